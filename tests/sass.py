"""The machine code that nvcc made of csrc/cuda: registers, spills and instructions of every kernel of a built library. Needs no GPU.

    python -m fastnce build-cuda
    python tests/sass.py                          # the library of these sources; exit 1 where a verdict is not ok
    python tests/sass.py --write tests/sass.json  # the same, and record its registers, products and overlap
    python tests/sass.py --check tests/sass.json  # the same, and exit 1 where the record says something else

A library of all architectures takes minutes, and is needed to record. The record names its sources, so that a change of them asks for a new
one. To compare with it, a library of some architectures is enough, which turn.py names.

Registers, stack and spills are what ptxas said, in the .json beside the library; everything else is read from the machine code. Shared
memory is in neither: kernels are given it at their launch. Products that ptxas says it serialised have stopped the build already.

A row of the record is one kernel in one form: registers per thread for each GPU, its tensor-core instruction, and its overlap. The
registers of a wgmma kernel are those of its launch: warps that copy give theirs up, down to 40, and warps that multiply take up to 232.
Overlap is the part of a plain tile's exponentials that stand between products and the wait for them. It has no value for tiles whose
labels, ids or mask are looked at: their exponentials come behind the wait, and only the two warpgroups overlap there.

Verdicts, all that apply, or "ok":

    MISSING     a kernel is not there for every GPU, or not as PTX for later ones; wgmma kernels are for sm_90a alone
    SPILL       registers are kept in local memory: a stack, LDL or STL
    NO MMA      a kernel of tiles without HMMA, or a wgmma kernel without HGMMA
    NO TMA      a wgmma kernel that copies tiles without UTMALDG
    SERIAL      a wgmma loop that waits for its products more often than it has to
    NO OVERLAP  a wgmma loop over plain tiles that takes too few of its exponentials while products are under way
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import aot  # puts this checkout first on the path
import machine_code

from fastnce.compiled import build, find

TILES = ("forward_rows", "forward_both", "retrieval", "backward_rows", "weights_block")
WGMMA = "wgmma_"
# Instructions that are counted, by how their names begin.
COUNTED = {name: (name,) for name in ("HMMA", "HGMMA", "MUFU", "LDSM", "UTMALDG", "LDL", "STL")} | {"ATOM": ("RED.", "REDG", "ATOM")}
# Architectures with machine code.
GPUS = [arch for arch in build.ARCHS if not arch.startswith("compute_")]
# The loops wait once per tile: forward kernels for each of two, backward kernels for each of two products.
WAITS = 2
# Of a plain tile's exponentials, the part that has to stand between its neighbour's products and the wait for them. The rest, left to
# ptxas, ends up behind the wait, or not, with any change of the code around it.
OVERLAP = 2 / 3


class Compiled(NamedTuple):
    """The machine code of one kernel on one architecture.

    kernel, form     wgmma_forward_both, "D=128 index"
    regs             per thread
    stack, spills    bytes of stack, bytes that are stored to it and loaded again
    counts           instructions by the names of COUNTED
    overlap          mean of overlaps(); None where no tile is known to be plain
    """

    kernel: str
    form: str
    arch: str
    regs: int = 0
    stack: int = 0
    spills: int = 0
    counts: dict[str, int] = {}
    overlap: float | None = None
    verdict: str = "MISSING"


# What is in the library ---------------------------------------------------------------------------------------------------------------


def kernels(text: str) -> dict[str, list[machine_code.Instruction]]:
    """Name -> instructions, from what cuobjdump -sass prints."""
    parts = re.split(r"^\s+Function : (\S+)$", text, flags=re.MULTILINE)
    return {name: machine_code.instructions(body) for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def disassemble(library: Path) -> tuple[dict[tuple[str, str], list[machine_code.Instruction]], set[str]]:
    """(architecture, name) -> instructions; names of the kernels that are there as PTX."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        machine_code.cuobjdump("-xelf", "all", "-xptx", "all", library.resolve(), cwd=folder)
        # The longest first, so that the last does not run alone.
        cubins = sorted(Path(folder).glob("*.cubin"), key=lambda path: -path.stat().st_size)
        texts = pool.map(lambda path: kernels(machine_code.cuobjdump("-sass", path)), cubins)
        # fastnce-cuda-....7.sm_90a.cubin
        sass = {(path.suffixes[-2][1:], name): found for path, text in zip(cubins, texts, strict=True) for name, found in text.items()}
        ptx = {name for path in Path(folder).glob("*.ptx") for name in re.findall(r"\.entry (\w+)", path.read_text())}
    return sass, ptx


