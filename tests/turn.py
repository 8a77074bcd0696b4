"""The architectures that the CUDA library is compiled for in a run of all tests.

They are sm_90a, which alone has wgmma kernels, and one of the others in turn: a change of the sources chooses anew. Prints them as
`python -m fastnce build-cuda --arch` takes them; needs no Triton.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout

from fastnce.compiled import build, find


def turn() -> tuple[str, ...]:
    """In the order of build.ARCHS."""
    others = [arch for arch in build.ARCHS if arch != build.SM90]
    chosen = (build.SM90, others[int(find.digest("cuda"), 16) % len(others)])
    return tuple(arch for arch in build.ARCHS if arch in chosen)


if __name__ == "__main__":
    print(",".join(turn()))
