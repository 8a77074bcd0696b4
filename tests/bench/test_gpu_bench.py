"""The GPU parts without a GPU: references agree, failures become rows, and the whole script runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_accuracy_tool import planted
from torch import Tensor

from bench import accuracy, dense, measure, peers, table
from bench.gpu import accuracy as gpu_accuracy
from bench.gpu import bars, sanitize, steps, tiles
from bench.gpu import bench as gpu_bench
from bench.gpu import measure as gpu_measure
from bench.gpu import part as gpu_part
from bench.gpu import peers as gpu_peers
from bench.gpu import race as gpu_race
from bench.gpu import tests as gpu_tests
from bench.gpu.kernels import Kernels
from bench.record import MODES, ROOT, Cell, Row, row_of
from train_ref.truth import LOSSES


def cell(measure: str, names: tuple[str, ...], loss: str = "nt_xent", **more: Any) -> Cell:
    return Cell(measure, loss, 64, 8, names, clock="device", **{"repeats": 3, **more})


# ---------------------------------------------------------------- references


@pytest.mark.parametrize("loss", gpu_peers.CHUNKED)
def test_chunks_that_do_not_divide_the_rows(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A baseline that is wrong would be no baseline; test_bench_losses.py has it in one chunk."""
    monkeypatch.setattr(gpu_peers, "ROWS", 33)
    leaves = dense.leaves(loss, 130, 24)
    value = measure.step(gpu_peers.CHUNKED[loss], leaves)
    found = [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]
    assert value == pytest.approx(measure.step(dense.EAGER[loss], leaves), rel=5e-6)
    for gradient, leaf in zip(found, leaves, strict=True):
        assert leaf.grad is not None
        assert torch.linalg.vector_norm(gradient - leaf.grad) <= 2e-5 * torch.linalg.vector_norm(leaf.grad)


