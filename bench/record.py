"""Results: the cells that are measured, their rows, the machine and versions, a digest of the sources; writing one, and reading all.

A result (schema 2) is {"schema": 2, "env": {...}, "rows": [...]}. env is that of record.environment with mem_limit_mib (0: none) and
cells_left, the number of cells that the time budget left out. Every row has

    measure     time | memory | gemm | kernels
    mode        full (forward and backward) | fwd (forward, gradients enabled) | bwd (backward alone); gemm rows: fwd
    loss, n, d, dtype, threads, device, contestant
    status      ok | oom | oom-skipped (a smaller N was oom) | crash | timeout | missing; all but ok with a detail

and where it is ok
    time        cpu_ms, wall_ms or gpu_ms {median, min}; cpu_ratio, wall_ratio or gpu_ratio to fastnce, taken round by round, absent where
                fastnce did not run in the same process; alone: true where the contestant ran in a process of its own;
                gemm_share, percent of the measured matrix product's rate; loss_value, gradient_norm
    memory      peak_mib above the inputs; loss_value, gradient_norm
    gemm        tflops and the time it took
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastnce
from bench import peers
from fastnce import files
from fastnce.compiled import find

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"  # the results that the pages show
OUT = Path("fastnce-bench")  # in the current folder: measuring on a machine of one's own changes nothing of the checkout
SOURCES = {".py", ".cpp", ".h", ".inc", ".cu", ".cuh"}

# Settings of the C library and of torch that change the cost of page faults, and with it the time of the dense losses.
ALLOCATOR = ("GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE", "MALLOC_ARENA_MAX", "LD_PRELOAD")

Row = dict[str, Any]
Result = dict[str, Any]
SCHEMA = 2
MODES = {"full": "forward + backward", "fwd": "forward", "bwd": "backward alone"}


# ---------------------------------------------------------------- rows


@dataclass(frozen=True)
class Cell:
    """One problem, one kind of measurement, and the contestants that are measured in one process."""

    measure: str  # "time", "memory", "gemm" or "kernels"
    loss: str
    n: int
    d: int
    names: tuple[str, ...]
    mode: str = "full"  # "fwd": forward with gradients enabled; "bwd": backward alone; "full": both
    dtype: str = "float32"
    threads: int = 1
    repeats: int = 5
    mem_limit: int = 0  # MiB of address space above the process with its inputs; 0: no limit
    device: str = "cpu"
    clock: str = "host"  # "device": as bench/gpu/measure.py measures; it falls back to the host's clock where the device has none
    backend: str = "auto"  # of fastnce
    noise: float = 0.5  # of the second view
    temperature: float = 0.0  # 0: that of dense.py
    seconds: float = 0.0  # stop the rounds of a device clock after that, if three are done; 0: never

    def title(self) -> str:
        return f"{self.measure:6} {self.mode:4} {self.loss:8} N={self.n:<7} D={self.d:<4} {self.dtype} {', '.join(self.names)}"


def row_of(cell: Cell, name: str, status: str, **measured: Any) -> Row:
    """The row of one contestant; the head of this file describes its fields."""
    problem = {"measure": cell.measure, "mode": cell.mode, "loss": cell.loss, "n": cell.n, "d": cell.d, "dtype": cell.dtype}
    return {**problem, "threads": cell.threads, "device": cell.device, "contestant": name, "status": status, **measured}


def clock(row: Row) -> tuple[str, str]:
    """Prefix of the fields that hold a row's time, and the words for it.

    The CPU time of one thread leaves out other processes that ran meanwhile. With more threads only the wall clock counts.
    """
    if row["device"] == "cuda":
        return "gpu", "CUDA events"
    return ("cpu", "process CPU time") if row["threads"] == 1 else ("wall", "wall time")


def milliseconds(row: Row) -> float:
    """Median time of an ok row of measure time."""
    return float(row[f"{clock(row)[0]}_ms"]["median"])


def ratio(row: Row) -> float | None:
    """Its time over fastnce's, the median of the rounds; None where fastnce did not run in the same process."""
    found = row.get(f"{clock(row)[0]}_ratio")
    return None if found is None else float(found)


