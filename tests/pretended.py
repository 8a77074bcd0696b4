"""Compilers that are pretended: they write in two halves, and say who called them, with what and when."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastnce.compiled import find

# A "compiler" that writes its output in two halves; a line per call into `calls`: the output, then the arguments; and one at its end into
# `spans`: session, begin, end.
PRETENDED = f"""#!{sys.executable}
import os, sys, time
from pathlib import Path
begun = time.monotonic()
here = Path(__file__).parent
if "--version" in sys.argv:
    print("pretended 1.0, release", (here / "release").read_text())
    sys.exit()
out = Path(sys.argv[sys.argv.index("-o") + 1])
with open(here / "calls", "a") as calls:
    print(out.name, *sys.argv[1:], file=calls)
out.write_text("half")
time.sleep(float((here / "pause").read_text()))
out.write_text("whole")
with open(here / "spans", "a") as spans:
    print(os.getsid(0), begun, time.monotonic(), file=spans)
if out.suffix == ".o" and ".cu" in out.name:
    print((here / "says").read_text())
"""
# Output of ptxas 13.0 with -v, for a kernel that it serialised and for one that it did not.
SERIALISED = """\
ptxas info    : (C7519) warpgroup.arrive is injected in around line 45 by compiler to allow use of registers in GMMA in function 'k'
ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient register resources
"""
SOUND = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'k' for 'sm_80'
ptxas info    : Function properties for k
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 1 barriers, 364 bytes cmem[0]
ptxas info    : Compile time = 3.373 ms
ptxas info    : Compiling entry function 'k' for 'sm_90a'
ptxas info    : Function properties for k
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 28 registers, used 1 barriers
"""


@pytest.fixture
def pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Pretended compilers, empty CUDA sources, and a cache, for this process and those that it starts."""
    script = tmp_path / "bin" / "nvcc"
    script.parent.mkdir()
    script.write_text(PRETENDED)
    script.chmod(0o755)
    (script.parent / "pause").write_text("0.1")
    (script.parent / "release").write_text("13.0")
    (script.parent / "says").write_text(SOUND)
    (script.parent / "calls").touch()
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    for unit in ("rows.cu", "rows_sm90.cu", "bind.cpp", "problem.h", "device.cuh"):
        (tmp_path / "csrc" / "cuda" / unit).touch()
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("FASTNCE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTNCE_NATIVE", raising=False)
    monkeypatch.setattr(find, "packaged_folder", lambda: tmp_path / "packaged")
    sources = find.sources
    monkeypatch.setattr(find, "sources", lambda kind: tmp_path / "csrc" / kind if kind == "cuda" else sources(kind))
    find.digest.cache_clear()
    find.objection.cache_clear()
    yield tmp_path
    find.digest.cache_clear()
    find.objection.cache_clear()


def calls(pretended: Path) -> dict[str, list[str]]:
    """Output -> arguments of the compiler; every output was written once."""
    lines = [line.split() for line in (pretended / "bin" / "calls").read_text().splitlines()]
    assert len({line[0] for line in lines}) == len(lines)
    return {line[0]: line[1:] for line in lines}
