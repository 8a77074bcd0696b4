"""The losses of a batch of pairs in which some ids repeat: three things to do about the copies, fused or dense."""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from train_ref.implementations import LossFunctions

# plain: a copy is a negative like any other. exclude: it is none. multi-positive: it is a positive.
VARIANTS = ("plain", "exclude", "multi-positive")
IDS = {"plain": (), "exclude": ("exclude_query_ids", "exclude_key_ids"), "multi-positive": ("query_ids", "key_ids")}


class Objective(Protocol):
    """left (B, D), right (B, D), logit scale, ids (B,), and mined right halves (M, D) with their ids (M,) if any -> loss."""

    def __call__(
        self,
        left: Tensor,
        right: Tensor,
        logit_scale: Tensor,
        ids: Tensor,
        mined: Tensor | None = None,
        mined_ids: Tensor | None = None,
    ) -> Tensor: ...


def objective(variant: str, functions: LossFunctions) -> Objective:
    """The loss of that variant, by fastnce or in its dense form."""
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; it must be one of {', '.join(VARIANTS)}")
    return partial(pair_loss, variant, functions)


def pair_loss(
    variant: str,
    functions: LossFunctions,
    left: Tensor,
    right: Tensor,
    logit_scale: Tensor,
    ids: Tensor,
    mined: Tensor | None = None,
    mined_ids: Tensor | None = None,
) -> Tensor:
    """With s_ij = logit_scale * cos(left_i, right_j) and C_i the rows with row i's id: the mean over i, and over both directions, of

        plain           log sum_j exp s_ij - s_ii
        exclude         log sum_{j = i or j not in C_i} exp s_ij - s_ii
        multi-positive  log sum_j exp s_ij - mean_{j in C_i} s_ij

    left, right (B, D), logit_scale 0-dim, ids (B,) integers. Returns a 0-dim tensor in nats: one call for both directions, and one for
    each where only one of them meets mined halves.
    mined (M, D) and mined_ids (M,) are further right halves j, after the batch's own: every left half meets all of them, and no
    mean over i or direction from right to left contains them.
    Radford et al. 2021 (arXiv:2103.00020), figure 3; Khosla et al. 2020 (arXiv:2004.11362), eq. 2, for several positives.

    Where the copies have one and the same embedding on one side, multi-positive *is* plain: each of m copies then has the same logarithm,
    and the m values differ only in whose positive logit stands alone, so that their sum is the same. And where c mined copies have the
    embedding of row i's own right half, the derivative of its value by that common logit is (1 + c) p - 1 <= 0, p the softmax of each:
    they weaken the pull and never become a push. Only copies with other embeddings (other translations) are pushed away.
    """
    if mined is not None and mined_ids is not None:
        met = dict(zip(IDS[variant], (ids, torch.cat([ids, mined_ids])), strict=False))
        there = functions.info_nce(left, right, mined, scale=logit_scale, in_batch=True, **met)
        back = functions.info_nce(right, left, scale=logit_scale, **dict.fromkeys(IDS[variant], ids))
        return (there + back) / 2
    if variant == "exclude":
        return functions.info_nce(left, right, scale=logit_scale, exclude_query_ids=ids, symmetric=True)
    return functions.clip_loss(left, right, logit_scale, image_ids=ids if variant == "multi-positive" else None)


def false_negatives(ids: Tensor) -> float:
    """How many other rows of the batch have a row's id, on average over its rows."""
    _, counts = ids.unique(return_counts=True)
    return ((counts * (counts - 1)).sum() / len(ids)).item()


def mined_false_negatives(ids: Tensor, mined_ids: Tensor) -> tuple[float, float]:
    """ids (B,), mined_ids (B, K), row i mined for row i: how many have row i's id among its own K, and among all B K; means over rows."""
    own = (mined_ids == ids[:, None]).sum() / len(ids)
    met = (mined_ids.flatten() == ids[:, None]).sum() / len(ids)
    return own.item(), met.item()