def rows_of(rows: list[Row], **wanted: Any) -> list[Row]:
    """The rows whose fields have these values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


# ---------------------------------------------------------------- where a result comes from


def digest() -> str:
    """sha256 over the sources in fastnce/ and csrc/: a result belongs to exactly these."""
    found = hashlib.sha256()
    for folder in ("fastnce", "csrc"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SOURCES:
                found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def cpu_model() -> str:
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def gpu() -> dict[str, Any]:
    """The GPU, its CUDA and Triton; never its serial number."""
    seen = torch.cuda.get_device_properties(0)
    major, minor = torch.cuda.get_device_capability(0)
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    return {
        "name": seen.name,
        "capability": f"{major}.{minor}",
        "multiprocessors": seen.multi_processor_count,
        "memory_gib": round(seen.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "triton": triton,
    }


def machine(device: str = "cpu") -> str:
    """Folder name for results of machines like this one: the GPU, or the CPU and how many; never a host name."""
    name = f"{cpu_model()} {os.cpu_count()} cpus" if device == "cpu" else gpu()["name"]
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def environment(command: list[str], threads: int, device: str = "cpu") -> dict[str, Any]:
    """The env of a result: machine, versions, settings, and the command that repeats it."""
    return ({} if device == "cpu" else {"gpu": gpu()}) | {
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "vector": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastnce": fastnce.__version__,
        "peers": peers.versions(),
        "threads": threads,
        # Of an objection only the part before the colon: the rest names a path of this machine.
        "compiled": (find.objection("cpu") or find.level("cpu")).partition(":")[0],
        "allocator": {name: os.environ[name] for name in ALLOCATOR if name in os.environ},
        "load": [round(load, 2) for load in os.getloadavg()],
        "sources": digest(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join(command),
    }


# ---------------------------------------------------------------- files


def text(result: Result) -> str:
    """The JSON of a result, with a line for each row and each entry of env."""

    def lines(value: Any) -> str:
        if isinstance(value, dict):
            return "{\n" + ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items()) + "\n }"
        if isinstance(value, list) and value:
            return "[\n" + ",\n".join(f"  {json.dumps(entry)}" for entry in value) + "\n ]"
        return json.dumps(value)

    return "{\n" + ",\n".join(f" {json.dumps(name)}: {lines(value)}" for name, value in result.items()) + "\n}\n"


def save(result: dict[str, Any], markdown: str, out: Path, kind: str = "") -> Path:
    """Write <out>/<machine>/<UTC date>-<digest>.json and .md; an earlier result of the same day and sources is kept."""
    folder = out / machine("cuda" if "gpu" in result["env"] else "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    environment = result["env"]
    stem = "-".join(filter(None, [environment["time"][:10], environment["sources"][:8], kind]))
    path, again = folder / f"{stem}.json", 1
    while path.exists():
        again += 1
        path = folder / f"{stem}-{again}.json"
    files.write(path, text(result))
    files.write(path.with_suffix(".md"), markdown)
    return path


@dataclass(frozen=True)
class Recorded:
    """A file of bench/results."""

    machine: str
    name: str
    content: dict[str, Any]

    @property
    def env(self) -> dict[str, Any]:
        env: dict[str, Any] = self.content["env"]
        return env

    @property
    def rows(self) -> list[Row]:
        rows: list[Row] = self.content["rows"]
        return rows


@dataclass(frozen=True)
class Results:
    """Results of time and memory (measured), of accuracy (judged) and of the parts of gpu/, the newest first.

    `left_out` are results of time and memory in another schema."""

    measured: list[Recorded]
    judged: list[Recorded]
    left_out: list[Recorded]
    parts: list[Recorded]


def load(folder: Path) -> Results:
    """Every result of a folder. Raises ValueError for a file that is no result."""
    found = [Recorded(path.parent.name, path.name, content(path)) for path in sorted(folder.glob("*/*.json"))]
    found.sort(key=lambda result: (result.env["time"], result.name))
    parts = [result for result in reversed(found) if "part" in result.content and not result.content["dry_run"]]
    found = [result for result in found if "part" not in result.content]
    judged = [result for result in reversed(found) if re.search(r"-accuracy(-\d+)?\.json$", result.name)]
    measured = [result for result in reversed(found) if result not in judged]
    readable = [result for result in measured if result.content["schema"] == SCHEMA]
    return Results(readable, judged, [result for result in measured if result not in readable], parts)


def content(path: Path) -> dict[str, Any]:
    """The content of a file. Raises ValueError where it lacks what every result has."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        wrong = not isinstance(found["schema"], int) or not isinstance(found["rows"], list) or not isinstance(found["env"]["time"], str)
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or no result: {type(error).__name__}") from error
    if wrong:
        raise ValueError(f"{path} is no result: its schema, rows and env are not what python -m bench writes")
    return dict(found)
