"""The pages do what they say: their Python runs, their commands are the ones that are tested, their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_truth import public_losses

import fastnce
from bench.page import GENERATED
from train_ref.truth import LOSSES

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "docs" / "guide.md").read_text()
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Every fenced block of a language: its first line in the page, and its text."""
    text = page.read_text()
    return [(text.count("\n", 0, m.start(2)), m[2]) for m in FENCE.finditer(text) if m[1] == language]


def run(page: Path) -> dict[str, Any]:
    """All Python blocks of a page, one after the other in one namespace. A traceback names the page and the line in it."""
    names: dict[str, Any] = {"__name__": page.stem}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for line, code in blocks(page, "python"):
            exec(compile("\n" * line + code, str(page), "exec"), names)
    return names


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name)
def test_python_blocks_run(page: Path) -> None:
    run(page)


def test_the_changed_line_changes_nothing() -> None:
    names = run(ROOT / "README.md")
    torch.testing.assert_close(names["after"], names["before"])


def test_every_replacement_in_the_tables_runs() -> None:
    """`fastnce...` in a cell of a table is code for somebody to copy."""
    query, key, negatives, rows = torch.randn(4, 8, 16)
    labels = torch.arange(8) % 3
    names = {"fastnce": fastnce, "temperature": 0.2, "logit_scale": 10.0, "query": query, "key": key, "negatives": negatives}
    names |= {"rows": rows, "labels": labels, "features": torch.stack([query, key], 1), "queue": fastnce.NegativeQueue(32, 16)}
    names |= {"a": query, "b": key, "q": query, "k": key, "image": query, "text": key}
    cells = [cell for line in GUIDE.splitlines() if line.startswith("|") for cell in line.split("|")]
    codes = [code for cell in cells for code in re.findall(r"`([^`]*\bfastnce\.[^`]*)`", cell)]
    assert len(codes) >= 10
    for code in codes:
        assert torch.isfinite(eval(code, names)), code


def test_every_name_in_the_table_of_losses_is_public() -> None:
    table = README[README.index("## Which function for which method") :].split("\n\n")[1]
    rows = [line.split("|")[2:4] for line in table.splitlines()[2:]]
    twins = {function.strip(" `"): module.strip(" `") for function, module in rows}
    assert twins.keys() == public_losses() and set(twins.values()) <= set(fastnce.__all__)
    assert all(twins[loss.name] == loss.module for loss in LOSSES.values())


def command(program: str) -> list[str]:
    """The steps of README's one-line command that sets up an environment and runs a program in it."""
    lines = [line for _, block in blocks(ROOT / "README.md", "bash") for line in block.splitlines()]
    (found,) = (line for line in lines if " && " in line and program in line)
    return found.split(" && ")


@pytest.mark.parametrize("program", ["-m fastnce", "-m pytest"])
def test_the_two_commands_set_up_what_they_need(program: str) -> None:
    setup, install, start = command(program)
    assert setup == "python3 -m venv .venv"
    found = re.fullmatch(r'\.venv/bin/pip install -q (?:\.|-e "\.\[(\w+)\]")', install)
    assert found is not None and (found[1] is not None) == (program == "-m pytest")
    assert found[1] is None or re.search(rf"^{found[1]} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert start.startswith(f".venv/bin/python {program}")


def test_programs_that_readme_names_are_there() -> None:
    named = re.findall(r"\.venv/bin/python ([\w/]+\.py)", README)
    assert named
    for program in named:
        assert (ROOT / program).is_file(), program


def test_readme_is_short() -> None:
    """Its reference parts are in the guide, its tables in the benchmarks."""
    assert len(README.split()) < 900


def test_the_test_command_is_what_ci_runs() -> None:
    tests = command("-m pytest")[-1].removeprefix(".venv/bin/")
    assert tests.startswith("python -m pytest -q")
    ci = ROOT / ".ci" / "run"
    assert [line for line in ci.read_text().splitlines() if "-m pytest" in line] == [f"step {tests}"]
    assert ci.stat().st_mode & 0o111


def anchors(page: Path) -> set[str]:
    """Of its headings, as a link writes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text()):
        there = page.parent / target if target else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), f"{target}#{anchor}"


def test_the_answer_is_above_the_fold() -> None:
    """The two sentences, the line that changes, then its gain: before anything is to be installed."""
    lines = README.splitlines()
    assert lines.index("<!-- bench:begin (generated) -->") < 20
    assert README.index("fastnce.info_nce(") < README.index("<!-- bench:end -->") < README.index("pip install")


@pytest.mark.parametrize(("page", "region"), [(page, region) for page, regions in GENERATED.items() for region in regions])
def test_generated_regions_are_marked_once(page: str, region: str) -> None:
    text, begin, end = (ROOT / page).read_text(), f"<!-- {region}:begin (generated) -->", f"<!-- {region}:end -->"
    assert text.count(begin) == text.count(end) == 1
    assert text[text.index(begin) + len(begin) : text.index(end)].strip()
