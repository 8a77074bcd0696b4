"""Which pairs of a loss are positives and negatives, for a block of anchors: losses.py says the same with whole matrices.

A function takes the tensors of a call by name, the numbers of some anchors (M, 1) and those of all keys (N,). It returns which keys are
positives of these anchors, and which are negatives, both boolean (M, N). A key that is neither is excluded.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Pairs = Callable[[dict[str, Tensor], Tensor, Tensor], tuple[Tensor, Tensor]]


def same_row(arguments: dict[str, Tensor], anchors: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Row i of the keys is the positive of row i of the queries."""
    positive = anchors == keys
    return positive, ~positive


def same_row_and_queue(arguments: dict[str, Tensor], anchors: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """The keys are [k; queue]. Of the former all but the anchor's own are excluded."""
    return anchors == keys, (keys >= len(arguments["k"])).expand(len(anchors), -1)


def other_view(arguments: dict[str, Tensor], anchors: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """The rows are [first views; second views]."""
    positive = (anchors + len(keys) // 2) % len(keys) == keys
    return positive, ~positive & (anchors != keys)


def same_label(arguments: dict[str, Tensor], anchors: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Of one view."""
    labels, others = arguments["labels"], anchors != keys
    positive = (labels[anchors] == labels) & (labels >= 0) & others
    return positive, ~positive & others
