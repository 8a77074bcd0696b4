"""Hard negatives: the right halves nearest to a left half, whatever they mean."""

from __future__ import annotations

import torch
from torch import Tensor

from train_ref.two_towers.data import PairData
from train_ref.two_towers.retrieval import embed
from train_ref.two_towers.towers import TwoTowers

# Rows of the scores held at once: 1024 x 13,366 float32 are 55 MB.
CHUNK = 1024


def mine(towers: TwoTowers, data: PairData, k: int) -> Tensor:
    """(len(data.train), k) int64: for the left half of every training pair, the k pairs of data.corpus with the nearest right halves.

    By cosine, in eval mode, first the nearest. The pair itself is left out and nothing else: pairs with its id, whose right halves are as
    correct as its own, are found like any other, and the more of them the better the towers are.
    """
    left, right = embed(towers, data, data.corpus)
    found = []
    for rows in torch.arange(len(data.train)).split(CHUNK):
        scores = left[rows] @ right.T
        scores[torch.arange(len(rows)), rows] = -torch.inf  # data.corpus begins with data.train
        found.append(scores.topk(k, dim=1).indices)
    return data.corpus[torch.cat(found)]