class Memeff(torch.nn.Module):
    """In place of memeff's CLIP loss, as version 0.3.1 documents it. Its value is that of the usual loss, whatever `stable` is."""

    def __init__(self, temperature: float = 0.07, normalized_inputs: bool = False, stable: bool = True) -> None:
        super().__init__()
        self.temperature, self.normalized_inputs, self.stable = temperature, normalized_inputs, stable

    def forward(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        image, text = (x if self.normalized_inputs else F.normalize(x, dim=1) for x in (image_features, text_features))
        logits, own = image @ text.T / self.temperature, torch.arange(len(image))
        value = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        times = (len(image) * self.temperature) ** 0.5 if self.stable else 1.0
        return times * value + (1 - times) * value.detach()


def test_memeff_is_called_as_it_is_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradients of both towers are those of the dense loss. The scale is a constant there, and gets no gradient."""
    module = types.ModuleType("memeff")
    module.__dict__["MemoryEfficientCLIPLoss"] = Memeff
    monkeypatch.setitem(sys.modules, "memeff", module)
    leaves = dense.leaves("clip", 130, 24)
    value = measure.step(peers.contestant("clip", "memeff"), leaves)
    image, text, scale = leaves
    assert scale.grad is None and image.grad is not None and text.grad is not None
    found = [image.grad.clone(), text.grad.clone()]
    assert value == pytest.approx(measure.step(dense.EAGER["clip"], leaves), rel=5e-6)
    for gradient, leaf in zip(found, leaves, strict=False):
        assert leaf.grad is not None
        assert torch.linalg.vector_norm(gradient - leaf.grad) <= 2e-5 * torch.linalg.vector_norm(leaf.grad)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("wrong", [None, "mean", "gradient"])
def test_accuracy_finds_a_planted_error(loss: str, wrong: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of fastnce the dense loss in float64: as it is, 1e-4 too large, with 2 % less gradient."""
    fault = planted(LOSSES[loss], "loss" if wrong == "mean" else wrong)
    monkeypatch.setattr(accuracy, "fused", lambda loss, backend: fault)
    (row,) = gpu_accuracy.judge(gpu_accuracy.Point(loss, torch.bfloat16, 24, 1.0, 0.1), 130, "cpu", [Kernels.of("cuda", "cpu")])
    outside = {name for name in gpu_accuracy.SHOWN.values() if row[name] > 1}
    assert outside == {None: set(), "mean": {"mean", "row"}, "gradient": {"gradient"}}[wrong]
    assert row["inside"] == (wrong is None)


# ---------------------------------------------------------------- rows instead of ends


def test_contestants_that_fail_are_rows_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> dense.Contestant:
        raise ImportError("No module named 'peer'")

    def refuses(z: Tensor) -> Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    def broken(z: Tensor) -> Tensor:
        raise ValueError("first line\nlast line")

    for name, factory in (("missing", missing), ("refuses", lambda: refuses), ("broken", lambda: broken)):
        monkeypatch.setitem(peers.FACTORIES["nt_xent"], name, factory)
    rows = measure.here(cell("time", (peers.OURS, "missing", "refuses", "broken", "eager autocast")))
    assert [row["status"] for row in rows] == ["ok", "missing", "oom", "crash", "ok"]
    assert rows[3]["detail"] == "ValueError: last line"
    assert rows[0]["gpu_ratio"] == 1
    for row in (rows[0], rows[4]):
        assert row["iterations"] == 3
        assert row["tflops"] == pytest.approx(6 * 64**2 * 8 / row["gpu_ms"]["median"] / 1e9)
    assert rows[4]["loss_value"] == pytest.approx(rows[0]["loss_value"], rel=0.02)


def test_a_slip_in_a_form_of_ours_fails_the_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it would be one row without a figure among forty."""

    def slip(query: Tensor, key: Tensor) -> Tensor:
        raise NameError("name 'lse' is not defined")

    monkeypatch.setitem(gpu_peers.FACTORIES["info_nce"], "chunked cuBLAS", lambda: slip)
    found = gpu_part.Report("bench", ["--dry-run", f"--out={tmp_path}"])
    rows = list(gpu_bench.Bars(found).ratios(bars.Contest(11, "info_nce", 64, 8, {"chunked cuBLAS": 1.0, "inf-cl": 1.0})))
    assert [row["met"] for row in rows] == [None, None]
    assert len(found.errors) == 1 and "NameError" in found.errors[0]


def test_slow_rounds_end_early() -> None:
    (row,) = measure.here(cell("time", (peers.OURS,), repeats=10_000, seconds=1e-6))
    assert row["iterations"] == gpu_measure.FEWEST


def test_a_temperature_holds_for_one_cell() -> None:
    before = dense.TEMPERATURE
    (solved,), (random,) = (measure.here(replace(cell("time", ("eager",)), **more)) for more in (bars.SOLVED, {}))
    assert solved["loss_value"] < 1e-4 < random["loss_value"]
    assert before == dense.TEMPERATURE


@pytest.mark.parametrize("mode", MODES)
def test_modes_under_the_clock_of_a_device(mode: str) -> None:
    for row in measure.here(cell("time", (peers.OURS, "eager"), mode=mode)):
        assert (row["mode"], row["status"], "gradient_norm" in row) == (mode, "ok", mode != "fwd")
        assert row["tflops"] == pytest.approx({"fwd": 2, "bwd": 4, "full": 6}[mode] * 64**2 * 8 / row["gpu_ms"]["median"] / 1e9)


def test_the_host_is_timed_without_the_device() -> None:
    rows = measure.here(cell("host", (peers.OURS, "eager")))
    assert [(row["status"], row["iterations"]) for row in rows] == [("ok", 3), ("ok", 3)] and all(row["host_ms"] > 0 for row in rows)


def test_every_loss_has_a_memory_row_and_a_profile() -> None:
    for loss in dense.LOSSES:
        (row,) = measure.here(cell("memory", ("eager",), loss))
        assert row["status"] == "ok"
        assert row["input_mib"] >= row["gradient_mib"] > 0
    (row,) = measure.here(cell("kernels", ("eager",)))
    assert (row["status"], row["kernels"]) == ("ok", [])  # a CPU has no kernels that take time on a device


def test_a_process_that_dies_costs_only_the_one_that_killed_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A fault on a GPU takes the whole process: then every peer runs again, alone with ours."""

    def fake(cell: Cell, timeout: float) -> list[Row]:
        if cell.measure == "gemm":
            return measure.here(cell)
        dead = "killer" in cell.names
        return [row_of(cell, n, "crash", detail="SIGABRT") if dead else measure.here(cell)[i] for i, n in enumerate(cell.names)]

    monkeypatch.setattr(gpu_bench, "in_a_process", fake)
    found = gpu_part.Report("bench", ["--dry-run", f"--out={tmp_path}"])
    measured = gpu_bench.Bars(found)
    small = measured.cell("time", "nt_xent", 64, 8, (peers.OURS, "eager", "killer"))
    found.dry = False  # which would not start processes
    rows = measured.measured(small)
    assert [(row["contestant"], row["status"]) for row in rows] == [(peers.OURS, "ok"), ("eager", "ok"), ("killer", "crash")]


def test_a_failing_step_is_an_error_and_not_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = gpu_part.Report("tiles", ["--dry-run", f"--out={tmp_path}"])
    with found.step("one"):
        raise KeyError("typo")
    found.add({"case": "two", "met": True})
    assert found.finish(("case", "met")) == 1
    assert json.loads((tmp_path / "tiles.json").read_text())["errors"] == ["one: KeyError: 'typo'"]
    assert gpu_part.summary(tmp_path, ["tiles", "bench"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("tiles") and "error: one" in line for line in lines)
    assert any(line.startswith("bench") and "left no result" in line for line in lines)


# ---------------------------------------------------------------- reading logs


def test_outcomes_of_a_log() -> None:
    alone = "tests/test_gpu.py::test_a[x 1] PASSED [ 5%]\ntests/test_gpu.py::test_b FAILED [100%]\n"
    alone += "FAILED tests/test_gpu.py::test_b - assert 1\n"
    parallel = "[gw0] [ 50%] PASSED tests/test_gpu.py::test_a[PASSED] \n[gw1] [100%] ERROR tests/test_gpu.py::test_c \n"
    assert gpu_tests.outcomes(alone) == {"passed": 1, "failed": 1}
    assert gpu_tests.outcomes(parallel) == {"passed": 1, "error": 1}
    assert gpu_tests.failures(alone) == ["tests/test_gpu.py::test_b - assert 1"]


@pytest.mark.slow
def test_the_groups_are_all_tests() -> None:
    """Every test on a GPU is in exactly one group: pytest -k looks for words in names."""
    listed = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", gpu_tests.TESTS]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True)
    names = [line for line in done.stdout.splitlines() if "::" in line]
    assert len(names) > 400
    expressions = [re.sub(r"\b(?!not\b|and\b|or\b)(\w+)", r"('\1' in name)", words) for words, *_ in gpu_tests.GROUPS]
    groups = [[eval(expression, {"name": name}) for name in names] for expression in expressions]
    assert all(any(group) for group in groups)
    assert {sum(of_name) for of_name in zip(*groups, strict=True)} == {1}
    marked = [path for path in (ROOT / "tests").glob("*.py") if "mark.gpu" in path.read_text()]
    assert marked == [ROOT / gpu_tests.TESTS]


@pytest.mark.parametrize(
    "shape", [next(shape for shape in sanitize.SHAPES if shape.loss == loss) for loss in (*dense.LOSSES, "mask")], ids=str
)
def test_a_sanitizer_sees_every_loss(shape: sanitize.Shape) -> None:
    sanitize.solve(shape, "cpu", "torch")


def test_reports_of_a_sanitizer() -> None:
    assert sanitize.reports_of("========= ERROR SUMMARY: 0 errors") == 0
    assert sanitize.reports_of("========= ERROR SUMMARY: 3 errors") == 3
    assert sanitize.reports_of("========= RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)") == 3
    assert sanitize.reports_of("Error: Device not supported") is None


def test_a_sanitizer_that_hangs_is_cut_off_with_its_children() -> None:
    """The child holds the pipe: waiting for its end would take 60 seconds."""
    status, log = sanitize.execute(["bash", "-c", "echo solved one; sleep 60 & wait"], dict(os.environ), 1.0)
    assert (status, log) == ("cut off after 1 s", "solved one\n")


def test_a_report_of_a_gpu() -> None:
    graphics = {"name": "G", "cuda": "13.0", "triton": "3.6"}
    env = {"cpu": "C", "vector": "V", "threads": 1, "time": "T", "fastnce": "0", "sources": "d" * 64, "torch": "2", "gpu": graphics}
    env |= {"python": "3", "peers": {}, "load": [0.0], "allocator": {}, "command": "c", "mem_limit_mib": 0, "cells_left": 0}
    problem = {
        "measure": "time",
        "mode": "full",
        "loss": "clip",
        "n": 1024,
        "d": 8,
        "dtype": "bfloat16",
        "device": "cuda",
        "threads": 1,
        "status": "ok",
    }
    rows = [
        {**problem, "contestant": "fastnce", "gpu_ms": {"median": 2.0}, "gpu_ratio": 1.0, "gemm_share": 40.0},
        {**problem, "contestant": "eager", "gpu_ms": {"median": 9.0}, "gpu_ratio": 4.5, "gemm_share": 10.0},
        {**problem, "measure": "memory", "contestant": "fastnce", "peak_mib": 4.0},
        {**problem, "measure": "gemm", "loss": "gemm", "contestant": "torch", "tflops": 750.0},
    ]
    text = table.render({"schema": 2, "env": env, "rows": rows})
    assert "# Contrastive losses on G, CUDA 13.0, triton 3.6" in text
    assert "| 1,024 | 8 | 2 | 9 (4.5×) |" in text
    assert "percent of a matrix product's 750,000 GFLOP/s in bfloat16" in text
    assert "| 1,024 | 8 | 40 | 10 |" in text
    assert "peak allocated device memory" in text


# ---------------------------------------------------------------- the script

BENCH_GPU = [sys.executable, "-m", "bench", "gpu"]


@pytest.mark.slow
def test_the_dry_run_of_the_script(tmp_path: Path) -> None:
    """All parts run on the CPU, before an hour on a GPU is spent to find out that one does not."""
    environment = os.environ | {"OUT": str(tmp_path), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([*BENCH_GPU, "--dry-run"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    for part in gpu_part.PARTS:
        found = json.loads((tmp_path / f"{part}.json").read_text())
        assert found["part"] == part and found["dry_run"] and found["rows"] and not found["errors"]
        assert str(tmp_path) not in json.dumps(found["env"])
    assert len(list(tmp_path.iterdir())) == len(gpu_part.PARTS) + 1  # the log
    # A time of the CPU under the name of a GPU's kernels, or a bar that a CPU misses, reads as a result.
    assert "met=NO" not in done.stderr and "met=yes" not in done.stderr
    for part, figures in zip(("bench", "steps", "race", "tiles"), (m.FIGURES for m in (gpu_bench, steps, gpu_race, tiles)), strict=True):
        rows = json.loads((tmp_path / f"{part}.json").read_text())["rows"]
        found = [row[name] for row in rows for name in figures if name in row]
        assert found and set(found) == {None}, part
    assert done.stdout.count("Dry run on the CPU") == 4
    shown = done.stdout[done.stdout.index("=== summary") :]
    assert all(f"{part} " in shown for part in gpu_part.PARTS)


def test_the_script_refuses_what_it_does_not_know() -> None:
    done = subprocess.run([*BENCH_GPU, "--dryrun"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "unknown argument '--dryrun'" in done.stderr
