"""One training: a seed, a method and an implementation of the losses in; a trained network and its history out."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from train_ref.data import ImageData
from train_ref.implementations import LossFunctions
from train_ref.methods import Method, N
from train_ref.presets import DIGITS, Preset

LEARNING_RATE = DIGITS.learning_rate
WARM_UP = DIGITS.warm_up


@dataclass(frozen=True)
class Epoch:
    """Mean loss in nats, the learning rate of the last step, wall seconds, and the logit scale at the end where one is learned."""

    epoch: int
    loss: float
    lr: float
    seconds: float
    logit_scale: float | None = None


@dataclass
class History:
    """Everything a training has to say except its accuracies. order_sha256 covers the indices of every batch so far, in order.

    temperature is the one at first where it is learned.
    """

    method: str
    loss: str
    seed: int
    temperature: float
    epochs: list[Epoch] = field(default_factory=list)
    step_losses: list[float] = field(default_factory=list)
    order_sha256: str = ""
    seconds: float = 0.0
    cpu_seconds: float = 0.0


def learning_rate(step: int, steps: int, peak: float = LEARNING_RATE, warm_up: float = WARM_UP) -> float:
    """Linear warm-up over the first part of all steps, then half a cosine towards zero; step counts from 0."""
    warm = max(1, int(steps * warm_up))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def build_optimizer(groups: list[dict[str, Any]], preset: Preset) -> torch.optim.Optimizer:
    """AdamW, or SGD with momentum 0.9, for a learner's parameter groups; every step sets the learning rate."""
    if preset.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=preset.weight_decay)
    return torch.optim.AdamW(groups, weight_decay=preset.weight_decay)


def train_network(
    method: Method[N],
    functions: LossFunctions,
    data: ImageData,
    *,
    seed: int,
    temperature: float,
    epochs: int,
    batch_size: int,
    on_epoch: Callable[[History], None],
    preset: Preset = DIGITS,
) -> tuple[N, History]:
    """Train on the first data.n_train images, on their device; on_epoch is called after every epoch.

    Order, views and initial state have a generator each: one seed gives all methods and both implementations of the
    losses the same weights, batches and views. Raises FloatingPointError after the first epoch in which the loss of a step
    was not finite.
    """
    device = data.images.device
    network = method.build(seed, data, preset)
    order, views, start = (torch.Generator().manual_seed(3 * seed + stream) for stream in range(3))
    two_views = method.views[data.name]
    learner = method.learner(network, functions, temperature, preset, start)
    optimizer = build_optimizer(learner.parameter_groups(), preset)
    history = History(method.name, functions.name, seed, temperature)
    digest = hashlib.sha256()
    steps_per_epoch = data.n_train // batch_size
    steps, step = epochs * steps_per_epoch, 0

    began, cpu_began = time.perf_counter(), time.process_time()
    for epoch in range(1, epochs + 1):
        epoch_began = time.perf_counter()
        shuffled = torch.randperm(data.n_train, generator=order)
        losses = []
        # The last, smaller batch is dropped: it has fewer negatives. A new order every epoch evens that out.
        for batch in shuffled[: steps_per_epoch * batch_size].split(batch_size):
            digest.update(batch.numpy().tobytes())
            batch = batch.to(device, non_blocking=True)
            lr = learning_rate(step, steps, preset.peak_learning_rate(batch_size), preset.warm_up)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = learner.loss(two_views(data.images[batch], views), data.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            learner.after_step()
            losses.append(loss.detach())
            step += 1
        # Read once an epoch: a GPU would stand still at every step that waits for its loss.
        history.step_losses += torch.stack(losses).tolist()
        unusable = [i for i, value in enumerate(history.step_losses) if not math.isfinite(value)]
        if unusable:
            raise FloatingPointError(
                f"{method.name}, {functions.name} loss, seed {seed}: the loss is {history.step_losses[unusable[0]]} at step "
                f"{unusable[0] + 1}; temperature {temperature:g} is probably too low"
            )
        mean = math.fsum(history.step_losses[-steps_per_epoch:]) / steps_per_epoch
        history.epochs.append(Epoch(epoch, mean, lr, time.perf_counter() - epoch_began, learner.logit_scale()))
        history.order_sha256 = digest.hexdigest()
        on_epoch(history)
    history.seconds, history.cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    return network, history
