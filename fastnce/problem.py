"""The interface of the backends: Problem, the question of forward, and Side, its answer; SideGrad and Wanted, the question of backward, and
Gradients, its answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastnce.pairs import Pairs
from fastnce.precision import compute_dtype

# Two cosines are a tie where they are no further apart than this, by the dtype of the products: 3 u of float32, u = 2^-24, and 16 u of
# float64. Equal rows have equal bits, because the threshold and the logits come from one routine. Rows that differ in length alone differ
# by roundings: of both logits and of both lengths, each by up to u, 0.8 u together (root mean square). With 8 to 2,048 columns, 1 in 200 of
# such pairs is more than 3 u apart in float32. In float64 there are bits to spare, and no such pair is.
TIE = {torch.float32: 3 * 2.0**-24, torch.float64: 2.0**-49}


class Problem(NamedTuple):
    """s_ij = scale * r_q[i] * r_k[j] * <q_i, k_j> + bias and the rules of its pairs.

    q          (M, D)
    k          (N, D), or None where the keys are the queries (symmetric logits)
    scale      0-dim, compute dtype; bias the same or None
    two_sided  column statistics as well as row statistics
    metrics    also rank, ties, hardest negative and best positive
    threshold  (M,) logits that rank counts from; None: the row's own best positive
    frozen     q will be asked for its gradient and k will not (MoCo's queue)
    q_wide     stand-in for q, of its shape and in the inner precision: dq is not rounded and goes there (wide.shared); k_wide the same
    rounded    the vectors of Side will be rounded to the compute dtype: a backend that sets ROUNDED returns them so
    """

    q: Tensor
    k: Tensor | None
    scale: Tensor
    bias: Tensor | None
    pairs: Pairs
    two_sided: bool
    normalize: bool
    metrics: bool = False
    threshold: Tensor | None = None
    frozen: bool = False
    q_wide: Tensor | None = None
    k_wide: Tensor | None = None
    rounded: bool = False

    @property
    def keys(self) -> Tensor:
        return self.q if self.k is None else self.k

    @property
    def symmetric(self) -> bool:
        return self.k is None

    @property
    def gradient_dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """The dtypes of dq and dk."""
        q, k = self.q if self.q_wide is None else self.q_wide, self.keys if self.k_wide is None else self.k_wide
        return q.dtype, k.dtype

    def tied(self, best: Tensor, unit: float) -> tuple[Tensor, Tensor]:
        """Bounds (low, high) of every row, around the threshold that ranks count from. A negative ties with the threshold where
        low <= logit <= high, and is above it unless logit <= high.

        best: the largest positive logit of every row, without the bias. A nat has `unit` of its units: 1, or log2(e) in base 2. The bounds
        are in the same unit, and without the bias too.
        Logits of rows that are not normalised have any size: there the band is the same fraction of the threshold itself.
        A negative that is nan is above any threshold, because it is not <= high. A threshold that is nan, or -inf (a row without a
        positive), has every negative above it, and nothing ties with it.
        """
        given, bias, threshold = self.threshold, self.bias, best
        if given is not None:
            threshold = (given if bias is None else given - bias) * unit
        elif bias is not None:
            threshold = best + 0.0 * bias  # a bias that is no number makes every logit nan
        band = TIE[compute_dtype(self.q.dtype)] * (unit * self.scale.detach() if self.normalize else threshold.abs())
        low, high = threshold - band, threshold + band
        return low.where(low > -torch.inf, torch.inf), high.masked_fill(high.isnan(), -torch.inf)


class Side(NamedTuple):
    """Statistics of the rows (or of the columns): vectors of length M (or N), in vector_dtype where not integer (see Problem.rounded).

    lse_neg, lse_pos  log-sum-exp over negatives, over positives; -inf where there are none
    pos               mean logit of the positives, 0 where there are none
    n_pos             how many positives, int64
    own_neg, own_pos  the two log-sums in the form the backend's backward wants them back; from a backend whose keeps_output(problem) is
                      true, own_pos is (M, D + 1) float32: the mean of the keys, and of the logits, by the weights of the row
    rank              negatives above the threshold, int64            } metrics only. A logit that is nan is above, and never the
    ties              negatives that float32 cannot tell from it      } hardest; a threshold that is nan is below every negative
    hardest           column of the largest negative, -1 without      }
    hardest_logit     its logit, -inf without                         }
    pos_max           largest positive logit, -inf without            }
    """

    lse_neg: Tensor
    lse_pos: Tensor
    pos: Tensor
    n_pos: Tensor
    own_neg: Tensor
    own_pos: Tensor
    rank: Tensor | None = None
    ties: Tensor | None = None
    hardest: Tensor | None = None
    hardest_logit: Tensor | None = None
    pos_max: Tensor | None = None


class SideGrad(NamedTuple):
    """dL/d of the differentiable fields of a Side, in the same order; None where no gradient came down, which is 0 everywhere."""

    dlse_neg: Tensor | None
    dlse_pos: Tensor | None
    dpos: Tensor | None

    def of_all(self, side: Side) -> tuple[Tensor, Tensor, Tensor]:
        """With zeros for None."""
        dlse_neg, dlse_pos, dpos = (torch.zeros_like(side.pos) if g is None else g for g in self)
        return dlse_neg, dlse_pos, dpos


FIELDS = len(Side._fields)
WITHOUT_METRICS = Side._fields.index("rank")
DIFFERENTIABLE = len(SideGrad._fields)  # the first of a Side, in the same order


class Gradients(NamedTuple):
    """dL/d of the inputs; None where not asked for."""

    dq: Tensor | None
    dk: Tensor | None
    dscale: Tensor | None
    dbias: Tensor | None


class Wanted(NamedTuple):
    """Which gradients are asked for."""

    q: bool
    k: bool
    scale: bool
    bias: bool


class LossProblem(NamedTuple):
    """A loss as one number, or as one of each row, for a backend that makes it and its gradient in a handful of launches.

        loss = c sum_i weight_i value_i        c: 1 / rows or 1 / sum(weight) if mean, else 1
                                               two_sided: half of that, and half of the same of the columns
        loss_i = weight_i value_i              by_row. two_sided: value_i is the mean of those of row and column i

    problem    its rules and shapes; its scale is not read, any tensor takes the place. q may be (examples, views, D), whose rows are taken
               view by view, and labels of one side may be fewer than its rows: row i has label i % len(labels)
    second     further queries, which follow those of q
    partners   (rows, D): row i is the positive of query i, beside the keys
    scale      0-dim tensor, or None: then `value` is the scale. inverse: the tensor is 1 / scale
    weight     (rows,)
    by_place   query and key i have the label i % examples
    formula    "out", "in" or "decoupled": l_out, l_in, decoupled of formulas.py
    """

    problem: Problem
    formula: str
    mean: bool
    second: Tensor | None = None
    partners: Tensor | None = None
    scale: Tensor | None = None
    value: float = 0.0
    inverse: bool = False
    weight: Tensor | None = None
    by_place: bool = False
    by_row: bool = False

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Those that take gradients, in the order of LossWanted, then the ids of queries and keys."""
        problem, pairs = self.problem, self.problem.pairs
        ids = pairs.q_label, pairs.k_label, pairs.q_exclude, pairs.k_exclude
        return problem.q, self.second, problem.k, self.partners, self.scale, problem.bias, self.weight, *ids


class LossWanted(NamedTuple):
    """Which gradients of a LossProblem are asked for."""

    q: bool
    second: bool
    k: bool
    partners: bool
    scale: bool
    bias: bool
    weight: bool


def sides(flat: Sequence[Any], problem: Problem, per_side: int) -> list[Sequence[Any]]:
    """Cut a flat list of vectors into one run for the rows and, where two_sided, one for the columns."""
    return [flat[start : start + per_side] for start in range(0, per_side * (2 if problem.two_sided else 1), per_side)]
