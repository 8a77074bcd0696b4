"""Golden vectors: losses and gradients in float64, of four other projects' own code and of the formulas of three restated.

    python train_ref/truth/golden/make.py      # writes peers.json beside this file; needs the peers, see PEERS

peers.json lets a machine without the peers hold fastnce to them. Each case names who computed it, the fastnce call that
must agree, and the conversion between the two: peer = times * fastnce + plus. Inputs are not stored but described:

    {"random": [M, D], "seed": s}     uniform in [-1, 1)
    {"near": "query", "seed": s}      such noise added to another input: a second view, cosine about 0.7
    {"labels": [...]}, {"value": v}   as they stand

drawn from numpy.random.default_rng(s).random() and rounded to float32, so that float64 and float32 runs get the same
numbers; that stream and these operations are exact, so every platform builds the same bits, which `digest` verifies.
A gradient is stored as its norm, a few entries, and its products with fixed vectors of random signs: an error e in any
one element moves every product by |e|, and the root mean square over the products estimates the norm of all errors.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

FILE = Path(__file__).with_name("peers.json")
SCHEMA = 1
PEERS = {
    "info-nce-pytorch": "0.1.4",
    "pytorch-metric-learning": "2.9.0",
    "lightly": "1.6.0",
    "open_clip_torch": "3.3.0",
}
TEMPERATURES = (0.07, 0.5)
PROJECTIONS = 8
ENTRIES = 4

Recipe = dict[str, Any]
Array = NDArray[Any]


def build(recipes: dict[str, Recipe]) -> dict[str, Array]:
    """The inputs that the recipes describe: float64 arrays of float32 numbers, int64 labels."""
    built: dict[str, Array] = {}
    for name, recipe in recipes.items():
        if "labels" in recipe:
            built[name] = np.array(recipe["labels"], dtype=np.int64)
            continue
        if "value" in recipe:
            array = np.array(recipe["value"])
        else:
            shape = built[recipe["near"]].shape if "near" in recipe else tuple(recipe["random"])
            array = 2 * np.random.default_rng(recipe["seed"]).random(shape) - 1
            if "near" in recipe:
                array = built[recipe["near"]] + array
        built[name] = array.astype(np.float32).astype(np.float64)
    return built


def digest(arrays: dict[str, Array]) -> str:
    return hashlib.sha256(b"".join(array.astype("<f8").tobytes() for array in arrays.values())).hexdigest()[:16]


def summary(gradient: Array) -> dict[str, Any]:
    """Norm, evenly spread entries and random-sign products of a gradient."""
    flat = gradient.astype(np.float64).ravel()
    signs = np.where(np.random.default_rng(flat.size).random((PROJECTIONS, flat.size)) < 0.5, -1.0, 1.0)
    spread = np.unique(np.linspace(0, flat.size - 1, ENTRIES).astype(int))
    return {
        "norm": float(np.linalg.norm(flat)),
        "entries": {str(index): float(flat[index]) for index in spread},
        "products": [float(value) for value in signs @ flat],
    }


# ---------------------------------------------------------------- published formulas of projects that are no package
# One anchor at a time, as a reader of the paper would: slow, and sharing no idea with fastnce.


def _logits(rows: Tensor, temperature: float) -> Tensor:
    rows = F.normalize(rows, dim=1)
    return rows @ rows.T / temperature


def sup_con_formula(features: Tensor, labels: Tensor | None = None, *, temperature: float, one: bool = False) -> Tensor:
    """SupContrast's SupConLoss (Khosla et al. 2020, eq. 2): features (B, V, D); anchors are all views, or the first.

    The value is multiplied by temperature / base_temperature, where base_temperature = 0.07 even if the temperature is
    another, and an anchor without a positive adds 0.
    """
    features = features if features.dim() == 3 else features[:, None]
    batch, views, _ = features.shape
    classes = list(range(batch)) if labels is None else labels.tolist()
    logits = _logits(features.transpose(0, 1).reshape(batch * views, -1), temperature)
    anchors = range(batch if one else batch * views)
    total = logits.new_zeros(())
    for i in anchors:
        others = [j for j in range(batch * views) if j != i]
        positives = [j for j in others if classes[j % batch] == classes[i % batch]]
        if positives:
            log_denominator = logits[i, others].exp().sum().log()
            total = total - torch.stack([logits[i, j] - log_denominator for j in positives]).mean()
    return temperature / 0.07 * total / len(anchors)


def simclr_formula(z0: Tensor, z1: Tensor, temperature: float) -> Tensor:
    """google-research/simclr objective.py: a cross entropy per view self pushed down by 1e9, added, not averaged."""
    z0, z1 = F.normalize(z0, dim=1), F.normalize(z1, dim=1)
    n = len(z0)
    far = 1e9 * torch.eye(n, dtype=z0.dtype)
    labels = torch.eye(n, dtype=z0.dtype)
    first = torch.cat([z0 @ z1.T / temperature, z0 @ z0.T / temperature - far], dim=1)
    second = torch.cat([z1 @ z0.T / temperature, z1 @ z1.T / temperature - far], dim=1)
    return sum((-(labels * block.log_softmax(1)[:, :n]).sum(1).mean() for block in (first, second)), z0.new_zeros(()))


def summed_positives_formula(features: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """solo-learn's simclr_loss_func with labels: -log(sum over positives / sum over all others), no 1/|P| inside."""
    similarity = _logits(features, temperature).exp()
    same = labels[:, None] == labels[None]
    positive = (similarity * same.fill_diagonal_(False)).sum(1)
    negative = (similarity * (labels[:, None] != labels[None])).sum(1)
    return -(positive / (positive + negative)).log().mean()


