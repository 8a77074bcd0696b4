"""The backend "reference": the definition of all others, dense, on any device, in float32 (float64 for float64 input).

Memory is O(M N), so it is for tests and small problems. Every line below is one of the formulas:

s_ij      = scale * r_q[i] * r_k[j] * <q_i, k_j> + bias
lse_neg_i = log sum_{N_i} exp s_ij     lse_pos_i = log sum_{P_i} exp s_ij     pos_i = mean_{P_i} s_ij     n_pos_i = |P_i|
w_ij      = [j in N_i] dlse_neg_i exp(s_ij - lse_neg_i) + [j in P_i] (dlse_pos_i exp(s_ij - lse_pos_i) + dpos_i / n_pos_i)
dq_hat_i  = scale * sum_j w_ij k_hat_j     dq_i = r_q[i] (dq_hat_i - q_hat_i <q_hat_i, dq_hat_i>)     dbias = sum w
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnce.precision import compute_dtype, inverse_norms, valid_scale, vector_dtype
from fastnce.problem import Gradients, Problem, Side, SideGrad, Wanted

NAME = "reference"


def term(s: Tensor, base: Tensor) -> Tensor:
    """What a logit adds to the sum of its row: exp(s), divided by exp(base)."""
    return torch.exp(s - base)


def weight(s: Tensor, base: Tensor) -> Tensor:
    """The derivative of the term by s. The coefficient of a row makes its part of the weight dL/ds of it."""
    return term(s, base)


def unsupported(problem: Problem) -> list[str]:
    """Runs everything."""
    return []


def forward(problem: Problem) -> list[Side]:
    """Row statistics, then column statistics where two_sided."""
    q_hat, k_hat, _, _ = _operands(problem)
    t, positive, negative = _logits(problem, q_hat, k_hat)
    views = [(t, positive, negative), (t.T, positive.T, negative.T)]
    precise = vector_dtype(t)
    found = [_statistics(problem, *view) for view in views[: 2 if problem.two_sided else 1]]
    return [Side(*[v if v is None or not v.is_floating_point() else v.to(precise) for v in side]) for side in found]  # type: ignore[arg-type]


def backward(problem: Problem, grads: list[SideGrad], stats: list[Side], wanted: Wanted) -> Gradients:
    """dL/d(q, k, scale, bias) from dL/d(lse_neg, lse_pos, pos) of every side."""
    q_hat, k_hat, r_q, r_k = _operands(problem)
    t, positive, negative = _logits(problem, q_hat, k_hat)
    s = _biased(problem, t)
    w = _weights(s, positive, negative, grads[0], stats[0])
    if problem.two_sided:
        w = w + _weights(s.T, positive.T, negative.T, grads[1], stats[1]).T
    if problem.symmetric:
        w = w + w.T
    dq_hat = problem.scale * (w @ k_hat)
    dk_hat = problem.scale * (w.T @ q_hat)
    # Where k is q, `w + w.T` counts each pair from both of its ends.
    half = 0.5 if problem.symmetric else 1.0
    dq_dtype, dk_dtype = problem.gradient_dtypes
    return Gradients(
        _project(dq_hat, q_hat, r_q).to(dq_dtype) if wanted.q else None,
        _project(dk_hat, k_hat, r_k).to(dk_dtype) if wanted.k else None,
        half * (w * (q_hat @ k_hat.T)).sum() if wanted.scale else None,
        half * w.sum() if wanted.bias else None,
    )


def _operands(problem: Problem) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    dtype = compute_dtype(problem.q.dtype)
    if not problem.normalize:
        return problem.q.to(dtype), problem.keys.to(dtype), None, None
    r_q, r_k = (inverse_norms(x, problem.metrics)[:, None].to(dtype) for x in (problem.q, problem.keys))
    return problem.q.to(dtype) * r_q, problem.keys.to(dtype) * r_k, r_q, r_k


def _logits(problem: Problem, q_hat: Tensor, k_hat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits without the bias, and which of them are positives and negatives."""
    t = valid_scale(problem.scale) * (q_hat @ k_hat.T)
    positive, excluded = problem.pairs.dense(t.shape[0], t.shape[1], problem.symmetric, t.device)
    return t, positive, ~(positive | excluded)


def _biased(problem: Problem, t: Tensor) -> Tensor:
    return t if problem.bias is None else t + problem.bias


def _statistics(problem: Problem, t: Tensor, positive: Tensor, negative: Tensor) -> Side:
    s = _biased(problem, t)
    n_pos = positive.sum(1)
    pos = s.masked_fill(~positive, 0.0).sum(1) / n_pos.clamp(min=1)
    lse_pos = torch.where(n_pos == 1, pos, _lse(s, positive))
    lse_neg = _lse(s, negative)
    side = Side(lse_neg, lse_pos, pos, n_pos, lse_neg.clone(), lse_pos.clone())
    if not problem.metrics:
        return side
    if t.shape[1] == 0:  # torch has no maximum of an empty row: give it a column that is neither positive nor negative
        t, positive, negative = (matrix.new_zeros(len(t), 1) for matrix in (t, positive, negative))
    best = t.masked_fill(~positive, -torch.inf).amax(1)
    negatives = t.masked_fill(~negative, -torch.inf)
    low, high = (bound[:, None] for bound in problem.tied(best, 1.0))
    rank = (~(negatives <= high)).sum(1)
    ties = ((low <= negatives) & (negatives <= high)).sum(1)
    hardest_t, hardest = negatives.masked_fill(negatives.isnan(), -torch.inf).max(1)
    hardest = hardest.masked_fill(hardest_t == -torch.inf, -1)
    logits = {"hardest_logit": _biased(problem, hardest_t), "pos_max": _biased(problem, best)}
    return side._replace(rank=rank, ties=ties, hardest=hardest, **logits)


def _lse(s: Tensor, kept: Tensor) -> Tensor:
    s = s.masked_fill(~kept, -torch.inf)
    top = F.pad(s, (0, 1), value=-torch.inf).amax(1)
    base = top.masked_fill(top.isinf(), 0.0)
    return term(s, base[:, None]).sum(1).log() + base


def _weights(s: Tensor, positive: Tensor, negative: Tensor, grad: SideGrad, side: Side) -> Tensor:
    zero = s.new_zeros(())
    dlse_neg, dlse_pos, dpos = (v.to(s.dtype) for v in grad.of_all(side))
    side = side._replace(own_neg=side.own_neg.to(s.dtype), own_pos=side.own_pos.to(s.dtype))
    # A row without a negative has own_neg = -inf, and exp(-inf - -inf) would be nan. No pair of it is selected below: base 0 will do.
    base_neg = side.own_neg.masked_fill(side.own_neg == -torch.inf, 0.0)
    base_pos = side.own_pos.masked_fill(side.own_pos == -torch.inf, 0.0)
    of_negative = dlse_neg[:, None] * weight(s, base_neg[:, None])
    of_positive = dlse_pos[:, None] * weight(s, base_pos[:, None]) + (dpos / side.n_pos.clamp(min=1))[:, None]
    return torch.where(negative, of_negative, zero) + torch.where(positive, of_positive, zero)


def _project(dx_hat: Tensor, x_hat: Tensor, r: Tensor | None) -> Tensor:
    """Backward of x_hat = r x with r = 1 / |x|: remove the radial part, then divide by the norm."""
    return dx_hat if r is None else r * (dx_hat - x_hat * (x_hat * dx_hat).sum(1, keepdim=True))
