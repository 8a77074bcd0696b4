"""Trainings that the last two gates share: the reference, the noise control and every subject, on the same seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from train_ref.data import ImageData
from train_ref.evaluate import Accuracies, evaluate_encoder
from train_ref.gates.subject import Subject, noise_control
from train_ref.gates.verdict import raised
from train_ref.implementations import dense_losses
from train_ref.loop import History, train_network
from train_ref.methods import SIMCLR
from train_ref.model import Network, build_network

TEMPERATURE = 0.5


class Stopped(Exception):
    """Ends a training after the epochs that were asked for."""


@dataclass
class Run:
    """One SimCLR training: its loss at every step, nan throughout if it `failed`, which says how. No network if it was not finished.

    orders are the hashes of the batches' indices up to the end of every epoch.
    """

    losses: Sequence[float]
    orders: Sequence[str]
    network: Network | None
    data: ImageData
    failed: str = ""

    @cached_property
    def accuracies(self) -> Accuracies:
        """Of the frozen features; nan without a network."""
        if self.network is None:
            return Accuracies(float("nan"), float("nan"), float("nan"))
        return evaluate_encoder(self.network.encoder, self.data)

    @cached_property
    def parameters(self) -> Tensor:
        return flat(self.network) if self.network is not None else torch.tensor(float("nan"))


class Trainings:
    """Runs by subject and seed, each trained once: same weights at first, same batches, same views for one seed.

    stop_after ends them early with the learning rates of all the epochs: how far rounding has led by a step depends on these.
    """

    def __init__(self, data: ImageData, epochs: int = 40, batch_size: int = 256, stop_after: int | None = None) -> None:
        self.data, self.epochs, self.batch_size, self.stop_after = data, epochs, batch_size, stop_after
        self.reference = Subject("reference losses", dense_losses(), device=data.images.device)
        # Two, as one training is a small sample of how far rounding leads.
        self.controls = (noise_control(), noise_control("rotated"))
        self._runs: dict[tuple[str, int], Run] = {}

    @property
    def steps(self) -> int:
        return (self.stop_after or self.epochs) * (self.data.n_train // self.batch_size)

    def of(self, subject: Subject, seed: int) -> Run:
        """The run of that subject, trained now if it is the first time. Raises NotImplementedError if the subject does."""
        key = (subject.label, seed)
        if key not in self._runs:
            self._runs[key] = self._train(subject, seed)
        return self._runs[key]

    def failure(self, subject: Subject, seeds: int) -> str:
        """How the first that failed of its runs did so; empty where none did. Raises NotImplementedError if the subject does."""
        return next((run.failed for run in (self.of(subject, seed) for seed in range(seeds)) if run.failed), "")

    def _train(self, subject: Subject, seed: int) -> Run:
        so_far: list[float] = []
        orders: list[str] = []

        def on_epoch(history: History) -> None:
            so_far[:] = history.step_losses
            orders.append(history.order_sha256)
            if len(history.epochs) == self.stop_after:
                raise Stopped

        try:
            network, history = train_network(
                SIMCLR,
                subject.trained(),
                self.data,
                seed=seed,
                temperature=TEMPERATURE,
                epochs=self.epochs,
                batch_size=self.batch_size,
                on_epoch=on_epoch,
            )
        except Stopped:
            return Run(so_far, orders, None, self.data)
        except NotImplementedError:
            raise
        except Exception as error:  # FloatingPointError: a loss that was not finite
            return Run([float("nan")] * self.steps, orders, None, self.data, raised(error))
        return Run(history.step_losses, orders, network, self.data)

    def path(self, seed: int) -> float:
        """How far the reference's parameters move in all."""
        start = flat(build_network(seed, self.data.images.device))
        return (self.of(self.reference, seed).parameters - start).norm().item()


def flat(network: Network) -> Tensor:
    """All parameters in one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])
