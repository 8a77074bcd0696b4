"""Contestants that need a GPU, or are only worth comparing with on one. The same leaves and the same answer as in peers.py.

eager autocast      peers.py's eager form under bfloat16 autocast, as mixed-precision training runs it
compile autocast    torch.compile of that
chunked cuBLAS      ours, plain: chunks of rows, each a cuBLAS product whose bfloat16 logits are read once for the log-sums and once for
                    their gradient, which is made in the forward and is exact. siglip-kernel and Liger do the same for their losses
inf-cl              Inf-CL's Triton loss (Cheng et al. 2024, arXiv:2410.17243), one call per direction
cut-cross-entropy   Apple's linear_cross_entropy (Wijmans et al. 2024, arXiv:2411.09009), keys as classifier, without its gradient filter
liger-kernel        its fused linear cross-entropy, keys as classifier
memeff              its CLIP loss, both directions in one pass. Its scale is a constant, so it makes one gradient less. stable=False, since
                    its default multiplies the gradient by sqrt(batch * temperature)
siglip-kernel       another loss of the same two towers and products: sigmoids, one direction. Its time can be compared, its value cannot

The last five compare rows with keys, so they have no form that leaves a row's own column out: they serve info_nce and clip only.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import dense
from bench.dense import EAGER, Contestant, indices, open_clip_form, partners, supcontrast_form
from bench.peers import Factories

ROWS = 4096  # of a chunk, as siglip-kernel has on Hopper: its logits at N = 65,536 are 512 MiB in bfloat16
OTHER_VALUE = ("siglip-kernel",)  # contestants that compute another loss


# ---------------------------------------------------------------- mixed precision


def autocast(function: Contestant) -> Contestant:
    def call(*leaves: Tensor) -> Tensor:
        with torch.autocast(leaves[0].device.type, dtype=torch.bfloat16):
            return function(*leaves)

    return call


def compiled(function: Contestant) -> Contestant:
    # On a CPU this is a dry run, and does without the C++ compiler that the usual backend needs there.
    found: Contestant = torch.compile(function, backend="inductor" if torch.cuda.is_available() else "aot_eager")
    return found


# ---------------------------------------------------------------- chunked products


def _sums(logits: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sums of a chunk (C, N) of cosines: of its rows, and of its part of every column."""
    s = logits.float() * scale
    return s.logsumexp(1), s.logsumexp(0)


def _weights(logits: Tensor, scale: Tensor, lse: Tensor, share: float) -> Tensor:
    """share * softmax of every row, in the dtype of the products."""
    return ((logits.float() * scale - lse[:, None]).exp() * share).to(logits.dtype)


def _both_weights(logits: Tensor, scale: Tensor, rows: Tensor, columns: Tensor, share: float) -> Tensor:
    s = logits.float() * scale
    return (((s - rows[:, None]).exp() + (s - columns[None, :]).exp()) * share).to(logits.dtype)


