"""What is right: every loss in dense torch, which the tests, gates and benchmarks hold fastnce to.

losses.py defines the losses, LOSSES below lists them, contract.py says how far from exact is right enough, golden/ has other projects'
results. Nothing here imports what it judges: torch is all it needs. A public loss that is missing in LOSSES fails a test. To add one,
write its dense form in losses.py and its entry here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from train_ref.truth import losses


class Rows(NamedTuple):
    """What an example is made of: two views (B, D), a queue (K, D), and labels (B,)."""

    first: Tensor
    second: Tensor
    queue: Tensor
    labels: Tensor


def _of_negatives(values: Tensor) -> Tensor:
    """1 - p, p the share of the positives in the sum: next to nothing where the loss is solved."""
    return -torch.expm1(-values)


def _whole(values: Tensor) -> Tensor:
    """The positives are no part of the sum."""
    return torch.ones_like(values)


class Loss(NamedTuple):
    """A public loss and its truth.

    name        of the function, here and in fastnce
    module      of the class in fastnce
    function    its dense form: the tensors of an example and the number that multiplies the cosines, by name -> one value per anchor
    leaves      the names of its features, in the order of the arguments
    definition  its value, in the statistics of docs/math.md
    example     the tensors of one call, by name
    symmetric   the keys are the queries
    number      the name of the argument that multiplies the cosines
    share       from the values of the rows: what the weights dL/ds of a row's negatives add up to
    """

    name: str
    module: str
    function: Callable[..., Tensor]
    leaves: tuple[str, ...]
    definition: str
    example: Callable[[Rows], dict[str, Tensor]]
    symmetric: bool = False
    number: str = "scale"
    share: Callable[[Tensor], Tensor] = _of_negatives


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


LOSSES = {
    loss.name: loss
    for loss in (
        Loss("nt_xent", "NTXentLoss", losses.nt_xent, ("z0", "z1"), ONE_POSITIVE, _two_views, symmetric=True),
        Loss("info_nce", "InfoNCE", losses.info_nce, ("query", "positive_key"), ONE_POSITIVE, _info_nce),
        Loss(
            "clip_loss",
            "ClipLoss",
            losses.clip_loss,
            ("image", "text"),
            f"mean of the row's and the column's {ONE_POSITIVE}",
            _clip,
            number="logit_scale",
        ),
        Loss(
            "sup_con", "SupConLoss", losses.sup_con, ("features",), "softplus(lse_neg - lse_pos) + lse_pos - pos", _sup_con, symmetric=True
        ),
        Loss("dcl_loss", "DCLLoss", losses.dcl_loss, ("z0", "z1"), "lse_neg - pos", _two_views, symmetric=True, share=_whole),
        Loss("moco_loss", "MoCoLoss", losses.moco_loss, ("q", "k", "queue"), ONE_POSITIVE, _moco),
    )
}
