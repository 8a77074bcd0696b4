"""`python -m fastnce bench` of this checkout: what is measured is its sources. --out bench/results records a result.

    python bench/run.py --quick
    python bench/run.py --losses nt_xent,clip --n 1k:16k:x4 --d 128,512
    python bench/run.py --device cuda --backend triton --dtype bfloat16 --n 4k:64k:x4

See bench/README.md for what is measured and under which conditions the numbers hold.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The checkout this file is in is what gets measured, because its sources are what the result's digest names.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastnce.bench import cli


def main(arguments: list[str]) -> int:
    return cli.main(arguments, "python bench/run.py")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
