"""Benchmark fastnce against the ways these losses are computed today, on this CPU or GPU.

    python -m bench time memory [options]    time and memory of a step, in one result; or one of the two alone
    python -m bench accuracy [options]       errors against float64, and the accuracy contract
    python -m bench host [options]           the host's time of a step, with kernels that do nothing
    python -m bench gpu [options] [part ...] the tests and measurements for a GPU; bench/gpu/run.sh lists the parts
    python -m bench page [options]           README, docs and figures from recorded results, or a page of one's own

time and memory, each with --help for the rest:

    python -m bench time memory --quick
    python -m bench time memory --losses nt_xent,clip --n 1k:16k:x4 --d 128,512
    python -m bench memory --n 16k --mem-limit 2GiB
    python -m bench time --device cuda --backend triton --dtype bfloat16 --n 4k:64k:x4

They print a table, and write <out>/<machine>/<UTC date>-<source digest>.json and the same table beside it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import dense, peers, record, sweep, table
from bench.record import OUT, ROOT, Cell
from fastnce import backends, files

PROGRAM = "python -m bench"
COMMANDS = ("time", "memory", "accuracy", "host", "gpu", "page")
ROUNDS = {"cpu": 5, "cuda": 20}
DTYPES = ("float32", "float64", "bfloat16", "float16")
MEASURES = ("time", "memory")
QUICK: dict[str, Any] = {"n": [4096], "d": [64], "repeats": 3, "peers": ["eager"]}  # under a minute, most of it starting processes
DEFAULT: dict[str, Any] = {"n": [1024, 4096, 16384], "d": [128, 512]}
UNITS = {"": 1, "k": 2**10, "M": 2**20}


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+)([kM]?)", text)
    if found is None or int(found[1]) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer such as 4096 or 4k")
    return int(found[1]) * UNITS[found[2]]


def _range(text: str) -> list[int]:
    """start:end:xF with both ends, or a single size."""
    if ":" not in text:
        return [_size(text)]
    found = re.fullmatch(r"([^:]+):([^:]+):x(\d+)", text)
    if found is None or int(found[3]) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a range such as 4k:1M:x2: from, to, and a factor of 2 or more")
    sizes, end = [_size(found[1])], _size(found[2])
    if sizes[0] > end:
        raise argparse.ArgumentTypeError(f"{text!r} starts above its end")
    while sizes[-1] * int(found[3]) <= end:
        sizes.append(sizes[-1] * int(found[3]))
    return sizes


def _sizes(text: str) -> list[int]:
    """Ascending, so that a contestant that runs out of memory at one size need not be tried at the next."""
    found = sorted({size for part in _names(text) for size in _range(part)})
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} names no size; give a list such as 1024,4096 or a range such as 4k:1M:x2")
    return found


def _mebibytes(text: str) -> int:
    units = {"MiB": 1, "GiB": 1024}
    if text[-3:] not in units or not text[:-3].isdigit() or int(text[:-3]) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512MiB or 2GiB")
    return int(text[:-3]) * units[text[-3:]]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("measure", nargs="+", choices=MEASURES, metavar="time|memory", help="one of them, or both into one result")
    parser.add_argument("--losses", type=_names, default=["nt_xent", "clip"], help=f"all, or of {', '.join(dense.LOSSES)}")
    parser.add_argument("--n", type=_sizes, help="rows (nt_xent: both views together): 1024,4096 or 4k:1M:x2; default: 1024,4096,16384")
    parser.add_argument("--d", type=_sizes, help="columns; default: 128,512")
    parser.add_argument("--dtype", type=_names, default=["float32"], help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--mode", type=_names, default=["full"], help="of fwd, bwd, full (default); memory is measured for fwd and full")
    known, except_for = ", ".join(peers.names("cpu")), "compile and, for nt_xent, pytorch-metric-learning"
    parser.add_argument("--peers", type=_names, help=f"of {known}; default: those that are installed, except for {except_for}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backend", choices=("auto", *backends.BACKENDS), default="auto", help="of fastnce")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, help="interleaved rounds per cell; default: 5 on a CPU, 20 on a GPU")
    parser.add_argument("--mem-limit", type=_mebibytes, default=0, help="address space above the inputs, e.g. 2GiB")
    parser.add_argument("--timeout", type=float, default=900, help="seconds that each contestant of a cell may take")
    parser.add_argument("--time-budget", type=float, help="seconds after which no cell is started")
    parser.add_argument("--at-least", type=float, help="exit 1 unless every other contestant takes so many times our time in this run")
    parser.add_argument("--out", type=Path, default=OUT, help=f"bench/results records it; default: {OUT}")
    parser.add_argument("--quick", action="store_true", help="N = 4096, D = 64, 3 rounds, against eager: under a minute")
    parser.add_argument("--dry-run", action="store_true", help="print the cells and stop")
    return parser


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of time and memory, checked; every default filled in."""
    parser = _parser()
    options = parser.parse_args(arguments)
    for name, value in (DEFAULT | {"repeats": ROUNDS[options.device]} | (QUICK if options.quick else {})).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.losses == ["all"]:
        options.losses = list(dense.LOSSES)
    options.losses = dense.spelled_as(dense.LOSSES, options.losses)
    options.measure = [name for name in MEASURES if name in options.measure]
    peak = Path("/proc/self/clear_refs").exists() or options.device == "cuda"
    for option, known in (
        ("losses", dense.LOSSES),
        ("dtype", DTYPES),
        ("mode", tuple(record.MODES)),
        ("peers", peers.names(options.device)),
    ):
        given = getattr(options, option)
        if given == []:
            parser.error(f"--{option} names nothing; choose from {', '.join(known)}")
        for name in given or []:
            if name not in known:
                parser.error(f"--{option}: unknown {name!r}; choose from {', '.join(known)}")
    if "nt_xent" in options.losses and any(n % 2 for n in options.n):
        parser.error("--n must be even for nt_xent: its rows are two views of every example")
    if "sup_con" in options.losses and min(options.n) < 2:
        parser.error("--n must be at least 2 for sup_con: every row needs a positive")
    for option in ("repeats", "threads", "timeout", "time_budget", "at_least"):
        value = getattr(options, option)
        if value is not None and not value > 0:
            parser.error(f"--{option.replace('_', '-')} must be above 0, got {value:g}")
    if options.measure == ["memory"] and options.mode == ["bwd"]:
        parser.error("memory --mode bwd: memory is measured for fwd and full; the peak of a step is that of full")
    if options.device == "cuda" and options.mem_limit:
        parser.error("--mem-limit holds for the CPU: a GPU has the memory it has")
    if options.device == "cuda" and not (options.dry_run or torch.cuda.is_available()):
        parser.error("--device cuda: torch finds no CUDA device here")
    if options.mem_limit and not peak:
        parser.error("--mem-limit: what a process holds is read from Linux's /proc, and there is none here")
    having = {name: [loss for loss in dense.LOSSES if name in peers.factories(loss, options.device)] for name in options.peers or []}
    for name, losses in having.items():
        if not set(losses) & set(options.losses):
            parser.error(f"--peers: {name} has none of {', '.join(options.losses)}, only {', '.join(losses)}")
    if options.at_least is not None and ("time" not in options.measure or options.peers == ["fastnce"]):
        parser.error("--at-least compares times with those of other contestants: measure time, and name some in --peers")
    if "memory" in options.measure and not peak:
        parser.error("memory: its peak is read from Linux's /proc, and there is none here; time needs none")
    return options


