"""The calls of the operator gate: the questions to every loss, one call at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from train_ref.truth import LOSSES, Rows

# 0.005 is below the published recipes: exponentials of its logits leave float32 unless a maximum is subtracted.
TEMPERATURES = (0.005, 0.02, 0.05, 0.1, 0.5)
NOISE = {"aligned": 0.5, "solved": 0.1}  # between the two views, in standard deviations of a coordinate
QUEUE = 1.6  # keys in the queue, per pair
# Options that implementations may offer beside features and temperature, and where. The bias cancels in CLIP's loss: it must not show.
OPTIONS = {
    "ids": ("info_nce", "clip_loss"),
    "exclude ids": ("info_nce",),
    "weight": tuple(LOSSES),
    "bias": ("clip_loss",),
    "sum": tuple(LOSSES),
}
BIAS = -10.0  # where SigLIP starts
# Around tiles of 128; and dimensions around paddings and where kernels change from rows held whole to rows read in steps.
ROWS = (127, 128, 129, 257)
WIDTHS = (128, 129, 257, 520)

Ids = tuple[Tensor, Tensor]  # of the queries and of the keys


@dataclass(frozen=True)
class Case:
    """pairs are rows of one side; nt_xent and sup_con see twice as many, or sup_con one less of an odd number: N may be odd.

    length multiplies every row; option is one of OPTIONS, or none.
    """

    loss: str
    kind: str = "random"
    pairs: int = 67
    d: int = 24
    temperature: float = 0.1
    length: float = 1.0
    seed: int = 0
    option: str = ""

    def __str__(self) -> str:
        length = "" if self.length == 1 else f", lengths about {self.length:g}"
        option = f", with {self.option}" if self.option else ""
        return f"{self.loss} {self.kind}, {self.pairs} pairs, D {self.d}, temperature {self.temperature:g}{length}{option}"

    @property
    def rows(self) -> int:
        """How many the loss has a value of."""
        if self.loss == "sup_con":
            return 2 * self.pairs - (self.pairs % 2 if self.pairs > 1 else 0)
        return (2 if LOSSES[self.loss].symmetric else 1) * self.pairs

    def labels(self) -> Tensor | None:
        """Of sup_con: its two views with some classes of one view, some rows alone and some negative labels."""
        if self.loss != "sup_con":
            return None
        label = torch.arange(self.pairs) % max(1, self.pairs - self.pairs // 4)
        both = torch.cat([label, label])[: self.rows]
        both[: self.pairs // 8] = -1 - torch.arange(self.pairs // 8) % 2
        both[self.pairs + 1 :][-1:] = self.pairs  # an anchor without a positive
        return both

    def ids(self) -> Ids | None:
        """Of both sides where rows with equal ids belong together, or are no negatives. Different rows of either have none, so that a swap
        shows; none denies that row i belongs to row i."""
        if self.option not in ("ids", "exclude ids"):
            return None
        of_queries = torch.arange(self.pairs) % max(1, self.pairs - self.pairs // 4)
        of_keys, none = of_queries.clone(), self.pairs // 8
        of_queries[:none] = -1  # belongs to nothing
        of_keys[self.pairs - none :] = -1
        return of_queries, of_keys

    def named_ids(self) -> dict[str, Tensor]:
        """Those ids as arguments of the loss."""
        sides = ("image", "text") if self.loss == "clip_loss" else ("query", "key")
        start = "exclude_" if self.option == "exclude ids" else ""
        return {f"{start}{side}_ids": one for side, one in zip(sides, self.ids() or (), strict=False)}

    def weights(self) -> Tensor | None:
        """One per value, float64: 0, 1/2, 1, 3/2, 2 by turns."""
        return torch.arange(self.rows, dtype=torch.float64) % 5 / 2 if self.option == "weight" else None

    def sides(self, dtype: torch.dtype) -> list[Tensor]:
        """The features in the order of the loss's arguments, rounded to the dtype; every row of another length."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(rows: int) -> Tensor:
            return torch.randn(rows, self.d, generator=generator, dtype=torch.float64)

        n_queue = int(QUEUE * self.pairs) if self.loss == "moco_loss" else 0
        first, second, queue = normal(self.pairs), normal(self.pairs), normal(n_queue)
        if self.kind in NOISE:
            second = first + NOISE[self.kind] * second
        if self.kind == "identical":
            first, second, queue = (first[:1].expand(len(rows), -1) for rows in (first, second, queue))
        if self.kind == "orthogonal":
            rows = torch.eye(2 * self.pairs + n_queue, dtype=torch.float64)
            first, second, queue = rows[:, torch.randperm(len(rows), generator=generator)].split([self.pairs, self.pairs, n_queue])
        # 1/2, 1 and 2 by turns: a forgotten norm shows, parallel rows stay parallel, and float16 keeps its range.
        lengths = [2.0 ** (torch.arange(len(rows)) % 3 - 1) * self.length for rows in (first, second, queue)]
        one, two, ring = ((rows * length.double()[:, None]).to(dtype) for rows, length in zip((first, second, queue), lengths, strict=True))
        labels = self.labels()
        example = Rows(one, two, ring, torch.empty(0)) if labels is None else Rows(torch.cat([one, two])[: self.rows], two, ring, labels)
        arguments = LOSSES[self.loss].example(example)
        return [arguments[leaf] for leaf in LOSSES[self.loss].leaves]


