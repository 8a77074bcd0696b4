"""The truth: every loss in dense torch. Tests, gates and benchmarks hold fastnce to it.

losses.py defines the losses, LOSSES below lists them, exact.py has their answers in float64 for any number of rows, contract.py says how
far from exact is right enough, golden/ has other projects' results. Nothing here imports what it judges: torch is all it needs. A public
loss that is missing in LOSSES fails a test. To add one, write its dense form in losses.py and its entry here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from train_ref.truth import losses, pairs


class Rows(NamedTuple):
    """The inputs of an example: two views (B, D), a queue (K, D), and labels (B,)."""

    first: Tensor
    second: Tensor
    queue: Tensor
    labels: Tensor


class Loss(NamedTuple):
    """A public loss and its truth.

    name        of the function, here and in fastnce
    module      of the class in fastnce
    function    its dense form: the tensors of an example and the number that multiplies the cosines, by name -> one value per anchor
    sides       the names of its features, in the order of the arguments; rows of one side are joined. The last side holds the keys
    pairs       which keys are positives and negatives of which anchors, the rows of the first side
    definition  its value, in the statistics of docs/math.md
    example     the tensors of one call, by name
    number      the name of the argument that multiplies the cosines
    both_ways   its value is the mean of two: of the first side against the last, and of the last against the first
    positive_in_sum  whether the positives are part of the sum of exponentials
    """

    name: str
    module: str
    function: Callable[..., Tensor]
    sides: tuple[tuple[str, ...], ...]
    pairs: pairs.Pairs
    definition: str
    example: Callable[[Rows], dict[str, Tensor]]
    number: str = "scale"
    both_ways: bool = False
    positive_in_sum: bool = True

    @property
    def leaves(self) -> tuple[str, ...]:
        """The names of all its features."""
        return tuple(leaf for side in self.sides for leaf in side)

    @property
    def symmetric(self) -> bool:
        """The keys are the queries."""
        return len(self.sides) == 1

    def share(self, values: Tensor) -> Tensor:
        """The sum of the weights dL/ds of a row's negatives, from the values of the rows.

        1 - p, p the share of the positives in the sum: next to nothing where the loss is solved.
        """
        return -torch.expm1(-values) if self.positive_in_sum else torch.ones_like(values)


ONE_POSITIVE = "softplus(lse_neg - pos)"


def _info_nce(rows: Rows) -> dict[str, Tensor]:
    return {"query": rows.first, "positive_key": rows.second}


def _two_views(rows: Rows) -> dict[str, Tensor]:
    return {"z0": rows.first, "z1": rows.second}


def _sup_con(rows: Rows) -> dict[str, Tensor]:
    return {"features": rows.first, "labels": rows.labels}


def _clip(rows: Rows) -> dict[str, Tensor]:
    return {"image": rows.first, "text": rows.second}


def _moco(rows: Rows) -> dict[str, Tensor]:
    return {"q": rows.first, "k": rows.second, "queue": rows.queue}


def _table(*every: Loss) -> dict[str, Loss]:
    return {loss.name: loss for loss in every}


LOSSES = _table(
    Loss("nt_xent", "NTXentLoss", losses.nt_xent, (("z0", "z1"),), pairs.other_view, ONE_POSITIVE, _two_views),
    Loss("info_nce", "InfoNCE", losses.info_nce, (("query",), ("positive_key",)), pairs.same_row, ONE_POSITIVE, _info_nce),
    Loss(
        "clip_loss",
        "ClipLoss",
        losses.clip_loss,
        (("image",), ("text",)),
        pairs.same_row,
        f"mean of the row's and the column's {ONE_POSITIVE}",
        _clip,
        number="logit_scale",
        both_ways=True,
    ),
    Loss(
        "sup_con",
        "SupConLoss",
        losses.sup_con,
        (("features",),),
        pairs.same_label,
        "softplus(lse_neg - lse_pos) + lse_pos - pos",
        _sup_con,
    ),
    Loss("dcl_loss", "DCLLoss", losses.dcl_loss, (("z0", "z1"),), pairs.other_view, "lse_neg - pos", _two_views, positive_in_sum=False),
    Loss("moco_loss", "MoCoLoss", losses.moco_loss, (("q",), ("k", "queue")), pairs.same_row_and_queue, ONE_POSITIVE, _moco),
)
