"""A tiled implementation of the losses in plain torch, sound by default, and faults to put into it, one at a time.

Every fault is one that fused kernels have had or could have. Each names the gate of train_ref/gates that must catch it; a
fault caught elsewhere only is a hole in that gate.

    PYTHONPATH=. python tests/mutants.py     the tables of docs/validation.md, measured: which gate catches which fault
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from train_ref.data import N_TRAIN, load_digits
from train_ref.gates.formula import formula
from train_ref.gates.free_run import free_run
from train_ref.gates.operator import operator
from train_ref.gates.outcome import outcome
from train_ref.gates.replay import Checkpoint, Recording, gradients, record, replay
from train_ref.gates.scenes import SCENES
from train_ref.gates.subject import Subject, dtype_name
from train_ref.gates.trainings import Trainings
from train_ref.gates.verdict import Verdict, worst
from train_ref.implementations import LossFunctions, dense_losses

# Columns of a tile, for up to 300 columns and for more. They divide no size in use, so the last tile is always ragged.
TILES = (48, 200)


@dataclass(frozen=True)
class Mutant:
    """A fault: how it reads, and the gate and dtype that must show it."""

    fault: str
    says: str
    gate: str
    dtype: torch.dtype = torch.float32


MUTANTS = (
    Mutant("one direction", "clip_loss without text to image", "formula"),
    Mutant("self is positive", "sup_con counts an anchor among its own positives", "formula"),
    Mutant("no scale", "gradient without its factor 1/temperature", "replay"),
    Mutant("one-sided", "gradient of the query side alone", "replay"),
    Mutant("self kept", "an anchor stays among its own keys", "replay"),
    Mutant("radial part", "gradient of the norms forgotten", "replay"),
    Mutant("tf32", "operands rounded to TF32, ten bits", "replay"),
    Mutant("scale factor", "derivative by the logit scale once more times the scale", "replay"),
    Mutant("backward self", "an anchor is among its own keys in the backward pass only", "operator"),
    Mutant("tail dropped", "the ragged last tile is never visited", "operator"),
    Mutant("wrong positive", "the positive of a row is its neighbour's", "operator"),
    Mutant("mask off by one", "the column beside the diagonal is excluded", "operator"),
    Mutant("scale sign", "derivative by the scale with the wrong sign", "operator"),
    Mutant("no maximum", "exponentials summed without subtracting a maximum", "operator"),
    Mutant("never rescaled", "the sum is not rescaled when the running maximum moves", "operator"),
    Mutant("row 0", "upstream gradient of row 0 used for every row", "operator"),
    Mutant("no upstream", "upstream gradient taken to be positive", "operator"),
    Mutant("epsilon", "1e-6 added to every norm", "operator"),
    Mutant("lonely anchor", "an anchor without positives counts its log-sum", "operator"),
    Mutant("wide rows", "gradient halved from 128 dimensions on", "operator"),
    Mutant("129", "the last key dropped where their number is 1 more than a multiple of 128", "operator"),
    Mutant("ids ignored", "ids of rows that belong together ignored", "operator"),
    Mutant("weight ignored", "weights of rows ignored", "operator"),
    Mutant("half sums", "running maximum and sum kept in bfloat16", "operator", torch.bfloat16),
    Mutant("one-hot outside", "the positive's 1 subtracted after the weights are rounded", "operator", torch.bfloat16),
    Mutant("two products", "positive logit from unrounded operands, the others from rounded ones", "operator", torch.bfloat16),
)


@dataclass(frozen=True)
class Relation:
    """The rules by which a column is positive for a row, or excluded.

    Positive are the row's partner and the columns with its label. Excluded are the row itself, the columns before own_before that are not
    its partner, and the columns with its excluded label that are not positive. In a decoupled loss the positives are no part of the sum.
    """

    partner: Tensor | None = None
    labels: tuple[Tensor, Tensor] | None = None
    exclude_self: bool = False
    own_before: int = 0
    excluded: tuple[Tensor, Tensor] | None = None
    decoupled: bool = False

    def tile(self, rows: int, columns: Tensor, fault: str, backward: bool = False) -> tuple[Tensor, Tensor]:
        """(rows, columns) positive and kept."""
        row, column = torch.arange(rows)[:, None], columns[None]
        excluded = torch.zeros(rows, len(columns), dtype=torch.bool)
        if self.exclude_self and fault != "self kept" and not (fault == "backward self" and backward):
            excluded = row + (fault == "mask off by one") == column
        positive = torch.zeros_like(excluded)
        if self.partner is not None:
            partner = self.partner.roll(1) if fault == "wrong positive" else self.partner
            positive = partner[:, None] == column
        if self.labels is not None:
            positive |= equal(self.labels, columns)
            if self.exclude_self and fault != "self is positive":
                positive &= row != column
        if self.own_before:
            excluded = excluded | ((column < self.own_before) & ~positive)
        if self.excluded is not None:
            excluded = excluded | (equal(self.excluded, columns) & ~positive)
        return positive, ~excluded


def equal(labels: tuple[Tensor, Tensor], columns: Tensor) -> Tensor:
    return (labels[0][:, None] == labels[1][columns]) & (labels[0][:, None] >= 0)


class RunningSum:
    """Running log-sum-exp of the rows over tiles."""

    def __init__(self, rows: int, like: Tensor, fault: str) -> None:
        self.fault = fault
        dtype = torch.bfloat16 if fault == "half sums" and like.dtype == torch.float32 else like.dtype
        self.largest, self.sum = torch.full((rows,), -torch.inf, dtype=dtype), torch.zeros(rows, dtype=dtype)

    def add(self, logits: Tensor, chosen: Tensor) -> None:
        logits = logits.masked_fill(~chosen, -torch.inf).to(self.sum.dtype)
        if self.fault == "no maximum":
            self.largest = torch.zeros_like(self.largest)
        largest = torch.maximum(self.largest, logits.amax(1)) if self.fault != "no maximum" else self.largest
        base = largest.masked_fill(largest.isinf(), 0.0)
        moved = 1.0 if self.fault == "never rescaled" else (self.largest - base).exp()
        self.sum = self.sum * moved + (logits - base[:, None]).exp().sum(1)
        self.largest = largest

    def value(self, like: Tensor) -> Tensor:
        return (self.largest.masked_fill(self.largest.isinf(), 0.0) + self.sum.log()).to(like.dtype)


class Tiled(torch.autograd.Function):
    """(M,) losses log sum_kept exp s - mean_positive s, a tile of columns at a time; k None: the keys are the queries."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor | None, scale: Tensor, pairs: Relation, fault: str) -> Tensor:
        q_hat, q_norm = unit(q, fault)
        k_hat, k_norm = (q_hat, q_norm) if k is None else unit(k, fault)
        negatives, positives = RunningSum(len(q), q_hat, fault), RunningSum(len(q), q_hat, fault)
        total, n_pos = torch.zeros_like(q_hat[:, 0]), torch.zeros_like(q_hat[:, 0])
        for columns in tiles(len(k_hat), fault):
            s = product(q_hat, k_hat[columns], q.dtype, fault) * scale
            positive, kept = pairs.tile(len(q), columns, fault)
            negatives.add(s, kept & ~positive)
            positives.add(s, positive)
            exact = q_hat @ k_hat[columns].T * scale if fault == "two products" else s
            total += exact.masked_fill(~positive, 0.0).sum(1)
            n_pos += positive.sum(1)
        lse_neg, lse_pos = negatives.value(q_hat), positives.value(q_hat)
        some = (n_pos > 0) & (lse_neg > -torch.inf) if pairs.decoupled else n_pos > 0
        lse = lse_neg if pairs.decoupled else F.softplus(lse_neg - lse_pos) + lse_pos
        loss = torch.where(some, lse - total / n_pos.clamp(min=1), lse_neg if fault == "lonely anchor" else 0.0)
        ctx.save_for_backward(q_hat, q_norm, k_hat, k_norm, scale, lse_neg, lse_pos, n_pos, some)
        ctx.pairs, ctx.fault, ctx.symmetric, ctx.dtype = pairs, fault, k is None, q.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        q_hat, q_norm, k_hat, k_norm, scale, lse_neg, lse_pos, n_pos, some = ctx.saved_tensors
        fault, dtype = ctx.fault, ctx.dtype
        if fault == "row 0":
            upstream = upstream[0].expand_as(upstream)
        if fault == "no upstream":
            upstream = upstream.abs()
        # The part of the negatives in the sum.
        share = torch.ones_like(lse_neg)[:, None] if ctx.pairs.decoupled else torch.sigmoid(lse_neg - lse_pos)[:, None]
        dq, dk, dscale = torch.zeros_like(q_hat), torch.zeros_like(k_hat), torch.zeros_like(scale)
        for columns in tiles(len(k_hat), fault):
            cosine = product(q_hat, k_hat[columns], dtype, fault)
            positive, kept = ctx.pairs.tile(len(q_hat), columns, fault, backward=True)
            s, one = cosine * scale, positive / n_pos.clamp(min=1)[:, None]
            of_positives = (s - lse_pos[:, None]).exp()
            negative = (s - lse_neg[:, None]).exp() * share
            # With one positive this is 1 - 1 - share, in which nothing cancels.
            w = torch.where(positive, (of_positives - one) - of_positives * share, negative)
            w = w.masked_fill(~(kept & some[:, None]), 0.0) * upstream[:, None]
            dscale += (w * cosine).sum()
            if fault == "one-hot outside":
                ones = one * upstream[:, None]
                w = (w + ones).to(dtype).to(w.dtype) - ones
            dq += w @ k_hat[columns]
            dk[columns] += w.T @ q_hat
        if fault != "no scale":
            dq, dk = dq * scale, dk * scale
        if fault == "wide rows" and dq.shape[1] >= 128:
            dq, dk = dq / 2, dk / 2
        if fault == "one-sided":
            dk = torch.zeros_like(dk)
        by_scale = {"scale sign": -dscale, "scale factor": dscale * scale}.get(fault, dscale)
        if ctx.symmetric:
            return through_norm(dq + dk, q_hat, q_norm, dtype, fault), None, by_scale, None, None
        return through_norm(dq, q_hat, q_norm, dtype, fault), through_norm(dk, k_hat, k_norm, dtype, fault), by_scale, None, None


