"""The losses: check the input, say which pairs are what, ask for the statistics, apply a formula, reduce."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastnce import arguments, dense_small, hints, relations, statistics
from fastnce.formulas import Reduction, decoupled, l_in, l_out, reduced
from fastnce.negatives import Negatives, Ragged, one_positive
from fastnce.pairs import Pairs
from fastnce.problem import Problem
from fastnce.queue import NegativeQueue
from fastnce.views import two_views
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
    """InfoNCE: mean over i of -log(exp(s_ii) / sum_j exp(s_ij)),  s_ij = cos(query_i, key_j) / temperature.

    query          (M, D) anchors, any scale: rows are normalised here unless normalize=False
    positive_key   (N, D), N >= M: row i is the positive of query i and, in-batch, a negative of every other query
    negative_keys  None: the other rows of positive_key (in-batch); (K, D): shared by all queries ("unpaired");
                   (M, K, D): K of its own for each query (negative_mode="paired");
                   (values (T, D), offsets (M + 1,)): query i has values[offsets[i]:offsets[i + 1]] (ragged; offsets rise from 0 to T)
    temperature    float or one-element tensor, or give scale = 1 / temperature instead; differentiable. Without either: 0.1
    reduction      "none": (M,); "mean" (weighted by weight); "sum"
    weight         (M,) weight of each query
    query_ids, key_ids                   integers: keys with the query's id are positives too, and the row's value is the mean over its
                                         positives (SupCon's L_out)
    exclude_query_ids, exclude_key_ids   integers: keys with the query's id are no negatives (copies of the same document); its own
                                         positive_key row is kept. Key ids are one per key met: in-batch keys, then unpaired negatives.
                                         Negative ids match nothing. Row i of positive_key is a positive whatever the ids are
    in_batch       None: only without negative_keys; True: in-batch negatives and negative_keys, of which there may be none (keys[:0],
                   values (0, D)); False: negative_keys only
    symmetric      mean of query -> key and key -> query (M = N, no negative_keys), as CLIP
    backend        "auto"; or by name "torch" (any device), "cpu" (the C++ library), "triton", "cuda" (NVIDIA GPUs), "reference" (dense)

    Returns a 0-dim float32 tensor (float64 for float64 input) in nats: log(M) when all embeddings are equal, 0 for a batch of one.
    Memory is O((M + N) D), never O(M N). Raises ValueError / TypeError / RuntimeError as in docs/numerics.md.
    van den Oord et al. 2018 (arXiv:1807.03748), eq. 4; argument order of info-nce-pytorch.

    >>> z = torch.eye(4)
    >>> info_nce(z, z, temperature=1.0)  # log(e + 3) - 1
    tensor(0.7437)
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
    scale = arguments.scale_of(where, temperature, scale, query)
    weight = arguments.weights(where, weight, rows, query)
    # A loss of one part, against positive_key, or of two.
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

    def part(ids: Tensor | None, keys: slice) -> Tensor | None:
        return None if ids is None else ids[keys]

    def problem(k: Tensor, keys: slice, offset: int | None) -> Problem:
        pairs = Pairs(False, offset, label[0], part(label[1], keys), exclude[0], part(exclude[1], keys))
        q_wide, k_wide = first if offset == 0 else second
        return Problem(query, k, scale, None, pairs, symmetric, normalize, q_wide=q_wide, k_wide=k_wide)

    def with_none(loss: Tensor) -> Tensor:
        """The loss; it depends on negatives that are none with a gradient of their shape."""
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
    return with_none(reduced(values, weight, reduction, query))


@arguments.without_return_stats
def nt_xent(
    z0: Tensor,
    z1: Tensor | None = None,
    temperature: float | Tensor | None = None,
    reduction: Reduction = "mean",
    *,
    scale: float | Tensor | None = None,
    normalize: bool = True,
    weight: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """NT-Xent of SimCLR: with z = [z0; z1], mean over the 2B rows i of log(sum_{j != i} exp(s_ij)) - s_ip,  s = cos / temperature.

    z0, z1        (B, D) two views; row i of one is the positive of row i of the other. Or z0 (2B, D) = [view 0; view 1] alone
    temperature   float or one-element tensor, or give scale = 1 / temperature instead; differentiable. Without either: 0.5
    weight        (2B,) per anchor, or (B,) per example
    Others as in info_nce. Returns a 0-dim float32 (float64) tensor in nats; reduction="none": (2B,), rows of z0 first.
    Half of the logits are computed once: cos is symmetric. Memory O(B D). Google's SimCLR code reports twice this value.
    Chen et al. 2020 (arXiv:2002.05709), eq. 1.

    >>> nt_xent(torch.eye(4), temperature=1.0)  # three candidates at similarity 0
    tensor(1.0986)
    """
    where = "nt_xent"
    problem, weight = two_views(where, z0, z1, temperature, scale, normalize, reduction, weight)
    if (loss := dense_small.mean_cross_entropy(problem, backend, reduction, weight)) is not None:
        return loss
    found = statistics.compute(where, problem, backend)
    hints.something_to_learn(where, found.lse_neg, found.n_pos)
    return reduced(l_out(found, one_positive=True), weight, reduction, problem.q)


@arguments.without_return_stats
def dcl_loss(
    z0: Tensor,
    z1: Tensor | None = None,
    temperature: float | Tensor | None = None,
    reduction: Reduction = "mean",
    *,
    scale: float | Tensor | None = None,
    normalize: bool = True,
    weight: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """DCL, NT-Xent whose denominator leaves out the positive: mean over i of log(sum_{j != i, p} exp(s_ij)) - s_ip, p the other view of i.

    z0, z1        (B, D) two views, or z0 (2B, D) alone, as in nt_xent; weight too
    temperature   as in info_nce. Without it and scale: 0.1
    Others as in info_nce. Returns a 0-dim float32 (float64) tensor in nats, below 0 where the positive outweighs all negatives;
    reduction="none": (2B,), rows of z0 first. A batch of one example has no negatives: 0, without gradient.
    Yeh et al. 2021 (arXiv:2110.06848), eq. 6, without weights of positives.

    >>> dcl_loss(torch.eye(4), temperature=1.0)  # two negatives at similarity 0, as the positive
    tensor(0.6931)
    """
    where = "dcl_loss"
    problem, weight = two_views(where, z0, z1, temperature, scale, normalize, reduction, weight)
    found = statistics.compute(where, problem, backend)
    hints.something_to_learn(where, found.lse_neg, found.n_pos)
    return reduced(decoupled(found), weight, reduction, problem.q)


@arguments.without_return_stats
def sup_con(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor | None = None,
    variant: Literal["out", "in"] = "out",
    views: Literal["all", "one"] = "all",
    reduction: Reduction = "mean",
    *,
    no_positive: Literal["zero", "skip", "error"] = "zero",
    unlabelled: Literal["alone", "own_views"] = "alone",
    scale: float | Tensor | None = None,
    normalize: bool = True,
    weight: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Supervised contrastive loss. Per anchor i, over the candidates C_i (all rows but i) and its positives P_i (same label):

        variant="out": log sum_{C_i} exp s - mean_{P_i} s        "in": log sum_{C_i} exp s - log sum_{P_i} exp s + log |P_i|

    features      (B, V, D): V views of B examples, or (N, D): one view; s = cos / temperature
    labels        integers (B,) or (N,): equal labels are positives, and a negative label is none
    mask          bool (B, B) or (N, N) instead of labels: mask[i, j] makes example j a positive of example i; mask[i, i] its own other
                  views. Without both, the other views of the same example are its positives (SimCLR): there must be some
    unlabelled    an example with a negative label: "alone": nothing is its positive, not even its other views;
                  "own_views": those are, as without labels. It is a negative of all others either way
    views         "all": every view of every example is an anchor; "one": only view 0 is
    no_positive   an anchor without positives "zero": counts as 0 in the mean (SupContrast); "skip": leaves it (PML);
                  "error": ValueError, at the price of reading one value back from the device
    temperature   as in info_nce. Without it and scale: 0.1
    weight        one per anchor, in the order of reduction="none": (V * B,) view by view, or (B,) per example
    Others as in info_nce. Returns a 0-dim float32 (float64) tensor in nats. SupContrast's value is temperature / base_temperature times it.
    Khosla et al. 2020 (arXiv:2004.11362), eq. 2 and 3.

    >>> sup_con(torch.eye(4), torch.tensor([0, 0, 1, 1]), temperature=1.0)
    tensor(1.0986)
    """
    where = "sup_con"
    arguments.features(where, (2, 3), features=features)
    arguments.values(where, normalize, features=features)
    examples, n_views = features.shape[0], features.shape[1] if features.dim() == 3 else 1
    if n_views == 0:
        raise ValueError(f"{where}: features is {tuple(features.shape)}; it needs at least one view")
    words = {"variant": variant, "views": views, "no_positive": no_positive, "unlabelled": unlabelled}
    arguments.options(where, **words, normalize=normalize)
    if labels is not None and mask is not None:
        raise ValueError(f"{where}: Cannot define both `labels` and `mask`")
    if mask is not None and unlabelled == "own_views":
        raise ValueError(f"{where}: unlabelled='own_views' is about labels, and there is a mask: mask.fill_diagonal_(True) says the same")
    anchors = examples * (1 if views == "one" else n_views)
    arguments.reduction(where, reduction, anchors)
    labels = relations.labels(where, labels, features)
    mask = relations.mask(where, "mask", mask, features, (examples, examples))
    relations.some_positive(where, features, labels, mask)
    # Row v * B + b of z is view v of example b.
    z = features if features.dim() == 2 else features.transpose(0, 1).reshape(n_views * examples, features.shape[-1])
    if weight is not None and isinstance(weight, Tensor) and weight.shape == (examples,):
        weight = weight.repeat(anchors // max(examples, 1))
    weight = arguments.weights(where, weight, anchors, features, examples)
    hints.temperature(where, temperature, scale, normalize)
    scale = arguments.scale_of(where, temperature, scale, features)
    if labels is None and mask is None:
        hints.views_second(where, features)
        labels = torch.arange(examples, device=features.device)
    elif labels is not None and unlabelled == "own_views":
        labels = relations.with_own_labels(labels)
    else:
        hints.negative_ids(where, ("labels",), (labels,))
    pairs = Pairs(exclude_self=True, q_label=None if labels is None else labels.repeat(n_views), mask=mask)
    if views == "one" and n_views > 1:
        label = pairs.q_label
        pairs = pairs._replace(q_label=None if label is None else label[:examples], k_label=label)
        q_wide, k_wide = shared_uses(z, z)
        q_wide = None if q_wide is None else q_wide[:examples]
        problem = Problem(z[:examples], z, scale, None, pairs, False, normalize, q_wide=q_wide, k_wide=k_wide)
    else:
        problem = Problem(z, None, scale, None, pairs, False, normalize)
    found = statistics.compute(where, problem, backend)
    some = found.n_pos > 0
    if no_positive == "error" and not bool(some.all()):
        first = int((~some).nonzero()[0])
        raise ValueError(f"{where}: anchor {first} has no positive; give it one, or use no_positive='zero' or 'skip'")
    values = l_out(found) if variant == "out" else l_in(found)
    if no_positive == "skip":
        counted = some.to(values.dtype)
        weight = counted if weight is None else weight * counted
    hints.something_to_learn(where, found.lse_neg, found.n_pos)
    hints.anchors(where, found.n_pos, n_views, mask is not None, no_positive == "skip")
    return reduced(values, weight, reduction, z)


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
    """CLIP's symmetric loss: mean over i of (log sum_j exp s_ij + log sum_j exp s_ji) / 2 - s_ii,  s = logit_scale * cos + logit_bias.

    image, text            (N, D) each: row i of one belongs to row i of the other. With image_ids and text_ids the numbers of rows may
                           differ, (M, D) and (N, D)
    logit_scale            1 / temperature (exp of CLIP's parameter, as open_clip passes it), float or one-element tensor, differentiable
    logit_bias             added to every logit, float or one-element tensor; it cancels in this loss
    image_ids, text_ids    integers: equal ids belong together, as positives; the value is then L_out in both directions. Copies stay
                           among the candidates
    exclude_image_ids, exclude_text_ids   integers: pairs with equal ids are no negatives, in both directions; the pair of row i and row i
                           stays. For an image whose row is copied for each of its captions, and for texts that occur twice.
                           Ids of one side serve both where rows are aligned. A negative id matches nothing
    aligned                whether row i belongs to row i beside what image_ids and text_ids say. None: where there are as many images as
                           texts, and ids must then agree on each row; False: positives by ids alone, of both sides (shuffled texts)
    weight                 (N,) per pair

        clip_loss(image[i], text, scale, exclude_image_ids=i)      image i[n] of caption n is copied: its other captions are left out
        clip_loss(image, text, scale, image_ids=ids, text_ids=i)   M images, N captions: all captions of an image are its positives

    Both directions come from one pass over the logits. Others as in info_nce. Returns a 0-dim float32 (float64) tensor in nats;
    reduction="none": (N,). With M images and N texts: the mean (sum) of the two directions' means (sums).
    Radford et al. 2021 (arXiv:2103.00020), figure 3.

    >>> clip_loss(torch.eye(4), torch.eye(4), 1.0)
    tensor(0.7437)
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
    scale = arguments.scalar(where, "logit_scale", logit_scale, image)
    bias = None if logit_bias is None else arguments.scalar(where, "logit_bias", logit_bias, image, positive=False)
    hints.logit_scale(where, logit_scale, normalize)
    pairs = Pairs(False, 0 if paired else None, *label, *exclude)
    q_wide, k_wide = shared_uses(image, text)
    problem = Problem(image, text, scale, bias, pairs, True, normalize, q_wide=q_wide, k_wide=k_wide)
    if (loss := dense_small.mean_cross_entropy(problem, backend, reduction, weight)) is not None:
        return loss
    found = statistics.compute(where, problem, backend)
    assert found.columns is not None
    hints.something_to_learn(where, found.lse_neg, found.n_pos)
    for kind, side, other in (("images", found, "text"), ("texts", found.columns, "image")):
        hints.without_positive(where, side.n_pos, kind, f" and count 0: no {other} has their id")
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
    """MoCo: mean over i of -log(exp(s_ii) / (exp(s_ii) + sum_j exp(q_i . queue_j / temperature))),  s_ii = cos(q_i, k_i) / temperature.

    q        (N, D) queries
    k        (N, D) their positives from the momentum encoder; pass them detached, as MoCo does (they get a gradient if they ask for one)
    queue    (K, D) negatives of every query: a tensor, or a NegativeQueue. It is read in place: put the new keys in after backward
    Others as in info_nce; without temperature and scale the temperature is 0.07. Returns a 0-dim float32 (float64) tensor in nats.
    He et al. 2020 (arXiv:1911.05722), eq. 1.

    >>> moco_loss(torch.eye(2, 3), torch.eye(2, 3), torch.eye(3)[2:], temperature=1.0)  # softplus(-1)
    tensor(0.3133)
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
    scale = arguments.scale_of(where, temperature, scale, q)
    *own, q_wide, k_wide = shared_uses(q, k, q, negatives)
    problem = Problem(q, negatives, scale, None, Pairs(), False, normalize, q_wide=q_wide, k_wide=k_wide)
    found = statistics.merge(one_positive(q, k, own, scale, normalize), statistics.compute(where, problem, backend))
    hints.something_to_learn(where, found.lse_neg, found.n_pos)
    return reduced(l_out(found, one_positive=True), weight, reduction, q)
