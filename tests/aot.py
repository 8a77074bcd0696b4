"""Every Triton kernel compiled ahead of time, exactly as it is launched, and what the hardware gets. Needs no GPU.

    python tests/aot.py                                        # the backend's launches; exit 1 where a verdict is not ok
    python tests/aot.py --arch sm_90,sm_100 --json FILE        # some architectures; keep the numbers
    python tests/aot.py --markdown A.json B.json               # recorded runs of two versions of Triton side by side
    python tests/aot.py --check A.json B.json                  # exit 1 unless they are of the same launches and every verdict is ok
    python tests/aot.py --sample 4 A.json                      # exit 1 where a recorded run is not what these sources compile to

Compiling everything for every architecture takes minutes per version of Triton, so runs are recorded in tests/aot/. They name the
sources they are of: after a change of those they must be recorded again. --sample compares all the names, and compiles every Nth launch
again, other ones after every change: all numbers must be the recorded ones.

Verdicts, all that apply, or "ok":

    ERROR    does not compile
    SPILL    registers are kept in local memory: LDL or STL
    SMEM     one block wants more shared (sm_100: or tensor) memory than there is
    NO MMA   a product of tiles without a tensor-core instruction
    SERIAL   the compiler waits after every wgmma, so that products no longer overlap: a dot under an `if` in a loop does that
    SCALAR   loads 16 bits at a time beside a product: an address of which the compiler does not know that it is aligned
    TF32     a float32 product rounded to 10 bits
    F64      a float64 product
    FUSION   enable_fp_fusion left to Triton, whose default changes with its version
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib
import io
import itertools
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout

from machine_code import MMA, count, disassemble, hot_loop, resident, serialised

from fastnce.backends import _gpu
from fastnce.backends import triton as backend
from fastnce.backends.triton import launches, tape
from fastnce.pairs import Pairs
from fastnce.problem import LossProblem, LossWanted, Problem, SideGrad, Wanted

LENGTHS = (64, 128, 256, 512)
ROWS = 256  # of the problems that are recorded: only the types and the layout of their tensors matter
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")

TILE = re.compile(r"B[A-Z]|BLOCK_?\w*")  # names of constexprs that are tile sizes


class Launch(NamedTuple):
    """One specialisation of one kernel, as Triton's own binder makes it from the arguments of a launch.

    kernel      module:name
    signature   argument -> type: *bf16, i32, constexpr
    constexprs  path of an argument -> value, None and an integer 1 included
    attrs       path of an argument -> what is known of it, such as divisibility by 16
    options     for the compiler: num_warps, num_stages, enable_fp_fusion
    """

    kernel: str
    arch: str
    signature: dict[str, str]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, Any]

    @property
    def named(self) -> dict[str, Any]:
        """Constexprs by name."""
        names = list(self.signature)
        return {names[path[0]]: value for path, value in self.constexprs.items()}


class Compiled(NamedTuple):
    """The machine code of one launch.

    regs, stack, spills   registers per thread, bytes of stack, instructions that load from or store to it
    smem, blocks          bytes of shared memory per block, resident blocks per SM
    mma                   tensor-core instructions, as "16 HGMMA"
    mufu                  instructions of the special function unit: exp2, log2, rsqrt
    loop                  instructions of the innermost loop with most tensor-core instructions
    seconds, verdict      how long it took, and the words at the top of this file
    error                 what the compiler said where the verdict is ERROR
    """

    kernel: str
    variant: str
    arch: str
    tile: str
    warps: int
    stages: int
    regs: int = 0
    stack: int = 0
    spills: int = 0
    smem: int = 0
    blocks: int = 0
    mma: str = ""
    mufu: int = 0
    loop: int = 0
    seconds: float = 0.0
    verdict: str = ""
    error: str = ""


# What is launched ---------------------------------------------------------------------------------------------------------------------


def target(arch: str) -> GPUTarget:
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r}: choose from {', '.join(ARCHITECTURES)}")
    return GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)


def record(run: Callable[[], None], arch: str) -> list[Launch]:
    """The different launches that run() makes, in the order in which they come first. None is run: their outputs stay as they are.

    The place of Triton's launcher is taken, so that whatever stands between a kernel and its caller is seen through. Tensors may be on
    the CPU: their allocations, like a GPU's, start at multiples of 16 bytes.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set, so that kernels are interpreted and not compiled: unset it")
    backend = make_backend(target(arch))
    seen: dict[str, Launch] = {}

    def bind(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        bound, specialization, options = create_function_from_signature(kernel.signature, kernel.params, backend)(*args, **kwargs)
        _, signature, constexprs, attrs = kernel._pack_args(backend, kwargs, bound, specialization, options)
        launch = Launch(f"{kernel.__module__}:{kernel.__name__}", arch, signature, constexprs, attrs, options)
        seen.setdefault(repr(launch), launch)

    with mock.patch.object(JITFunction, "run", bind):
        run()
    return list(seen.values())


def problems() -> Iterator[Problem]:
    """Every kernel, in both forms of the operands, at each length that has tiles of its own, with the fewest and with the most rules.

    The operands are float16 whatever the input is; float16 input differs from bfloat16 in the passes over single rows alone.
    """
    ids = torch.zeros(ROWS, dtype=torch.int64)
    mask = torch.zeros(ROWS, ROWS, dtype=torch.bool)
    both_ids = {"q_label": ids, "k_label": ids, "q_exclude": ids, "k_exclude": ids}
    for dtype, d in itertools.product((torch.bfloat16, torch.float32), LENGTHS):
        q, k = torch.zeros(2, ROWS, d, dtype=dtype)
        ask = functools.partial(Problem, q, scale=torch.tensor(10.0), bias=None, normalize=True)
        yield ask(k=k, pairs=Pairs(offset=0), two_sided=False)  # info_nce
        yield ask(k=k, pairs=Pairs(offset=0), two_sided=True)  # clip_loss
        yield ask(k=k, pairs=Pairs(), two_sided=False, frozen=True)  # moco_loss
        yield ask(k=k, pairs=Pairs(q_exclude=ids, k_exclude=ids), two_sided=False, frozen=True)
        yield ask(k=k, pairs=Pairs(offset=0, **both_ids), two_sided=True, metrics=True, rounded=True)  # contrastive_stats
        yield ask(k=k, pairs=Pairs(offset=0, **both_ids, mask=mask), two_sided=True, metrics=True)
        if d == LENGTHS[1]:
            yield ask(k=None, pairs=Pairs(exclude_self=True, q_label=ids), two_sided=False)  # sup_con
            biased = functools.partial(ask, k=k, bias=torch.tensor(1.0), two_sided=False, rounded=True)
            yield biased(pairs=Pairs(offset=0))
            yield biased(pairs=Pairs(offset=0), metrics=True)  # retrieval
            yield biased(pairs=Pairs(offset=0), metrics=True, normalize=False, threshold=torch.zeros(ROWS))


def losses() -> Iterator[tuple[LossProblem, LossWanted]]:
    """Losses in the forms that a training step has: one number or one of each row, a temperature that is a number or a tensor."""
    ids = torch.zeros(ROWS, dtype=torch.int64)
    for dtype, d in itertools.product((torch.bfloat16, torch.float32), (LENGTHS[1], LENGTHS[3])):
        q, k = torch.zeros(2, ROWS, d, dtype=dtype)
        ask = functools.partial(Problem, q, scale=torch.empty(()), bias=None, normalize=True)
        simclr, supcon = ask(k=None, pairs=Pairs(True, ROWS), two_sided=False), ask(k=None, pairs=Pairs(True, q_label=ids), two_sided=False)
        queue = ask(k=k, pairs=Pairs(), two_sided=False, frozen=True)
        for scale in (None, torch.tensor(10.0)):
            how = {"scale": scale, "value": 10.0, "inverse": True}
            for problem, formula, more in (
                (simclr, "out", {"second": k}),  # nt_xent
                (ask(k=k, pairs=Pairs(offset=0), two_sided=False), "out", {}),  # info_nce
                (ask(k=k, pairs=Pairs(offset=0), two_sided=True), "out", {}),  # clip_loss
                (supcon, "out", {}),  # sup_con
                (queue, "out", {"partners": k}),  # moco_loss
            ):
                keys = problem.k is not None and not problem.frozen
                wanted = LossWanted(True, "second" in more, keys, False, scale is not None, False, False)
                yield LossProblem(problem, formula, True, **how, **more), wanted
                if scale is not None:
                    yield LossProblem(problem, formula, False, **how, **more, by_row=True), wanted
        yield LossProblem(simclr, "decoupled", True, second=k, value=10.0), LossWanted(True, True, False, False, False, False, False)
        yield LossProblem(supcon, "in", True, value=10.0), LossWanted(True, False, False, False, False, False, False)
        yield LossProblem(supcon, "in", False, value=10.0, by_row=True), LossWanted(True, False, False, False, False, False, False)
        weighted = LossProblem(simclr, "decoupled", False, second=k, value=10.0, weight=torch.zeros(2 * ROWS), by_row=True)
        yield weighted, LossWanted(True, True, False, False, False, False, False)


def shipped(arch: str) -> None:
    """Forward and backward of all of them, where the host code believes to be on this architecture."""
    tape.forget()  # those of another architecture
    with mock.patch.object(launches, "architecture", return_value=arch):
        for ask, asked in losses():
            found, kept = backend.loss(ask)
            backend.gradients(ask, kept, torch.ones_like(found), asked)
        for problem in problems():
            stats = backend.forward(problem)
            grads = [SideGrad(side.lse_neg, side.lse_pos, side.pos) for side in stats]
            backend.backward(problem, grads, stats, Wanted(True, not problem.symmetric and not problem.frozen, True, False))


# What it compiles to ------------------------------------------------------------------------------------------------------------------


def compiled(launch: Launch) -> Compiled:
    """Compile one launch and read what comes out."""
    module, name = launch.kernel.split(":")
    tile = "x".join(str(value) for key, value in launch.named.items() if TILE.fullmatch(key))
    row = Compiled(name, "", launch.arch, tile, launch.options.get("num_warps", 4), launch.options.get("num_stages", 3))
    source = ASTSource(getattr(importlib.import_module(module), name), launch.signature, launch.constexprs, launch.attrs)
    began = time.perf_counter()
    try:
        with mock.patch.object(knobs.nvidia, "dump_ptxas_log", True), contextlib.redirect_stdout(io.StringIO()) as log:
            kernel = triton.compile(source, target(launch.arch), launch.options)
    except Exception as error:  # one that does not compile must not hide the others
        return row._replace(verdict="ERROR", error="".join(traceback.format_exception(error, limit=0)).strip())
    if launch.arch.startswith("sm_"):
        row = inspected(row, kernel, log.getvalue())
    wrong = [row.verdict] if row.verdict else []
    wrong += [] if "enable_fp_fusion" in launch.options else ["FUSION"]
    return row._replace(smem=kernel.metadata.shared, seconds=round(time.perf_counter() - began, 2), verdict="+".join(wrong) or "ok")


def inspected(row: Compiled, kernel: Any, log: str) -> Compiled:
    """A row with the numbers of a kernel for NVIDIA, and as verdict all that is wrong with them."""
    sass, used = disassemble(kernel.asm["cubin"])
    loop, shared, tensor = hot_loop(sass), kernel.metadata.shared, kernel.metadata.tmem_size or 0
    row = row._replace(
        regs=used["REG"],
        stack=used["STACK"],
        spills=count(sass, "LDL", "STL"),
        blocks=resident(row.arch, kernel.metadata.num_warps, used["REG"], shared, tensor),
        mma=" ".join(f"{n} {name}" for name in MMA if (n := count(sass, name))),
        mufu=count(sass, "MUFU"),
        loop=len(loop),
    )
    products = " ".join(re.findall(r"\b(?:mma|wgmma|tcgen05\.mma)\.\S+", kernel.asm["ptx"]))
    wrong = {
        "SPILL": row.spills,  # some frames of 8 bytes are never touched
        "SMEM": not row.blocks,
        "NO MMA": not row.mma and "tt.dot" in kernel.asm["ttir"],
        "SERIAL": serialised(loop, log),
        "SCALAR": row.mma and any(one.name.startswith("LDG") and ".U16" in one.name for one in sass),
        "TF32": "tf32" in products,
        "F64": ".f64" in products,
    }
    return row._replace(verdict="+".join(name for name, found in wrong.items() if found))


def check(launches: list[Launch]) -> list[Compiled]:
    """All of them, in this order, in as many processes as there are cores and with an empty cache."""
    with (
        tempfile.TemporaryDirectory() as cache,
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache),
        # Not forked: torch and LLVM have threads.
        ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool,
    ):
        found = list(pool.map(compiled, launches))
    return [row._replace(variant=variant) for row, variant in zip(found, variants(launches), strict=True)]