# ---------------------------------------------------------------- the cases

CLASSES = [0, 1, 2, 0, 1, 3, 3, 0, 2, 2, 4, 4, 1, 0, 3, 5, 5, 0, 1]  # every class at least twice
LONELY = [0, 1, 2, 0, 1, 3, 4, 0, 2, 5, 6, 2, 1, 0, 7]  # classes 3 to 7 have one member: anchors without a positive


class Case(NamedTuple):
    peer: str  # the project whose code computed it
    function: str  # of fastnce
    options: dict[str, Any]  # its arguments besides the inputs
    recipes: dict[str, Recipe]
    compute: Callable[..., Tensor]  # the peer, called with the inputs by name
    times: float = 1.0
    plus: float = 0.0


def _pair(first: str, second: str, seed: int) -> dict[str, Recipe]:
    return {first: {"random": [29, 19], "seed": seed}, second: {"near": first, "seed": seed + 1}}


def _labelled(shape: list[int], labels: list[int], seed: int) -> dict[str, Recipe]:
    return {"features": {"random": shape, "seed": seed}, "labels": {"labels": labels}}


def _release(distribution: str, what: str) -> str:
    return f"{distribution} {importlib.metadata.version(distribution)}, {what}"


def _restated(what: str) -> str:
    return f"formula of {what}, restated"


def info_nce_cases(t: float) -> list[Case]:
    from train_ref.truth.golden.packages import info_nce_pytorch

    peer, loss = _release("info-nce-pytorch", "info_nce"), info_nce_pytorch()
    shared = _pair("query", "positive_key", 4) | {"negative_keys": {"random": [41, 19], "seed": 6}}
    own = _pair("query", "positive_key", 7) | {"negative_keys": {"random": [29, 5, 19], "seed": 9}}
    queue = _pair("q", "k", 10) | {"queue": {"random": [41, 19], "seed": 12}}
    paired = {"temperature": t, "negative_mode": "paired"}
    return [
        Case(peer, "info_nce", {"temperature": t}, _pair("query", "positive_key", 1), partial(loss, temperature=t)),
        Case(peer, "info_nce", {"temperature": t}, shared, partial(loss, temperature=t)),
        Case(peer, "info_nce", paired, own, partial(loss, **paired)),
        Case(peer, "moco_loss", {"temperature": t}, queue, lambda q, k, queue: loss(q, k, queue, t)),
    ]


def nt_xent_cases(t: float) -> list[Case]:
    from pytorch_metric_learning import losses

    from train_ref.truth.golden.packages import lightly_nt_xent

    pml, lightly = losses.SelfSupervisedLoss(losses.NTXentLoss(t)), lightly_nt_xent()(temperature=t)
    options, pair = {"temperature": t}, _pair("z0", "z1", 21)
    pml_name = _release("pytorch-metric-learning", "SelfSupervisedLoss(NTXentLoss)")
    tf_name = _restated("SimCLR (TensorFlow) objective.add_contrastive_loss")
    return [
        Case(pml_name, "nt_xent", options, pair, lambda z0, z1: pml(z0, z1)),
        Case(_release("lightly", "NTXentLoss"), "nt_xent", options, pair, lambda z0, z1: lightly(z0, z1)),
        Case(tf_name, "nt_xent", options, pair, lambda z0, z1: simclr_formula(z0, z1, t), times=2.0),
    ]


def dcl_cases(t: float) -> list[Case]:
    from train_ref.truth.golden.packages import lightly_dcl

    loss = lightly_dcl()(temperature=t)
    return [Case(_release("lightly", "DCLLoss"), "dcl_loss", {"temperature": t}, _pair("z0", "z1", 51), lambda z0, z1: loss(z0, z1))]


