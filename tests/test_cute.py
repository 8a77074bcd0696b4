"""CUTLASS as a witness: what csrc/cuda takes from the hardware's encodings, beside what CuTe, NVIDIA's own library, makes of the same.

tests/native/witness.cpp compares on the CPU: swizzles, descriptors and their advances, elements of threads, boxes and maps of TMA. Here the
text of the instructions is compared, and faults are planted that both must show.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from emulated import EMULATOR
from test_cuda_native import COMPILER, compiled, linked, said

from fastnce.compiled import build, find

FOLDER = find.sources("cuda")


def cutlass() -> Path:
    """CUTLASS's headers, which the package nvidia-cutlass has; without them the test is skipped."""
    found = importlib.util.find_spec("cutlass_library")
    folders = [Path(folder) / "source" / "include" for folder in (found.submodule_search_locations or [] if found else [])]
    if not any((folder / "cute" / "tensor.hpp").is_file() for folder in folders):
        pytest.skip("CUTLASS's headers are not installed: pip install --no-deps nvidia-cutlass")
    return folders[0]


# ---------------------------------------------------------------- text of instructions


def bodies(text: str, header: str) -> dict[str, str]:
    """What follows each match of `header`, up to the next one, by the match's group."""
    found = list(re.finditer(header, text))
    ends = [match.start() for match in found[1:]] + [len(text)]
    return {match[1]: text[match.end() : end] for match, end in zip(found, ends, strict=True)}


def instruction(name: str, body: str, known: dict[str, str]) -> list[str]:
    """Words of the name, and operands, of an instruction in the last asm statement of `body` that has it; then its predicate.

    An operand is the expression that stands for it: d<n> a sum or a register that ldmatrix fills, a<n>, b<n> a register of an operand,
    `known` has the other ones.
    """

    def plain(expression: str) -> str:
        if block := re.fullmatch(r"c\[(\d+)\]\[(\d+)\]", expression):
            return f"d{4 * int(block[1]) + int(block[2])}"
        if register := re.fullmatch(r"(a|b|c|d|r|dst)\[?(\d+)\]?", expression):
            return {"a": "a", "b": "b"}.get(register[1], "d") + str(int(register[2]))
        return known.get(expression, expression)

    statement = [found for found in re.findall(r"\basm(?: volatile)? ?\((.*?)\);\n", body, re.DOTALL) if name in found][-1]
    words = re.findall(r'"([^"]*)"(\s*\(((?:[^()]|\([^()]*\))*)\))?', statement)
    bound = [plain(expression) for _, is_bound, expression in words if is_bound]
    code = "".join(text for text, is_bound, _ in words if not is_bound).replace("\\n", "")
    code = re.sub(r"%(\d+)", lambda at: bound[int(at[1])], code)
    (opcode, operands), (predicate,) = re.findall(rf"({re.escape(name)}\S*)([^;]*)", code)[0], re.findall("setp[^;]*", code) or [""]
    return [*sorted(opcode.split(".")), *re.findall(r"-?\w+", operands), predicate]


# An operand with k along its rows is K-major, one with k down its rows MN-major; products are added as they are, not negated.
K, MN, ONE = "0", "1", "1"
ALWAYS, WHERE_ASKED = "setp.eq.b32 p, 0, 0", "setp.ne.b32 p, accumulate, 0"
OURS = {"a": "left", "b": "right", "static_cast<int>(accumulate)": "accumulate", "column": "x", "row": "y"}
OURS |= {f"shared_address({of})": "barrier" if of == "barrier" else "shared" for of in ("row", "to", "barrier")}
CUTES = {"desc_a": "left", "desc_b": "right", "int32_t(scale_D)": "accumulate", "int32_t(scaleA)": ONE, "int32_t(scaleB)": ONE}
CUTES |= {"smem_int_ptr": "shared", "smem_int_mbar": "barrier", "gmem_int_desc": "map", "crd0": "x", "crd1": "y", "int32_t(tnspA)": K}


def ours(texts: dict[str, str]) -> dict[str, list[str]]:
    products = bodies(texts["wgmma.cuh"], r"template <>\nFASTNCE_DEVICE void (\w+<\d+>)")
    functions = bodies(texts["device.cuh"] + texts["hopper.cuh"], r"FASTNCE_DEVICE \w+ (\w+)\(")
    rest = {"mma": "mma.", "ldmatrix": "ldmatrix.", "ldmatrix_transposed": "ldmatrix.", "tensor_load": "cp.async.bulk."}
    found = {name: instruction("wgmma.", body, OURS) for name, body in products.items()}
    return found | {name: instruction(opcode, functions[name], OURS) for name, opcode in rest.items()}


