"""The reader of machine code: every verdict is reached by a listing that deserves it. And the real CUDA library, where it is built: its
content, its needs, and its messages without a GPU.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import machine_code
import sass
import turn

from fastnce.compiled import build, find

ROOT = Path(__file__).resolve().parent.parent
BOTH, MMA, ROWS = "wgmma_forward_both", "forward_both", "wgmma_backward_rows"
# Mangled and demangled.
NAMES = {
    "_ZN7fastnce4cuda18wgmma_forward_bothINS0_4WalkILNS0_6KernelE1ELi128ELb0EEEEEv14CUtensorMap_stS5_NS0_7ProblemE": f"{BOTH} D=128 index",
    "_ZN7fastnce4cuda19wgmma_backward_rowsINS0_4WalkILNS0_6KernelE3ELi64ELb0EEENS0_5TermsILb1ELb1ELb0EEEEEvNS0_7ProblemE": (
        f"{ROWS} D=64 index rows columns"
    ),
    "_ZN7fastnce4cuda19wgmma_backward_rowsINS0_4WalkILNS0_6KernelE3ELi64ELb0EEENS0_5TermsILb1ELb1ELb1EEEEEvNS0_7ProblemE": (
        f"{ROWS} D=64 index rows columns one exponential"
    ),
    "_ZN7fastnce4cuda19wgmma_backward_rowsINS0_4WalkILNS0_6KernelE3ELi256ELb1EEENS0_8AnyTermsEEEv14CUtensorMap_st": f"{ROWS} D=256 content",
    "_ZN7fastnce4cuda12forward_bothINS0_5ShapeILi64ELi2ELi2ELi64EEELb0EEEvNS0_7ProblemENS0_4GridENS0_8BothSumsE": (
        "forward_both D=64 two parts index 128x64"
    ),
    "_ZN7fastnce4cuda9retrievalINS0_5ShapeILi0ELi1ELi1ELi32EEEEEvNS0_7ProblemENS0_4GridENS0_9RetrievalE": "retrieval long rows 64x32",
    "_ZN7fastnce4cuda6finishINS0_8BFloat16EEEvNS0_7RawRowsES3_NS0_6FinishE": "finish bfloat16",
    "_ZN7fastnce4cuda7prepareIfEEvNS0_7RawRowsENS0_7OperandEb": "prepare float32",
    "_ZN7fastnce4cuda19coefficients_kernelILNS0_5PhaseE2EEEvNS0_13ContributionsEPd": "coefficients vectors",
}
PRODUCT, EXPONENTIAL, WAIT = "HGMMA.64x128x16.F32 R24, gdesc[UR8], R24", "MUFU.EX2 R5, R5", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
COPY, BACK = "UTMALDG.2D [UR8], [UR6]", "@P0 BRA 0x10"
# Two tiles a turn, with three of four exponentials beside products; then a wait for a barrier, placed behind the end.
TILE = [PRODUCT, EXPONENTIAL, EXPONENTIAL, EXPONENTIAL, PRODUCT, WAIT, EXPONENTIAL]
SOUND = [COPY, *TILE, *TILE, BACK, "EXIT", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R4]", "BRA 0x20"]
# A backward kernel: the exponentials behind the first wait are beside the second product.
BACKWARD = [COPY, PRODUCT, PRODUCT, "WARPGROUP.DEPBAR.LE gsb0, 0x1", EXPONENTIAL, EXPONENTIAL, EXPONENTIAL, WAIT, EXPONENTIAL, BACK, "EXIT"]


def listing(*instructions: str, name: str = "k") -> str:
    """As cuobjdump -sass prints it, at 0x0, 0x10, 0x20."""
    lines = [f"        /*{16 * i:04x}*/                   {text} ;      /* 0x00005800ff057624 */" for i, text in enumerate(instructions)]
    code = "\n                                            /* 0x000fe200078e00ff */\n".join(lines)
    return f'\tcode for sm_90a\n\n\t\tFunction : {name}\n\t.headerflags\t@"EF_CUDA_SM90"\n{code}\n\t\t..........\n'


def verdict(kernel: str, form: str, instructions: list[str], **numbers: int) -> str:
    (found,) = sass.kernels(listing(*instructions)).values()
    return sass.judged(sass.Compiled(kernel, form, "sm_90a", **numbers), found).verdict


def test_names() -> None:
    pretty = sass.demangle(NAMES)
    assert {name: " ".join(filter(None, sass.described(pretty[name]))) for name in NAMES} == NAMES
    with pytest.raises(ValueError, match="not a kernel"):
        sass.described("main")


def test_instructions_are_read_by_kernel() -> None:
    found = sass.kernels(listing("MOV R1, R2", name="a") + listing("@!P1 EXIT", "STL.64 [R1+0x8], R2", name="b"))
    assert {name: [(one.address, one.name) for one in code] for name, code in found.items()} == {
        "a": [(0, "MOV")],
        "b": [(0, "EXIT"), (16, "STL.64")],
    }


def test_sound_kernels_pass() -> None:
    assert verdict(BOTH, "D=128 index", SOUND) == "ok"
    assert verdict(ROWS, "D=64 index rows", BACKWARD) == "ok"
    assert verdict(MMA, "D=64 index 64x64", ["HMMA.16816.F32 R8, R4, R6, R8", "EXIT"]) == "ok"
    assert verdict("statistics", "", ["EXIT"]) == "ok"


def test_what_is_counted() -> None:
    code = [
        *SOUND,
        "RED.E.ADD.F32.FTZ.RN.STRONG.GPU [R2], R4",
        "REDG.E.ADD [R2], R4",
        "ATOMG.E.ADD PT, R2, [R2], R4",
        "REDUX.SUM UR4, R2",
        "LDL R2, [R1]",
    ]
    (found,) = sass.kernels(listing(*code)).values()
    row = sass.judged(sass.Compiled(BOTH, "D=128 index", "sm_90a"), found)
    assert {name: n for name, n in row.counts.items() if n} == {"HGMMA": 4, "MUFU": 8, "UTMALDG": 1, "ATOM": 3, "LDL": 1}
    assert row.overlap == pytest.approx(3 / 4)


@pytest.mark.parametrize(
    ("expected", "kernel", "code", "numbers"),
    [
        ("SPILL", MMA, ["HMMA.16816.F32 R8, R4, R6, R8", "STL [R1], R4"], {}),
        ("SPILL", MMA, ["HMMA.16816.F32 R8, R4, R6, R8", "LDL.64 R4, [R209]"], {}),
        ("SPILL", MMA, ["HMMA.16816.F32 R8, R4, R6, R8"], {"stack": 40}),
        ("SPILL", BOTH, SOUND, {"spills": 8}),
        ("NO MMA", MMA, ["FFMA R8, R4, R6, R8"], {}),
        ("NO MMA", MMA, [PRODUCT], {}),
        ("NO MMA+NO OVERLAP", BOTH, [COPY, "HMMA.16816.F32 R8, R4, R6, R8"], {}),
        ("NO TMA", BOTH, ["NOP", *SOUND[1:]], {}),
        # After every product.
        ("SERIAL", BOTH, [COPY, PRODUCT, EXPONENTIAL, WAIT, PRODUCT, EXPONENTIAL, WAIT, PRODUCT, EXPONENTIAL, WAIT, BACK], {}),
        # Before the exponentials, in both tiles or in one of them.
        ("NO OVERLAP", BOTH, [COPY, PRODUCT, WAIT, EXPONENTIAL, EXPONENTIAL, BACK], {}),
        ("NO OVERLAP", BOTH, [COPY, *TILE, PRODUCT, WAIT, EXPONENTIAL, EXPONENTIAL, EXPONENTIAL, EXPONENTIAL, BACK], {}),
        # Every group of products is waited for, and then the exponentials come.
        ("NO OVERLAP", ROWS, [text.replace("0x1", "0x0") if "DEPBAR" in text else text for text in BACKWARD], {}),
        # Half of them.
        ("NO OVERLAP", ROWS, [*BACKWARD[:-2], EXPONENTIAL, EXPONENTIAL, *BACKWARD[-2:]], {}),
        # Outside of any loop, and in a listing that only looks like one.
        ("NO OVERLAP", BOTH, [COPY, *TILE, "EXIT", "BRA 0x10"], {}),
    ],
)
def test_verdicts(expected: str, kernel: str, code: list[str], numbers: dict[str, int]) -> None:
    assert verdict(kernel, "D=128 index", code, **numbers) == expected


def test_where_no_tile_is_plain_nothing_has_to_overlap() -> None:
    code = [COPY, PRODUCT, WAIT, EXPONENTIAL, EXPONENTIAL, BACK]
    assert verdict(BOTH, "D=128 content", code) == "ok"
    assert verdict(BOTH, "D=128 content", [*code[:-1], WAIT, WAIT, BACK]) == "SERIAL"


def test_the_shortest_loop_is_that_of_plain_tiles() -> None:
    """Two loops with as many products; the longer one tells pairs apart and waits first."""
    masked = [PRODUCT, PRODUCT, WAIT, *["ISETP.NE.AND P1, PT, R2, R3, PT"] * 40, *[EXPONENTIAL] * 8, f"BRA 0x{16 * (len(TILE) + 2):x}"]
    assert verdict(BOTH, "D=128 index", [COPY, *TILE, BACK, *masked]) == "ok"


def test_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A kernel that one GPU lacks, one that is no PTX, and one that ptxas said nothing of; a wgmma kernel is for sm_90a."""
    finish, statistics, prepare = (
        f"_ZN7fastnce4cuda{name}" for name in ("6finishIfEEvNS0_7RawRowsE", "17statistics_kernelEi", "7prepareIfEEvi")
    )
    wgmma = next(iter(NAMES))
    archs = [arch for arch in build.ARCHS if not arch.startswith("compute_")]
    (plain,) = sass.kernels(listing("EXIT")).values()
    (sound,) = sass.kernels(listing(*SOUND)).values()
    code = {(arch, name): plain for arch in archs for name in (finish, statistics, prepare)} | {("sm_90a", wgmma): sound}
    del code["sm_100", finish]
    said = [f"{arch} {name}: 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads; Used 30 registers" for arch, name in code]
    said = [line for line in said if not line.startswith(f"sm_80 {prepare}")]
    library = tmp_path / "library.so"
    library.with_suffix(".json").write_text(json.dumps({"nvcc": "nvcc, release 13.0, V13.0.88", "ptxas": {"a.cu": said}}))
    monkeypatch.setattr(sass, "disassemble", lambda _: (code, {finish, prepare}))
    wrong = [(row.kernel, row.arch) for row in sass.inspect(library) if row.verdict != "ok"]
    assert wrong == [("finish", "sm_100"), ("prepare", "sm_80"), ("statistics", "compute_100")]
    assert sass.main([str(library)]) == 1 and "3 not ok" in capsys.readouterr().out
    code["sm_100", finish] = plain
    kept = tmp_path / "kept.json"
    assert sass.main([str(library), "--write", str(kept)]) == 1  # verdicts are verdicts, recorded or not
    assert json.loads(kept.read_text())["compiler"] == "nvcc 13.0.88"
    assert '\n{"kernel": "wgmma_forward_both", "form": "D=128 index", "sm_80": null, "sm_90a": 30, "sm_100": null, ' in kept.read_text()
    capsys.readouterr()
    sass.main([str(library), "--check", str(kept)])
    assert "differs" not in capsys.readouterr().out
    kept.write_text(kept.read_text().replace('"overlap": "75%"', '"overlap": "76%"'))
    assert sass.main([str(library), "--check", str(kept)]) == 1
    printed = capsys.readouterr().out
    assert "differs from this library" in printed and re.search(r'^-.*"76%"}.*\n\+.*"75%"}', printed, re.MULTILINE)


