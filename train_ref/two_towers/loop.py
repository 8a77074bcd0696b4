"""One training of two towers: a variant, an implementation and a seed in; trained towers and their history out."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from train_ref.implementations import LossFunctions
from train_ref.loop import learning_rate
from train_ref.two_towers.data import Images, PairData
from train_ref.two_towers.mining import mine
from train_ref.two_towers.objectives import false_negatives, mined_false_negatives, objective
from train_ref.two_towers.text import Bags
from train_ref.two_towers.towers import LogitScale, TwoTowers, build_towers

WEIGHT_DECAY = 1e-4
WARM_UP = 0.1  # of all steps


@dataclass(frozen=True)
class Settings:
    """What a data set is trained with. temperature is 1 / the logit scale at first; dropout the share of n-grams left out of a text;
    hard_negatives how many are mined for each pair."""

    epochs: int
    batch_size: int
    temperature: float
    learning_rate: float
    dropout: float
    hard_negatives: int = 0


@dataclass(frozen=True)
class Epoch:
    """Mean loss in nats, logit scale and learning rate of the last step, wall seconds."""

    epoch: int
    loss: float
    logit_scale: float
    lr: float
    seconds: float


@dataclass
class History:
    """All that a training has to say. order_sha256 covers the indices of every batch, in order; false_negatives is the mean number of
    other rows of a batch with a row's id; mined_false_negatives of hard negatives with it among those mined for the row itself, and
    met_false_negatives among all those of its batch, over the epochs that have hard negatives."""

    variant: str
    loss: str
    seed: int
    epochs: list[Epoch] = field(default_factory=list)
    step_losses: list[float] = field(default_factory=list)
    order_sha256: str = ""
    false_negatives: float = 0.0
    mined_false_negatives: float = 0.0
    met_false_negatives: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0


def logit_scale(functions: LossFunctions, temperature: float) -> nn.Module:
    """fastnce's module beside its losses, the same in plain torch beside the dense ones."""
    if functions.name == "reference":
        return LogitScale(1 / temperature)
    import fastnce

    module: nn.Module = fastnce.LogitScale(1 / temperature)
    return module


def some(side: Images | Bags, index: Tensor, dropout: float, generator: torch.Generator) -> Tensor | Bags:
    """Those images, or those texts without some of their n-grams."""
    chosen = side.select(index)
    return chosen.thinned(dropout, generator) if isinstance(chosen, Bags) else chosen


def train_towers(
    data: PairData,
    settings: Settings,
    variant: str,
    functions: LossFunctions,
    *,
    seed: int,
    device: torch.device,
    on_epoch: Callable[[History], None],
) -> tuple[TwoTowers, History]:
    """Train on data.train; on_epoch is called after every epoch.

    With settings.hard_negatives, every epoch but the first begins by mining with the towers as they are, and every left half of a batch
    meets what was mined for any of them. One seed gives all variants and both implementations the same initial weights, batches and
    left-out n-grams of the batch.
    Raises FloatingPointError when the loss is no longer finite.
    """
    loss_of = objective(variant, functions)
    towers, scale = build_towers(data, seed, device), logit_scale(functions, settings.temperature).to(device)
    order, dropped = (torch.Generator().manual_seed(2 * seed + stream) for stream in range(2))
    dropped_mined = torch.Generator().manual_seed(-1 - seed)  # of its own: how many n-grams were mined depends on the towers
    # Weight decay would pull the scale towards 1; CLIP exempts it.
    groups: list[dict[str, Any]] = [{"params": list(towers.parameters())}, {"params": list(scale.parameters()), "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)
    history, digest, copies = History(variant, functions.name, seed), hashlib.sha256(), list[float]()
    mined_copies: list[tuple[float, float]] = []
    steps_per_epoch = len(data.train) // settings.batch_size
    steps = settings.epochs * steps_per_epoch

    began, cpu_began = time.perf_counter(), time.process_time()
    for epoch in range(1, settings.epochs + 1):
        epoch_began = time.perf_counter()
        hard = mine(towers, data, settings.hard_negatives) if settings.hard_negatives and epoch > 1 else None
        shuffled = torch.randperm(len(data.train), generator=order)
        # The last, smaller batch is dropped: it has fewer negatives. A new order every epoch evens that out.
        for rows in shuffled[: steps_per_epoch * settings.batch_size].split(settings.batch_size):
            batch = data.train[rows]
            digest.update(batch.numpy().tobytes())
            ids = data.ids[batch]
            copies.append(false_negatives(ids))
            lr = learning_rate(len(history.step_losses), steps, settings.learning_rate, WARM_UP)
            for group in optimizer.param_groups:
                group["lr"] = lr
            left, right = (some(side, batch, settings.dropout, dropped).to(device) for side in (data.left, data.right))
            left_embedding, right_embedding = towers(left, right)
            mined, mined_ids = None, None
            if hard is not None:
                mined_copies.append(mined_false_negatives(ids, data.ids[hard[rows]]))
                index = hard[rows].flatten()
                mined = towers.right(some(data.right, index, settings.dropout, dropped_mined).to(device))
                mined_ids = data.ids[index].to(device)
            loss = loss_of(left_embedding, right_embedding, scale(), ids.to(device), mined, mined_ids)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.step_losses.append(loss.item())
            if not math.isfinite(history.step_losses[-1]):
                raise FloatingPointError(
                    f"{data.name}, {variant}, {functions.name} loss, seed {seed}: the loss is {history.step_losses[-1]} at step "
                    f"{len(history.step_losses)}; temperature {settings.temperature:g} is probably too low"
                )
        mean = math.fsum(history.step_losses[-steps_per_epoch:]) / steps_per_epoch
        history.epochs.append(Epoch(epoch, mean, scale().item(), lr, time.perf_counter() - epoch_began))
        on_epoch(history)
    history.order_sha256, history.false_negatives = digest.hexdigest(), math.fsum(copies) / len(copies)
    if mined_copies:
        history.mined_false_negatives, history.met_false_negatives = (math.fsum(c) / len(c) for c in zip(*mined_copies, strict=True))
    history.seconds, history.cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    return towers, history
