"""Benchmark fastnce against the ways these losses are computed today, on this CPU or GPU.

    python bench/run.py --quick
    python bench/run.py --losses nt_xent,clip --n 1024,4096,16384 --d 128,512 --mode both
    python bench/run.py --device cuda --backend triton --dtype bfloat16 --n 4096,32768

Writes bench/results/<machine>/<UTC date>-<source digest>.json and the same as a Markdown table. See bench/README.md for
what is measured and under which conditions the numbers hold.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

# The checkout this file is in is what gets measured, because its sources are what the result's digest names.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import measure, peers, record, report

ROUNDS = {"cpu": 5, "cuda": 20}
DTYPES = ("float32", "float64", "bfloat16", "float16")


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _sizes(text: str) -> list[int]:
    sizes = [int(part) for part in _names(text)]
    if not sizes or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of positive integers such as 1024,4096")
    return sizes


def _mebibytes(text: str) -> int:
    units = {"MiB": 1, "GiB": 1024}
    if text[-3:] not in units or not text[:-3].isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512MiB or 2GiB")
    return int(text[:-3]) * units[text[-3:]]


def parse(arguments: list[str]) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="bench/run.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--losses", type=_names, default=["nt_xent", "clip"], help=f"of {', '.join(peers.LOSSES)}")
    parser.add_argument("--n", type=_sizes, default=[1024, 4096, 16384], help="rows (nt_xent: both views together)")
    parser.add_argument("--d", type=_sizes, default=[128, 512], help="columns")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backend", default="auto", help="of fastnce")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, help=f"interleaved rounds per cell; default: {ROUNDS}")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--mode", choices=("time", "memory", "both"), default="both")
    parser.add_argument("--peers", type=_names, help=f"of {', '.join(peers.names('cuda'))}; default: all that are installed")
    parser.add_argument("--mem-limit", type=_mebibytes, default=0, help="address space above the inputs, e.g. 2GiB")
    parser.add_argument("--timeout", type=float, default=900, help="seconds per process")
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="default: bench/results")
    parser.add_argument("--quick", action="store_true", help="small sizes, 3 rounds: under a minute")
    parser.add_argument("--dry-run", action="store_true", help="print the cells and stop")
    options = parser.parse_args(arguments)
    if options.quick:
        options.n, options.d, options.repeats = [512, 1024], [64], 3
    options.repeats = ROUNDS[options.device] if options.repeats is None else options.repeats
    known_peers = peers.names(options.device)
    for given, known, what in ((options.losses, peers.LOSSES, "loss"), (options.peers or [], known_peers, "peer")):
        for name in given:
            if name not in known:
                parser.error(f"unknown {what} {name!r}; choose from {', '.join(known)}")
    if "nt_xent" in options.losses and any(n % 2 for n in options.n):
        parser.error("--n must be even for nt_xent: its rows are two views of every example")
    if options.repeats < 1 or options.threads < 1:
        parser.error("--repeats and --threads must be at least 1")
    if options.device == "cuda" and options.mem_limit:
        parser.error("--mem-limit holds for the CPU: a GPU has the memory it has")
    if options.device == "cuda" and not (options.dry_run or torch.cuda.is_available()):
        parser.error("--device cuda: torch finds no CUDA device here")
    if options.device == "cpu" and not Path("/proc/self/clear_refs").exists() and options.mode != "time":
        parser.error("peak memory is read from Linux's /proc; use --mode time here")
    return options


def plan(options: argparse.Namespace) -> list[measure.Cell]:
    planned: list[measure.Cell] = []
    for loss in options.losses:
        names = tuple(peers.contestants(loss, options.peers, options.device))
        for d in options.d:
            for n in options.n:
                cell = measure.Cell("time", loss, n, d, names, dtype=options.dtype, threads=options.threads)
                cell = replace(cell, repeats=options.repeats, mem_limit=options.mem_limit, device=options.device)
                cell = replace(cell, backend=options.backend, clock="host" if options.device == "cpu" else "device")
                planned += measure.cells(options.mode, cell)
    return planned


def spelled_out(options: argparse.Namespace) -> list[str]:
    """The command line with every default written down, less where the result goes."""
    words = []
    for name, value in vars(options).items():
        if name in ("out", "dry_run", "quick") or value is None:
            continue
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        words.append(f"--{name.replace('_', '-')}={text}{'MiB' * (name == 'mem_limit')}")
    return words


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    try:
        planned = plan(options)
    except ImportError as error:
        raise SystemExit(f"bench/run.py: {error}; install it, or leave it out of --peers") from error
    if options.dry_run:
        print("\n".join(cell.title() for cell in planned))
        return
    env = record.environment("run.py", spelled_out(options), options.threads, options.device)
    rows: list[measure.Row] = []
    for index, cell in enumerate(planned, 1):
        print(f"[{index}/{len(planned)}] {cell.title()}", file=sys.stderr, flush=True)
        rows += measure.run(cell, options.timeout)
    if options.device == "cuda":
        gemm = measure.Cell("gemm", "gemm", 8192, 8192, ("cublas",), dtype="bfloat16", repeats=20, device="cuda", clock="device")
        rows += measure.run(gemm, options.timeout)
    result = {"schema": record.SCHEMA, "env": env, "rows": rows}
    markdown = report.render(result)
    record.save(result, markdown, options.out)
    print(markdown)


if __name__ == "__main__":
    main(sys.argv[1:])
