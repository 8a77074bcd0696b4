"""Who finds whom: the towers' embeddings of held-out pairs, each half searching its other half among all candidates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from train_ref.two_towers.data import PairData
from train_ref.two_towers.towers import TwoTowers

DIRECTIONS = ("left_to_right", "right_to_left")
FURTHER = tuple(f"further_{direction}" for direction in DIRECTIONS)  # among held-out pairs of training ids


@dataclass(frozen=True)
class Retrieval:
    """Fractions of the queries with a correct candidate in the first place, among the first five; and the mean of 1 / its place."""

    r1: float
    r5: float
    mrr: float


def places(scores: Tensor, ids: Tensor) -> Tensor:
    """(N,) int64: the place, from 1, of the best correct candidate of every query; ties are lost.

    scores (N, N): row i is query i, column j candidate j. Candidate j is correct for query i where ids[i] == ids[j]; a wrong one that
    scores as high as the best correct one goes before it, so that embeddings that are all equal find nothing.
    """
    correct = ids[:, None] == ids[None, :]
    best = scores.masked_fill(~correct, -torch.inf).amax(1, keepdim=True)
    return ((scores >= best) & ~correct).sum(1) + 1


def retrieval(scores: Tensor, ids: Tensor) -> Retrieval:
    place = places(scores, ids).double()
    return Retrieval((place <= 1).double().mean().item(), (place <= 5).double().mean().item(), (1 / place).mean().item())


def chance(ids: Tensor) -> Retrieval:
    """What candidates in random order give on average: with c correct ones of N, none is among the first k with probability
    prod_{j < k} (N - c - j) / (N - j)."""
    n = len(ids)
    _, counts = ids.unique(return_counts=True)
    place = torch.arange(n, dtype=torch.float64)
    at = torch.zeros(n, dtype=torch.float64)  # how probable every place of the best correct candidate is, on average over the queries
    for correct, groups in zip(*counts.unique(return_counts=True), strict=True):
        none_yet = ((n - correct - place) / (n - place)).clamp(min=0).cumprod(0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), none_yet[:-1]])
        at += correct * groups / n * (before - none_yet)
    return Retrieval(at[0].item(), at[:5].sum().item(), (at / (place + 1)).sum().item())


@torch.no_grad()
def embed(towers: TwoTowers, data: PairData, index: Tensor) -> tuple[Tensor, Tensor]:
    """Both halves of those pairs as unit rows on the CPU, in eval mode. Raises RuntimeError if that has changed the towers."""
    device = next(towers.parameters()).device
    before = {name: value.clone() for name, value in towers.state_dict().items()}
    training = towers.training
    towers.eval()
    try:
        halves = [towers(data.left.select(part).to(device), data.right.select(part).to(device)) for part in index.split(512)]
    finally:
        towers.train(training)
    changed = [name for name, value in towers.state_dict().items() if not torch.equal(value, before[name])]
    if changed:
        raise RuntimeError(f"evaluation changed the towers ({', '.join(changed)}): they were not frozen")
    left, right = (F.normalize(torch.cat(half).cpu(), dim=1) for half in zip(*halves, strict=True))
    return left, right


def evaluate(towers: TwoTowers, data: PairData, candidates: Tensor) -> dict[str, Retrieval]:
    """Both directions among those pairs, by cosine, in eval mode. Raises RuntimeError if that has changed the towers."""
    left, right = embed(towers, data, candidates)
    scores, ids = left @ right.T, data.ids[candidates]
    return dict(zip(DIRECTIONS, (retrieval(scores, ids), retrieval(scores.T, ids)), strict=True))
