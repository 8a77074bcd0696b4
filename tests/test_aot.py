"""The ahead-of-time checker: every verdict is reached by a kernel that deserves it, and it compiles exactly what Triton would launch."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import aot
import machine_code
import triton
import triton.language as tl

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}


@triton.jit
def product(a_of, b_of, out, n, BM: tl.constexpr, PRECISION: tl.constexpr):
    """sum_j (A B_j^T) B_j over n tiles: two products, the second of which needs the first."""
    i = tl.arange(0, BM)
    at = i[:, None] * BM + i[None, :]
    a = tl.load(a_of + at)
    kind: tl.constexpr = out.dtype.element_ty
    total = tl.zeros([BM, BM], kind)
    for j in range(n):
        b = tl.load(b_of + j * BM * BM + at)
        s = tl.dot(a, tl.trans(b), out_dtype=kind, input_precision=PRECISION)
        total = tl.dot(s.to(b.dtype), b, total, out_dtype=kind, input_precision=PRECISION)
    tl.store(out + at, total)


@triton.jit
def under_if(a_of, b_of, out, n, BM: tl.constexpr):
    """The same with a third product, in every other turn of the loop only."""
    i = tl.arange(0, BM)
    at = i[:, None] * BM + i[None, :]
    a = tl.load(a_of + at)
    total = tl.zeros([BM, BM], tl.float32)
    for j in range(n):
        b = tl.load(b_of + j * BM * BM + at)
        total = tl.dot(tl.dot(a, tl.trans(b)).to(b.dtype), b, total)
        if j % 2 == 0:
            tl.store(out + (j + 1) * BM * BM + at, tl.dot(a, b))
    tl.store(out + at, total)


@triton.jit(do_not_specialize=["rows"])
def row_sums(a_of, out, rows, columns, scale, bias, BN: tl.constexpr):
    """No product of tiles at all."""
    i = tl.program_id(0)
    if i < rows:
        a = tl.load(a_of + i * columns + tl.arange(0, BN)).to(tl.float32) * scale
        if bias is not None:
            a += tl.load(bias)
        tl.store(out + i, tl.sum(a))


def toys(arch: str) -> None:
    """One launch per verdict, and a few that are the same or another kernel to Triton. In the order of VERDICTS."""
    half, single, double = (torch.empty(1 << 16, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64))
    product[(1,)](half, half, single, 5, BM=64, PRECISION="ieee", **OPTIONS)
    product[(9,)](half, half, single, 7, BM=64, PRECISION="ieee", **OPTIONS)
    if arch == "sm_80":
        product[(1,)](half, half, single, 5, BM=64, PRECISION="ieee", maxnreg=64, **OPTIONS)
        row_sums[(4,)](half, single, 16, 64, 0.5, None, BN=64, **OPTIONS)
        row_sums[(4,)](half, single, 1, 32, 1.5, None, BN=64, **OPTIONS)
        row_sums[(4,)](half, single, 16, 63, 0.5, None, BN=64, **OPTIONS)
        row_sums[(4,)](half, single, 16, 1, 0.5, None, BN=64, **OPTIONS)
        row_sums[(4,)](half, single, 16, 64, 0.5, single, BN=64, **OPTIONS)
        row_sums[(4,)](half[1:], single, 16, 64, 0.5, single, BN=64, **OPTIONS)
        product[(1,)](half, half[1:], single, 5, BM=64, PRECISION="ieee", **OPTIONS)
    if arch == "sm_90":
        product[(1,)](half, half, single, 5, BM=64, PRECISION="ieee", num_warps=4, num_stages=2)
        product[(1,)](half, half, single, 5, BM=64, PRECISION="ieee", num_warps=4, num_stages=32, enable_fp_fusion=True)
        product[(1,)](half, half, single, 5, BM=64, PRECISION="ieee", maxnreg=96, **OPTIONS)
        product[(1,)](half, half, single, 5, BM=48, PRECISION="ieee", **OPTIONS)
        product[(1,)](single, single, single, 5, BM=32, PRECISION="ieee", **OPTIONS)
        product[(1,)](single, single, single, 5, BM=32, PRECISION="tf32", **OPTIONS)
        product[(1,)](double, double, double, 5, BM=16, PRECISION="ieee", **OPTIONS)
        under_if[(1,)](half, half, single, 5, BM=64, **OPTIONS)


VERDICTS = {
    "sm_80": ["ok", "SPILL", "ok", "ok", "ok", "ok", "ok", "SCALAR"],
    "sm_90": ["ok", "FUSION", "SMEM", "SERIAL", "ERROR", "NO MMA", "TF32", "F64", "SERIAL"],
    "sm_100": ["ok"],
    "gfx942": ["ok"],
}


def program(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """tests/aot.py in a process of its own: where kernels are interpreted, as other tests want them, nothing can be compiled."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    command = [sys.executable, aot.__file__, *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("aot") / "toys.json"
    done = program("--of", "test_aot:toys", "--json", str(file))
    assert done.returncode == 1, done.stderr
    last = done.stdout.splitlines()[-1]
    every = [verdict for verdicts in VERDICTS.values() for verdict in verdicts]
    assert last == f"{len(every)} compiled with Triton {triton.__version__}, {len(every) - every.count('ok')} not ok"
    assert "arange's range must be a power of 2" in done.stdout
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def of(compiled: dict[str, Any], arch: str) -> list[aot.Compiled]:
    return [aot.Compiled(**row) for row in compiled["kernels"] if row["arch"] == arch]