def variants(launches: list[Launch]) -> list[str]:
    """The differences between the launches of each kernel: flags by name, numbers, types of tensors, tensors that may be None."""
    described = []
    for launch in launches:
        parts = dict(launch.signature)
        more = launch.named | {name: value for name, value in launch.options.items() if name not in ("num_warps", "num_stages")}
        parts.update({name: str(value) for name, value in more.items()})
        described.append((launch.kernel, {name: part for name, part in parts.items() if not TILE.fullmatch(name)}))
    out = []
    for kernel, parts in described:
        texts = []
        for name, part in parts.items():
            others = {more.get(name, "None") for same, more in described if same == kernel}
            if len(others) > 1 and part not in ("None", "False"):
                tensor = part.startswith("*")
                texts.append(name if part == "True" or (tensor and "None" in others) else part[1:] if tensor else f"{name}={part}")
        out.append(" ".join(dict.fromkeys(texts)))
    return out


# What is said about it ----------------------------------------------------------------------------------------------------------------

COLUMNS = ("arch", "kernel", "variant", "tile", "warps", "stages", "regs", "smem", "blocks", "mma", "mufu", "loop", "seconds", "verdict")


def aligned(table: list[list[str]]) -> list[str]:
    """A line per row, columns below each other."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]


def text(rows: list[Compiled]) -> str:
    """The rows as a table for a terminal, then what did not compile."""
    lines = aligned([list(COLUMNS)] + [[str(getattr(row, name)) for name in COLUMNS] for row in rows])
    errors = [f"\n{row.arch} {row.kernel} {row.variant} {row.tile}\n{row.error}" for row in rows if row.error]
    wrong = sum(row.verdict != "ok" for row in rows)
    return "\n".join([*lines, *errors, f"{len(rows)} compiled with Triton {triton.__version__}, {wrong} not ok"])


def either(values: Sequence[object]) -> str:
    """One value, or one per version of Triton."""
    return " / ".join(map(str, values if len(set(values)) > 1 else values[:1]))


def beside(runs: dict[str, list[Compiled]]) -> list[tuple[Compiled, ...]]:
    """Each launch in all versions of Triton, the oldest first. Raises ValueError where one has a launch twice, or another lacks it."""
    by_key: dict[tuple[object, ...], dict[str, Compiled]] = {}
    for version in ordered(runs):
        for row in runs[version]:
            found = by_key.setdefault((row.kernel, row.variant, row.arch, row.tile, row.warps, row.stages), {})
            if version in found:
                raise ValueError(f"{row.kernel} {row.variant} {row.tile} for {row.arch}: two launches of this name")
            found[version] = row
    for (kernel, variant, arch, tile, *_), found in by_key.items():
        if len(found) != len(runs):
            raise ValueError(f"{kernel} {variant} {tile} for {arch}: not in the results of every version of Triton")
    return [tuple(found.values()) for found in by_key.values()]


def ordered(versions: Iterable[str]) -> list[str]:
    """Versions of Triton, the oldest first."""
    return sorted(versions, key=lambda version: [int(part) for part in version.split(".")[:3]])


def markdown(runs: dict[str, list[Compiled]]) -> str:
    """The rows of one or more versions of Triton side by side, and a line for what has no numbers."""
    lines = [
        f"Triton {' / '.join(ordered(runs))}: one number where they agree.",
        "",
        "| kernel | variant | architecture | tile | warps, stages | registers | shared KiB | blocks per SM | MMA | loop |",
        "|---|---|---|---|---|--:|--:|--:|---|--:|",
    ]
    launches = beside(runs)
    for rows in launches:
        one = rows[0]
        if one.regs:
            cells = [one.kernel, one.variant, one.arch, one.tile, f"{one.warps}, {one.stages}"]
            cells += [either([row.regs for row in rows]), either([f"{row.smem / 1024:.3g}" for row in rows])]
            cells += [either([row.blocks for row in rows]), either([re.sub(r"\d+ ", "", row.mma) for row in rows])]
            lines.append("| " + " | ".join([*cells, either([row.loop for row in rows])]) + " |")
    unread = [rows[0].arch for rows in launches if not any(row.regs for row in rows)]
    for arch in dict.fromkeys(unread):
        lines += ["", f"{arch}: {unread.count(arch)} compile; their registers are not read."]
    return "\n".join(lines)


def sources() -> str:
    """sha256 of the sources that the compiled code depends on."""
    digest = hashlib.sha256()
    host, device = (sorted(Path(package.__path__[0]).glob("*.py")) for package in (_gpu, backend))
    for path in [*host, *device]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def write(path: Path, rows: list[Compiled]) -> None:
    """A run, one row per line."""
    lines = ",\n".join(json.dumps(row._asdict()) for row in rows)
    head = f'"triton": {json.dumps(triton.__version__)}, "sources": {json.dumps(sources())}'
    path.write_text(f'{{{head}, "kernels": [\n{lines}\n]}}\n')


def read(files: list[Path]) -> dict[str, list[Compiled]]:
    """Recorded runs by version of Triton."""
    runs = [json.loads(file.read_text()) for file in files]
    return {run["triton"]: [Compiled(**row) for row in run["kernels"]] for run in runs}


def differences(recorded: Path, launches: list[Launch], every: int) -> list[str]:
    """The differences between a recorded run and these sources: first its digest, then names, then the numbers of a sample."""
    run = json.loads(recorded.read_text())
    again = f"record it again: python tests/aot.py --json {recorded}"
    if run["sources"] != sources() or run["triton"] != triton.__version__:
        return [f"{recorded} is of other sources, or of Triton {run['triton']} and not {triton.__version__}; {again}"]
    rows = [Compiled(**row) for row in run["kernels"]]
    names = [(row.kernel, row.variant, row.arch) for row in rows]
    described = variants(launches)
    if names != [(one.kernel.split(":")[1], variant, one.arch) for one, variant in zip(launches, described, strict=True)]:
        return [f"{recorded} holds other launches than are made; {again}"]
    start = int(sources(), 16) % every
    found = [row._replace(variant=variant) for row, variant in zip(check(launches[start::every]), described[start::every], strict=True)]
    pairs = zip(rows[start::every], found, strict=True)
    return [f"recorded {a}\ncompiled {b}" for a, b in pairs if a._replace(seconds=0.0) != b._replace(seconds=0.0)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, help="recorded runs, read instead of compiling")
    parser.add_argument("--arch", default=",".join(ARCHITECTURES), help="%(default)s")
    parser.add_argument("--of", default="aot:shipped", help="module:function(architecture) that launches (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--check", action="store_true", help="print only what is not ok")
    parser.add_argument("--sample", type=int, metavar="N")
    options = parser.parse_args(arguments)
    if options.sample:
        (recorded,) = options.results
        launches = [one for arch in options.arch.split(",") for one in record(functools.partial(shipped, arch), arch)]
        wrong = differences(recorded, launches, options.sample)
        print("\n".join(wrong) or f"{recorded}: {len(launches[:: options.sample])} of {len(launches)} compiled again, all as recorded")
        return int(bool(wrong))
    if options.results:
        runs = read(options.results)
    else:
        module, name = options.of.split(":")
        launch = getattr(importlib.import_module(module), name)
        launches = [one for arch in options.arch.split(",") for one in record(functools.partial(launch, arch), arch)]
        runs = {triton.__version__: check(launches)}
    rows = [row for run in runs.values() for row in run]
    if options.json:
        write(options.json, rows)
    if options.check:
        print(f"{len(beside(runs))} launches, each with Triton {', '.join(ordered(runs))}")
        print(*(text([row]) for row in rows if row.verdict != "ok"), sep="\n")
    else:
        print(markdown(runs) if options.markdown else text(rows))
    return int(any(row.verdict != "ok" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