def test_every_recorded_kernel_uses_tensor_cores_and_overlaps_where_it_can() -> None:
    """The record that .ci/run compares with a library. No GPU has 256 registers for a thread."""
    rows = json.loads((ROOT / "tests" / "sass.json").read_text())["kernels"]
    assert len({(row["kernel"], row["form"]) for row in rows}) == len(rows) >= 90
    for row in rows:
        regs = [row[arch] for arch in build.ARCHS if not arch.startswith("compute_") and row[arch] is not None]
        assert regs and all(0 < n < 256 for n in regs), row
        wgmma = row["kernel"].startswith(sass.WGMMA)
        tile = row["kernel"].removeprefix(sass.WGMMA) in sass.TILES
        assert row["products"] == ("HGMMA" if wgmma else "HMMA" if tile else ""), row
        plain = wgmma and "index" in row["form"]
        assert bool(row["overlap"]) == plain and (not plain or int(row["overlap"][:-1]) >= 100 * sass.OVERLAP), row


def test_without_a_library_it_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(find, "library_path", lambda _: None)
    assert sass.main([]) == 1
    assert "python -m fastnce build-cuda" in capsys.readouterr().err


# ---------------------------------------------------------------- the real library

# Operator -> the arguments that it writes to.
OPERATORS = {
    "prepare": ["operand", "factor", "inverse_norm"],
    "aligned": ["t"],
    "finish": ["out"],
    "forward_rows": ["sums", "count"],
    "forward_both": ["row_sum", "row_count", "column_sum", "column_count"],
    "retrieval": ["largest", "counts"],
    "backward_rows": ["dx", "moment"],
    "weights_block": ["for_rows", "for_columns", "moment"],
    "statistics": ["lse_neg", "lse_pos", "pos", "n_pos", "own_neg", "own_pos"],
    "coefficients": ["vectors", "pair_weights", "scalars"],
    "scale_gradient": ["dscale", "dbias"],
    "tile": [],
    "runs_on": [],
}
LOADED = """
import json, sys, torch, fastnce
from fastnce.compiled import find
from fastnce.__main__ import _compiled
from fastnce.backends import cuda

assert str(cuda.library_path()) == sys.argv[1]
torch.ops.load_library(cuda.library_path())
found = [schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("fastnce_cuda::")]
writes = {s.name.split("::")[1]: [a.name for a in s.arguments if a.alias_info and a.alias_info.is_write] for s in found}
x, refused = torch.ones(2, 4, dtype=torch.float64), []
for run in (
    lambda: torch.ops.fastnce_cuda.scale_gradient(x[0], [], 1.0, x[0], x[0], x[0]),
    lambda: fastnce.info_nce(x.float(), x.float(), backend="cuda"),
):
    try:
        run()
    except NotImplementedError as error:
        refused.append(str(error))
tiles = [torch.ops.fastnce_cuda.tile("forward_both", "index", 1, 128, architecture) for architecture in (80, 90, 100)]
print(json.dumps([writes, refused, torch.ops.fastnce_cuda.runs_on(-1), tiles, _compiled("cuda")]))
"""


