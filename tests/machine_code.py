"""The machine code of a kernel for NVIDIA GPUs: its instructions, its loops, and how many blocks an SM holds at once."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton

# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability". Shared memory in bytes: of one block, of an SM.
SHARED = {"sm_80": (163 << 10, 164 << 10), "sm_90": (227 << 10, 228 << 10), "sm_100": (227 << 10, 228 << 10)}
RESERVED = 1 << 10  # shared memory that the system keeps per block
REGISTERS, PARTITIONS, WARPS, BLOCKS = 64 << 10, 4, 64, 32  # of an SM; its registers and warps are split over the partitions
TENSOR_COLUMNS = 512  # tensor memory of an SM, sm_100

MMA = ("HMMA", "IMMA", "DMMA", "HGMMA", "QGMMA", "IGMMA", "UTCHMMA", "UTCQMMA")  # by chip: sm_80, sm_90, sm_100


class Instruction(NamedTuple):
    address: int
    name: str  # HGMMA.64x128x16.F32.BF16
    text: str  # with its operands


LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);", re.MULTILINE)


def cuobjdump(*arguments: str | Path, **options: Any) -> str:
    """Of Triton, or of the toolkit."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = program if program.is_file() else shutil.which("cuobjdump")
    if found is None:
        raise FileNotFoundError(f"no cuobjdump: neither {program} nor on PATH")
    return subprocess.run([found, *arguments], capture_output=True, text=True, check=True, **options).stdout


def instructions(text: str) -> list[Instruction]:
    """Those in what cuobjdump -sass prints."""
    return [Instruction(int(m[1], 16), m[2], m[2] + m[3]) for m in LINE.finditer(text)]


def disassemble(cubin: bytes) -> tuple[list[Instruction], dict[str, int]]:
    """The kernel's instructions, and its REG and STACK."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = cuobjdump("-sass", "-res-usage", file.name)
    return instructions(text), {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", text)}


def count(sass: Sequence[Instruction], *prefixes: str) -> int:
    return sum(instruction.name.startswith(prefixes) for instruction in sass)


def loops(sass: list[Instruction]) -> Iterator[list[Instruction]]:
    """The instructions between every branch backward and where it goes."""
    for branch in sass:
        goes = re.search(r"0x([0-9a-f]+)\s*$", branch.text) if branch.name.startswith("BRA") else None
        if goes and int(goes[1], 16) < branch.address:
            yield [instruction for instruction in sass if int(goes[1], 16) <= instruction.address <= branch.address]


def hot_loop(sass: list[Instruction]) -> list[Instruction]:
    """The loop with most tensor-core instructions, then most exponentials, then the shortest; empty without any loop."""
    return max(loops(sass), key=lambda loop: (count(loop, *MMA), count(loop, "MUFU"), -len(loop)), default=[])


def serialised(loop: list[Instruction], log: str) -> bool:
    """Whether the assembler says so, or waits after more than half of the products, which it does silently where registers are capped.

    Two or three waits per turn of a loop are what a kernel needs that uses one product in the next.
    """
    waits = count(loop, "WARPGROUP.DEPBAR")
    return "wgmma.mma_async instructions are serialized" in log or (waits > 3 and 2 * waits > count(loop, *MMA))


def resident(arch: str, warps: int, regs: int, smem: int, tensor_columns: int) -> int:
    """Blocks that an SM holds at once. Registers are given to a warp in units of 8 per thread."""
    per_block, per_sm = SHARED[arch]
    if smem > per_block or tensor_columns > TENSOR_COLUMNS:
        return 0
    per_warp = -(-regs // 8) * 8 * 32
    by_registers = REGISTERS // PARTITIONS // per_warp * PARTITIONS // warps
    return min(by_registers, per_sm // (smem + RESERVED), WARPS // warps, BLOCKS, TENSOR_COLUMNS // max(1, tensor_columns))
