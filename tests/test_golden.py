"""fastnce against golden/peers.json: the float64 losses and gradients of other projects' own code.

float64 must agree to rounding. The float32 limits are the spread between correct float32 implementations: these peers
differ from each other by 3e-6 of the loss and 2e-5 of the gradient's norm at these temperatures.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from named import ON_CPU

import fastnce
from train_ref.truth import LOSSES
from train_ref.truth.golden import make

GOLDEN = json.loads(make.FILE.read_text())
CASES: list[dict[str, Any]] = GOLDEN["cases"]
LIMITS = {torch.float64: (1e-12, 1e-11), torch.float32: (5e-6, 2e-5)}  # relative: loss, gradient


def name(case: dict[str, Any]) -> str:
    options = case["options"] or case["inputs"]["logit_scale"]
    return "-".join([case["function"], *(str(value) for value in options.values()), case["peer"].replace(" ", "_")])


def fastnce_at(case: dict[str, Any], dtype: torch.dtype, backend: str) -> tuple[float, dict[str, make.Array]]:
    """fastnce's loss and gradients in the peer's convention."""
    arrays = make.build(case["inputs"])
    assert make.digest(arrays) == case["digest"], "numpy gave other random inputs than golden/peers.json was made of"
    function = partial(getattr(fastnce, case["function"]), **case["options"], backend=backend)
    loss, gradients = make.run(function, make.tensors(arrays, dtype))
    return case["times"] * loss + case["plus"], {key: case["times"] * value for key, value in gradients.items()}


def relative_errors(loss: float, gradients: dict[str, make.Array], case: dict[str, Any]) -> dict[str, float]:
    """Of the loss, and per input of the gradient: the largest error that its norm, entries and products show."""
    errors = {"loss": abs(loss - case["loss"]) / abs(case["loss"])}
    assert gradients.keys() == case["gradients"].keys()
    for key, expected in case["gradients"].items():
        got = make.summary(gradients[key])
        shown = [
            abs(got["norm"] - expected["norm"]),
            *(abs(got["entries"][index] - value) for index, value in expected["entries"].items()),
            float(np.sqrt(np.mean(np.subtract(got["products"], expected["products"]) ** 2))),
        ]
        errors[key] = max(shown) / expected["norm"]
    return errors


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_agrees_with_the_peer(case: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    loss_limit, gradient_limit = LIMITS[dtype]
    errors = relative_errors(*fastnce_at(case, dtype, backend), case)
    assert errors.pop("loss") <= loss_limit
    assert max(errors.values()) <= gradient_limit, errors


@pytest.mark.parametrize("index", [0, 200, 550])
def test_one_wrong_element_shows(index: int) -> None:
    """The stored summary must move when any single element of a gradient does, or the file proves nothing."""
    case = CASES[0]
    loss, gradients = fastnce_at(case, torch.float64, "reference")
    gradients["query"].flat[index] += 1e-10 * case["gradients"]["query"]["norm"]
    assert relative_errors(loss, gradients, case)["query"] > LIMITS[torch.float64][1]


def test_every_loss_has_a_peer() -> None:
    assert {case["function"] for case in CASES} >= LOSSES.keys()
