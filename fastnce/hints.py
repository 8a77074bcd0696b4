"""Debug mode's findings about a whole call: an error where nothing can be learned or compared, a warning about legal input that looks like
a mistake. Apart from these, only arguments.py reads values, and code that runs where reading is free."""

from __future__ import annotations

import numbers
import sys
import warnings

import torch
from torch import Tensor

from fastnce import arguments, relations

# Logits of unit rows span 2 * scale nats. Below a scale of 0.2 the loss is within 0.4 nats of that of equal rows.
_FLAT = 0.2
# CLIP's scale starts at 1 / 0.07 and ends at 100. CLIP learns the logarithm, from 2.66 to 4.61.
_LOGARITHM = 5.0


class _Hint(str):
    """A warning's text. Texts of one kind are equal whatever their numbers, so Python shows one of them for each line of the caller."""

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
    """Warn of a temperature that looks like a scale, and the other way round; not without normalisation, where logits have any size."""
    name, given = ("temperature", temperature) if scale is None else ("scale", scale)
    number = _number(given) if normalize and arguments.debugging() else None
    if number is None or not 0 < number < torch.inf:
        return
    if scale is None and number > 1 / _FLAT:
        _warn(where, name, f"temperature is {number:g}, which looks like a scale; scale = 1 / temperature: give scale={number:g}")
    elif scale is not None and number < _FLAT:
        _warn(where, name, f"scale is {number:g}, which looks like a temperature; scale = 1 / temperature: give scale=1 / {number:g}")


def logit_scale(where: str, given: object, normalize: bool) -> None:
    """Warn of a logit scale that looks like its logarithm, which CLIP learns; the loss takes the scale itself."""
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
    """Warn of ids below -1, which look like hashes, and of ids that are all negative, which do nothing. `given` are the caller's own."""
    for name, ids in zip(names, given, strict=True):
        if ids is None or not arguments.debugging(ids) or ids.numel() == 0:
            continue
        ids = ids.to(torch.int64)  # where torch can compare
        count = int((ids < 0).sum())
        if count and (count == len(ids) or int(ids.min()) < -1):
            remedy = f"{name} & (2**63 - 1) makes ids of hashes; -1 says on purpose that a row has none"
            _warn(where, name, f"{count} of {len(ids)} {name} are negative, and a negative id matches nothing: {remedy}")


def views_second(where: str, features: Tensor) -> None:
    """Warn of features with more views than examples: without labels, only that tells (views, examples, D) from (examples, views, D)."""
    if arguments.debugging() and features.dim() == 3 and features.shape[0] < features.shape[1]:
        examples, views = features.shape[:2]
        _warn(
            where,
            "views",
            f"features is {tuple(features.shape)}, which is {examples} examples of {views} views each; views come second: "
            f"features.transpose(0, 1), if it is {views} examples",
        )


def partners(where: str, names: tuple[str, str], a: Tensor | None, b: Tensor | None) -> None:
    """Warn of a query and a key that are positives by their place and have different ids."""
    if a is not None and b is not None and arguments.debugging(a, b):
        row = relations.disagreement(a, b)
        if row is not None:
            _warn(where, "partners", f"{names[0]} and {names[1]} differ at row {row}, whose query and key are positives by their place")


def without_positive(where: str, n_pos: Tensor, rows: str, then: str) -> None:
    """Warn of rows without a positive, in a batch of several: how many there are, and their fate (`then`)."""
    if arguments.debugging(n_pos) and n_pos.numel() > 1:
        count = int((n_pos == 0).sum())
        if count:
            _warn(where, rows, f"{count} of {n_pos.numel()} {rows} have no positive{then}")


def anchors(where: str, n_pos: Tensor, views: int, masked: bool, skipped: bool) -> None:
    """Warn of sup_con's anchors without a positive. With several views, such an anchor has lost even the others of its own example."""
    if views == 1 and skipped:  # the caller knows of them
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
            f"{where}: no row has both a positive and another key: the ids, labels or mask leave a loss of 0 that trains nothing"
        )


def something_to_compare(where: str, lse_neg: Tensor, n_pos: Tensor) -> None:
    """Debug mode only: one row at least must have a pair that is not excluded."""
    if arguments.debugging(lse_neg) and lse_neg.numel() > 1 and not bool(((n_pos > 0) | (lse_neg > -torch.inf)).any()):
        raise ValueError(f"{where}: no row has any key: the ids, labels or mask exclude every pair")
