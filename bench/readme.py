"""Write the recorded results into the generated regions of README.md.

    python bench/readme.py            # rewrite them
    python bench/readme.py --check    # exit 1 where README and results differ

Every file of bench/results that run.py or accuracy.py wrote is shown: one paragraph of conditions each, then its tables. What the
parts of gpu_run.sh wrote is not: docs/benchmarks.md speaks of those.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as in run.py: this checkout

from bench import report

ROOT = Path(__file__).resolve().parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "bench" / "results"


def results(accuracy: bool) -> list[dict[str, Any]]:
    """Recorded results of one kind, oldest first."""
    files = sorted(RESULTS.glob("*/*.json"), key=lambda path: path.name)
    found = [json.loads(path.read_text()) for path in files if path.stem.endswith("-accuracy") == accuracy]
    return [result for result in found if "part" not in result]


def bench_region() -> str:
    """The tables of every timing or memory result, its title as a sentence and its sections without headings."""
    parts = []
    for result in results(accuracy=False):
        text = re.sub(r"^# (.*)$", r"**\1.**", report.render(result), count=1, flags=re.MULTILINE)
        parts.append(re.sub(r"^## (.*)$", r"\1:", text, flags=re.MULTILINE).strip())
    return "\n\n".join(parts)


def accuracy_region() -> str:
    """How many cells of the grid are inside the contract, and the worst of each quantity."""
    parts = []
    for result in results(accuracy=True):
        env, summary = result["env"], result["rows"]
        outside = sum(row["outside"] for row in summary)
        cells = sum(row["cells"] for row in summary)
        lines = [
            f"{cells - outside:,} of {cells:,} cells are inside the contract ({env['cpu']}, torch {env['torch']}, "
            f"sources {env['sources'][:8]}, `{env['command']}`). Worst of each quantity as a fraction of its limit, and cells outside:",
            "",
            "| dtype | loss | mean loss | row | gradient | d/d scale | outside |",
            "|---|---|--:|--:|--:|--:|--:|",
        ]
        for dtype, loss in dict.fromkeys((row["dtype"], row["loss"]) for row in summary):
            rows = {row["quantity"]: row for row in summary if (row["dtype"], row["loss"]) == (dtype, loss)}
            used = " | ".join(f"{rows[name]['most_of_limit']:.2g}" for name in ("loss", "row", "gradient", "scale"))
            missed = ", ".join(f"{row['outside']} {name}" for name, row in rows.items() if row["outside"]) or "0"
            lines.append(f"| {dtype} | {loss} | {used} | {missed} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def regenerate(text: str) -> str:
    """README with its regions as the results say."""
    for name, region in (("bench", bench_region()), ("accuracy", accuracy_region())):
        begin, end = f"<!-- {name}:begin (generated) -->", f"<!-- {name}:end -->"
        head, rest = text.split(begin)
        text = f"{head}{begin}\n{region}\n{end}{rest.split(end)[1]}"
    return text


def main() -> None:
    before = README.read_text()
    after = regenerate(before)
    if "--check" in sys.argv[1:]:
        raise SystemExit(0 if before == after else "README.md differs from bench/results: run python bench/readme.py")
    README.write_text(after)


if __name__ == "__main__":
    main()
