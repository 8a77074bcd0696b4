"""What debug mode says about a whole call: an error where nothing can be learned or compared, a warning about legal input that looks like a
mistake. Values are read only here, in `checks`, and where reading them is free."""

from __future__ import annotations

import numbers
import sys
import warnings

import torch
from torch import Tensor

from fastnce import arguments, relations

# With unit rows logits span 2 * scale nats: below a scale of 0.2 the loss is that of rows which are all equal, within 0.4 nats.
_FLAT = 0.2
# CLIP starts at 1 / 0.07 and ends at 100; the logarithms of these, which it learns, are 2.66 and 4.61.
_LOGARITHM = 5.0


class _Hint(str):
    """A warning's text. Those of one kind are equal, whatever their numbers: Python then shows one of them for each line of the caller."""

    kind: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hint) and self.kind == other.kind

    def __hash__(self) -> int:
        return hash(self.kind)


def _warn(where: str, kind: str, text: str) -> None:
    """A UserWarning at the line that called the package, also through a module or a function of torch."""
    hint = _Hint(f"{where}: {text}")
    hint.kind = f"{where} {kind}"
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("fastnce", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(hint, UserWarning, stacklevel=level)


def temperature(where: str, temperature: object, scale: object, normalize: bool) -> None:
    """A temperature that looks like a scale, or the other way round. Rows that are not normalised have logits of any size."""
    name, given = ("temperature", temperature) if scale is None else ("scale", scale)
    number = _number(given) if normalize and arguments.debugging() else None
    if number is None or not 0 < number < torch.inf:
        return
    if scale is None and number > 1 / _FLAT:
        _warn(where, name, f"temperature is {number:g}, which looks like a scale; scale = 1 / temperature: give scale={number:g}")
    elif scale is not None and number < _FLAT:
        _warn(where, name, f"scale is {number:g}, which looks like a temperature; scale = 1 / temperature: give scale=1 / {number:g}")


def logit_scale(where: str, given: object, normalize: bool) -> None:
    """CLIP learns the logarithm of its scale, and the loss takes the scale itself."""
    number = _number(given) if normalize and arguments.debugging() else None
    if number is not None and 0 < number < _LOGARITHM:
        _warn(
            where,
            "logit_scale",
            f"logit_scale is {number:g}, which looks like its logarithm, or like a temperature; CLIP's is 14 to 100: "
            "give logit_scale.exp(), or 1 / temperature",
        )


def _number(given: object) -> float | None:
    """The value of a Python number or of a one-element tensor, where it may be read."""
    if isinstance(given, Tensor):
        return float(given.detach()) if given.numel() == 1 and arguments.debugging(given) else None
    return float(given) if isinstance(given, numbers.Real) else None


def negative_ids(where: str, names: tuple[str, ...], given: tuple[Tensor | None, ...]) -> None:
    """Ids below -1 look like hashes, whose sign means nothing; and ids that are all negative do nothing. `given` are the caller's own."""
    for name, ids in zip(names, given, strict=True):
        if ids is None or not arguments.debugging(ids) or ids.numel() == 0:
            continue
        ids = ids.to(torch.int64)  # where torch can compare
        count = int((ids < 0).sum())
        if count and (count == len(ids) or int(ids.min()) < -1):
            remedy = f"{name} & (2**63 - 1) makes ids of hashes; -1 says on purpose that a row has none"
            _warn(where, name, f"{count} of {len(ids)} {name} are negative, and a negative id matches nothing: {remedy}")


def views_second(where: str, features: Tensor) -> None:
    """Without labels nothing else tells (views, examples, columns) from (examples, views, columns)."""
    if arguments.debugging() and features.dim() == 3 and features.shape[0] < features.shape[1]:
        examples, views = features.shape[:2]
        _warn(
            where,
            "views",
            f"features is {tuple(features.shape)}, which is {examples} examples of {views} views each; views come second: "
            f"features.transpose(0, 1), if it is {views} examples",
        )


def partners(where: str, names: tuple[str, str], a: Tensor | None, b: Tensor | None) -> None:
    """Ids that say of a query and its own key that they do not belong together, while they are positives by their place."""
    if a is not None and b is not None and arguments.debugging(a, b):
        row = relations.disagreement(a, b)
        if row is not None:
            _warn(where, "partners", f"{names[0]} and {names[1]} differ at row {row}, whose query and key are positives by their place")


def without_positive(where: str, n_pos: Tensor, rows: str, then: str) -> None:
    """Rows without a positive, of a batch of several: how many, and what becomes of them."""
    if arguments.debugging(n_pos) and n_pos.numel() > 1:
        count = int((n_pos == 0).sum())
        if count:
            _warn(where, rows, f"{count} of {n_pos.numel()} {rows} have no positive{then}")


def anchors(where: str, n_pos: Tensor, views: int, masked: bool, skipped: bool) -> None:
    """Anchors of sup_con without a positive. Where there are several views, they have lost even their own others."""
    if views == 1 and skipped:  # that is how the caller deals with them
        return
    then = " and are left out" if skipped else " and count 0"
    if views > 1 and masked:
        then += ": where the diagonal of mask is False, not even the example's other views are positives; mask.fill_diagonal_(True)"
    elif views > 1:
        then += ": with a negative label, not even the example's other views are positives; unlabelled='own_views' keeps those"
    else:
        then += "; no_positive='skip' leaves them out of the mean"
    without_positive(where, n_pos, "anchors", then)


def something_to_learn(where: str, lse_neg: Tensor, n_pos: Tensor) -> None:
    """Debug mode only: in a batch of several rows, one at least must have a positive and something beside it."""
    if arguments.debugging(lse_neg) and lse_neg.numel() > 1 and not bool(((n_pos > 0) & ((lse_neg > -torch.inf) | (n_pos > 1))).any()):
        raise ValueError(
            f"{where}: no row has both a positive and another candidate: the ids, labels or mask leave a loss of 0 that trains nothing"
        )


def something_to_compare(where: str, lse_neg: Tensor, n_pos: Tensor) -> None:
    """Debug mode only: one row at least must have a candidate."""
    if arguments.debugging(lse_neg) and lse_neg.numel() > 1 and not bool(((n_pos > 0) | (lse_neg > -torch.inf)).any()):
        raise ValueError(f"{where}: no row has any candidate: the ids, labels or mask exclude every pair")
