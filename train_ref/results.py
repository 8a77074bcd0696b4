"""Write the tables of docs/reference-runs.md from the recorded runs in train_ref/results.

    python train_ref/results.py            # write them
    python train_ref/results.py --check    # write nothing; exit 1 when the page says something else

A recorded run is a result.json as train.py wrote it. Its "summary" becomes a table: a list of {"row": label, metric: {"mean",
"sd"}, ...} with fractions between 0 and 1. Files without a summary are no runs and are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:
    # Run as a file: import the package from the repository, not its modules as top-level names.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from train_ref import files
from train_ref.evaluate import FEATURES, RETRIEVAL

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "train_ref" / "results"
PAGE = ROOT / "docs" / "reference-runs.md"
BEGIN, END = "<!-- results:begin (generated) -->", "<!-- results:end -->"

TITLES = FEATURES.metrics | RETRIEVAL.metrics
# The part of a recipe that a reader compares first; all of it is in the file.
SHOWN = [
    "preset", "network", "optimizer", "learning_rate", "weight_decay", "batch_size", "epochs", "temperatures", "queue_size", "momentum",
    "bfloat16", "loss", "backend", "device", "threads",
]  # fmt: skip


def cell(value: dict[str, float | None] | None) -> str:
    """In %, with the standard deviation over seeds where there is one; empty for a row without this metric."""
    if value is None or value["mean"] is None:
        return ""
    sd = value["sd"]
    return f"{100 * value['mean']:.1f}" + ("" if sd is None else f" ± {100 * sd:.1f}")


def setting(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return f"{name} " + ", ".join(f"{key} {entry:g}" for key, entry in value.items())
    return f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"


def section(name: str, result: dict[str, Any]) -> str:
    """Heading, recipe and table of one recorded run."""
    data, config, summary = result["data"], result["config"], result["summary"]
    metrics = list(dict.fromkeys(key for row in summary for key in row if key != "row"))
    settings = "; ".join(setting(key.replace("_", " "), config[key]) for key in SHOWN if config.get(key) is not None)
    # Runs before the sha256 was recorded have none.
    hashes = "".join(f"; {file} sha256 {sha256}" for file, sha256 in data.get("files", {}).items())
    versions = ", ".join(f"{key} {value}" for key, value in result["versions"].items())
    lines = [
        f"### {name}",
        "",
        f"{data['described']}. In %, mean ± standard deviation; seeds {', '.join(map(str, config['seeds']))}.",
        "",
        "| | " + " | ".join(TITLES.get(metric, metric) for metric in metrics) + " |",
        "|---" + "|--:" * len(metrics) + "|",
        *("| " + " | ".join([row["row"], *(cell(row.get(metric)) for metric in metrics)]) + " |" for row in summary),
        "",
        f"{settings}{hashes}; {versions}; {result['cpu_seconds']:.0f} CPU s, {result['seconds']:.0f} s for all of it.",
    ]
    return "\n".join(lines)


def render(page: str, folder: Path) -> str:
    """The page with the recorded runs between its marks. Raises ValueError unless it has each mark once, in order."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"the page needs {BEGIN} and {END}, once each and in this order")
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    sections = [section(name, result) for name, result in results.items() if "summary" in result]
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    return before + "\n\n".join([BEGIN, *sections, END]) + after


@files.command("results.py")
def main(argv: Sequence[str] | None = None, page: Path = PAGE, folder: Path = RESULTS) -> int:
    """Write the page, or with --check say whether it is what would be written; returns the exit status."""
    p = argparse.ArgumentParser(description="Write the tables of docs/reference-runs.md from train_ref/results.")
    p.add_argument("--check", action="store_true", help="write nothing; exit 1 when the page differs")
    options = p.parse_args(argv)
    before = page.read_text(encoding="utf-8")
    after = render(before, folder)
    if options.check and before != after:
        print(f"{page.name} is not what {folder.name} says: run python train_ref/results.py", file=sys.stderr)
        return 1
    if not options.check:
        files.write(page, after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