def unit(rows: Tensor, fault: str) -> tuple[Tensor, Tensor]:
    """Rows of length 1 in float32 (float64 of float64), and their norms."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    norm = wide.norm(dim=1, keepdim=True)
    norm = norm + 1e-6 if fault == "epsilon" else norm.clamp(min=1e-12)
    return wide / norm, norm


def through_norm(d_hat: Tensor, hat: Tensor, norm: Tensor, dtype: torch.dtype, fault: str) -> Tensor:
    radial = 0.0 if fault == "radial part" else hat * (hat * d_hat).sum(1, keepdim=True)
    return ((d_hat - radial) / norm).to(dtype)


def tiles(columns: int, fault: str) -> list[Tensor]:
    if fault == "129" and columns % 128 == 1 and columns > 1:
        columns -= 1
    size = TILES[columns > 300]
    found = list(torch.arange(columns).split(size))
    return found[:-1] if fault == "tail dropped" and len(found[-1]) < size else found


def product(q_hat: Tensor, k_hat: Tensor, dtype: torch.dtype, fault: str) -> Tensor:
    """Cosines of a tile."""
    if fault == "two products":
        q_hat, k_hat = q_hat.to(dtype).to(q_hat.dtype), k_hat.to(dtype).to(k_hat.dtype)
    if fault == "tf32" and q_hat.dtype == torch.float32:
        # The low 13 of the 23 bits of the mantissa, rounded to nearest.
        q_hat, k_hat = (((x.contiguous().view(torch.int32) + 4096) & ~8191).view(torch.float32) for x in (q_hat, k_hat))
    return q_hat @ k_hat.T


# The losses -----------------------------------------------------------------------------------------------------------------------------


def tiled(fault: str = "") -> LossFunctions:
    """All losses with one fault, or none."""

    def rows(q: Tensor, k: Tensor | None, scale: Any, pairs: Relation) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        scale = scale.to(wide) if isinstance(scale, Tensor) else torch.tensor(scale, dtype=wide)
        return Tiled.apply(q, k, scale, pairs, fault)

    def pair(one: Tensor | None, other: Tensor | None) -> tuple[Tensor, Tensor] | None:
        return None if one is None or other is None or fault == "ids ignored" else (one, other)

    def reduced(rows: Tensor, reduction: str, weight: Tensor | None) -> Tensor:
        weight = torch.ones_like(rows) if weight is None or fault == "weight ignored" else weight.to(rows)
        rows = rows * weight
        return {"none": rows, "sum": rows.sum(), "mean": rows.sum() / weight.sum()}[reduction]

    def two_views(z0: Tensor, z1: Tensor, temperature: Any, decoupled: bool = False) -> Tensor:
        partner = torch.arange(2 * len(z0)).roll(len(z0))
        return rows(torch.cat([z0, z1]), None, 1 / temperature, Relation(partner, exclude_self=True, decoupled=decoupled))

    def nt_xent(z0: Tensor, z1: Tensor, temperature: Any = 0.5, reduction: str = "mean", *, weight: Tensor | None = None) -> Tensor:
        return reduced(two_views(z0, z1, temperature), reduction, weight)

    def dcl_loss(z0: Tensor, z1: Tensor, temperature: Any = 0.1, reduction: str = "mean", *, weight: Tensor | None = None) -> Tensor:
        return reduced(two_views(z0, z1, temperature, decoupled=True), reduction, weight)

    def info_nce(
        query: Tensor,
        positive_key: Tensor,
        temperature: Any = 0.1,
        reduction: str = "mean",
        *,
        weight: Tensor | None = None,
        query_ids: Tensor | None = None,
        key_ids: Tensor | None = None,
        exclude_query_ids: Tensor | None = None,
        exclude_key_ids: Tensor | None = None,
    ) -> Tensor:
        own = Relation(torch.arange(len(query)), pair(query_ids, key_ids), excluded=pair(exclude_query_ids, exclude_key_ids))
        return reduced(rows(query, positive_key, 1 / temperature, own), reduction, weight)

    def clip_loss(
        image: Tensor,
        text: Tensor,
        logit_scale: Any,
        reduction: str = "mean",
        *,
        weight: Tensor | None = None,
        image_ids: Tensor | None = None,
        text_ids: Tensor | None = None,
    ) -> Tensor:
        own = torch.arange(len(image))
        forth = rows(image, text, logit_scale, Relation(own, pair(image_ids, text_ids)))
        back = rows(text, image, logit_scale, Relation(own, pair(text_ids, image_ids)))
        return reduced(forth if fault == "one direction" else (forth + back) / 2, reduction, weight)

    def sup_con(
        features: Tensor, labels: Tensor, temperature: Any = 0.1, reduction: str = "mean", *, weight: Tensor | None = None
    ) -> Tensor:
        if features.ndim == 3:
            labels, features = labels.repeat_interleave(features.shape[1]), features.flatten(0, 1)
        return reduced(rows(features, None, 1 / temperature, Relation(labels=(labels, labels), exclude_self=True)), reduction, weight)

    def moco_loss(
        q: Tensor, k: Tensor, queue: Tensor, temperature: Any = 0.07, reduction: str = "mean", *, weight: Tensor | None = None
    ) -> Tensor:
        pairs = Relation(torch.arange(len(q)), own_before=len(k))
        return reduced(rows(q, torch.cat([k, queue]), 1 / temperature, pairs), reduction, weight)

    losses = (info_nce, nt_xent, dcl_loss, sup_con, clip_loss, moco_loss)
    return LossFunctions(fault or "tiled", {loss.__name__: loss for loss in losses})


# The measured tables --------------------------------------------------------------------------------------------------------------------

# Faults that training hardly notices: their outcome is measured too.
TRAINED = ("no scale", "one-sided", "self kept", "tail dropped")


def subject(mutant: Mutant) -> Subject:
    return Subject(mutant.fault, tiled(mutant.fault), mutant.dtype)


def cosine_of_dz(functions: LossFunctions, checkpoint: Checkpoint) -> float:
    """The cosine of these losses' gradient of the embeddings and the reference's, which replay does not look at."""
    one, other = gradients(functions, checkpoint), gradients(dense_losses(), checkpoint)
    return F.cosine_similarity(one.dz.double(), other.dz.double(), dim=0).item()


def caught(verdict: Verdict) -> str:
    return "caught" if verdict.status == "fail" else verdict.status


def table_of_faults(recordings: list[Recording]) -> list[str]:
    """Every fault through the first three gates; bold is the gate that the fault is assigned to."""
    lines = ["| fault | given | formula | operator | replay |", "|---|---|---|---|---|"]
    for mutant in MUTANTS:
        faulty = subject(mutant)
        cells = [caught(verdict) for verdict in (formula(faulty), operator(faulty), replay(faulty, recordings))]
        cells = [
            f"**{cell}**" if gate == mutant.gate else cell for gate, cell in zip(("formula", "operator", "replay"), cells, strict=True)
        ]
        lines.append(f"| {mutant.says} | {dtype_name(mutant.dtype)} | " + " | ".join(cells) + " |")
    return lines


def table_of_outcomes(recording: Recording, trainings: Trainings) -> list[str]:
    """Four faults as a cosine, a training and its accuracies show them."""
    lines = [
        "| fault | replay ‖dz‖ | cosine of dz | free run | 1-shot, points | linear, points | outcome |",
        "|---|---|---|---|---|---|---|",
    ]
    for mutant in (mutant for mutant in MUTANTS if mutant.fault in TRAINED):
        faulty = subject(mutant)
        dz = next(check.measured for check in replay(faulty, [recording]).checks if check.name.endswith("dz"))
        cosine = min(cosine_of_dz(faulty.functions, checkpoint) for checkpoint in recording.checkpoints)
        free, reached = free_run(faulty, trainings), outcome(faulty, trainings)
        points = [f"{100 * found['low']:+.2f} to {100 * found['high']:+.2f}" for found in reached.notes.values()]
        at = f"{caught(free)}, {worst(free.checks).name}" if free.status == "fail" else free.status
        lines.append(f"| {mutant.says} | {dz:.2g} | {cosine:.10f} | {at} | " + " | ".join(points) + f" | {caught(reached)} |")
    return lines


def main() -> None:
    torch.set_num_threads(1)
    data = load_digits()
    recordings = [record(name, data.images[:N_TRAIN], data.labels[:N_TRAIN], steps=40, checkpoints=20, batch_size=128) for name in SCENES]
    print("\n".join(table_of_faults(recordings)) + "\n", flush=True)
    print("\n".join(table_of_outcomes(recordings[0], Trainings(data, epochs=20))))


if __name__ == "__main__":
    main()
