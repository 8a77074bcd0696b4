"""A program that calls the operators of a compiled library with arguments that do not fit together. Each call must raise or run, and none
may read or write memory that is not its own:

    python tests/fuzz.py LIBRARY SEED CALLS

A call begins as one that fits, of random shapes and rules; then up to three of its arguments change. The sanitizer's library, loaded before
all others, ends the process at the first access out of bounds.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]

FLOAT, DOUBLE, HALF, INT, LONG, BOOL = torch.float32, torch.float64, torch.float16, torch.int32, torch.int64, torch.bool
NONE = 2**31 - 1  # stands for a diagonal that does not exist


def some(chance: float = 0.5) -> bool:
    return random.random() < chance


def new(*shape: int, dtype: torch.dtype = FLOAT) -> Tensor:
    """A tensor as kernels get it: of numbers from 0 to 1, or of small ids."""
    if dtype in (INT, LONG):
        return torch.randint(-1, 4, shape, dtype=dtype)
    return torch.randint(0, 2, shape).to(BOOL) if dtype == BOOL else torch.rand(shape).to(dtype)


# ---------------------------------------------------------------- calls that fit: csrc/cpu

# The vectors of one side that forward writes, in its order: name, dtype, whether it belongs to the metrics.
COLLECTED = (
    ("negative", DOUBLE, False), ("top_negative", FLOAT, False), ("positive", DOUBLE, False), ("top_positive", FLOAT, False),
    ("pos", DOUBLE, False), ("n_pos", LONG, False), ("low", FLOAT, True), ("high", FLOAT, True), ("rank", LONG, True),
    ("ties", LONG, True), ("hardest_t", FLOAT, True), ("hardest", LONG, True),
)  # fmt: skip


def tiles_of_cpu() -> tuple[Arguments, int, int]:
    """Arguments that forward and backward share."""
    m, depth, symmetric = random.choice((0, 1, 5, 6, 17, 64, 70, 130)), random.choice((1, 16, 20)), some(0.4)
    n = m if symmetric else random.choice((0, 1, 7, 64, 65, 129))
    pitch, two_sided = -(-depth // 16) * 16, not symmetric and some()
    label, exclude = some(), some(0.3)
    given: Arguments = {
        "x": new(m, pitch),
        "y": None if symmetric else new(n, pitch),
        "depth": depth,
        "bias": random.choice((0.0, -3.0)),
        "flags": [int(two_sided), int(some()), 1, int(some())],
        "offset": random.choice((None, 0, 1, m // 2, -3, 2**31 - 1, 1 - 2**31)),
        "q_label": new(m, dtype=LONG) if label else None,
        "k_label": new(n, dtype=LONG) if label and not symmetric else None,
        "q_exclude": new(m, dtype=LONG) if exclude else None,
        "k_exclude": new(n, dtype=LONG) if exclude and not symmetric else None,
        "mask": new(random.randint(1, 9), random.randint(1, 9), dtype=BOOL) if not symmetric and some(0.3) else None,
    }
    return given, m, n


def cpu_forward() -> Arguments:
    given, m, n = tiles_of_cpu()
    metrics, sides = some(), (m, n)[: 1 + given["flags"][0]]
    return given | {"sums": [new(0 if metric and not metrics else rows, dtype=dtype) for rows in sides for _, dtype, metric in COLLECTED]}


def cpu_best_positives() -> Arguments:
    given, m, n = tiles_of_cpu()
    return given | {"best": [new(rows) for rows in (m, n)[: 1 + given["flags"][0]]]}


def cpu_backward() -> Arguments:
    given, m, n = tiles_of_cpu()
    x, y = given["x"], given["y"]
    weights = [new(rows) for rows in (m, n)[: 1 + given["flags"][0]] for _ in range(5)]
    dx, dy = (torch.zeros_like(of) if of is not None and some(0.8) else None for of in (x, y))
    return given | {"weights": weights, "center": 0.5, "dx": dx, "dy": dy, "moment": new(m, dtype=DOUBLE) if some() else None}


# ---------------------------------------------------------------- calls that fit: csrc/cuda


def tiles_of_cuda(depths: tuple[int, ...] = (64, 128)) -> tuple[Arguments, int, int]:
    """Arguments that all kernels over tiles share."""
    rows, columns, parts, depth = (
        random.choice((0, 1, 100, 128)),
        random.choice((0, 3, 128, 150)),
        random.choice((1, 2)),
        random.choice(depths),
    )
    symmetric = some(0.3)
    columns = rows if symmetric else columns
    m, n = (-(-of // 128) * 128 for of in (rows, columns))
    label, exclude, mask = some(), some(0.3), new(3, 5, dtype=BOOL) if some(0.2) else None
    x = new(m, parts, depth, dtype=HALF)
    shape = (*mask.shape, *mask.stride()) if mask is not None else (1, 1, 0, 0)
    up = random.choice((NONE, 0, 1, -2))
    given: Arguments = {
        "x": x,
        "y": x if symmetric else new(n, parts, depth, dtype=HALF),
        "a": new(m),
        "b": new(n),
        "scale": torch.tensor(10.0),
        "bound": torch.tensor(random.choice((10.0, 100.0))),
        "q_label": new(m, dtype=INT) if label else None,
        "k_label": new(n, dtype=INT) if label else None,
        "q_exclude": new(m, dtype=INT) if exclude else None,
        "k_exclude": new(n, dtype=INT) if exclude else None,
        "mask": mask,
        "sizes": [*shape, rows, columns, 0 if symmetric else NONE, up, NONE, int(some()), 0],
    }
    return given, rows, columns


def splits_of(columns: int) -> tuple[int, int]:
    """Tiles have 16 to 128 columns, and every split has one."""
    splits, least = random.choice((1, 2)) if columns > 128 else 1, 16
    return splits, max(1, -(-columns // (least * splits)))


def forward_rows() -> Arguments:
    given, rows, columns = tiles_of_cuda((64, 128, 320))
    (splits, per_split), in_tile = splits_of(columns), given["sizes"][9]
    count = new(splits, rows, dtype=INT) if in_tile else None
    more = {"always": some(), "splits": splits, "per_split": per_split, "sums": new(5 if in_tile else 2, splits, rows), "count": count}
    return given | more


def forward_both() -> Arguments:
    given, rows, columns = tiles_of_cuda()
    fields, in_tile, symmetric = 3 if given["sizes"][9] else 1, given["sizes"][9], given["x"] is given["y"]
    sums = [
        new(fields, rows),
        new(rows, dtype=INT) if in_tile else None,
        new(fields, columns),
        new(columns, dtype=INT) if in_tile else None,
    ]
    sums = sums[:2] * 2 if symmetric else sums
    splits, per_split = splits_of(columns)
    names = ("row_sum", "row_count", "column_sum", "column_count")
    return given | {"symmetric": symmetric, "splits": splits, "per_split": per_split} | dict(zip(names, sums, strict=True))


def retrieval() -> Arguments:
    given, rows, columns = tiles_of_cuda()
    splits, per_split = splits_of(columns)
    largest, counts = new(2, splits, rows), new(3, splits, rows, dtype=INT)
    return given | {"bounds": new(2, rows), "splits": splits, "per_split": per_split, "largest": largest, "counts": counts}


def weights_of(given: Arguments) -> Arguments:
    fields = 5 if given["sizes"][9] else 2
    return {"row": new(fields, len(given["a"])), "column": new(fields, len(given["b"])), "center": torch.tensor(0.5)}


def backward_rows() -> Arguments:
    given, rows, columns = tiles_of_cuda()
    splits, per_split = splits_of(columns)
    dx, moment = new(splits, *given["x"].shape[::2]), new(splits, rows) if some() else None
    sides = random.choice(((True, True), (True, False), (False, True)))
    more = {"of_rows": sides[0], "of_columns": sides[1], "splits": splits, "per_split": per_split, "dx": dx, "moment": moment}
    return given | weights_of(given) | more


def weights_block() -> Arguments:
    given, _, _ = tiles_of_cuda((320,))
    # Ids of no rows are none.
    content = "ids" if given["sizes"][9] or (given["q_exclude"] is not None and len(given["a"])) else "index"
    parts = given["x"].shape[1]
    tile = torch.ops.fastnce_cuda.tile("weights_block", content, parts, 0, 80)
    height, width = len(given["a"]), len(given["b"])
    pitch = max(height, width)
    blocks = [new(parts, pitch, pitch, dtype=HALF) if some(0.8) else None for _ in range(2)]
    down, across = height // tile[0], width // tile[1]
    more = {"of_columns": some(), "row0": 0, "column0": 0, "down": down, "across": across, "pitch": pitch}
    moment = new(across, pitch) if some() else None
    return given | weights_of(given) | more | {"for_rows": blocks[0], "for_columns": blocks[1], "moment": moment}


def raw(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Rows may be further apart than they are long."""
    return new(rows, columns + random.choice((0, 3)), dtype=dtype)[:, :columns]