@cache
def _fast(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """One pass over the logits instead of one per operation, where there is a compiler for the device."""
    return torch.compile(function, dynamic=False) if device == "cuda" else function


class Chunked(torch.autograd.Function):
    """Mean over the rows i of log sum_j exp(s_ij) - s_ip, of unit rows, s = scale <q_i, k_j>; with `both` also over the columns, halved.

    exclude_self: k is q, and j = i is left out. The positive of row i is column positive[i]; where both, that is i. One direction costs 3
    products in all, both directions 4: the log-sums of the columns are known after the last chunk, so the logits are made twice.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, scale: Tensor, positive: Tensor, exclude_self: bool, both: bool) -> Tensor:
        n, starts, device = len(q), range(0, len(q), ROWS), q.device.type
        dq, dk = torch.empty_like(q), torch.zeros(k.shape, device=k.device)
        rows = torch.empty(n, device=q.device)
        columns = torch.full((len(k),), -torch.inf, device=q.device)
        share = 1 / n / (2 if both else 1)

        def logits(start: int) -> Tensor:
            chunk = q[start : start + ROWS] @ k.T
            if exclude_self:
                chunk.diagonal(start).fill_(-torch.inf)
            return chunk

        def gradients(start: int, weights: Tensor) -> None:
            chunk = slice(start, start + ROWS)
            dq[chunk] = weights @ k
            dk.add_(weights.T @ q[chunk])

        for start in starts:
            chunk, part = slice(start, start + ROWS), logits(start)
            if both:
                rows[chunk], of_part = _fast(_sums, device)(part, scale)
                columns = torch.logaddexp(columns, of_part)
            else:
                rows[chunk] = _fast(_row_sums, device)(part, scale)
                gradients(start, _fast(_weights, device)(part, scale, rows[chunk], share))
        for start in starts if both else ():
            gradients(start, _fast(_both_weights, device)(logits(start), scale, rows[start : start + ROWS], columns, share))
        # The positive's weight, -1 / n, is added apart: as one number with a probability it would be rounded to the products' dtype.
        toward = k[positive].float()
        wide = dq.float() - toward / n
        dk.index_add_(0, positive, q.float(), alpha=-1 / n)
        pos = (q.float() * toward).sum(1)
        # sum_ij w_ij <q_i, k_j> = sum_i <q_i, dq_i>: the derivative by the scale needs no pass of its own.
        by_scale = (q.float() * wide).sum()
        ctx.save_for_backward((wide * scale).to(q.dtype), (dk * scale).to(k.dtype), by_scale)
        loss = (rows - scale * pos).mean()
        return (loss + (columns - scale * pos).mean()) / 2 if both else loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk, by_scale = ctx.saved_tensors
        g = grads[0]
        return dq * g.to(dq.dtype), dk * g.to(dk.dtype), by_scale * g, None, None, None


def _row_sums(logits: Tensor, scale: Tensor) -> Tensor:
    return (logits.float() * scale).logsumexp(1)


def _unit(x: Tensor) -> Tensor:
    """Rows of length one: norms in float32, rows in their own dtype."""
    return F.normalize(x.float(), dim=1).to(x.dtype)


def _scale(x: Tensor) -> Tensor:
    return torch.tensor(1 / dense.TEMPERATURE, device=x.device)


def chunked_nt_xent(z: Tensor) -> Tensor:
    unit = _unit(z)
    found: Tensor = Chunked.apply(unit, unit, _scale(z), partners(z), True, False)
    return found


def chunked_info_nce(query: Tensor, key: Tensor) -> Tensor:
    found: Tensor = Chunked.apply(_unit(query), _unit(key), _scale(query), indices(query), False, False)
    return found


def chunked_clip(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    found: Tensor = Chunked.apply(_unit(image), _unit(text), logit_scale, indices(image), False, True)
    return found


CHUNKED: dict[str, Contestant] = {"nt_xent": chunked_nt_xent, "info_nce": chunked_info_nce, "clip": chunked_clip}


# ---------------------------------------------------------------- other packages

# Mean cross-entropy of scaled unit rows against unit rows, the positive at the same index.
OneDirection = Callable[[Tensor, Tensor], Tensor]


def _member(module: str, name: str) -> Any:
    """A function of a package. Some packages fail to be imported without a GPU, each in its own way: here all raise ImportError."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:
        raise ImportError(f"{module}: {type(error).__name__}: {error}") from error


def _inf_cl() -> OneDirection:
    # cal_inf_loss would not do: it sums the gradient of its scale over a group of processes, and here there is none.
    loss = _member("inf_cl", "cal_flash_loss")

    def call(q: Tensor, k: Tensor) -> Tensor:
        d = q.shape[1]
        found: Tensor = loss(q, k, head_dim=256 if d % 256 == 0 else d).mean()  # columns are cut into heads of 16 to 256
        return found

    return call


def _cut_cross_entropy() -> OneDirection:
    loss = _member("cut_cross_entropy", "linear_cross_entropy")
    return lambda q, k: loss(q.contiguous(), k, indices(q), filter_eps=None)


def _liger() -> OneDirection:
    loss = _member("liger_kernel.ops.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")
    return lambda q, k: loss.apply(q, k, indices(q))[0]


def _siglip() -> Contestant:
    loss = _member("siglip_kernel", "fused_siglip_loss")

    def call(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
        bias = torch.full_like(logit_scale, -10.0)
        found: Tensor = loss(_unit(image), _unit(text), logit_scale.log(), bias)
        return found

    return call


def _memeff() -> Contestant:
    # Rows are passed as they are: the loss normalises them itself, unless it is made with normalized_inputs=True.
    loss = _member("memeff", "MemoryEfficientCLIPLoss")(temperature=1 / dense.LOGIT_SCALE, stable=False)

    def call(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
        found: Tensor = loss(image, text)
        return found

    return call


def _by_rows(factory: Callable[[], OneDirection]) -> Contestant:
    """info_nce by a cross-entropy of one direction."""
    loss = factory()
    return lambda query, key: loss((_unit(query) / dense.TEMPERATURE).to(query.dtype), _unit(key))


def _by_both(factory: Callable[[], OneDirection]) -> Contestant:
    """clip by a cross-entropy of one direction, called twice."""
    loss = factory()

    def call(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
        a, b = _unit(image), _unit(text)
        return (loss((logit_scale * a).to(a.dtype), b) + loss((logit_scale * b).to(b.dtype), a)) / 2

    return call


FACTORIES: Factories = {
    loss: {
        "eager autocast": partial(autocast, EAGER[loss]),
        "compile autocast": partial(compiled, autocast(EAGER[loss])),
        **({"chunked cuBLAS": partial(CHUNKED.__getitem__, loss)} if loss in CHUNKED else {}),
    }
    for loss in dense.LOSSES
}
FACTORIES["sup_con"]["SupContrast autocast"] = partial(autocast, supcontrast_form)
FACTORIES["clip"]["open_clip autocast"] = partial(autocast, open_clip_form)
FACTORIES["clip"]["siglip-kernel"] = _siglip
FACTORIES["clip"]["memeff"] = _memeff
for _name, _factory in (("inf-cl", _inf_cl), ("cut-cross-entropy", _cut_cross_entropy), ("liger-kernel", _liger)):
    FACTORIES["info_nce"][_name] = partial(_by_rows, _factory)
    FACTORIES["clip"][_name] = partial(_by_both, _factory)
