"""Forward beside the tiles: the sums of every row that tiles add to, and the statistics that follow from them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastnce.backends._tiled.gemm import inner
from fastnce.backends._tiled.operands import Work
from fastnce.precision import LN2, LOG2E, vector_dtype
from fastnce.problem import Side


class LogSum:
    """The sums of every row over its negatives and, where positives are found in tiles, over its positives: (classes, rows) of all sides,
    the rows of the second behind those of the first.

    total  of term(t) where it is unshifted, elsewhere of term(t, top). The bias is inside of t
    top    the largest t so far, None where it is unshifted
    """

    def __init__(self, work: Work) -> None:
        self.bias, self.exact = work.bias, work.problem.bias
        shape = (2 if work.in_tile else 1, sum(len(rows) for rows in work.sides()))
        self.total = work.x.new_zeros(shape, dtype=vector_dtype(work.x))
        self.top = None if work.unshifted else work.x.new_full(shape, -torch.inf)

    def result(self, of_class: int, own: slice) -> tuple[Tensor, Tensor]:
        """The natural logarithm of a sum, and the sum in the form that backward wants: itself where it is unshifted, otherwise its log2."""
        total = self.total[of_class, own]
        log2 = total.log2() if self.top is None else total.log2() + self.top[of_class, own]
        log = log2 * LN2
        if self.bias is not None and self.exact is not None:
            # The bias that tiles add is rounded; the rest of it comes in here.
            log = log + (self.exact - self.bias.to(log.dtype) * LN2)
        return log, total.clone() if self.top is None else log2


class Sums:
    """The sums of one side: vectors with a number for each of its rows.

    logs, own       log-sums of all sides, and where those of this one are
    pos, n_pos      sum of the logits of its positives, without the bias, and their number
    tile_pos        the same sum of the tiles' logits. An aligned pair has a dot product of its own in `pos`, which is rounded less
    With metrics:
    pos_max         largest positive logit
    low, high       bounds that negatives are compared with, see compare()
    rank, ties      number of negatives above the bounds, and between them
    hardest_logit   largest negative logit
    hardest         its column
    """

    def __init__(self, work: Work, logs: LogSum, own: slice) -> None:
        self.problem, self.in_tile, self.logs, self.own = work.problem, work.in_tile, logs, own
        rows = own.stop - own.start
        self.pos = work.x.new_zeros(rows, dtype=vector_dtype(work.x))
        self.tile_pos = self.pos if work.in_tile else torch.zeros_like(self.pos)
        self.n_pos = torch.zeros(rows, dtype=torch.int64, device=work.x.device)
        if self.problem.metrics:
            self.pos_max = work.x.new_full((rows,), -torch.inf)
            self.low, self.high = self.pos_max, self.pos_max
            self.rank, self.ties = torch.zeros_like(self.n_pos), torch.zeros_like(self.n_pos)
            self.hardest = torch.full_like(self.n_pos, -1)
            self.hardest_logit = torch.full_like(self.pos_max, -torch.inf)

    @staticmethod
    def of(work: Work) -> list[Sums]:
        """The sums of every side before the first tile: they hold the pairs that are kept out of the tiles."""
        logs, sums, start = LogSum(work), [], 0
        for rows in work.sides():
            sums.append(Sums(work, logs, slice(start, start + len(rows))))
            start += len(rows)
        if not work.in_tile:
            i, j = work.aligned()
            aligned = inner(work.x[i], work.y[j])
            for side, own in work.ends(i, j):
                sums[side].pos[own] = aligned
                sums[side].n_pos[own].fill_(1)
        return sums

    def compare(self) -> None:
        """Set the bounds that negatives are compared with, from the best positives."""
        self.low, self.high = (bound.to(self.pos_max.dtype) for bound in self.problem.tied(self.pos_max, LOG2E))

    def result(self) -> Side:
        none = self.n_pos == 0
        lse_neg, own_neg = self.logs.result(0, self.own)
        if self.in_tile:
            pos = self._nats(self.pos / self.n_pos.clamp(min=1)).masked_fill_(none, 0.0)
            lse_pos, own_pos = self.logs.result(1, self.own)
            lse_pos = torch.where(self.n_pos == 1, pos, lse_pos)
        else:
            pos = self._nats(self.pos).masked_fill_(none, 0.0)
            lse_pos, own_pos = pos.masked_fill(none, -torch.inf), self.tile_pos
        side = Side(lse_neg, lse_pos, pos, self.n_pos, own_neg, own_pos)
        if not self.problem.metrics:
            return side
        logits = {"hardest_logit": self._nats(self.hardest_logit), "pos_max": self._nats(self.pos_max)}
        return side._replace(rank=self.rank, ties=self.ties, hardest=self.hardest, **logits)

    def _nats(self, t: Tensor) -> Tensor:
        s = t.to(self.pos.dtype) * LN2
        return s if self.problem.bias is None else s + self.problem.bias