def cutes(headers: Path, names: list[str]) -> dict[str, list[str]]:
    files = ("mma_sm90_gmma", "mma_sm80", "copy_sm75", "copy_sm90_tma")
    text = "".join((headers / "cute" / "arch" / f"{name}.hpp").read_text() for name in files)
    assert re.search(rf"enum class Major {{\s*K\s*= {K},\s*MN = {MN}\s*}}", text)
    assert re.search(rf"enum class ScaleIn {{[^}}]*One =\s+{ONE}\s", text)
    structs = bodies(text, r"struct (\w+)\s*\n")
    found = {
        "mma": instruction("mma.", structs["SM80_16x8x16_F32F16F16F32_TN"], CUTES),
        "ldmatrix": instruction("ldmatrix.", structs["SM75_U32x4_LDSM_N"], CUTES),
        "ldmatrix_transposed": instruction("ldmatrix.", structs["SM75_U16x8_LDSM_T"], CUTES),
    }
    # Without the hint to L2, and its operand.
    found["tensor_load"] = [word for word in instruction("cp.async.bulk.", structs["SM90_TMA_LOAD_2D"], CUTES) if "cache_hint" not in word]
    for name in names:
        if product := re.fullmatch(r"(wgmma|wgmma_rows)<(\d+)>", name):
            kind, turned = ("RS", MN) if product[1] == "wgmma_rows" else ("SS", K)
            found[name] = instruction("wgmma.", structs[f"MMA_64x{product[2]}x16_F32F16F16_{kind}"], CUTES | {"int32_t(tnspB)": turned})
            assert found[name].pop() == WHERE_ASKED
            found[name].append(ALWAYS if kind == "RS" else WHERE_ASKED)
    return found


def texts() -> dict[str, str]:
    return {name: (FOLDER / name).read_text() for name in ("wgmma.cuh", "device.cuh", "hopper.cuh")}


def test_instructions_have_the_names_and_operands_of_cute() -> None:
    found = ours(texts())
    assert found == cutes(cutlass(), list(found))
    assert len(found) == 10


# File, text, and what stands in its place.
TEXTS = {
    "y~ not turned": ("wgmma.cuh", "%36, p, 1, 1, 1;", "%36, p, 1, 1, 0;"),
    "x~ turned": ("wgmma.cuh", "%16, %17, p, 1, 1, 0, 0;", "%16, %17, p, 1, 1, 1, 0;"),
    "negated": ("wgmma.cuh", "%16, %17, p, 1, 1, 0, 0;", "%16, %17, p, -1, 1, 0, 0;"),
    "sums exchanged": ("wgmma.cuh", '(c[3][2]), "+f"(c[3][3])\n      : "l"', '(c[3][3]), "+f"(c[3][2])\n      : "l"'),
    "descriptors exchanged": ("wgmma.cuh", "%64, %65, p,", "%65, %64, p,"),
    "not added": ("wgmma.cuh", "setp.ne.b32 p, %34, 0", "setp.eq.b32 p, %34, 0"),
    "another size": ("wgmma.cuh", "m64n32k16", "m64n64k16"),
    "B by rows": ("device.cuh", "m16n8k16.row.col", "m16n8k16.row.row"),
    "not transposed": ("device.cuh", "x4.trans", "x4"),
    "registers exchanged": ("device.cuh", "{%8, %9}", "{%9, %8}"),
    "coordinates exchanged": ("hopper.cuh", "{%3, %4}", "{%4, %3}"),
}


@pytest.mark.parametrize("fault", TEXTS)
def test_a_fault_in_an_instruction_is_shown(fault: str) -> None:
    found, (file, right, wrong) = texts(), TEXTS[fault]
    assert found[file].count(right) == 1, f"{file} has changed"
    before, after = ours(found), ours(found | {file: found[file].replace(right, wrong)})
    assert sum(after[name] != cute for name, cute in cutes(cutlass(), list(before)).items()) == 1


# ---------------------------------------------------------------- layouts


def cuda_headers() -> list[str]:
    """Flags for the folders that nvcc takes CUDA's headers from."""
    try:
        listed = subprocess.run([build.nvcc(), "-dryrun", "-c", "unit.cu"], capture_output=True, text=True).stderr
    except build.BuildError as error:
        pytest.skip(f"no headers of CUDA: {error}")
    words = shlex.split(" ".join(re.findall(r"(?:SYSTEM_)?INCLUDES=(.*)", listed)))
    return [flag for word in words if (folder := word.removeprefix("-I")) not in ("", "-isystem") for flag in ("-isystem", folder)]