@pytest.fixture(scope="module")
def library() -> Path:
    """In the user's cache, or where .ci/run has built it. Never loaded here: a process holds one CUDA library, most tests the emulated."""
    with pytest.MonkeyPatch.context() as elsewhere:
        found = find.library_path("cuda")
        elsewhere.setenv("FASTNCE_CACHE_DIR", str(ROOT / "build" / "cuda"))
        found = found or find.library_path("cuda")
    if found is None:
        pytest.skip(f"the CUDA library of these sources is {find.not_built('cuda')}; .ci/run builds it where nvcc is")
    return found


def output(*command: str | Path, **environment: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=os.environ | environment).stdout


def test_it_is_for_every_gpu(library: Path) -> None:
    """Those of the library: all, or those whose turn it is. `python tests/sass.py` reads every kernel, which takes half a minute."""
    archs = set(find.archs(library))
    assert archs == set(build.ARCHS) or archs == set(turn.turn())
    listed = machine_code.cuobjdump("--list-elf", "--list-ptx", library)
    assert {line.rsplit(".", 2)[1] for line in listed.splitlines() if line.startswith("ELF")} == archs & set(sass.GPUS)
    ptx = {"sm_100"} if "compute_100" in archs else set()
    assert {line.rsplit(".", 2)[1] for line in listed.splitlines() if line.startswith("PTX")} == ptx
    used = sass.resources(json.loads(library.with_suffix(".json").read_text()))
    kernels = {sass.described(name)[0] for name in sass.demangle({name for _, name in used}).values()}
    # One kernel for each operator that writes, those of sm_90a, and none that this page's reader does not know.
    wgmma = {"wgmma_forward_rows", "wgmma_forward_both", "wgmma_backward_rows"}
    expected = {name for name, written in OPERATORS.items() if written} | wgmma
    assert kernels == expected and set(sass.TILES) < kernels


