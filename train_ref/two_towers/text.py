"""Sentences as bags of hashed character n-grams: no vocabulary, no tokeniser, any script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

N_GRAMS = (1, 2, 3, 4)
BITS = 15
ROWS = 2**BITS

# Knuth's multiplicative hashing with 2^64 / the golden ratio (The Art of Computer Programming 3, 6.4): its upper bits are the good ones.
# Python's own hash() is salted anew in every process.
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Bags:
    """values (T,) int32 and offsets (N + 1,) int64: text i has the rows values[offsets[i]:offsets[i + 1]] of an embedding table."""

    values: Tensor
    offsets: Tensor

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def select(self, index: Tensor) -> Bags:
        """The bags of those texts, in that order."""
        starts = self.offsets[index]
        lengths = self.offsets[index + 1] - starts
        ends = lengths.cumsum(0)
        # Position j of the result is n-gram j - (ends - lengths) of its text.
        values = self.values[torch.arange(int(lengths.sum())) + (starts - ends + lengths).repeat_interleave(lengths)]
        return Bags(values, torch.cat([ends.new_zeros(1), ends]))

    def thinned(self, dropout: float, generator: torch.Generator) -> Bags:
        """Without each n-gram with probability `dropout`."""
        kept = torch.rand(len(self.values), generator=generator) >= dropout
        kept_before = torch.cat([self.offsets.new_zeros(1), kept.cumsum(0)])
        return Bags(self.values[kept], kept_before[self.offsets])

    def to(self, device: torch.device) -> Bags:
        return Bags(self.values.to(device), self.offsets.to(device))


def hashed_n_grams(texts: Sequence[str]) -> Bags:
    """All character n-grams of each text, case folded and between two spaces, each a row from 0 to ROWS - 1.

    h_0 = n, h_k = (h_{k-1} xor code point k) * MULTIPLIER mod 2^64, and the row is h_n's upper BITS bits: the same in every process.
    """
    padded = [f" {text.casefold()} " for text in texts]
    points = np.frombuffer("".join(padded).encode("utf-32-le"), "<u4").astype(np.uint64)
    lengths = np.array([len(text) for text in padded], dtype=np.int64)
    left = lengths.cumsum().repeat(lengths) - np.arange(len(points))  # characters from here to the end of the text
    rows = np.empty((len(points), len(N_GRAMS)), dtype=np.int32)
    for column, n in enumerate(N_GRAMS):
        state = np.full(len(points), n, dtype=np.uint64)
        for k in range(n):
            state = (state ^ np.concatenate([points[k:], np.zeros(k, np.uint64)])) * MULTIPLIER
        rows[:, column] = state >> np.uint64(64 - BITS)
    values = rows[left[:, None] >= np.array(N_GRAMS)]
    counts = sum(np.maximum(lengths - n + 1, 0) for n in N_GRAMS)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    return Bags(torch.from_numpy(values), torch.from_numpy(offsets))
