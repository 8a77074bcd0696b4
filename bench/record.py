"""What a result says about itself: the machine, the versions, a digest of the sources it measured."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import time
from pathlib import Path
from typing import Any

import torch

import fastnce
from bench import peers
from bench.table import SCHEMA as SCHEMA
from fastnce import files, native

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"  # those that the pages show
OUT = Path("fastnce-bench")  # in the current folder: who measures on a machine of theirs changes nothing of the checkout
SOURCES = {".py", ".cpp", ".h", ".inc", ".cu", ".cuh"}

# Settings of the C library and of torch that change what page faults cost, and with it the time of the dense losses.
ALLOCATOR = ("GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE", "MALLOC_ARENA_MAX", "LD_PRELOAD")


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
    """The GPU and what stands between it and us; never its serial number."""
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
    """What a result says of where it comes from; `command` is what repeats it."""
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
        # Of an objection what it is about, and not where: a record names no place.
        "compiled": (native.objection("cpu") or native.level("cpu")).partition(":")[0],
        "allocator": {name: os.environ[name] for name in ALLOCATOR if name in os.environ},
        "load": [round(load, 2) for load in os.getloadavg()],
        "sources": digest(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join(command),
    }


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
    files.write(path, json.dumps(result, indent=1) + "\n")
    files.write(path.with_suffix(".md"), markdown)
    return path
