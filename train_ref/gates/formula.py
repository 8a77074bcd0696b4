"""Gate 1: the same function as other projects compute, in float64.

golden/peers.json holds the losses and gradients of nine implementations of seven projects: four projects' own code and the
formulas of three restated. float64 leaves no room for a missing factor, another set of keys or another mean: correct
implementations agree to 1e-14. The dense reference is held to the same vectors, because the other gates compare with it.
"""

from __future__ import annotations

import inspect
import json
from typing import Any

import numpy as np
import torch

from train_ref.gates.subject import Subject, offers
from train_ref.gates.verdict import Check, Verdict, failure, worst_by_name
from train_ref.truth.golden import make

LOSS_LIMIT = 1e-12  # relative
GRADIENT_LIMIT = 1e-11


def formula(subject: Subject) -> Verdict:
    """Every stored case the subject has the arguments for; per peer the worst relative error of loss and gradient.

    The subject's dtype plays no part. Raises RuntimeError when numpy builds other inputs than the file was made of.
    """
    verdict = Verdict("formula", subject.name)
    try:
        view = torch.eye(2, dtype=torch.float64, device=subject.device)
        subject.loss("nt_xent")(view, view)
    except NotImplementedError as reason:
        # Explicit negatives may not need the part that lacks float64. Passing with those alone would say too much.
        return verdict.refused(reason)
    except Exception as error:
        verdict.checks.append(failure("two rows", LOSS_LIMIT, error))
        return verdict
    found: list[Check] = []
    functions: dict[str, bool] = {}  # whether any case of it was answered
    for case in json.loads(make.FILE.read_text())["cases"]:
        peer = case["peer"].removeprefix("formula of ").removesuffix(", restated")
        where = f"{case['function']} {case['options'] or case['inputs']['logit_scale']}"
        functions.setdefault(case["function"], False)
        arrays = make.build(case["inputs"])
        if make.digest(arrays) != case["digest"]:
            raise RuntimeError(f"numpy {np.__version__} gave other random inputs than {make.FILE.name} was made of")
        try:
            loss_error, gradient_error = errors(subject, case, arrays)
        except (NotOffered, NotImplementedError) as missing:
            verdict.not_run.append(f"{where} of {peer}: {' '.join(str(missing).split())}")
            continue
        except Exception as error:
            found.append(failure(f"{peer}: loss", LOSS_LIMIT, error, where))
            continue
        functions[case["function"]] = True
        found.append(Check(f"{peer}: loss", loss_error, LOSS_LIMIT, where))
        found.append(Check(f"{peer}: gradient", gradient_error, GRADIENT_LIMIT, where))
    verdict.checks = worst_by_name(found)
    verdict.missing = [f"{function}: not one case" for function, answered in functions.items() if not answered]
    verdict.not_run += verdict.missing
    return verdict


class NotOffered(Exception):
    """The subject cannot be asked this, and says why."""


def errors(subject: Subject, case: dict[str, Any], arrays: dict[str, Any]) -> tuple[float, float]:
    """Relative errors of the loss, and of the worst gradient as far as its norm, entries and products show it."""
    loss = subject.loss(case["function"])
    options = dict(case["options"])
    # Some read from the number of dimensions that each query has negatives of its own.
    if "negative_mode" in options and not offers(loss, "negative_mode"):
        del options["negative_mode"]
    for argument in (*arrays, *options):
        if not offers(loss, argument):
            raise NotOffered(f"has no argument {argument}")
    if case["function"] == "sup_con" and "labels" not in arrays and needs(loss, "labels"):
        arrays["labels"] = np.arange(len(arrays["features"]))  # the definition of going without: a class per example
    inputs = {name: tensor.detach().to(subject.device) for name, tensor in make.tensors(arrays, torch.float64).items()}
    inputs = {name: tensor.requires_grad_(tensor.is_floating_point()) for name, tensor in inputs.items()}
    leaves = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    value = loss(**inputs, **options)
    gradients = torch.autograd.grad(case["times"] * value + case["plus"], list(leaves.values()))
    loss_error = abs(case["times"] * value.item() + case["plus"] - case["loss"]) / abs(case["loss"])
    by_input = zip(leaves, gradients, strict=True)
    return loss_error, max(gradient_error(gradient.cpu().numpy(), case["gradients"][name]) for name, gradient in by_input)


def needs(loss: Any, argument: str) -> bool:
    """Whether the loss cannot be called without it."""
    return inspect.signature(loss).parameters[argument].default is inspect.Parameter.empty


def gradient_error(found: make.Array, expected: dict[str, Any]) -> float:
    """The largest error that the stored norm, entries and random-sign products show, relative to the norm."""
    got = make.summary(found)
    shown = [
        abs(got["norm"] - expected["norm"]),
        *(abs(got["entries"][index] - value) for index, value in expected["entries"].items()),
        float(np.sqrt(np.mean(np.subtract(got["products"], expected["products"]) ** 2))),
    ]
    return float(max(shown) / expected["norm"])