def plan(options: argparse.Namespace) -> list[Cell]:
    """One process for the times of all contestants of a problem, one each for their memory.

    Raises ImportError where a contestant that was named is not installed.
    """
    planned: list[Cell] = []
    for loss in options.losses:
        names = tuple(peers.contestants(loss, options.peers, options.device))
        problems = ((dtype, d, mode, n) for dtype in options.dtype for d in options.d for mode in options.mode for n in options.n)
        for dtype, d, mode, n in problems:
            cell = Cell("time", loss, n, d, names, mode, dtype, options.threads, options.repeats, options.mem_limit, options.device)
            cell = replace(cell, backend=options.backend, clock="host" if options.device == "cpu" else "device")
            planned += [cell] if "time" in options.measure else []
            if "memory" in options.measure and mode != "bwd":
                planned += [replace(cell, measure="memory", names=(name,)) for name in names]
    return planned


def spelled_out(options: argparse.Namespace) -> list[str]:
    """The command line with every default written down, less where the result goes."""
    words = list(options.measure)
    for name, value in vars(options).items():
        if name in ("measure", "out", "dry_run", "quick") or value is None:
            continue
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        words.append(f"--{name.replace('_', '-')}={text}{'MiB' * (name == 'mem_limit')}")
    return words


def main(arguments: list[str]) -> int:
    """Run the command that the arguments name. Returns the exit status."""
    command, rest = (arguments or [""])[0], arguments[1:]
    if command == "accuracy":
        from bench import accuracy

        return accuracy.main(rest)
    if command == "host":
        from bench import host

        return host.main(rest)
    if command == "page":
        from bench import page

        return page.main(rest)
    if command == "gpu":
        return subprocess.call(["bash", str(ROOT / "bench/gpu/run.sh"), *rest])
    if command and command[0] != "-" and command not in MEASURES:
        _parser().error(f"unknown command {command!r}; choose from {', '.join(COMMANDS)}")
    return measure(arguments)


@files.command(PROGRAM)
def measure(arguments: list[str]) -> int:
    """The commands time and memory. Returns the exit status."""
    options = parse(arguments)
    try:
        planned = plan(options)
    except ImportError as error:
        raise SystemExit(f"{PROGRAM}: {error}; install it, or leave it out of --peers") from error
    if options.dry_run:
        print("\n".join(cell.title() for cell in planned))
        return 0
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"{PROGRAM}: argument --out: cannot make the folder {options.out}: {error.strerror}") from error
    env = record.environment([*PROGRAM.split(), *spelled_out(options)], options.threads, options.device)
    timed = options.dtype if "time" in options.measure else []
    products = sweep.gemm(planned[0], timed, options.timeout)
    found = sweep.run(planned, options.timeout, options.time_budget)
    products = sweep.better(products, sweep.gemm(planned[0], timed, options.timeout))
    env |= {"mem_limit_mib": options.mem_limit, "cells_left": found.left}
    rows = sweep.with_shares(found.rows, products) + products
    result = {"schema": record.SCHEMA, "env": env, "rows": rows}
    markdown = table.render(result)
    path = record.save(result, markdown, options.out)
    print(f"written: {path} and {path.with_suffix('.md').name}", file=sys.stderr, flush=True)
    print(markdown)
    return 0 if options.at_least is None else _slower(rows, options.at_least)


def _slower(rows: list[record.Row], least: float) -> int:
    """Print each contestant that takes less than `least` times our time, or has no time. Returns 1 where there is one."""
    timed = [row for row in rows if row["measure"] == "time" and row["contestant"] != peers.OURS]
    found = [(row, record.ratio(row) if row["status"] == "ok" else None) for row in timed]
    short = [(row, ratio) for row, ratio in found if ratio is None or ratio < least]
    for row, ratio in short:
        said = row["status"] if ratio is None else f"{ratio:.2f} times"
        print(f"{row['loss']} N={row['n']} D={row['d']}: {row['contestant']} takes {said}, not {least:g}", file=sys.stderr)
    return 1 if short or not timed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