def shapes() -> tuple[int, int, int, torch.dtype]:
    return random.choice((0, 1, 5, 9)), random.choice((1, 6)), random.choice((1, 4, 50, 300)), random.choice((FLOAT, HALF, torch.bfloat16))


def prepare() -> Arguments:
    m, _, columns, dtype = shapes()
    operand = new(-(-m // 128) * 128, random.choice((1, 2)), -(-columns // 64) * 64, dtype=HALF)
    return {"x": raw(m, columns, dtype), "operand": operand, "factor": new(len(operand)), "inverse_norm": new(m), "normalize": some()}


def aligned() -> Arguments:
    m, n, columns, dtype = shapes()
    pairs = min(m, n)
    first = {"first_row": random.randint(0, m - pairs), "first_column": random.randint(0, n - pairs)}
    x, y = raw(m, columns, dtype), raw(n, columns, dtype)
    return {"x": x, "y": y, "r_x": new(m), "r_y": new(n), "scale": torch.tensor(10.0), "t": new(pairs)} | first


def finish() -> Arguments:
    m, n, columns, dtype = shapes()
    x, y = raw(m, columns, dtype), raw(n, columns, dtype)
    dx = new(random.choice((1, 3)), m + 2, columns + 5)
    numbers = {"scale": torch.tensor(10.0), "lift": torch.tensor(2.0), "up": random.choice((NONE, 0, -2)), "down": random.choice((NONE, 3))}
    vectors = {"r_x": new(m), "r_y": new(n), "pair": new(m)}
    return {"dx": dx, "x": x, "y": y, "normalize": some(), "out": torch.empty(m, columns, dtype=dtype)} | numbers | vectors


def statistics() -> Arguments:
    rows, splits, in_tile = random.choice((0, 1, 5, 200)), random.choice((1, 3)), some()
    pairs = new(random.randint(0, rows)) if not in_tile else None
    ends = [0] if pairs is None else [random.randint(0, rows - len(pairs)) for _ in range(random.choice((1, 2)))]
    unshifted = new(3 if in_tile else 1, rows) if some() else None
    given: Arguments = {"sums": new(5 if in_tile else 2, splits, rows), "count": new(splits, rows, dtype=INT) if in_tile else None}
    given |= {"unshifted": unshifted, "unshifted_count": new(rows, dtype=INT) if in_tile and unshifted is not None else None}
    given |= {"pairs": pairs, "ends": ends, "bias": torch.tensor(1.0) if some() else None, "n_pos": new(rows, dtype=LONG)}
    return given | {name: new(rows, dtype=DOUBLE) for name in ("lse_neg", "lse_pos", "pos", "own_neg", "own_pos")}


def coefficients() -> Arguments:
    in_tile, symmetric = some(), some()
    rows = [random.choice((1, 5, 300)) for _ in range(1 if symmetric else random.choice((1, 2)))]
    padded = [-(-of // 128) * 128 for of in rows]
    factors = [new(of) for of in (padded * 2 if symmetric else [*padded, 128])[:2]]
    stats = [new(of, dtype=LONG if which == 3 else DOUBLE) for of in rows for which in range(6)]
    pairs = random.randint(1, min(rows)) if some() else 0
    ends = [random.randint(0, rows[0] - pairs), random.randint(0, rows[-1] - pairs)]
    given: Arguments = {"grads": [new(of, dtype=DOUBLE) for of in rows for _ in range(3)], "stats": stats, "factors": factors}
    given |= {"bias": torch.tensor(1.0) if some() else None, "pair_t": new(pairs, dtype=DOUBLE) if pairs else None, "pair_ends": ends}
    given |= {"in_tile": in_tile, "symmetric": symmetric, "vectors": [new(5 if in_tile else 2, of) for of in padded]}
    return given | {"pair_weights": new(pairs) if pairs else None, "scalars": new(4, dtype=DOUBLE)}


def scale_gradient() -> Arguments:
    about = [new(random.choice((0, 5, 700))) for _ in range(random.choice((0, 1, 2, 4)))]
    numbers = {name: torch.tensor(2.0) for name in ("scale", "dscale", "dbias")}
    return {"scalars": new(4, dtype=DOUBLE), "about": about, "divide": 2.0} | numbers


def tile() -> Arguments:
    kernel = random.choice(("forward_rows", "forward_both", "retrieval", "backward_rows", "weights_block"))
    given = {"parts": random.choice((1, 2)), "depth": random.choice((0, 64, 128, 256, 512)), "architecture": random.choice((80, 90, 100))}
    return {"kernel": kernel, "rules": random.choice(("index", "ids", "mask"))} | given


CPU: dict[str, Callable[[], Arguments]] = {
    "best_positives": cpu_best_positives,
    "forward": cpu_forward,
    "backward": cpu_backward,
    "level": dict,
}
CUDA: dict[str, Callable[[], Arguments]] = {
    made.__name__: made
    for made in (
        forward_rows, forward_both, retrieval, backward_rows, weights_block, prepare, aligned, finish, statistics, coefficients,
        scale_gradient, tile,
    )
}  # fmt: skip
CUDA |= {"runs_on": lambda: {"device": random.choice((-1, 0, 7))}}
# Operators with few arguments, or none: they are called an eighth as often as the others.
RARE = {"level", "runs_on", "tile"}


# ---------------------------------------------------------------- calls that no longer fit


def longer(t: Tensor, by: int) -> Tensor:
    shape = list(t.shape) or [1]
    at = random.randrange(len(shape))
    shape[at] = max(0, shape[at] + by)
    return torch.zeros(shape, dtype=t.dtype)


def misaligned(t: Tensor) -> Tensor:
    memory = bytearray(t.numel() * t.element_size() + 1)
    return torch.frombuffer(memory, dtype=t.dtype, offset=1, count=t.numel()).view(t.shape) if t.numel() else t


TENSORS: tuple[Callable[[Tensor], Any], ...] = (
    lambda t: None,
    lambda t: t.to(random.choice((FLOAT, DOUBLE, HALF, INT, LONG, BOOL, torch.uint8, torch.complex64))),
    lambda t: longer(t, random.choice((-1, 1, 16, -16, 128))),
    lambda t: t.new_empty(0),
    lambda t: t.new_empty((0, *t.shape[1:])),
    lambda t: t.new_empty((*t.shape[:-1], 0)),
    lambda t: t.new_zeros((2**40, 0)),
    lambda t: t.reshape(-1),
    lambda t: t[None],
    lambda t: t.transpose(0, -1) if t.dim() > 1 else t.flip(0) if t.dim() else t[None],
    lambda t: torch.stack([t, t], -1)[..., 0],
    lambda t: t.new_zeros(()).expand(t.shape),
    lambda t: torch.cat([t.reshape(-1), t.new_zeros(1)])[1:].view(t.shape),
    misaligned,
    lambda t: t.to("meta"),
    lambda t: t.to_sparse() if t.dim() and not t.is_sparse else t,
    lambda t: torch.full_like(t, torch.nan) if t.is_floating_point() else torch.full_like(t, random.choice((0, 1, 7))),
    lambda t: torch.nn.Parameter(t.clone()) if t.is_floating_point() else t,
    lambda t: [t],
)
NUMBERS = (
    -1,
    0,
    1,
    2,
    3,
    5,
    16,
    17,
    64,
    128,
    1000,
    2**20,
    2**30,
    2**31 - 1,
    2**31,
    2**32,
    2**62,
    2**63 - 1,
    -(2**31),
    -(2**63),
    2**64,
    None,
)


def changed(value: Any, others: list[Tensor]) -> Any:
    """Another argument in the place of this one. others: all tensors of the call."""
    if isinstance(value, Tensor):
        # The same memory twice, whole or in part.
        if others and some(0.2):
            other = random.choice(others)
            return other if some() or other.numel() < value.numel() else other.reshape(-1)[: value.numel()].view(value.shape)
        return random.choice(TENSORS)(value)
    if isinstance(value, bool):
        return random.choice((not value, None, 2))
    if isinstance(value, int):
        return random.choice((value + 1, value - 1, -value, 2 * value, *NUMBERS))
    if isinstance(value, float):
        return random.choice((0.0, -1.0, math.nan, math.inf, -math.inf, 1e300, None, "1"))
    if isinstance(value, str):
        return random.choice(("", "index", "forward_rows", value + "s", None))
    if isinstance(value, list):
        if not value or some(0.3):
            return random.choice(([], value[:-1], value * 2, value[1:], value[::-1], None))
        at = random.randrange(len(value))
        return [*value[:at], changed(value[at], others), *value[at + 1 :]]
    return random.choice((None, 0, torch.zeros(3), torch.zeros(8, dtype=LONG), torch.zeros(2, 2, dtype=BOOL), *others))


def tensors_of(given: Arguments) -> list[Tensor]:
    found = [one for value in given.values() for one in (value if isinstance(value, list) else [value])]
    return [one for one in found if isinstance(one, Tensor)]


def fuzz(library: str, seed: int, calls: int) -> dict[str, Any]:
    """Counts by operator of calls that ran and that raised. Raises where a call that fits is refused, and where another exception comes."""
    torch.ops.load_library(library)
    kind, operators = ("cpu", CPU) if hasattr(torch.ops.fastnce_cpu, "level") else ("cuda", CUDA)
    namespace = getattr(torch.ops, f"fastnce_{kind}")
    known = {s.name.split("::")[1] for s in torch._C._jit_get_all_schemas() if s.name.startswith(f"fastnce_{kind}::")}
    assert known == set(operators), f"operators without calls here, or the other way round: {known ^ set(operators)}"
    ran: Counter[str] = Counter()
    raised: Counter[str] = Counter()
    names = [name for name in operators for _ in range(1 if name in RARE else 8)]
    for number in range(calls):
        random.seed(f"{seed} {number}")
        torch.manual_seed(random.randrange(2**31))
        name = random.choice(names)
        given = operators[name]()
        changes = random.choices((0, 1, 2, 3), (1, 6, 3, 1))[0] if given else 0
        for _ in range(changes):
            at = random.choice(list(given))
            with contextlib.suppress(RuntimeError):  # an argument that has changed already may refuse another change
                given[at] = changed(given[at], tensors_of(given))
        try:
            getattr(namespace, name)(**given)
        except (RuntimeError, ValueError, TypeError) as error:
            if changes == 0:
                raise AssertionError(f"call {number} of {name} fits and is refused: {error}") from error
            raised[name] += 1
        else:
            ran[name] += 1
    return {"calls": calls, "ran": ran, "raised": raised}


def run(library: Path, seed: int, calls: int, timeout: float = 600) -> dict[str, Any]:
    """The same in a process of its own, with the sanitizer's library loaded before all others. Raises AssertionError with its message."""
    compiler = os.environ.get("CXX", "c++")
    preload = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    # Python does not free all of its memory at exit. Fibers of the emulator have stacks of their own.
    environment = os.environ | {"LD_PRELOAD": " ".join(preload), "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    command = [sys.executable, __file__, str(library), str(seed), str(calls)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    assert done.returncode == 0, f"seed {seed}: status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-6000:]}"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(fuzz(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
