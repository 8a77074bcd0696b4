"""The losses of rows that meet each other: nt_xent, dcl_loss, sup_con."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fastnce import arguments, dense_small, fused, hints, relations, statistics
from fastnce.formulas import Reduction, decoupled, l_in, l_out, reduced
from fastnce.pairs import Pairs
from fastnce.problem import Problem
from fastnce.statistics import ContrastiveStats
from fastnce.wide import shared as shared_uses


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
    """NT-Xent, the loss of SimCLR: every row has to find the other view of its example among all other rows.

        mean over the 2B rows i of z = [z0; z1] of  log(sum_{j != i} exp(s_ij)) - s_ip        s_ij = cos(z_i, z_j) / temperature

    p is the row of the other view of i. Half of the logits are computed, once each: cos is symmetric.

    Args:
        z0: (B, D) first view of B examples; or (2B, D), both views one after the other, without z1.
        z1: (B, D) second view: row i of one is the positive of row i of the other.
        temperature: a float or a one-element tensor, which gets its gradient. Default: 0.5.
        reduction: "mean" (with weights: sum(weight * value) / sum(weight)), "sum", or "none" for the values of the rows.
        scale: 1 / temperature, instead of temperature.
        normalize: False takes dot products of the rows as they are, instead of cosines.
        weight: floating-point weights, (2B,) one per row or (B,) one per example. Default: all equal.
        backend: "auto", or by name "torch" (any device), "cpu" (the C++ library), "triton", "cuda" (NVIDIA GPUs), "reference" (dense).

    Returns:
        A 0-dim float32 tensor (float64 for float64 features) in nats; with reduction="none", (2B,), rows of z0 first. It is log(2B - 1)
        where all rows are equal. Google's SimCLR code reports twice this value: it adds the means of the two views. Memory is O(B D).

    Raises:
        ValueError: views of different shapes, an odd number of rows without z1, temperature and scale at once.
        TypeError, RuntimeError, NotImplementedError: as docs/numerics.md lists; each message says what to write instead.

    Example:
        >>> fastnce.nt_xent(torch.eye(4), temperature=1.0)  # three keys at similarity 0
        tensor(1.0986)

    Chen et al. 2020 (arXiv:2002.05709), eq. 1.
    """
    where = "nt_xent"
    values = partial(l_out, one_positive=True)
    return _of_two_views(where, z0, z1, temperature, scale, normalize, reduction, weight, backend, "out", values)


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
    """DCL: NT-Xent whose denominator leaves the positive out, so that easy positives do not shrink the gradient.

        mean over the 2B rows i of z = [z0; z1] of  log(sum_{j != i, p} exp(s_ij)) - s_ip        s_ij = cos(z_i, z_j) / temperature

    p is the row of the other view of i.

    Args:
        z0: (B, D) first view of B examples; or (2B, D), both views one after the other, without z1.
        z1: (B, D) second view: row i of one is the positive of row i of the other.
        temperature: a float or a one-element tensor, which gets its gradient. Default: 0.1.
        reduction: "mean" (with weights: sum(weight * value) / sum(weight)), "sum", or "none" for the values of the rows.
        scale: 1 / temperature, instead of temperature.
        normalize: False takes dot products of the rows as they are, instead of cosines.
        weight: floating-point weights, (2B,) one per row or (B,) one per example. Default: all equal.
        backend: "auto", or by name "torch" (any device), "cpu" (the C++ library), "triton", "cuda" (NVIDIA GPUs), "reference" (dense).

    Returns:
        A 0-dim float32 tensor (float64 for float64 features) in nats; with reduction="none", (2B,), rows of z0 first. It is below 0 where
        the positive outweighs all negatives. A batch of one example has no negatives: 0, without gradient. Memory is O(B D).

    Raises:
        ValueError: views of different shapes, an odd number of rows without z1, temperature and scale at once.
        TypeError, RuntimeError, NotImplementedError: as docs/numerics.md lists; each message says what to write instead.

    Example:
        >>> fastnce.dcl_loss(torch.eye(4), temperature=1.0)  # two negatives at similarity 0, as the positive
        tensor(0.6931)

    Yeh et al. 2021 (arXiv:2110.06848), eq. 6, without weights of positives.
    """
    where = "dcl_loss"
    return _of_two_views(where, z0, z1, temperature, scale, normalize, reduction, weight, backend, "decoupled", decoupled)


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
    """SupCon: every anchor has to find the rows of its own label among all other rows.

        variant="out":  log sum_{C_i} exp s_ij - mean_{P_i} s_ip        s_ij = cos(z_i, z_j) / temperature
        variant="in":   log sum_{C_i} exp s_ij - log mean_{P_i} exp s_ip

    C_i are all rows but i, P_i those of them that are positives of i.

    Args:
        features: (B, V, D), V views of B examples, or (N, D), one view of each.
        labels: integers (B,) or (N,), one per example. Equal labels are positives; a negative label means that the example has none.
        mask: bool (B, B) or (N, N), instead of labels: mask[i, j] makes example j a positive of example i, and mask[i, i] the other views
            of example i. Default, without labels too: the other views of the same example are its positives, as in SimCLR.
        temperature: a float or a one-element tensor, which gets its gradient. Default: 0.1.
        variant: "out" (L_out: the mean over the positives outside of the logarithm) or "in" (L_in: inside).
        views: which rows are anchors, "all" or "one": only the first view of each example.
        reduction: "mean" (with weights: sum(weight * value) / sum(weight)), "sum", or "none" for the values of the anchors.
        no_positive: of an anchor without positives, "zero": it counts as 0 in the mean (as SupContrast); "skip": the mean leaves it out (as
            PyTorch Metric Learning); "error": ValueError, for which one value is read back from the device.
        unlabelled: of an example with a negative label, "alone": not even its other views are its positives; "own_views": those are. It is
            a negative of all other examples either way.
        scale: 1 / temperature, instead of temperature.
        normalize: False takes dot products of the rows as they are, instead of cosines.
        weight: floating-point weights, one per anchor in the order of reduction="none", or (B,) one per example. Default: all equal.
        backend: "auto", or by name "torch" (any device), "cpu" (the C++ library), "triton", "cuda" (NVIDIA GPUs), "reference" (dense).

    Returns:
        A 0-dim float32 tensor (float64 for float64 features) in nats; with reduction="none", one value per anchor: (V * B,) view by view,
        or (B,) with views="one". SupContrast's value is temperature / base_temperature times this one. Memory is O(V B D).

    Raises:
        ValueError: one view of each example without labels and mask, both of them at once, labels that do not fit the features, an anchor
            without positives where no_positive="error".
        TypeError, RuntimeError, NotImplementedError: as docs/numerics.md lists; each message says what to write instead.

    Example:
        >>> fastnce.sup_con(torch.eye(4), torch.tensor([0, 0, 1, 1]), temperature=1.0)  # three keys at similarity 0
        tensor(1.0986)

    Khosla et al. 2020 (arXiv:2004.11362), eq. 2 and 3.
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
    if weight is not None and isinstance(weight, Tensor) and weight.shape == (examples,):
        weight = weight.repeat(anchors // max(examples, 1))
    weight = arguments.weights(where, weight, anchors, features, examples)
    hints.temperature(where, temperature, scale, normalize)
    one: Tensor | None = None
    if mask is None and views == "all" and no_positive == "zero" and fused.serves(backend, features):
        own = relations.with_own_labels(labels) if labels is not None and unlabelled == "own_views" else labels
        rules = Pairs(exclude_self=True, q_label=own)
        ask = fused.ask(
            where, features, None, rules, temperature, scale, normalize, variant, reduction, weight=weight, by_place=own is None
        )
        one = fused.loss(where, ask, backend)
        if fused.enough(one):
            return one
    scale = arguments.scale_of(where, temperature, scale, features)
    if labels is None and mask is None:
        hints.views_second(where, features)
        labels = torch.arange(examples, device=features.device)
    elif labels is not None and unlabelled == "own_views":
        labels = relations.with_own_labels(labels)
    else:
        hints.negative_ids(where, ("labels",), (labels,))
    # Row v * B + b of z is view v of example b.
    z = features if features.dim() == 2 else features.transpose(0, 1).reshape(n_views * examples, features.shape[-1])
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
    return reduced(values, weight, reduction, z) if one is None else one


def _of_two_views(
    where: str,
    z0: Tensor,
    z1: Tensor | None,
    temperature: float | Tensor | None,
    scale: float | Tensor | None,
    normalize: bool,
    reduction: Reduction,
    weight: Tensor | None,
    backend: str,
    formula: str,
    values: Callable[[ContrastiveStats], Tensor],
) -> Tensor:
    """nt_xent and dcl_loss: every row of z = [z0; z1] against all others. formula, values: the same one, by name and here."""
    statistics.check_backend(where, backend)
    same = z0 is z1
    z0, z1 = _checked_views(where, z0, z1, normalize)
    rows = z0.shape[0] * (1 if z1 is None else 2)
    weight = _checked_weight(where, z0, rows, normalize, reduction, weight)
    hints.temperature(where, temperature, scale, normalize)
    pairs, one = Pairs(True, rows // 2), None
    if not same and fused.serves(backend, z0):
        # One operator takes the two views as they are.
        ask = fused.ask(where, z0, None, pairs, temperature, scale, normalize, formula, reduction, second=z1, weight=weight)
        one = fused.loss(where, ask, backend)
        if fused.enough(one):
            return one
    z, wide = z0, None
    if z1 is not None:
        z, (wide, other) = torch.cat([z0, z1]), shared_uses(z0, z1)
        wide = None if wide is None or other is None else torch.cat([wide, other])
    scale = arguments.scale_of(where, temperature, scale, z)
    problem = Problem(z, None, scale, None, pairs, False, normalize, q_wide=wide)
    if formula == "out" and (loss := dense_small.mean_cross_entropy(problem, backend, reduction, weight)) is not None:
        return loss
    found = statistics.compute(where, problem, backend)
    hints.something_to_learn(where, found.lse_neg, found.n_pos)
    return reduced(values(found), weight, reduction, z) if one is None else one


def _checked_views(where: str, z0: Tensor, z1: Tensor | None, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """The two views in one dtype; z1 is None where z0 holds both."""
    if z1 is None:
        arguments.features(where, z0=z0)
        if z0.shape[0] % 2:
            raise ValueError(f"{where}: z0 is {tuple(z0.shape)}; without z1 it holds two views, [view 0; view 1]: an even number of rows")
        arguments.values(where, normalize, z0=z0)
        return z0, None
    arguments.features(where, z0=z0, z1=z1)
    z0, z1 = arguments.one_dtype(where, z0=z0, z1=z1)
    if z0.shape != z1.shape:
        raise ValueError(f"{where}: z0 is {tuple(z0.shape)} and z1 is {tuple(z1.shape)}; two views have the same number of rows")
    arguments.values(where, normalize, z0=z0, z1=z1)
    return z0, z1


def _checked_weight(where: str, like: Tensor, rows: int, normalize: bool, reduction: str, weight: Tensor | None) -> Tensor | None:
    """The weights of the rows of both views, and what else is checked beside the views."""
    arguments.reduction(where, reduction, rows)
    arguments.options(where, normalize=normalize)
    if weight is not None and isinstance(weight, Tensor) and weight.shape == (rows // 2,) and rows:
        weight = torch.cat([weight, weight])
    return arguments.weights(where, weight, rows, like, rows // 2)
