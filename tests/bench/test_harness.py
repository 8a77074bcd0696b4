"""The harness itself: failures become rows, contestants that cannot fit are not tried, and results hold nothing about the user."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import __main__ as command
from bench import dense, measure, peers, record, sweep, table
from bench.peers import OURS
from bench.record import Cell

LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")


def result_in(folder: Path) -> tuple[dict[str, Any], str]:
    """The one result below a folder, and its table."""
    (path,) = folder.glob("*/*.json")
    return json.loads(path.read_text()), path.with_suffix(".md").read_text()


# ---------------------------------------------------------------- one process


@pytest.mark.slow
@LINUX
def test_a_refused_allocation_is_a_row_and_larger_problems_are_not_tried(tmp_path: Path) -> None:
    """The (4096, 4096) float32 logits are 64 MiB: they do not fit into 48, and fastnce does."""
    arguments = ["memory", "--losses=nt_xent", "--n=4k:8k:x2", "--d=16", "--peers=eager", "--mem-limit=48MiB"]
    assert command.main([*arguments, "--out", str(tmp_path)]) == 0
    result, markdown = result_in(tmp_path)
    assert result["env"]["mem_limit_mib"] == 48
    found = [(row["n"], row["contestant"], row["status"]) for row in result["rows"]]
    assert found == [(4096, OURS, "ok"), (4096, "eager", "oom"), (8192, OURS, "ok"), (8192, "eager", "oom-skipped")]
    assert all(0 < row["peak_mib"] < 48 for row in result["rows"] if row["status"] == "ok")
    assert result["rows"][1]["detail"] == "tried to allocate 67108864 bytes"
    assert result["rows"][3]["detail"] == "not run: out of memory at N=4096"
    assert "| OOM |" in markdown and "| (OOM) |" in markdown and table.SKIPPED in markdown


def test_a_timeout_is_a_row() -> None:
    rows = sweep.in_a_process(Cell("time", "nt_xent", 8, 4, ("eager", OURS)), timeout=0.01)
    assert [(row["contestant"], row["status"], row["detail"]) for row in rows] == [
        ("eager", "timeout", "took more than 0.01 s"),
        (OURS, "timeout", "took more than 0.01 s"),
    ]


@pytest.mark.slow
def test_a_contestant_that_kills_its_process_is_the_only_one_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of that name that dies while it is imported stands in front of the real one."""
    (tmp_path / "info_nce.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGABRT)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    rows = sweep.isolated(Cell("time", "info_nce", 32, 8, (OURS, "info-nce-pytorch"), repeats=1), timeout=300)
    assert [(row["contestant"], row["status"]) for row in rows] == [(OURS, "ok"), ("info-nce-pytorch", "crash")]
    assert rows[1]["detail"] == "SIGABRT"
    for row in rows:
        assert row["alone"] and not {"cpu_ratio", "wall_ratio"} & row.keys()


def test_what_the_kernel_kills_ran_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among several in one process the culprit is unknown; alone it is known."""

    def killed(*given: Any, **more: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], -signal.SIGKILL, "", "")

    monkeypatch.setattr(sweep.subprocess, "run", killed)
    rows = sweep.isolated(Cell("time", "clip", 8, 4, (OURS, "eager")), timeout=1.0)
    assert [(row["status"], row["alone"]) for row in rows] == [("oom", True)] * 2
    assert [row["status"] for row in sweep.in_a_process(Cell("time", "clip", 8, 4, (OURS, "eager")), timeout=1.0)] == ["crash"] * 2


@pytest.mark.parametrize("call", [2, 3, 5], ids=["first at full size", "first round", "a later round"])
def test_memory_that_is_refused_when_timed_is_a_row(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also alone in its process, and also after it has run before: the others go on and keep their ratios."""

    def hungry(calls: list[int]) -> dense.Contestant:
        def loss(*leaves: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            if len(calls) >= call:
                raise MemoryError
            return dense.eager_clip(*leaves)

        return loss

    monkeypatch.setitem(peers.FACTORIES["clip"], "careful", lambda: hungry([]))
    cell = Cell("time", "clip", 16, 8, (OURS, "careful", "eager"), repeats=3)
    ours, refused, eager = measure.measure_time(cell)
    assert (ours["status"], refused["status"], eager["status"]) == ("ok", "oom", "ok")
    assert eager["cpu_ratio"] > 0 and "cpu_ms" not in refused
    assert [row["status"] for row in measure.measure_time(replace(cell, names=("careful",)))] == ["oom"]


def test_a_real_limit_on_a_timed_cell() -> None:
    rows = sweep.isolated(Cell("time", "nt_xent", 4096, 16, (OURS, "eager"), repeats=1, mem_limit=128), 120)
    assert [row["status"] for row in rows] == ["ok", "oom"]


def test_the_limit_holds_while_a_contestant_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []
    monkeypatch.setattr(measure, "limit_memory", lambda mebibytes: seen.append(("limit", mebibytes)))

    def step(function: dense.Contestant, leaves: tuple[torch.Tensor, ...], mode: str) -> float:
        seen.append(("step", len(leaves[0])))
        return 1.0

    monkeypatch.setattr(measure, "step", step)
    monkeypatch.setitem(peers.FACTORIES["clip"], "compile", lambda: dense.eager_clip)
    measure.measure_memory(Cell("memory", "clip", 1024, 8, ("compile",), mem_limit=64))
    measure.measure_memory(Cell("memory", "clip", 2048, 8, ("eager",), mem_limit=64))
    beyond = 64 + measure.COMPILING
    assert seen == [("limit", beyond), ("step", 1024), ("limit", 64), ("step", 1024), ("step", 1024), ("limit", 64), ("step", 2048)]


def test_what_is_measured_is_memory_and_not_code() -> None:
    """No page of a library is read for the first time within the step that counts."""
    code = """
import torch; torch.set_num_threads(1)
from bench import measure
from bench.record import Cell
cell = Cell("memory", "nt_xent", 2048, 64, ("fastnce",))
function = measure.warmed_up(cell, "fastnce")
leaves = measure.leaves_of(cell)
before = measure.resident("RssFile")
measure.step(function, leaves)
print(measure.resident("RssFile") - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=record.ROOT, check=True)
    assert float(done.stdout) < 0.5


def test_one_that_raises_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> dense.Contestant:
        raise ModuleNotFoundError("No module named 'lightly'")

    monkeypatch.setitem(peers.FACTORIES["nt_xent"], "lightly", missing)
    rows = measure.here(Cell("time", "nt_xent", 8, 4, ("lightly", "eager", OURS), repeats=1))
    assert [row["status"] for row in rows] == ["missing", "ok", "ok"]
    monkeypatch.setitem(peers.FACTORIES["nt_xent"], "eager", lambda: lambda z: z.no_such_name)
    rows = measure.here(Cell("time", "nt_xent", 8, 4, ("eager", OURS), repeats=1))
    assert [row["status"] for row in rows] == ["crash", "ok"]
    assert rows[0]["detail"] == "AttributeError: 'Tensor' object has no attribute 'no_such_name'"


def test_times_of_one_process_come_with_their_ratios() -> None:
    rows = measure.measure_time(Cell("time", "clip", 32, 8, (OURS, "eager", "careful", "chunked"), repeats=3))
    assert [row["status"] for row in rows] == ["ok"] * 4
    assert rows[0]["cpu_ratio"] == rows[0]["wall_ratio"] == 1
    for row in rows:
        assert 0 < row["wall_ms"]["min"] <= row["wall_ms"]["median"]
        assert row["loss_value"] == pytest.approx(rows[0]["loss_value"], rel=5e-6)
        assert row["gradient_norm"] == pytest.approx(rows[0]["gradient_norm"], rel=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("loss", dense.LOSSES)
def test_a_forward_leaves_no_gradient_and_a_backward_that_of_the_whole(loss: str) -> None:
    found = {mode: measure.here(Cell("time", loss, 32, 8, (OURS, "eager"), mode, repeats=1)) for mode in record.MODES}
    for forward, backward, full in zip(found["fwd"], found["bwd"], found["full"], strict=True):
        assert (forward["mode"], backward["mode"], full["mode"]) == ("fwd", "bwd", "full")
        assert forward["loss_value"] == backward["loss_value"] == full["loss_value"]
        assert "gradient_norm" not in forward
        assert backward["gradient_norm"] == full["gradient_norm"] > 0


def test_what_a_backward_is_timed_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward has run before the clock starts, once for every step."""
    calls = []

    def loss(z: Any) -> Any:
        calls.append(len(z))
        return z.square().sum()

    leaves = dense.leaves("nt_xent", 8, 4)
    ready = measure.prepared("bwd", loss, leaves)
    assert calls == [8] and leaves[0].grad is None
    ready()
    assert calls == [8] and leaves[0].grad is not None
    assert measure.prepared("full", loss, leaves) is not None and calls == [8] and leaves[0].grad is None


# ---------------------------------------------------------------- the command line


def options(*arguments: str) -> Any:
    """Of a command that measures both, where the first argument is not one of them."""
    return command.parse([*([] if arguments[:1] == ("memory",) else command.MEASURES), *arguments])


def test_ranges_lists_and_defaults() -> None:
    assert options("--n=4k:1M:x2").n == [2**exponent for exponent in range(12, 21)]
    assert options("--n=4k:10k:x2,1024").n == [1024, 4096, 8192]
    assert options("--n=8192,64", "--d=64,128", "--dtype=float32,bfloat16").n == [64, 8192]
    assert options("--losses=all").losses == list(dense.LOSSES)
    assert (options("--quick").n, options("--quick").peers, options("--quick", "--n=64").n) == ([4096], ["eager"], [64])
    assert options("--mem-limit=2GiB").mem_limit == 2048
    assert (options().mode, options().repeats, options("--device=cuda", "--dry-run").repeats) == (["full"], 5, 20)


def test_the_plan() -> None:
    given = ["--losses=clip", "--n=64,128", "--d=8", "--mode=fwd,bwd,full", "--dtype=float32,bfloat16", "--peers=eager"]
    planned = command.plan(options(*given))
    assert [cell.n for cell in planned if cell.measure == "time"] == [64, 128] * 6
    assert {(cell.mode, cell.names) for cell in planned if cell.measure == "memory"} == {
        (mode, (name,)) for mode in ("fwd", "full") for name in (OURS, "eager")
    }


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--n=4k:1M"], "argument --n: '4k:1M' is not a range such as 4k:1M:x2"),
        (["--n=4k:1M:x1"], "a factor of 2 or more"),
        (["--n=2M:1M:x2"], "starts above its end"),
        (["--n=4g"], "'4g' is not a positive integer such as 4096 or 4k"),
        (["--n=,"], "names no size"),
        (["--n=0"], "'0' is not a positive integer"),
        (["--n=65"], "--n must be even for nt_xent"),
        (["--losses=sup_con", "--n=1"], "--n must be at least 2 for sup_con"),
        (["--losses=nt_xnt"], "--losses: unknown 'nt_xnt'; choose from nt_xent, info_nce"),
        (["--losses="], "--losses names nothing"),
        (["--dtype=fp32"], "--dtype: unknown 'fp32'; choose from float32"),
        (["--mode=both"], "--mode: unknown 'both'; choose from full, fwd, bwd"),
        (["all"], "invalid choice: 'all' (choose from 'time', 'memory')"),
        (["--peers=nobody"], "--peers: unknown 'nobody'"),
        (["memory", "--mode=bwd,bwd"], "memory is measured for fwd and full"),
        (["--mem-limit=2GB"], "'2GB' is not a size such as 512MiB or 2GiB"),
        (["--time-budget=0"], "--time-budget must be above 0, got 0"),
        (["--backend=cpp"], "invalid choice: 'cpp'"),
        (["--device=cuda", "--mem-limit=1GiB"], "--mem-limit holds for the CPU"),
    ],
)
def test_bad_options_are_named(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        options(*arguments)
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err


def test_a_wanted_peer_that_is_not_installed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> dense.Contestant:
        raise ModuleNotFoundError("No module named 'lightly'")

    monkeypatch.setitem(peers.FACTORIES["nt_xent"], "lightly", missing)
    assert "lightly" not in peers.contestants("nt_xent")
    with pytest.raises(SystemExit, match="No module named 'lightly'; install it, or leave it out of --peers"):
        command.main(["time", "--losses=nt_xent", "--peers=lightly", "--dry-run"])


def test_an_unknown_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(["pages"])
    assert stopped.value.code == 2
    assert "unknown command 'pages'; choose from time, memory, accuracy, host, gpu, page" in capsys.readouterr().err


# ---------------------------------------------------------------- results


@pytest.mark.slow
def test_a_result_names_neither_host_nor_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["time", "--losses=nt_xent", "--n=32,64", "--d=4", "--repeats=1", "--peers=eager", "--time-budget=0.01"]
    assert command.main([*arguments, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    result, markdown = result_in(tmp_path)
    assert markdown == table.render(result)
    assert printed.out.strip() == markdown.strip()
    text = json.dumps(result) + markdown
    for secret in (str(tmp_path), str(record.ROOT), str(Path.home())):
        assert secret not in text
    assert socket.gethostname() not in re.findall(r"[\w.-]+", text)

    assert result["schema"] == record.SCHEMA == 2
    env = result["env"]
    assert env["command"].startswith("python -m bench time --losses=nt_xent --n=32,64")
    assert (env["mem_limit_mib"], env["cells_left"]) == (0, 1)
    assert "1 of the planned cells were not started." in markdown
    assert printed.err.startswith("[1/2] time   full nt_xent  N=32") and "1 of 2 cells left out" in printed.err
    found = [(row["measure"], row["mode"], row["contestant"], row["n"]) for row in result["rows"]]
    assert found == [
        ("time", "full", OURS, 32),
        ("time", "full", "eager", 32),
        ("gemm", "fwd", "torch", 1024),
        ("gemm", "fwd", "oneDNN", 1024),
    ]
    product, timed = max(result["rows"][2:], key=lambda row: row["tflops"]), result["rows"][:2]
    for row in timed:
        rate = 6 * 32 * 32 * 4 / row["cpu_ms"]["median"] / 1e9
        assert row["gemm_share"] == pytest.approx(100 * rate / product["tflops"])


def test_a_later_result_never_replaces_an_earlier_one(tmp_path: Path) -> None:
    result = {"env": {"time": "2026-01-02T03:04:05Z", "sources": "0123456789abcdef"}}
    first, second = (record.save(result, "", tmp_path) for _ in range(2))
    assert (first.name, second.name) == ("2026-01-02-01234567.json", "2026-01-02-01234567-2.json")


def test_the_digest_follows_the_sources_that_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not the code that measures: a comment there makes no result stale."""
    monkeypatch.setattr(record, "ROOT", tmp_path)
    for folder in ("fastnce", "csrc", "bench"):
        (tmp_path / folder).mkdir()
    source = tmp_path / "fastnce" / "a.py"
    found = []
    for text in ("1", "2"):
        source.write_text(text)
        found.append(record.digest())
    (tmp_path / "fastnce" / "a.pyc").write_text("compiled")
    (tmp_path / "bench" / "c.py").write_text("# a comment")
    found.append(record.digest())
    source.rename(tmp_path / "fastnce" / "b.py")
    found.append(record.digest())
    (tmp_path / "csrc" / "d.cpp").write_text("int d;")
    found.append(record.digest())
    assert found[1] == found[2]
    assert len(set(found)) == 4


def test_the_table_shows_what_did_not_run() -> None:
    env = {"cpu": "C", "vector": "V", "threads": 1, "time": "T", "fastnce": "0", "sources": "d" * 64, "torch": "2"}
    env |= {"python": "3", "peers": {}, "load": [0.0], "allocator": {}, "command": "c", "mem_limit_mib": 0, "cells_left": 0}
    problem = {"mode": "full", "loss": "clip", "n": 1024, "d": 8, "dtype": "float32", "device": "cpu", "threads": 1}
    sized, timed = problem | {"measure": "memory"}, problem | {"measure": "time", "status": "ok"}
    rows = [
        {**sized, "contestant": OURS, "status": "ok", "peak_mib": 4.0},
        {**sized, "contestant": "eager", "status": "oom"},
        {**sized, "contestant": "careful", "status": "ok", "peak_mib": 10.0},
        {**sized, "contestant": "lightly", "status": "timeout"},
        {**timed, "contestant": OURS, "cpu_ms": {"median": 2.0}, "alone": True},
        {**timed, "contestant": "eager", "cpu_ms": {"median": 8.0}, "alone": True},
    ]
    text = table.render({"schema": 2, "env": env, "rows": rows})
    assert "| 1,024 | 8 | 4 | OOM | 10 (2.5×) | timeout |" in text
    assert "| 1,024 | 8 | 2 | 8 |" in text  # not in turn: no ratio
    with pytest.raises(ValueError, match="schema 1, and this renders schema 2"):
        table.render({"schema": 1, "env": env, "rows": []})


def test_pytest_benchmark_writes_no_host(pytestconfig: pytest.Config) -> None:
    pytest.importorskip("pytest_benchmark")
    machine = {"node": socket.gethostname(), "processor": "x86_64"}
    pytestconfig.hook.pytest_benchmark_update_machine_info(config=pytestconfig, machine_info=machine)
    assert machine == {"processor": "x86_64"}


# ---------------------------------------------------------------- the program


@pytest.mark.slow
@LINUX
def test_as_a_program_in_any_folder(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "time", "memory", "--quick", "--losses=nt_xent", "--n=512"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(record.ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    result, markdown = result_in(tmp_path / "fastnce-bench")
    assert done.stdout.strip() == markdown.strip()
    assert "written: fastnce-bench/" in done.stderr
    assert result["env"]["command"].startswith("python -m bench time memory --losses=nt_xent --n=512 --d=64")
    assert [row["status"] for row in result["rows"]] == ["ok"] * 6  # two times, two peaks, two products
    assert result["env"]["sources"] == record.digest()