def resources(record: dict[str, Any]) -> dict[tuple[str, str], tuple[int, int, int]]:
    """(architecture, name) -> registers, bytes of stack, bytes of spills: lines of build.py."""
    line = r"(\w+) (\w+): (\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads; Used (\d+) registers"
    found = [m for unit in record["ptxas"].values() for text in unit if (m := re.match(line, text))]
    return {(m[1], m[2]): (int(m[6]), int(m[3]), int(m[4]) + int(m[5])) for m in found}


# Names --------------------------------------------------------------------------------------------------------------------------------


def demangle(names: Iterable[str]) -> dict[str, str]:
    names = list(names)
    plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout.splitlines()
    return dict(zip(names, plain, strict=True))


def described(name: str) -> tuple[str, str]:
    """Kernel and form of a demangled name: wgmma_forward_both, "D=128 index"; backward_rows, "D=64 two parts content 64x64".

    index, content   pairs are told apart by their places alone, or by labels, exclude ids or a mask
    64x32            rows of a block, columns of a tile
    """
    found = re.fullmatch(r"(?:void )?(\w+?)(?:_kernel)?(?:<(.*)>)?\(.*", name.replace("fastnce::cuda::", ""))
    if found is None:
        raise ValueError(f"not a kernel of csrc/cuda: {name}")
    kernel, arguments = found[1], (found[2] or "").strip()
    content = {"false": "index", "true": "content", None: ""}
    if m := re.match(r"Shape<(\d+), (\d+), (\d+), (\d+)>(?:, (\w+))?$", arguments):
        depth, parts, strips, columns = map(int, m.groups()[:4])
        words = [f"D={depth}" if depth else "long rows", "two parts" if parts == 2 else "", content[m[5]], f"{64 * strips}x{columns}"]
    elif m := re.match(r"Walk<\(Kernel\)\d, (\d+), (\w+)>(?:, (\w+)<?([^<>]*)>?)?$", arguments):
        terms = zip((m[4] or "").split(", "), ("rows", "columns", "one exponential"), strict=False)
        words = [f"D={m[1]}", content[m[2]], *(word for on, word in terms if on == "true")]
    elif m := re.match(r"\(Phase\)(\d)$", arguments):
        words = [("at once", "sums", "vectors")[int(m[1])]]
    else:
        words = [{"": "", "float": "float32", "Half": "float16", "BFloat16": "bfloat16"}[arguments]]
    return kernel, " ".join(filter(None, words))


# What is said about it ----------------------------------------------------------------------------------------------------------------


def product_loops(sass: list[machine_code.Instruction]) -> list[list[machine_code.Instruction]]:
    """Loops with wgmma in them. A branch back across an EXIT is none: waits for barriers are placed behind the kernel's end."""
    return [loop for loop in machine_code.loops(sass) if machine_code.count(loop, "HGMMA") and not machine_code.count(loop, "EXIT")]


def overlaps(loop: list[machine_code.Instruction]) -> list[float]:
    """For every tile of a loop, the part of its exponentials that stand between products and the wait after which none is pending."""
    beside, pending = [0], False
    for one in loop:
        pending |= one.name.startswith("HGMMA")
        beside[-1] += pending and one.name.startswith("MUFU.EX2")
        # The operand is how many groups of products may stay pending.
        if pending and one.name.startswith("WARPGROUP.DEPBAR") and re.search(r"\b0x0\s*$", one.text):
            pending = False
            beside.append(0)
    tiles = beside[:-1]
    return [found * len(tiles) / max(1, machine_code.count(loop, "MUFU.EX2")) for found in tiles]


def judged(row: Compiled, sass: list[machine_code.Instruction]) -> Compiled:
    """The row with what its instructions say."""
    counts = {name: machine_code.count(sass, *prefixes) for name, prefixes in COUNTED.items()}
    wgmma, loops, beside = row.kernel.startswith(WGMMA), product_loops(sass), None
    if wgmma and " index" in row.form:
        # Plain tiles have the shortest loop: nothing in it tells pairs apart.
        beside = overlaps(min(loops, key=lambda loop: len(loop) / machine_code.count(loop, "HGMMA"), default=[])) or [0.0]
        row = row._replace(overlap=sum(beside) / len(beside))
    wrong = {
        "SPILL": row.stack or row.spills or counts["LDL"] or counts["STL"],
        "NO MMA": row.kernel.removeprefix(WGMMA) in TILES and not counts["HGMMA" if wgmma else "HMMA"],
        "NO TMA": wgmma and not counts["UTMALDG"],
        "SERIAL": any(machine_code.count(loop, "WARPGROUP.DEPBAR") > WAITS for loop in loops),
        "NO OVERLAP": beside and min(beside) < OVERLAP,
    }
    return row._replace(counts=counts, verdict="+".join(name for name, found in wrong.items() if found) or "ok")