@pytest.mark.slow
@pytest.mark.parametrize("arch", VERDICTS)
def test_every_verdict(compiled: dict[str, Any], arch: str) -> None:
    assert [row.verdict for row in of(compiled, arch)] == VERDICTS[arch]


@pytest.mark.slow
def test_what_is_read(compiled: dict[str, Any]) -> None:
    """Numbers of kernels small enough to know them."""
    for arch, words in {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}.items():
        row = of(compiled, arch)[0]
        assert (row.kernel, row.tile, row.warps, row.stages, row.stack, row.spills) == ("product", "64", 4, 2, 0, 0)
        assert re.fullmatch(rf"\d+ {words}", row.mma)
        assert 32 < row.regs < 255 and 8 << 10 <= row.smem <= 64 << 10 and 2 <= row.blocks <= 8 and 20 < row.loop < 1000
    spilled, sums = of(compiled, "sm_80")[1:3]
    assert spilled.regs == 64 and spilled.stack and spilled.spills and spilled.variant.endswith(" maxnreg=64 enable_fp_fusion")
    assert (sums.mma, sums.mufu, sums.blocks) == ("", 0, 16)
    assert of(compiled, "sm_90")[2].smem > 227 << 10 and not of(compiled, "sm_90")[2].blocks


def test_kernels_that_are_interpreted_are_refused() -> None:
    done = program("--of", "test_aot:toys", "--arch", "sm_90", TRITON_INTERPRET="1")
    assert done.returncode == 1 and "TRITON_INTERPRET is set" in done.stderr