def sup_con_cases(t: float) -> list[Case]:
    from pytorch_metric_learning import losses

    pml, base = losses.SupConLoss(t), t / 0.07
    rows, lonely = _labelled([19, 17], CLASSES, 31), _labelled([15, 17], LONELY, 32)
    two_views, three_views = _labelled([11, 2, 17], CLASSES[:11], 33), _labelled([7, 3, 17], CLASSES[:7], 34)
    unlabelled = {"features": two_views["features"]}
    log_positives = sum(math.log(CLASSES.count(label) - 1) for label in CLASSES) / len(CLASSES)

    def of_package(features: Tensor, labels: Tensor) -> Tensor:
        value: Tensor = pml(features, labels)
        return value

    formula, summed = partial(sup_con_formula, temperature=t), partial(summed_positives_formula, temperature=t)

    def case(peer: str, recipes: dict[str, Recipe], loss: Callable[..., Tensor], *line: float, **options: str) -> Case:
        return Case(peer, "sup_con", {"temperature": t, **options}, recipes, loss, *line)

    package, supcontrast = _release("pytorch-metric-learning", "SupConLoss"), _restated("SupContrast SupConLoss")
    return [
        case(package, rows, of_package),
        case(package, lonely, of_package, no_positive="skip"),
        case(supcontrast, lonely, formula, base, no_positive="zero"),
        case(supcontrast, three_views, formula, base),
        case(supcontrast, two_views, partial(formula, one=True), base, views="one"),
        case(supcontrast, unlabelled, formula, base),
        case(_restated("solo-learn simclr_loss_func"), rows, summed, 1.0, -log_positives, variant="in"),
    ]


def clip_cases(t: float) -> list[Case]:
    from train_ref.truth.golden.packages import open_clip_loss

    loss = open_clip_loss()()

    def compute(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
        value: Tensor = loss(F.normalize(image, dim=-1), F.normalize(text, dim=-1), logit_scale)
        return value

    recipes = _pair("image", "text", 41) | {"logit_scale": {"value": 1 / t}}
    return [Case(_release("open_clip_torch", "ClipLoss of normalised features"), "clip_loss", {}, recipes, compute)]


def cases() -> list[Case]:
    """Every case at every temperature. Imports the peers."""
    groups = (info_nce_cases, nt_xent_cases, dcl_cases, sup_con_cases, clip_cases)
    return [case for t in TEMPERATURES for group in groups for case in group(t)]


def tensors(arrays: dict[str, Array], dtype: torch.dtype) -> dict[str, Tensor]:
    """The inputs as tensors: features of that dtype that require a gradient, labels as they are."""
    made: dict[str, Tensor] = {}
    for name, array in arrays.items():
        tensor = torch.tensor(array)
        made[name] = tensor.to(dtype).requires_grad_() if tensor.is_floating_point() else tensor
    return made


def run(function: Callable[..., Tensor], inputs: dict[str, Tensor]) -> tuple[float, dict[str, Array]]:
    """Loss and the gradients of the inputs that require one."""
    loss = function(**inputs)
    leaves = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return loss.item(), {name: gradient.double().numpy() for name, gradient in zip(leaves, gradients, strict=True)}


def evaluate(case: Case) -> dict[str, Any]:
    """A case as peers.json stores it."""
    arrays = build(case.recipes)
    loss, gradients = run(case.compute, tensors(arrays, torch.float64))
    return {
        "peer": case.peer,
        "function": case.function,
        "options": case.options,
        "inputs": case.recipes,
        "digest": digest(arrays),
        "times": case.times,
        "plus": case.plus,
        "loss": loss,
        "gradients": {name: summary(gradient) for name, gradient in gradients.items()},
    }


def main() -> int:
    sys.path.append(str(Path(__file__).resolve().parents[3]))  # bench/ and train_ref/ are folders of the checkout, never installed
    from train_ref import files

    return files.command("make.py")(make)(files.write)


def make(write: Callable[[Path, str], None]) -> int:
    """Evaluate all cases and write them."""
    torch.set_num_threads(1)
    versions = {name: importlib.metadata.version(name) for name in PEERS}
    if versions != PEERS:
        raise SystemExit(f"make.py: the peers are {versions}; install {PEERS} with pip install --no-deps")
    versions["torch"] = torch.__version__.split("+")[0]
    lines = ",\n".join("  " + json.dumps(evaluate(case), allow_nan=False) for case in cases())
    write(FILE, f'{{"schema": {SCHEMA},\n "versions": {json.dumps(versions)},\n "cases": [\n{lines}\n]}}\n')
    print(f"{FILE.name}: {FILE.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