def inspect(library: Path) -> list[Compiled]:
    """A row for every kernel on every architecture that it is or should be on."""
    used = resources(json.loads(library.with_suffix(".json").read_text()))
    sass, ptx = disassemble(library)
    pretty = demangle(sorted({name for _, name in used} | {name for _, name in sass} | ptx))
    rows = []
    for name, demangled in pretty.items():
        kernel, form = described(demangled)
        for arch in [build.SM90] if kernel.startswith(WGMMA) else find.archs(library) or build.ARCHS:
            row = Compiled(kernel, form, arch)
            if (arch, name) in sass and (arch, name) in used:
                row = judged(Compiled(kernel, form, arch, *used[arch, name]), sass[arch, name])
            elif arch.startswith("compute_") and name in ptx:
                continue  # nothing to say of it
            rows.append(row)
    return sorted(rows, key=lambda row: (row.kernel, [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", row.form)]))


def text(rows: list[Compiled]) -> str:
    """The rows as a table for a terminal."""
    lines = [["kernel", "form", "arch", "regs", "stack", "spills", *COUNTED, "overlap", "verdict"]]
    for row in rows:
        numbers = [row.regs, row.stack, row.spills, *(row.counts.get(name, 0) for name in COUNTED)]
        lines.append([row.kernel, row.form, row.arch, *map(str, numbers), percent(row.overlap), row.verdict])
    return "\n".join(aot.aligned(lines))


def percent(part: float | None) -> str:
    return "" if part is None else f"{part:.0%}"


def table(rows: list[Compiled]) -> list[dict[str, str | int | None]]:
    """The rows that are recorded: one per kernel and form."""
    found = []
    for kernel, form in dict.fromkeys((row.kernel, row.form) for row in rows):
        of = {row.arch: row for row in rows if (row.kernel, row.form) == (kernel, form)}
        one = of[build.SM90]
        products = next((name for name in ("HGMMA", "HMMA") if one.counts.get(name)), "")
        regs = {arch: of[arch].regs if arch in of else None for arch in GPUS}
        found.append({"kernel": kernel, "form": form, **regs, "products": products, "overlap": percent(one.overlap)})
    return found


def record(rows: list[Compiled], version: str) -> str:
    """The text of the record: a row per line, so that a diff names what has moved."""
    lines = ",\n".join(json.dumps(row) for row in table(rows))
    head = f'"compiler": {json.dumps(version)}, "sources": {json.dumps(find.digest("cuda"))}'
    return f'{{{head}, "kernels": [\n{lines}\n]}}\n'


def without(text: str, archs: Iterable[str]) -> str:
    """A record without the registers of some architectures."""
    for arch in archs:
        text = re.sub(rf'"{arch}": (\d+|null), ', "", text)
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", nargs="?", type=Path, help="by default the one that is built of these sources")
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--check", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    library = options.library or find.library_path("cuda")
    if library is None:
        print(f"the CUDA library of these sources is {find.not_built('cuda')}", file=sys.stderr)
        return 1
    rows = inspect(library)
    wrong = [row for row in rows if row.verdict != "ok"]
    # nvcc 13.0.88
    version = "nvcc " + re.findall(r"V([\d.]+)", json.loads(library.with_suffix(".json").read_text())["nvcc"])[-1]
    print(text(rows if not options.check else wrong))
    print(f"{library.name}, {version}: {len(rows)} kernels, {len(wrong)} not ok")
    found, missing = record(rows, version), [arch for arch in GPUS if arch not in (find.archs(library) or GPUS)]
    if options.write and missing:
        print(f"{library.name} lacks {', '.join(missing)}: a record is of all architectures", file=sys.stderr)
        return 1
    if options.write:
        options.write.write_text(found)
    if options.check:
        both = [without(text, missing).splitlines() for text in (options.check.read_text(), found)]
        moved = list(difflib.unified_diff(*both, n=0, lineterm=""))
        if moved:
            print(
                f"{options.check} (-) differs from this library (+): run python tests/sass.py --write {options.check}", *moved[2:], sep="\n"
            )
            return 1
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