def cases(pairs: int = 67, large: int = 530, wide: int = 140, thin: int = 1, seed: int = 0) -> Iterator[Case]:
    """Of every loss: each kind at each temperature; ragged sizes; one pair; wide rows; very long and short ones; options.

    pairs  of most cases
    large  rows of the case that has to be ragged behind at least one whole tile, also in tiles of 512
    wide   rows of the cases with many dimensions
    thin   every so many of the kinds and temperatures, others for every loss; nothing else is left out
    seed   of the first case; another one draws all of them again
    """
    for number, loss in enumerate(LOSSES):
        base = Case(loss, pairs=pairs, seed=seed)
        views = 2 if LOSSES[loss].symmetric else 1
        # Orthogonal rows need as many dimensions as rows.
        upright = replace(base, kind="orthogonal", pairs=9, d=18 + (int(QUEUE * 9) if loss == "moco_loss" else 0))
        kinds = [*(replace(base, kind=kind) for kind in ("random", "aligned", "solved", "identical")), upright]
        yield from [replace(case, temperature=temperature) for case in kinds for temperature in TEMPERATURES][number % thin :: thin]
        yield from (replace(base, pairs=1, d=7, kind=kind) for kind in ("random", "identical"))
        yield from (replace(base, pairs=n, d=d, seed=seed + 1) for n, d in ((2, 1), (5, 3), (33, 1), (pairs - 2, 65)))
        yield from (replace(base, pairs=math.ceil(rows / views), seed=seed + 1) for rows in ROWS)
        yield from (replace(base, pairs=math.ceil(wide / views), d=d, seed=seed + 1) for d in WIDTHS)
        yield replace(base, pairs=large // views, d=40, seed=seed + 2)
        yield from (replace(base, length=length, temperature=t) for length in (LONG, SHORT) for t in (0.05, 0.5))
        for option in (option for option, losses in OPTIONS.items() if loss in losses):
            yield from (replace(base, kind=kind, temperature=t, option=option) for kind, t in (("random", 0.1), ("aligned", 0.05)))


LONG, SHORT = 1e15, 1e-10  # see within_range for float16, whose numbers end at 65504


def within_range(case: Case, dtype: torch.dtype) -> Case:
    """The same case with lengths that float16 can hold, and whose gradients it can."""
    if dtype == torch.float16 and case.length != 1:
        return replace(case, length=64.0 if case.length > 1 else 1 / 16)
    return case
