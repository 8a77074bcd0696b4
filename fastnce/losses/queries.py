"""The losses of queries that meet keys: info_nce, clip_loss, moco_loss."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fastnce import arguments, dense_small, fused, hints, relations, statistics
from fastnce.formulas import Reduction, l_out, reduced
from fastnce.negatives import Negatives, Ragged, one_positive
from fastnce.pairs import Pairs
from fastnce.problem import Problem
from fastnce.queue import NegativeQueue
from fastnce.wide import shared as shared_uses


@arguments.without_return_stats
def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | Ragged | None = None,
    temperature: float | Tensor | None = None,
    reduction: Reduction = "mean",
    negative_mode: Literal["unpaired", "paired"] = "unpaired",
    *,
    scale: float | Tensor | None = None,
    normalize: bool = True,
    weight: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    exclude_query_ids: Tensor | None = None,
    exclude_key_ids: Tensor | None = None,
    in_batch: bool | None = None,
    symmetric: bool = False,
    backend: str = "auto",
) -> Tensor:
    """InfoNCE: every query has to find its own key among all the keys it meets.

        mean over i of -log(exp(s_ii) / sum_j exp(s_ij))        s_ij = cos(query_i, key_j) / temperature

    Args:
        query: (M, D) queries. Rows may have any length: they are normalised here unless normalize=False.
        positive_key: (N, D), N >= M. Row i is the positive of query i and, in-batch, a negative of every other query.
        negative_keys: further negatives. (K, D): the same ones for all queries. (M, K, D), with negative_mode="paired": K of its own for
            each query. (values (T, D), offsets (M + 1,)), ragged: query i has values[offsets[i]:offsets[i + 1]], and offsets rise from 0
            to T. Default: there are none, and the other rows of positive_key are the negatives.
        temperature: a float or a one-element tensor, which gets its gradient. Default: 0.1.
        reduction: "mean" (with weights: sum(weight * value) / sum(weight)), "sum", or "none" for the values of the queries.
        negative_mode: how a tensor of negative_keys is laid out, "unpaired" (K, D) or "paired" (M, K, D). A tuple is ragged either way.
        scale: 1 / temperature, instead of temperature.
        normalize: False takes dot products of the rows as they are, instead of cosines.
        weight: (M,) floating-point weights of the queries. Default: all equal.
        query_ids, key_ids: integers, (M,) and one for each key met. Keys with the query's id are positives too; the value of the query is
            then the mean over its positives (SupCon's L_out).
        exclude_query_ids, exclude_key_ids: integers, (M,) and one for each key met. Keys with the query's id are left out (other copies of
            the same document).
        in_batch: whether rows of positive_key are negatives of other queries. Default: where there are no negative_keys. With True,
            negative_keys may also be empty (keys[:0], values (0, D)).
        symmetric: the mean of query -> key and key -> query, as CLIP. M = N, and no negative_keys.
        backend: "auto", or by name "torch" (any device), "cpu" (the C++ library), "triton", "cuda" (NVIDIA GPUs), "reference" (dense).

    Keys met are the in-batch keys, then the unpaired negatives; paired and ragged negatives have no ids. Where there is one key for each
    query, ids of one side serve both. A negative id matches nothing. Row i of positive_key is a positive of query i whatever the ids are.
    For all other pairs, equal exclude ids win over equal query_ids and key_ids.

    Returns:
        A 0-dim float32 tensor (float64 for float64 features) in nats; with reduction="none", (M,). It is the log of the number of keys met
        where all rows are equal, and 0 for a query that meets its own key alone. Memory is O((M + N) D), never O(M N).

    Raises:
        ValueError: shapes or options that do not fit together, fewer keys than queries, temperature and scale at once.
        TypeError, RuntimeError, NotImplementedError: as docs/numerics.md lists; each message says what to write instead.

    Example:
        >>> z = torch.eye(4)
        >>> fastnce.info_nce(z, z, temperature=1.0)  # log(e + 3) - 1
        tensor(0.7437)

    van den Oord et al. 2018 (arXiv:1807.03748), eq. 4. Arguments are in the order of info-nce-pytorch.
    """
    where = "info_nce"
    arguments.features(where, query=query, positive_key=positive_key)
    rows, in_batch_keys = query.shape[0], positive_key.shape[0]
    arguments.reduction(where, reduction, rows)
    arguments.options(where, negative_mode=negative_mode, normalize=normalize, in_batch=in_batch, symmetric=symmetric)
    statistics.check_backend(where, backend)
    negatives = Negatives.of(where, negative_keys, negative_mode, query, may_be_none=in_batch is True)
    if negatives is None:
        query, positive_key = arguments.one_dtype(where, query=query, positive_key=positive_key)
    else:
        features = {"query": query, "positive_key": positive_key, negatives.name: negatives.keys}
        query, positive_key, keys = arguments.one_dtype(where, **features)
        negatives = negatives._replace(keys=keys)
        arguments.values(where, normalize, **{negatives.name: keys})
    arguments.values(where, normalize, query=query, positive_key=positive_key)
    use_batch = negatives is None if in_batch is None else in_batch
    none = negatives.keys if use_batch and negatives is not None and negatives.keys.numel() == 0 else None
    if none is not None:
        negatives = None
    if negatives is None and not use_batch:
        raise ValueError(f"{where}: in_batch=False needs negative_keys: there would be nothing to compare with")
    if in_batch_keys < rows or (in_batch_keys != rows and not use_batch):
        few = in_batch_keys < rows
        remedy = "so each query needs one" if few else f"and the others are no negatives: positive_key[:{rows}], or in_batch=True"
        raise ValueError(
            f"{where}: query is {tuple(query.shape)} and positive_key is {tuple(positive_key.shape)}; "
            f"row i of positive_key is the positive of query i, {remedy}"
        )
    if symmetric and (in_batch_keys != rows or negatives is not None):
        given = f"got {rows} queries, {in_batch_keys} keys and {'no ' if negatives is None else ''}negative_keys"
        raise ValueError(f"{where}: symmetric=True needs as many keys as queries and no negative_keys, {given}")
    hints.temperature(where, temperature, scale, normalize)
    weight = arguments.weights(where, weight, rows, query)
    # The loss has one part, against positive_key, or a second one against negative_keys.
    wide = shared_uses(query, positive_key, *(() if negatives is None else (query, negatives.keys)))
    first, second = wide[:2], wide[2:]

    shared = negatives.keys if negatives is not None and negatives.kind == "unpaired" else None
    paired = shared is None and rows == in_batch_keys
    met = (in_batch_keys if use_batch else 0) + (0 if shared is None else shared.shape[0])
    if not use_batch and shared is None and any(v is not None for v in (query_ids, key_ids, exclude_query_ids, exclude_key_ids)):
        raise ValueError(
            f"{where}: ids relate queries to in-batch or unpaired keys, and there are none here; in_batch=True adds the former"
        )
    of = ("query", "positive_key" if shared is None else "positive_key + negative_keys" if use_batch else "negative_keys")
    names, excluding = ("query_ids", "key_ids"), ("exclude_query_ids", "exclude_key_ids")
    label = relations.id_pair(where, names, (query_ids, key_ids), of, query, (rows, met), paired)
    exclude = relations.id_pair(where, excluding, (exclude_query_ids, exclude_key_ids), of, query, (rows, met), paired)
    hints.negative_ids(where, (*names, *excluding), (query_ids, key_ids, exclude_query_ids, exclude_key_ids))
    if use_batch and label[1] is not None:
        hints.partners(where, names, label[0], label[1][:rows])

    one: Tensor | None = None
    once = negatives is None or (negatives.keys is not positive_key and negatives.keys is not query)
    if none is None and query is not positive_key and once and fused.serves(backend, query):
        ask = None
        if use_batch and negatives is None:
            rules = Pairs(False, 0, *label, *exclude)
            ask = fused.ask(
                where, query, positive_key, rules, temperature, scale, normalize, "out", reduction, weight=weight, two_sided=symmetric
            )
        elif not use_batch and shared is not None and label[0] is None:
            rules = Pairs(False, None, None, None, *exclude)
            ask = fused.ask(
                where, query, shared, rules, temperature, scale, normalize, "out", reduction, partners=positive_key, weight=weight
            )
        one = None if ask is None else fused.loss(where, ask, backend)
        if fused.enough(one):
            return one
    scale = arguments.scale_of(where, temperature, scale, query)

    def part(ids: Tensor | None, keys: slice) -> Tensor | None:
        return None if ids is None else ids[keys]

    def problem(k: Tensor, keys: slice, offset: int | None) -> Problem:
        pairs = Pairs(False, offset, label[0], part(label[1], keys), exclude[0], part(exclude[1], keys))
        q_wide, k_wide = first if offset == 0 else second
        return Problem(query, k, scale, None, pairs, symmetric, normalize, q_wide=q_wide, k_wide=k_wide)

    def with_none(loss: Tensor) -> Tensor:
        """The loss, from which an empty tensor of negatives gets its gradient, also empty."""
        return loss if none is None else loss + none.sum(dtype=loss.dtype)

    before = in_batch_keys if use_batch else 0
    if use_batch:
        in_batch_problem = problem(positive_key, slice(0, before), 0)
        if negatives is None and (loss := dense_small.mean_cross_entropy(in_batch_problem, backend, reduction, weight)) is not None:
            return with_none(loss)
        found = statistics.compute(where, in_batch_problem, backend)
    else:
        found = one_positive(query, positive_key, first, scale, normalize)
    if shared is not None:
        found = statistics.merge(found, statistics.compute(where, problem(shared, slice(before, met), None), backend))
    elif negatives is not None:
        found = statistics.merge(found, negatives.statistics(query, second, scale, normalize))
    values = l_out(found, label[0] is None)
    if symmetric:
        assert found.columns is not None
        values = (values + l_out(found.columns, label[0] is None)) / 2
    hints.something_to_learn(where, found.lse_neg, found.n_pos)
    return with_none(reduced(values, weight, reduction, query)) if one is None else one


@arguments.without_return_stats
def clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    reduction: Reduction = "mean",
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    exclude_image_ids: Tensor | None = None,
    exclude_text_ids: Tensor | None = None,
    aligned: bool | None = None,
    normalize: bool = True,
    weight: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """CLIP: every image has to find its text among all texts, and every text its image among all images.

        mean over i of (log sum_j exp s_ij + log sum_j exp s_ji) / 2 - s_ii        s_ij = logit_scale * cos(image_i, text_j) + logit_bias

    Both directions come from one pass over the logits.

    Args:
        image: (N, D) features of images; (M, D) where ids say what belongs together.
        text: (N, D) features of texts: row i belongs to row i of image, unless aligned=False.
        logit_scale: 1 / temperature, a float or a one-element tensor, which gets its gradient. It is exp of CLIP's parameter, as open_clip
            passes it.
        logit_bias: a float or a one-element tensor, added to every logit; it cancels in this loss. Default: none.
        reduction: "mean" (with weights: sum(weight * value) / sum(weight)), "sum", or "none" for the values of the pairs.
        image_ids, text_ids: integers (M,), (N,). Equal ids make a positive; the value is then SupCon's L_out in both directions. Copies of
            an image stay in the sum.
        exclude_image_ids, exclude_text_ids: integers (M,), (N,). Equal ids leave a pair out in both directions, but not the pair of row i
            and row i.
        aligned: whether row i belongs to row i beside what image_ids and text_ids say. Default: where there are as many images as texts,
            and ids must then agree on each row. False: by ids alone, of both sides (shuffled texts).
        normalize: False takes dot products of the rows as they are, instead of cosines.
        weight: (N,) floating-point weights of the pairs. Default: all equal.
        backend: "auto", or by name "torch" (any device), "cpu" (the C++ library), "triton", "cuda" (NVIDIA GPUs), "reference" (dense).

    Where rows are aligned, ids of one side serve both. A negative id matches nothing. Exclude ids win over equal image_ids and text_ids.
    Image_ids make positives, exclude_image_ids drop false negatives. So an image with several captions is written in one of two ways:

        clip_loss(image[i], text, scale, exclude_image_ids=i)      image i[n] is copied for caption n: its other captions are left out
        clip_loss(image, text, scale, image_ids=ids, text_ids=i)   M images, N captions: all captions of an image are its positives

    Returns:
        A 0-dim float32 tensor (float64 for float64 features) in nats; with reduction="none", (N,). It is log N where all rows are equal.
        With positives by ids alone it is the mean of the two directions' means (or sums). Memory is O((M + N) D).

    Raises:
        ValueError: other numbers of images and texts without ids, ids that deny that row i belongs to row i, a scale that is not positive.
        TypeError, RuntimeError, NotImplementedError: as docs/numerics.md lists; each message says what to write instead.

    Example:
        >>> fastnce.clip_loss(torch.eye(4), torch.eye(4), 1.0)  # log(e + 3) - 1 in both directions
        tensor(0.7437)

    Radford et al. 2021 (arXiv:2103.00020), figure 3.
    """
    where = "clip_loss"
    arguments.features(where, image=image, text=text)
    image, text = arguments.one_dtype(where, image=image, text=text)
    arguments.values(where, normalize, image=image, text=text)
    rows, columns = image.shape[0], text.shape[0]
    arguments.some_keys(where, "text", text, rows)
    arguments.some_keys(where, "image", image, columns)
    arguments.reduction(where, reduction, min(rows, columns))
    arguments.options(where, normalize=normalize)
    arguments.choice(where, "aligned", aligned, (None, True, False))
    paired = rows == columns if aligned is None else aligned
    names, excluding, of = ("image_ids", "text_ids"), ("exclude_image_ids", "exclude_text_ids"), ("image", "text")
    label = relations.id_pair(where, names, (image_ids, text_ids), of, image, (rows, columns), paired)
    exclude = relations.id_pair(where, excluding, (exclude_image_ids, exclude_text_ids), of, image, (rows, columns), paired)
    relations.alignment(where, image, text, aligned, label, exclude[0] is not None, reduction == "none" or weight is not None)
    hints.negative_ids(where, (*names, *excluding), (image_ids, text_ids, exclude_image_ids, exclude_text_ids))
    weight = arguments.weights(where, weight, rows, image)
    bias = None if logit_bias is None else arguments.scalar(where, "logit_bias", logit_bias, image, positive=False)
    hints.logit_scale(where, logit_scale, normalize)
    pairs = Pairs(False, 0 if paired else None, *label, *exclude)
    q_wide, k_wide = shared_uses(image, text)
    one: Tensor | None = None
    if q_wide is None and (paired or weight is None) and fused.serves(backend, image):
        ask = fused.ask(
            where,
            image,
            text,
            pairs,
            None,
            logit_scale,
            normalize,
            "out",
            reduction,
            called="logit_scale",
            weight=weight,
            bias=bias,
            two_sided=True,
        )
        one = fused.loss(where, ask, backend)
        if fused.enough(one):
            return one
    scale = arguments.scalar(where, "logit_scale", logit_scale, image)
    problem = Problem(image, text, scale, bias, pairs, True, normalize, q_wide=q_wide, k_wide=k_wide)
    if (loss := dense_small.mean_cross_entropy(problem, backend, reduction, weight)) is not None:
        return loss
    found = statistics.compute(where, problem, backend)
    assert found.columns is not None
    hints.something_to_learn(where, found.lse_neg, found.n_pos)
    for kind, side, other in (("images", found, "text"), ("texts", found.columns, "image")):
        hints.without_positive(where, side.n_pos, kind, f" and count 0: no {other} has their id")
    if one is not None:
        return one
    by_row, by_column = l_out(found, label[0] is None), l_out(found.columns, label[0] is None)
    if paired:
        return reduced((by_row + by_column) / 2, weight, reduction, image)
    return (reduced(by_row, None, reduction, image) + reduced(by_column, None, reduction, image)) / 2


@arguments.without_return_stats
def moco_loss(
    q: Tensor,
    k: Tensor,
    queue: Tensor | NegativeQueue,
    temperature: float | Tensor | None = None,
    reduction: Reduction = "mean",
    *,
    scale: float | Tensor | None = None,
    normalize: bool = True,
    weight: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """MoCo: every query has to find its own key among a queue of keys of earlier batches.

        mean over i of -log(exp(s_ii) / (exp(s_ii) + sum_j exp(t_ij)))        s_ii = cos(q_i, k_i) / temperature
                                                                              t_ij = cos(q_i, queue_j) / temperature

    Args:
        q: (N, D) queries.
        k: (N, D) keys of the momentum encoder: row i is the positive of query i. Pass them detached, as MoCo does; they get a gradient if
            they ask for one.
        queue: (K, D) negatives of every query, a tensor or a NegativeQueue. It is read in place, without a copy: call enqueue after
            backward, or backward raises.
        temperature: a float or a one-element tensor, which gets its gradient. Default: 0.07.
        reduction: "mean" (with weights: sum(weight * value) / sum(weight)), "sum", or "none" for the values of the queries.
        scale: 1 / temperature, instead of temperature.
        normalize: False takes dot products of the rows as they are, instead of cosines.
        weight: (N,) floating-point weights of the queries. Default: all equal.
        backend: "auto", or by name "torch" (any device), "cpu" (the C++ library), "triton", "cuda" (NVIDIA GPUs), "reference" (dense).

    Returns:
        A 0-dim float32 tensor (float64 for float64 features) in nats; with reduction="none", (N,). It is log(K + 1) where all rows are
        equal. Memory is O((N + K) D).

    Raises:
        ValueError: q and k of different shapes, a queue without keys, temperature and scale at once.
        TypeError, RuntimeError, NotImplementedError: as docs/numerics.md lists; each message says what to write instead.

    Example:
        >>> fastnce.moco_loss(torch.eye(2, 3), torch.eye(2, 3), torch.eye(3)[2:], temperature=1.0)  # softplus(-1)
        tensor(0.3133)

    He et al. 2020 (arXiv:1911.05722), eq. 1.
    """
    where = "moco_loss"
    negatives = queue.keys if isinstance(queue, NegativeQueue) else queue
    arguments.features(where, q=q, k=k, queue=negatives)
    q, k, negatives = arguments.one_dtype(where, q=q, k=k, queue=negatives)
    arguments.values(where, normalize, q=q, k=k, queue=negatives)
    if q.shape != k.shape:
        raise ValueError(f"{where}: q is {tuple(q.shape)} and k is {tuple(k.shape)}; row i of k is the positive of row i of q")
    arguments.some_keys(where, "queue", negatives, q.shape[0])
    arguments.reduction(where, reduction, q.shape[0])
    arguments.options(where, normalize=normalize)
    weight = arguments.weights(where, weight, q.shape[0], q)
    hints.temperature(where, temperature, scale, normalize)
    one: Tensor | None = None
    if q is not k and q is not negatives and k is not negatives and fused.serves(backend, q):
        ask = fused.ask(where, q, negatives, Pairs(), temperature, scale, normalize, "out", reduction, partners=k, weight=weight)
        one = fused.loss(where, ask, backend)
        if fused.enough(one):
            return one
    scale = arguments.scale_of(where, temperature, scale, q)
    *own, q_wide, k_wide = shared_uses(q, k, q, negatives)
    problem = Problem(q, negatives, scale, None, Pairs(), False, normalize, q_wide=q_wide, k_wide=k_wide)
    found = statistics.merge(one_positive(q, k, own, scale, normalize), statistics.compute(where, problem, backend))
    hints.something_to_learn(where, found.lse_neg, found.n_pos)
    return reduced(l_out(found, one_positive=True), weight, reduction, q) if one is None else one
