"""Part `build`: the CUDA library for the architecture of this device alone, the report of ptxas, and whether the kernels end.

A library of these very sources that is there already, in the package or in FASTNCE_CACHE_DIR, is not compiled again. Without nvcc, ninja or
a C++ compiler a row says so, and the other parts say that the library is not built. Then each kind of its kernels solves the shapes of
sanitize.py once, in a process of its own: a kernel that waits for ever shows here, and not in the middle of a thousand tests.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.gpu import part, sanitize
from bench.gpu.kernels import Kernels
from bench.record import ROOT
from fastnce.compiled import build, find

COLUMNS = ("what", "kernels", "arch", "entries", "registers", "stack", "spilled", "mib", "seconds", "status")
SOLVING = 60.0  # seconds for all shapes; the GPU needs about one of them, the start of the process ten


def arch_of(capability: tuple[int, int]) -> str:
    """The entry of build.ARCHS for a device of this compute capability."""
    # Code for 8.0 runs on all of 8.x, that for 10.0 on all of 10.x. For any other device the driver compiles.
    return {8: "sm_80", 9: "sm_90a", 10: "sm_100"}.get(capability[0], "compute_100")


def missing() -> str:
    """The missing tool without which the library cannot be built; empty where none is missing."""
    try:
        build.nvcc()
        build.compiler()
    except build.BuildError as error:
        return str(error)
    return "" if shutil.which("ninja") or importlib.util.find_spec("ninja") else "ninja is not installed"


def compiled(report: part.Report, arch: str) -> dict[str, Any]:
    """The row of the library, which is built unless it is there."""
    row: dict[str, Any] = {"what": "library", "arch": arch}
    found = find.library_path("cuda")
    if found is not None and arch in find.archs(found):
        return row | {"mib": found.stat().st_size / 2**20, "status": "was there"}
    if lacking := missing():
        return row | {"status": lacking}
    begun = time.monotonic()
    status, log = sanitize.execute(
        [sys.executable, "-m", "fastnce", "build-cuda", "--arch", arch], dict(os.environ), max(report.left(), 1.0)
    )
    row["seconds"] = time.monotonic() - begun
    with report.log.open("a") as file:
        file.write(f"=== build-cuda --arch {arch}: {status}\n{log}\n")
    made = find.library_path("cuda")
    if status != "ok" or made is None:
        report.fail(f"build-cuda --arch {arch}: {status}: {(log.strip().splitlines() or [''])[-1]}")
        return row | {"status": f"{status}; see {report.log.name}"}
    if arch not in find.archs(made):
        report.fail(f"{made.name} is found before the library for {arch}")
    return row | {"mib": made.stat().st_size / 2**20, "status": "built"}


def emulated(report: part.Report) -> dict[str, Any]:
    """The row of the emulated library. It is put where the CUDA library is looked for; run.sh names a cache for it alone."""
    sys.path.append(str(ROOT / "tests"))
    emulator: Any = importlib.import_module("emulated")
    begun = time.monotonic()
    made: Path = emulator.emulate(build.folder())
    copy = made.with_name(find.name("cuda", ("emulated",)))
    shutil.copy(find.record_of(made), find.record_of(copy))
    shutil.copy(made, copy)
    return {"what": "library", "arch": "emulated", "seconds": time.monotonic() - begun, "status": "built"}


def resources(said: dict[str, list[str]]) -> Iterator[dict[str, Any]]:
    """A row for each unit, from the report of ptxas on its kernels: most registers, most bytes of stack, bytes spilled by all."""
    for unit, lines in sorted(said.items()):
        text = "\n".join(lines)

        def numbers(pattern: str, text: str = text) -> list[int]:
            return [int(found) for found in re.findall(pattern, text)]

        registers = numbers(r"Used (\d+) registers")
        row = {"what": unit, "entries": len(registers), "registers": max(registers, default=0)}
        row |= {"stack": max(numbers(r"(\d+) bytes stack frame"), default=0), "spilled": sum(numbers(r"(\d+) bytes spill stores"))}
        remarks = sorted(set(re.findall(r"\(C\d+\)", text)))
        yield row | {"status": f"remarks {' '.join(remarks)}" if remarks else "ok"}


def solved(kernels: Kernels, report: part.Report) -> dict[str, Any]:
    begun = time.monotonic()
    seconds = report.left() if report.dry else min(SOLVING, report.left())
    status, log = sanitize.execute(sanitize.this_program(report, [kernels]), dict(os.environ), max(seconds, 1.0))
    row = {
        "what": "shapes",
        "kernels": kernels.name,
        "entries": sanitize.solved_in(log),
        "seconds": time.monotonic() - begun,
        "status": status,
    }
    if status != "ok":
        with report.log.open("a") as file:
            file.write(f"=== the shapes by {kernels.name}: {status}\n{log}\n")
        report.fail(f"the shapes by {kernels.name}: {status}: {(log.strip().splitlines() or [''])[-1]}")
    return row


def main() -> int:
    report = part.Report("build")
    with report.step("build"):
        if report.where == "gpu":
            report.add(compiled(report, arch_of(torch.cuda.get_device_capability())))
        elif report.where == "emulated":
            report.add(emulated(report))
        else:
            report.add({"what": "library", "status": f"dry run: nothing is compiled; {build.tool('cuda')}"})
    path = find.library_path("cuda")
    if path is not None and path.with_suffix(".json").is_file() and report.where == "gpu":
        record = json.loads(path.with_suffix(".json").read_text())
        report.more = {"library": path.name, "record": record}
        for row in resources(record.get("ptxas", {})):
            report.add(row)
    names = tuple(name for name in report.names() if name.startswith("cuda"))
    for kernels in report.kernels(names, needed=False):
        with report.step(kernels.name):
            report.add(solved(kernels, report))
    return report.finish(COLUMNS)


if __name__ == "__main__":
    part.run(main)