def test_without_a_gpu_it_loads_and_refuses(library: Path) -> None:
    writes, refused, runs_on_the_cpu, tiles, state = json.loads(
        output(sys.executable, "-c", LOADED, library, FASTNCE_CACHE_DIR=str(library.parent), FASTNCE_NATIVE="1")
    )
    assert writes == OPERATORS
    assert "'fastnce_cuda::scale_gradient' with arguments from the 'CPU' backend" in refused[0]
    assert re.search(r"cuda: device cpu \(needs CUDA\)$", refused[1])
    assert runs_on_the_cpu is False and state == ", ".join(find.archs(library))
    # Rows, columns, and which family of kernels: mma.sync, but on sm_90a wgmma.
    assert [tile[2] for tile in tiles] == [0, 1, 0] and all(tile[0] == tile[1] == 128 for tile in tiles)


def test_it_needs_torch_by_its_c_interface_alone(library: Path) -> None:
    """No symbol of C++ but the standard library's: any torch from 2.11 on. CUDA's runtime is inside, the driver asked for at run time."""
    names = [line.split()[-1] for line in output("nm", "-D", "--undefined-only", library).splitlines()]
    foreign = [name for name in names if re.search("torch|c10|cuda|2at|^cu[A-Z]", name)]
    assert foreign and not [name for name in foreign if not re.fullmatch(r"(aoti_)?torch_\w+", name)]
    needed = re.findall(r"NEEDED.*\[(.*)\]", output("readelf", "-d", library))
    assert "libtorch_cpu.so" in needed and not [name for name in needed if re.match(r"lib(cu|nv|c10|torch(?!_cpu))", name)]
