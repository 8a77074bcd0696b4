"""Gate 3: loss and gradients at the parameters of a real training, against the dense float32 reference.

The reference trains alone and is stopped at some steps. There the subject gets the same embeddings, and four relative
errors are taken: of the loss, and the norms of the differences of the gradients by the embeddings, by the parameters and,
where there is one, by the logit scale. A cosine would not do: a gradient without its factor 1/temperature has cosine 1.

A loss that is nearly 0 is no place to compare with float32, whose own relative error is 1e-2 where the loss is 1e-5:
losses below 0.5 are compared with 0.5, which is the floor of 1e-6 nats; these trainings stay above 2.
"""

from __future__ import annotations

import copy
import hashlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from train_ref.gates.scenes import SCENES, Scene
from train_ref.gates.subject import Subject
from train_ref.gates.verdict import Check, Verdict, raised
from train_ref.implementations import LossFunctions, dense_losses
from train_ref.loop import learning_rate

QUANTITIES = ("loss", "dz", "dtheta", "dscale")
# Between correct float32 implementations 2e-7, 5e-7 and 6e-7 were measured for SimCLR at temperature 0.5; an embedding
# that is rounded to bfloat16 on its way moves the loss by 2e-5 and the gradients by 5e-3.
LIMITS = {
    torch.float32: {"loss": 2e-6, "dz": 1e-5, "dtheta": 2e-5, "dscale": 2e-5},
    torch.bfloat16: {"loss": 2e-4, "dz": 2e-2, "dtheta": 2e-2, "dscale": 2e-2},
}
LEAST_LOSS = 0.5


@dataclass
class Checkpoint:
    """A scene as it was before a step, and the inputs of that step."""

    step: int
    scene: Scene
    inputs: Tensor
    labels: Tensor


@dataclass
class Gradients:
    """One loss at one checkpoint: by the embeddings, by the parameters, and by the logarithm of the logit scale."""

    loss: float
    dz: Tensor
    dtheta: Tensor
    dscale: Tensor | None


@dataclass
class Recording:
    """A training of the reference. order_sha256 covers the indices of every batch, in order."""

    scene: str
    seed: int
    losses: list[float] = field(default_factory=list)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    order_sha256: str = ""

    @cached_property
    def exact(self) -> list[Gradients]:
        """The reference's own, at every checkpoint."""
        return [gradients(dense_losses(), checkpoint) for checkpoint in self.checkpoints]

    @cached_property
    def typical_dscale(self) -> float:
        """Median magnitude. The learned scale nears its optimum, where the derivative is a small rest of its terms."""
        found = [exact.dscale.abs().item() for exact in self.exact if exact.dscale is not None]
        return statistics.median(found) if found else 0.0


def record(
    name: str,
    images: Tensor,
    labels: Tensor,
    *,
    seed: int = 0,
    steps: int = 125,
    checkpoints: int = 25,
    batch_size: int = 256,
) -> Recording:
    """Train a scene with the reference on (N, 1, 8, 8) images, and keep it at so many evenly spaced steps.

    AdamW with the learning rates of a whole training of so many steps: large and small gradients both come by.
    """
    scene = SCENES[name](seed, images.device)
    order, views = (torch.Generator().manual_seed(2 * seed + stream) for stream in range(2))
    optimizer = torch.optim.AdamW(scene.parameters(), weight_decay=1e-4)
    found, digest = Recording(name, seed), hashlib.sha256()
    kept = set(torch.linspace(0, steps - 1, checkpoints).round().int().tolist())
    batches: list[Tensor] = []
    for step in range(steps):
        if not batches:
            batches = [part for part in torch.randperm(len(images), generator=order).split(batch_size) if len(part) == batch_size]
        batch = batches.pop()
        digest.update(batch.numpy().tobytes())
        batch = batch.to(images.device)
        inputs = scene.inputs(images[batch], views)
        if step in kept:
            found.checkpoints.append(Checkpoint(step, copy.deepcopy(scene), inputs, labels[batch]))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = scene.loss(dense_losses(), scene.embed(inputs), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scene.after_step()
        found.losses.append(loss.item())
    found.order_sha256 = digest.hexdigest()
    return found


def gradients(functions: LossFunctions, checkpoint: Checkpoint) -> Gradients:
    """The checkpoint's scene forward and backward with these losses."""
    scene = checkpoint.scene
    embeddings = scene.embed(checkpoint.inputs)
    loss = scene.loss(functions, embeddings, checkpoint.labels)
    parameters = {name: parameter for name, parameter in scene.named_parameters() if parameter.requires_grad}
    by = torch.autograd.grad(loss, [*embeddings, *parameters.values()])
    by_parameter = dict(zip(parameters, by[len(embeddings) :], strict=True))
    dscale = by_parameter.pop("log_scale", None)
    return Gradients(
        loss.item(),
        torch.cat([gradient.flatten() for gradient in by[: len(embeddings)]]),
        torch.cat([gradient.flatten() for gradient in by_parameter.values()]),
        dscale,
    )


def relative_errors(found: Gradients, exact: Gradients, least_dscale: float) -> dict[str, float]:
    """Of the loss and of every gradient; of vectors the norm of the difference over the norm."""
    errors = {"loss": abs(found.loss - exact.loss) / max(abs(exact.loss), LEAST_LOSS)}
    for name in QUANTITIES[1:]:
        one, other = getattr(found, name), getattr(exact, name)
        if other is not None:
            least = least_dscale if name == "dscale" else 0.0
            errors[name] = (one.double() - other.double()).norm().item() / max(other.double().norm().item(), least)
    return errors


def replay(subject: Subject, recordings: Sequence[Recording]) -> Verdict:
    """Per scene and quantity the worst checkpoint. The notes hold the errors of every checkpoint, for the picture.

    A scene that the subject refuses leaves a verdict of "not run"; a checkpoint at which it raises anything else has failed.
    """
    verdict = Verdict("replay", subject.label)
    if subject.dtype not in LIMITS:
        verdict.not_run.append("everything: no limits are set for this dtype")
        return verdict
    limits = LIMITS[subject.dtype]
    for recording in recordings:
        steps = [checkpoint.step + 1 for checkpoint in recording.checkpoints]
        where = [f"step {step}" for step in steps]
        try:
            errors = errors_along(subject, recording, where)
        except NotImplementedError as reason:
            verdict.missing.append(f"{recording.scene}: {' '.join(str(reason).split())}")
            continue
        for name, series in errors.items():
            # nan counts as the largest: max() alone would lose it.
            at = max(range(len(series)), key=lambda index: math.inf if math.isnan(series[index]) else series[index])
            verdict.checks.append(Check(f"{recording.scene} {name}", series[at], limits[name], where[at]))
        verdict.notes[recording.scene] = {"steps": steps, "errors": errors, "order_sha256": recording.order_sha256}
    verdict.not_run += verdict.missing
    return verdict


def errors_along(subject: Subject, recording: Recording, where: list[str]) -> dict[str, list[float]]:
    """By quantity the relative error at every checkpoint; nan where the subject raised an error, which where[checkpoint] then tells."""
    errors: dict[str, list[float]] = {}
    for at, (checkpoint, exact) in enumerate(zip(recording.checkpoints, recording.exact, strict=True)):
        try:
            found = relative_errors(gradients(subject.trained(), checkpoint), exact, recording.typical_dscale)
        except NotImplementedError:
            raise
        except Exception as error:
            found = {name: math.nan for name in QUANTITIES if getattr(exact, name) is not None}
            where[at] += f": {raised(error)}"
        for name, value in found.items():
            errors.setdefault(name, []).append(value)
    return errors