@pytest.fixture(scope="module")
def cute(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """CuTe's word, and the instructions, compiled once. Nothing is optimised: that would take longer than the program runs."""
    if shutil.which(COMPILER) is None:
        pytest.skip("no C++ compiler")
    headers, cuda = cutlass(), cuda_headers()
    major, minor = build._release(build.nvcc())
    nvccs = ["-DCUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL", f"-D__CUDACC_VER_MAJOR__={major}", f"-D__CUDACC_VER_MINOR__={minor}"]
    into = tmp_path_factory.mktemp("cute")
    says = compiled(EMULATOR / "cute.cpp", into, ["-O0", "-w", *nvccs, "-isystem", str(headers), *cuda])
    return [says, compiled(EMULATOR / "given.cpp", into, ["-O0", *cuda])]


def witness(cute: list[str], into: Path, folder: Path = FOLDER) -> tuple[int, str]:
    """Status and words of the program, of the csrc/cuda in `folder`."""
    unit = compiled(EMULATOR / "witness.cpp", into, ["-O0", *cuda_headers()], folder, warnings=folder == FOLDER)
    return said(linked([unit, *cute], into, []))


def test_layouts_are_those_of_cute(cute: list[str], tmp_path: Path) -> None:
    """Millions of checks: each is one number of a tile, one descriptor, one element of a fragment, one box."""
    status, output = witness(cute, tmp_path)
    assert status == 0 and re.fullmatch(r"\d{7,} checks, 0 wrong\n", output), output


class Fault(NamedTuple):
    """Lines of a file of csrc/cuda, what stands in their place, and the first line that the program must print."""

    file: str
    lines: str
    instead: str
    shown: str


OFFSETS = "leading_bytes >> 4) << 16 | static_cast<uint64_t>(stride_bytes >> 4) << 32"
EXCHANGED = "stride_bytes >> 4) << 16 | static_cast<uint64_t>(leading_bytes >> 4) << 32"
X, Y, TURNED = "descriptor of x~:", "descriptor of y~:", "descriptor of y~, k down the rows:"
FAULTS = {
    "offsets exchanged": Fault("hopper.cuh", OFFSETS, EXCHANGED, X),
    "another swizzle in descriptors": Fault("hopper.cuh", "uint64_t{1} << 62", "uint64_t{2} << 62", X),
    "another swizzle in memory": Fault("index.h", " ^ (row % SWIZZLE_ROWS)", " ^ (row / 2 % SWIZZLE_ROWS)", "unit_byte, k along the rows:"),
    "advance in a group": Fault("hopper.cuh", "b + k % 4 * 2", "b + k % 4 * 4", Y),
    "advance between groups": Fault("hopper.cuh", "x + k / 4 * x_rows * GROUP_BYTES", "x + k / 4 * N * GROUP_BYTES", X),
    "advance down the rows": Fault("hopper.cuh", "y + k * 16 * GROUP_BYTES", "y + k * 8 * GROUP_BYTES", TURNED),
    "offset between groups": Fault("hopper.cuh", ", ROWS * GROUP_BYTES, ATOM_BYTES", ", DEPTH * GROUP_BYTES, ATOM_BYTES", TURNED),
    "sums": Fault("index.h", "lane / 4 + e / 2 * 8;", "lane / 4 * 2 + e / 2;", "sums of wgmma:"),
    "left operand": Fault("backward_wgmma.cuh", "g[nb / 2][nb % 2 * 2 + h]", "g[nb / 2][nb % 2 + 2 * h]", "to_operand:"),
    "rows of ldmatrix": Fault(
        "index.h", " b_unit(int lane) { return lane / 8 % 2", " b_unit(int lane) { return lane / 16", "B of mma.sync:"
    ),
    "transposed rows": Fault(
        "index.h", " bt_row(int lane) { return lane % 16", " bt_row(int lane) { return lane % 8", "B of mma.sync, transposed:"
    ),
    "copies": Fault("mma.cuh", "+ unit_byte(row, unit, ROWS), from", "+ unit_byte(row, unit ^ 1, ROWS), from", "a copy:"),
    "boxes": Fault("wgmma_walk.cuh", "y(n) + group * BN * GROUP_BYTES", "y(n) + group * BM * GROUP_BYTES", "where a box of TMA goes:"),
    "swizzle of a map": Fault("forward_sm90.cu", "SWIZZLE_128B", "SWIZZLE_64B", "TMA: a row of a box is longer than the swizzle:"),
    "pitch of a map": Fault("forward_sm90.cu", "{2 * static_cast", "{static_cast", "tensor_map:"),
    "steps of a map": Fault("forward_sm90.cu", "step[2] = {1, 1}", "step[2] = {1, 9}", "TMA: step of elements:"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_layout_is_shown(fault: str, cute: list[str], tmp_path: Path) -> None:
    file, lines, instead, shown = FAULTS[fault]
    folder = tmp_path / "cuda"
    shutil.copytree(FOLDER, folder)
    text = (folder / file).read_text()
    assert text.count(lines) == 1, f"{file} has changed"
    (folder / file).write_text(text.replace(lines, instead))
    status, output = witness(cute, tmp_path, folder)
    assert status == 1 and output.startswith(shown) and " checks, 0 wrong" not in output, output
