"""The pages show the recorded results: nothing invented, nothing left out, the same bytes every time, and a change is noticed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from made_up import environment, measured, record, recorded

from bench import comparison, figure, page
from bench.record import load

pytest.importorskip("matplotlib")

ROOT = page.ROOT


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return recorded(tmp_path / "results")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return copied(tmp_path / "root")


def copied(root: Path) -> Path:
    """The pages, in another folder."""
    for name in page.GENERATED:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((ROOT / name).read_text())
    return root


def stale(root: Path, results: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in page.stale(root, load(results))]


def run(root: Path, results: Path, *options: str) -> int:
    return page.main([*options, "--root", str(root), "--results", str(results)])


def contents(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


# Recorded here -------------------------------------------------------------------------------------------------------------------------


def test_the_pages_and_figures_are_what_the_results_say() -> None:
    assert stale(page.ROOT, page.ROOT / "bench" / "results") == []


# Changes noticed ------------------------------------------------------------------------------------------------------------------------


def test_rendering_twice_changes_nothing(root: Path, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(root, results, "--check") == 1
    assert run(root, results) == 0
    first = contents(root)
    assert {path.relative_to(root).as_posix() for path in first} == {"README.md", "docs/benchmarks.md", "docs/figures/a-cpu-nt_xent.svg"}
    for path in first:
        if "figures" in path.parts:
            path.unlink()
    assert run(root, results, "--check") == 1
    assert run(root, results) == 0
    assert contents(root) == first
    capsys.readouterr()
    assert run(root, results, "--check") == 0
    assert capsys.readouterr().out == ""


def test_an_edited_number_is_noticed(root: Path, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(root, results)
    texts = {root / name: (root / name).read_text() for name in page.GENERATED}
    for path, text in texts.items():
        path.write_text(re.sub(r"\b(4,096|16,384)\b", "4,097", text, count=1))
        assert path.read_text() != text
    capsys.readouterr()
    assert run(root, results, "--check") == 1
    assert capsys.readouterr().out == "".join(f"differs from the results: {name}\n" for name in page.GENERATED)
    run(root, results)
    assert {path: path.read_text() for path in texts} == texts


def test_an_edited_result_is_noticed_everywhere(root: Path, results: Path) -> None:
    run(root, results)
    (path,) = results.glob("*/*-d.json")
    result = json.loads(path.read_text())
    (row,) = (
        row for row in result["rows"] if (row["measure"], row["loss"], row["contestant"], row["n"]) == ("memory", "nt_xent", "eager", 4096)
    )
    row["peak_mib"] *= 1.1
    path.write_text(json.dumps(result))
    found = stale(root, results)
    assert found == ["README.md", "docs/benchmarks.md", "docs/figures/a-cpu-nt_xent.svg"]


def test_an_edited_figure_is_noticed(root: Path, results: Path) -> None:
    run(root, results)
    svg = root / "docs/figures/a-cpu-nt_xent.svg"
    svg.write_text(svg.read_text().replace("#1f6fb4", "#1f6fb5"))
    assert stale(root, results) == ["docs/figures/a-cpu-nt_xent.svg"]


def test_another_matplotlib_judges_by_the_digest(root: Path, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    run(root, results)
    svg = root / "docs/figures/a-cpu-nt_xent.svg"
    svg.write_text(svg.read_text().replace("#1f6fb4", "#1f6fb5"))
    monkeypatch.setattr(matplotlib, "__version__", "0.0.1")
    assert stale(root, results) == []
    monkeypatch.setattr(figure, "digest", lambda chart: "sha256 " + "0" * 64)
    assert len(stale(root, results)) == 1


def test_a_figure_without_a_result_goes(root: Path, results: Path) -> None:
    run(root, results)
    other = root / "docs/figures/photograph.png"
    other.write_bytes(b"not drawn from results")
    (root / "docs/figures/a-cpu-nt_xent.svg").rename(root / "docs/figures/old.svg")
    assert stale(root, results) == ["docs/figures/a-cpu-nt_xent.svg", "docs/figures/old.svg"]
    run(root, results)
    assert not (root / "docs/figures/old.svg").exists() and other.exists()


@pytest.mark.parametrize("damage", ["", "twice", "swapped"])
def test_marks_that_are_missing_or_doubled_are_an_error(root: Path, results: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    begin, end = "<!-- bench:begin (generated) -->", "<!-- bench:end -->"
    text = (root / "README.md").read_text()
    there = re.search(f"{re.escape(begin)}.*?{end}", text, re.DOTALL)
    assert there
    other = {"": f"{end}", "twice": f"{begin}{begin}{end}", "swapped": f"{end}{begin}"}[damage]
    (root / "README.md").write_text(text.replace(there[0], other))
    with pytest.raises(SystemExit) as stopped:
        run(root, results)
    assert stopped.value.code == 2
    assert re.search(rf"README.md: {other.count(begin)} x .*{begin[5:11]}.* one of each is needed", capsys.readouterr().err)


def test_results_of_another_schema_are_named(root: Path, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(results, "a-cpu/old.json", measured("nt_xent", factor=3), environment(time="2027"), schema=1)
    run(root, results)
    assert "left out: a-cpu/old.json has schema 1" in capsys.readouterr().err
    assert "2027" not in (root / "README.md").read_text()


# Pages ---------------------------------------------------------------------------------------------------------------------------------


def test_the_newest_result_is_shown_and_the_best_library(results: Path) -> None:
    record(results, "a-cpu/1999-e.json", measured("nt_xent"), environment(time="1999-01-01T00:00:00Z"))
    record(results, "b-cpu/2027-memory.json", [row for row in measured("clip") if row["measure"] == "memory"], environment(time="2027"))
    record(results, "b-cpu/part.json", [], environment(), part="bench", dry_run=False, errors=[])
    found = comparison.comparisons(load(results))
    assert [(shown.result.name, shown.loss) for shown in found] == [("2026-01-02-d.json", "nt_xent")]
    expected = {"eager": "eager", "torch.compile": "compile", "chunked": "chunked", "library": "library", "fastnce": "fastnce"}
    assert found[0].shown == expected and list(found[0].shown) == list(expected)


def test_a_gpu_has_its_own_figure_and_no_place_in_readme(root: Path, results: Path) -> None:
    gpu = {"name": "GPU 9000", "cuda": "13", "triton": "3.6", "memory_gib": 0.5}
    rows = measured("nt_xent", factor=1e-3, device="cuda", dtype="bfloat16")
    for row in rows:
        row["contestant"] = {"eager": "eager autocast"}.get(row["contestant"], row["contestant"])
    record(results, "gpu-9000/2027-d.json", rows, environment(gpu=gpu, mem_limit_mib=0, time="2027-01-01T00:00:00Z"))
    run(root, results)
    assert (root / "docs/figures/gpu-9000-nt_xent.svg").exists()
    found, *_ = comparison.comparisons(load(results))
    assert (found.shown["eager"], found.limit, found.chart().clock) == ("eager autocast", 512, "CUDA events")
    found_on = page.four_numbers(load(results)) + page.summary(load(results))
    assert "GPU 9000" not in found_on and found_on.count("CPU (AVX2)") == 2
    text = (root / "docs/benchmarks.md").read_text()
    assert "gpu-9000-nt_xent.svg" in text
    assert "In the figure eager is eager autocast of the tables; torch.compile is compile of the tables." in text


CONDITIONS = ("CPU (AVX2), 1 thread", "float32", "D = 128", "torch 2.13.0", "2026-01-02", "dddddddd", "process CPU time")


def test_the_four_numbers_of_readme(results: Path) -> None:
    """At the largest N that eager can do, with their conditions in one line, and where another is faster."""
    text = page.four_numbers(load(results))
    assert text.startswith("| NT-Xent, N = 4,096 | peak memory | time |\n|---|--:|--:|\n| eager PyTorch | 192 MiB | 129 ms |\n")
    assert "\n| **fastnce** | 5 MiB | 95 ms |\n\nN counts both views. " in text
    line = text.splitlines()[-1]
    for condition in CONDITIONS:
        assert condition in line
    worst = "Small batches: other implementations are up to 1.5 times as fast, at most to N = 1,024 (clip), 2,048 (nt_xent)"
    assert line.endswith(f". {worst}: [where](docs/benchmarks.md#who-is-faster).")


def test_where_nobody_is_faster_that_is_said(results: Path) -> None:
    (path,) = results.glob("*/*-d.json")
    result = json.loads(path.read_text())
    for row in result["rows"]:
        if row["measure"] == "time" and row["status"] == "ok":
            row["cpu_ratio"] = 2.0
    path.write_text(json.dumps(result))
    assert page.four_numbers(load(results)).endswith("In no recorded cell is another faster.")


def test_the_summary(results: Path) -> None:
    text = page.summary(load(results))
    assert "| rows N | eager, MiB / ms | torch.compile, MiB / ms | chunked, MiB / ms | library, MiB / ms | **fastnce**, MiB / ms |" in text
    assert "| 1,024 | 12 / 7 | 9 / 10 | 40 / 11 | 16 / 20 | 2 / 9 |" in text
    assert "| 8,192 | OOM | OOM | 320 / 704 | OOM | 9 / 309 |" in text
    assert "At N = 4,096 eager takes 38.4 times the memory and 1.35 times the time of fastnce." in text
    assert "fits in 512 MiB above the inputs: fastnce 16,384, chunked 8,192, eager 4,096, torch.compile 4,096, library 4,096." in text
    assert "the loss differs from eager's by at most 5.0e-08 of it" in text
    assert "[198 of 200 cells](#accuracy) keep the accuracy contract." in text
    for condition in (*CONDITIONS, "sources dddddddd", "`python a.py`"):
        assert condition in text


def test_a_status_and_a_gap_are_shown_as_they_are(results: Path) -> None:
    (path,) = results.glob("*/*-d.json")
    result = json.loads(path.read_text())
    at = {(row["measure"], row["loss"], row["contestant"], row["n"]): row for row in result["rows"]}
    at["time", "nt_xent", "eager", 4096]["status"] = "timeout"
    result["rows"].remove(at["memory", "nt_xent", "chunked", 1024])
    path.write_text(json.dumps(result))
    text = page.summary(load(results))
    assert "| 4,096 | 192 / timeout |" in text and "| 1,024 | 12 / 7 | 9 / 10 | – / 11 |" in text
    assert page.four_numbers(load(results)).startswith("| NT-Xent, N = 2,048 |")  # the largest of which all four are known


@pytest.mark.parametrize("sources", ["d", "e"])
def test_a_timeout_is_completed_by_a_longer_run_of_the_same_sources(sources: str, results: Path) -> None:
    (path,) = results.glob("*/*-d.json")
    result = json.loads(path.read_text())
    (late,) = [row for row in result["rows"] if (row["measure"], row["contestant"], row["n"]) == ("time", "fastnce", 16384)][:1]
    again = dict(late)
    late["status"] = "timeout"
    path.write_text(json.dumps(result))
    env = environment(sources=sources * 64, command="python longer.py", time="2027-01-01T00:00:00Z")
    record(results, f"{path.parent.name}/2027-longer.json", [again], env)
    text = page.summary(load(results))
    assert ("timeout" in text) == (sources == "e")
    assert ("completed by `python longer.py`" in text) == (sources == "d")


def test_where_another_wins_is_listed(results: Path) -> None:
    found = load(results)
    everything, summary = page.everything(found), page.faster(found)
    assert "#### Where another is faster\n" in everything and "less memory" not in everything
    assert "| nt_xent | float32 | forward + backward | 1,024 | 128 | eager | 7 | 9 | 1.29 |" in everything
    assert "| CPU (AVX2), 1 thread | nt_xent, float32 | forward + backward | careful | faster | 1,024, 2,048 (D = 128) | 1.5× |" in summary
    assert "library" not in summary
    # Every row of a result, also the ones above the limit and the ones that are not drawn, is in its tables.
    assert "| 16,384 | 128 | 17 | (OOM) | (OOM) | (OOM) | OOM | (OOM) | (OOM) |" in everything
    assert everything.count("\n| 4,096 | 128 |") == 2


def test_less_memory_is_listed_when_it_is_more_than_noise(results: Path) -> None:
    (path,) = results.glob("*/*-d.json")
    result = json.loads(path.read_text())
    for row in result["rows"]:
        if (row["measure"], row["contestant"], row["n"]) == ("memory", "careful", 1024):
            row["peak_mib"] = {"nt_xent": 0.5, "clip": 1.5}[row["loss"]]
    path.write_text(json.dumps(result))
    found = load(results)
    assert "| nt_xent | float32 | forward + backward | 1,024 | 128 | careful | 0.5 | 2 | 4.00 |" in page.everything(found)
    smaller = [line for line in page.faster(found).splitlines() if "| smaller |" in line]
    assert smaller == ["| CPU (AVX2), 1 thread | nt_xent, float32 | forward + backward | careful | smaller | 1,024 (D = 128) | 4.0× |"]


def test_nothing_recorded_is_said(root: Path, results: Path) -> None:
    for path in results.glob("*/*.json"):
        path.unlink()
    run(root, results)
    assert [(root / name).read_text().count(page.NOTHING) for name in ("README.md", "docs/benchmarks.md")] == [1, 4]
    assert list((root / "docs").glob("figures/*")) == []