def test_every_kernel_that_the_backend_launches_is_recorded() -> None:
    sources = [path.read_text() for path in Path(aot.backend.__path__[0]).glob("*.py")]
    launched = {name for text in sources for name in re.findall(r"\blaunch\(\s*kernels\w*\.(\w+)", text)}
    code = "import aot; print(*{one.kernel.split(':')[1] for one in aot.record(lambda: aot.shipped('sm_90'), 'sm_90')})"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(Path(aot.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300, check=True)
    assert launched and set(done.stdout.split()) == launched


def kernels_ahead() -> None:
    """Print the losses ahead, in one format and class of D, whose kernels are all compiled for variants before; then how many there are."""
    from fastnce.backends import proof, proof_losses

    known: set[str] = set()

    def launch(of: proof.Variant, columns: int) -> None:
        with torch.no_grad():
            for case in (proof_losses.cases if of.loss else proof._cases)(aot.backend, of, columns, torch.device("cpu"), 40):
                case.answers(aot.backend)

    for of, columns in proof.ahead(losses=True):
        if (of.dtype, of.parts, columns) == ("float32", 2, 64):
            torch.use_deterministic_algorithms(of.deterministic)
            kernels = {repr(one) for one in aot.record(functools.partial(launch, of, columns), "sm_90")}
            if of.loss and kernels <= known:
                print(of)
            known |= kernels
    print(len(known), "kernels")


@pytest.mark.slow
def test_every_loss_ahead_has_a_kernel_of_its_own() -> None:
    """`python -m fastnce check` asks for no form of a loss of which everything is compiled already."""
    code = "import test_aot; test_aot.kernels_ahead()"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300, check=True)
    assert re.fullmatch(r"\d+ kernels\n", done.stdout)


@pytest.mark.parametrize(
    ("arch", "warps", "regs", "smem", "tensor", "blocks"),
    [
        ("sm_90", 4, 168, 49 << 10, 0, 3),  # registers
        ("sm_90", 4, 169, 49 << 10, 0, 2),  # 176, one too many
        ("sm_90", 8, 255, 0, 0, 1),
        ("sm_90", 4, 32, 113 << 10, 0, 2),  # 2 (113 + 1) KiB fill the SM
        ("sm_90", 4, 32, (113 << 10) + 1, 0, 1),
        ("sm_90", 4, 32, 227 << 10, 0, 1),
        ("sm_90", 4, 32, (227 << 10) + 1, 0, 0),
        ("sm_80", 4, 32, (163 << 10) + 1, 0, 0),
        ("sm_80", 4, 32, 0, 0, 16),  # warps
        ("sm_80", 1, 16, 0, 0, 32),  # blocks
        ("sm_100", 4, 64, 0, 256, 2),  # tensor memory
        ("sm_100", 4, 64, 0, 1024, 0),
    ],
)
def test_resident_blocks(arch: str, warps: int, regs: int, smem: int, tensor: int, blocks: int) -> None:
    assert machine_code.resident(arch, warps, regs, smem, tensor) == blocks


@pytest.mark.slow
def test_two_versions_side_by_side(compiled: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One number where they agree; a launch that one of them lacks, has twice, or compiles badly is found."""
    rows = [row for row in compiled["kernels"] if row["verdict"] == "ok" and row["kernel"] == "product"]
    old = [row | {"regs": row["regs"] and 77} for row in rows]

    def kept(version: str, rows: list[dict[str, Any]]) -> str:
        file = tmp_path / f"{version}.json"
        file.write_text(json.dumps({"triton": version, "kernels": rows}))
        return str(file)

    files = [kept("3.10.0", rows), kept("3.6.0", old)]
    assert aot.main(["--check", *files]) == aot.main(["--markdown", *files]) == 0
    printed = capsys.readouterr().out
    assert f"{len(rows)} launches, each with Triton 3.6.0, 3.10.0\n" in printed and "Triton 3.6.0 / 3.10.0: " in printed
    assert f"| 77 / {rows[0]['regs']} | {rows[0]['smem'] / 1024:.3g} |" in printed
    assert printed.count("\n| product |") == 3 and "gfx942: 1 compile" in printed
    assert aot.main(["--check", kept("3.10.0", [rows[0] | {"verdict": "SPILL"}, *rows[1:]]), files[1]]) == 1
    assert "SPILL" in capsys.readouterr().out
    with pytest.raises(ValueError, match="not in the results of every version"):
        aot.main(["--check", kept("3.10.0", rows[1:]), files[1]])
    with pytest.raises(ValueError, match="not in the results of every version"):
        aot.main(["--check", kept("3.10.0", rows), kept("3.6.0", old[1:])])
    with pytest.raises(ValueError, match="two launches of this name"):
        aot.main(["--check", kept("3.10.0", rows[:1] * 2), files[1]])
