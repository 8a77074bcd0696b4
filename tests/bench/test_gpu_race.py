"""Which kernels a GPU part runs, what their library was built to, and a race between them."""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from test_gpu_bench import cell

from bench.gpu import build as gpu_build
from bench.gpu import kernels as gpu_kernels
from bench.gpu import part as gpu_part
from bench.gpu import race as gpu_race
from bench.gpu.kernels import Kernels
from bench.record import Cell, Row
from fastnce.backends.cuda import launches
from fastnce.compiled import build


def test_which_kernels_are_chosen_and_for_how_long() -> None:
    """The library itself decides by the architecture; only the argument that it gets shows here."""
    cpu = torch.device("cpu")
    for name, where, architecture in (("cuda-mma", "gpu", 80), ("cuda-mma", "emulated", 80), ("cuda", "emulated", 90)):
        with gpu_kernels.chosen(Kernels.of(name, where)):
            assert launches.architecture(torch.device("cuda")) == architecture
    assert launches.architecture(cpu) == 80
    assert [Kernels.of(name, "gpu")[1:3] for name in gpu_kernels.NAMES] == [("cuda", "cuda")] * 2 + [("cuda", "triton")]
    assert {Kernels.of(name, "cpu")[1:] for name in gpu_kernels.NAMES} == {("cpu", "torch", 0)}
    assert not Kernels.of("cuda", "cpu").objection()


def test_the_environment_says_which_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for where in gpu_kernels.WORDS.values():
        for name, value in gpu_kernels.environment(where, ()).items():
            monkeypatch.setenv(name, value)
        assert (gpu_kernels.where(), gpu_kernels.asked()) == (where, gpu_kernels.names(where))
    monkeypatch.setenv(gpu_kernels.ASKED, "cuda,triton")
    assert gpu_kernels.asked() == ("cuda", "triton")


def test_kernels_that_do_not_run_are_rows(tmp_path: Path) -> None:
    found = gpu_part.Report("accuracy", ["--dry-run", f"--out={tmp_path}", "--kernels=cuda"])
    assert [kernels.name for kernels in found.kernels()] == ["cuda"] and not found.rows
    found.where = "gpu"
    with mock.patch.object(Kernels, "objection", return_value="library not built"):
        assert found.kernels() == []
    assert found.rows == [{"kernels": "cuda", "status": "library not built"}]
    assert found.errors == ["none of these kernels run here"]


def test_without_a_compiler_the_library_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise build.BuildError("no nvcc: looked for nvcc")

    monkeypatch.setenv("FASTNCE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "nvcc", none)
    found = gpu_part.Report("build", ["--dry-run", f"--out={tmp_path}"])
    assert gpu_build.compiled(found, "sm_90a") == {"what": "library", "arch": "sm_90a", "status": "no nvcc: looked for nvcc"}
    assert not found.errors
    assert found.kernels((), needed=False) == [] and not found.errors
    assert {gpu_build.arch_of(of) for of in ((8, 0), (8, 9), (9, 0), (10, 3), (12, 0))} <= build.ARCHS.keys()


def test_what_ptxas_said_by_unit() -> None:
    lines = [
        "sm_90a k: 16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads; Used 168 registers, used 1 barriers",
        "sm_90a l: 32 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads; Used 40 registers, used 1 barriers",
        "(C7519) warpgroup.arrive is injected",
    ]
    expected = {"what": "a.cu", "entries": 2, "registers": 168, "stack": 32, "spilled": 8, "status": "remarks (C7519)"}
    assert list(gpu_build.resources({"a.cu": lines})) == [expected]


def lap(**samples: list[float]) -> Row:
    names = tuple(name.replace("_", "-") for name in samples)
    results = {name: {"status": "ok", "loss_value": 2.0, "gradient_norm": 1.0} for name in names}
    return gpu_race.judged(cell("time", names), results, dict(zip(names, samples.values(), strict=True)))


def test_the_first_of_a_race() -> None:
    row = lap(cuda=[2.0, 9.0, 2.0], cuda_mma=[2.02, 9.1, 2.02], triton=[3.0, 13.5, 3.0], eager=[1.0, 4.0, 1.0])
    assert (row["first"], row["ahead"], row["triton"], row["status"]) == ("cuda = cuda-mma", 1.5, 3.0, "ok")
    assert (row["eager_over"], row["met"]) == (0.5, False)
    assert lap(cuda=[1.0], triton=[1.0])["ahead"] == 1
    found = [row, lap(cuda=[1.0], triton=[2.0])]
    assert gpu_race.standings(found) == {"float32 N up to 1024": {"shapes": 2, "cuda": 2, "cuda-mma": 1}}


def test_a_racer_that_computes_something_else_is_an_error(tmp_path: Path) -> None:
    results = {name: {"status": "ok", "loss_value": value, "gradient_norm": 1.0} for name, value in (("cuda", 2.0), ("triton", 2.1))}
    results["eager"] = {"status": "oom", "detail": "tried to allocate 64 GiB"}
    row = gpu_race.judged(cell("time", tuple(results)), results, {"cuda": [1.0], "triton": [2.0]})
    assert row["status"] == "eager: oom tried to allocate 64 GiB; triton computed something else"
    found = gpu_part.Report("race", ["--dry-run", f"--out={tmp_path}"])
    gpu_race.failed(found, row)
    assert len(found.errors) == 1


def test_a_contestant_that_ends_its_process_is_out_of_the_race(tmp_path: Path) -> None:
    """A fault on a GPU ends the process, and a kernel that waits for ever takes its time: the others go on."""
    found = gpu_part.Report("race", ["--dry-run", f"--out={tmp_path}"])
    runs: list[tuple[str, ...]] = []

    def run(command: list[str], given: Sequence[Cell], patience: float) -> Generator[Row]:
        for one in given:
            runs.append(one.names)
            if "cuda" in one.names and one.n == 64:
                return
            yield gpu_race.problem(one) | {"first": one.names[0], "failed": [], "status": "ok"}

    names = ("cuda", "triton")
    gpu_race.race(found, [replace(cell("time", names), n=n) for n in (32, 64, 96)], run)
    assert runs == [names, names, ("cuda",), ("triton",), ("triton",), ("triton",)]
    assert [(row["n"], row.get("first")) for row in found.rows] == [(32, "cuda"), (64, None), (64, "triton"), (96, "triton")]
    assert "cuda: its process died" in found.rows[1]["status"] and len(found.errors) == 1


@pytest.mark.parametrize(("end", "seconds"), [("", 60), ("import os; os.abort()", 60), ("import time; time.sleep(60)", 1)])
def test_rows_of_a_process_whatever_becomes_of_it(end: str, seconds: float) -> None:
    code = f"import sys, json; print('noise'); [print(json.dumps(x), flush=True) for x in json.load(sys.stdin)]; {end}"
    given = [cell("time", ("cuda",)), cell("time", ("triton",), "clip")]
    assert [row["loss"] for row in gpu_race.answers([sys.executable, "-c", code], given, seconds)] == ["nt_xent", "clip"]
