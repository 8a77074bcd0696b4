"""Train a small network on handwritten digits with a contrastive loss and see what its features are worth.

python train_ref/train.py                            SimCLR, fused loss, three seeds: under a minute on one core
python train_ref/train.py --loss both --method all   fused losses beside their dense twins, same seeds and batches
python train_ref/train.py --loss reference           without fastnce
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

if not __package__:
    # Run as a file: import the package from the repository, not its modules as top-level names.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from train_ref.data import N_TRAIN, Digits, load_digits
from train_ref.evaluate import Accuracies, evaluate_encoder, evaluate_features
from train_ref.figure import save_figure
from train_ref.implementations import LossFunctions, dense_losses, fused_losses
from train_ref.loop import EPOCHS, LEARNING_RATE, WEIGHT_DECAY, History, train_network
from train_ref.methods import MOMENTUM, QUEUE_SIZE, TEMPERATURES, TITLES
from train_ref.model import EMBEDDING, build_network
from train_ref.report import (
    Comparison,
    Row,
    compare,
    comparison_table,
    device_name,
    run_entries,
    summary_entry,
    table,
    versions,
    write_json,
)

Number = TypeVar("Number", int, float)


def number(kind: Callable[[str], Number], wanted: str, accept: Callable[[Number], bool]) -> Callable[[str], Number]:
    """An argparse type that says what it wants instead of 'invalid value'."""

    def parse(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accept(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


def parser() -> argparse.ArgumentParser:
    count = number(int, "a whole number of at least 1", lambda n: n >= 1)
    batch = number(int, f"a whole number from 2 to {N_TRAIN}, the training digits", lambda n: 2 <= n <= N_TRAIN)
    positive = number(float, "a positive number", lambda x: x > 0 and math.isfinite(x))
    p = argparse.ArgumentParser(description="Contrastive training on handwritten digits, evaluated on frozen features.")
    p.add_argument(
        "--method",
        nargs="+",
        choices=[*TEMPERATURES, "all"],
        default=["simclr"],
        help="one or several (default: simclr)",
    )
    p.add_argument(
        "--loss",
        choices=["fused", "reference", "both"],
        default="fused",
        help="fastnce, the dense losses of train_ref/losses.py, or both side by side (default: fused)",
    )
    p.add_argument("--seeds", type=count, metavar="N", help="use the seeds 0 to N-1 (default: 3, with --quick 1)")
    p.add_argument("--epochs", type=count, metavar="N", help=f"default: {EPOCHS}, with --quick 2")
    p.add_argument("--batch-size", type=batch, default=256, metavar="B", help="images, two views of each (default: 256)")
    p.add_argument(
        "--temperature",
        type=positive,
        metavar="X",
        help="default: " + ", ".join(f"{TITLES[name]} {value}" for name, value in TEMPERATURES.items()),
    )
    p.add_argument(
        "--backend",
        metavar="NAME",
        help="fastnce's backend for the fused losses (default: auto; with --loss both on a CPU: cpu)",
    )
    p.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    p.add_argument("--threads", type=count, default=1, metavar="N", help="CPU threads (default: 1; see README.md)")
    p.add_argument("--out", type=Path, metavar="DIR", help="for result.json and result.png (default: a new folder in ./runs)")
    p.add_argument("--quick", action="store_true", help="one seed, two epochs: does it run?")
    return p


def read_options(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[LossFunctions], torch.device]:
    """The options with their defaults filled in. Exits with status 2 and names the option when one cannot be used."""
    p = parser()
    options = p.parse_args(argv)
    options.seeds = options.seeds or (1 if options.quick else 3)
    options.epochs = options.epochs or (2 if options.quick else EPOCHS)
    options.method = [m for m in TEMPERATURES if m in options.method or "all" in options.method]

    if "moco" in options.method and 2 * options.batch_size > QUEUE_SIZE:
        p.error(
            f"argument --batch-size: {options.batch_size} images give {2 * options.batch_size} keys a step and MoCo's "
            f"queue holds {QUEUE_SIZE}; at most {QUEUE_SIZE // 2} with --method moco"
        )
    if options.loss == "reference" and options.backend:
        p.error("argument --backend: the reference losses have no backends; use --loss fused or both")
    try:
        device = torch.device(options.device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        p.error(f"argument --device: {options.device!r} cannot be used: {str(error).splitlines()[0]}")

    # On a CPU, auto may solve problems as small as these densely, and dense against dense would compare nothing.
    options.backend = options.backend or ("cpu" if options.loss == "both" and device.type == "cpu" else "auto")

    functions = []
    if options.loss != "reference":
        try:
            functions.append(fused_losses(options.backend))
        except ModuleNotFoundError as error:
            p.error(
                f"argument --loss: {options.loss} needs fastnce ({error}); run 'pip install -e .' in the repository or use --loss reference"
            )
        try:
            functions[0].nt_xent(torch.eye(2, EMBEDDING, device=device))
        except (ValueError, RuntimeError) as error:  # NotImplementedError is a RuntimeError
            p.error(f"argument --backend: {options.backend!r} cannot be used on {device}: {error}")
    if options.loss != "fused":
        functions.append(dense_losses())

    started = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    options.out = options.out or Path("runs") / f"{started}-{'-'.join(options.method)}-{options.loss}"
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        p.error(f"argument --out: cannot make the folder {options.out}: {error.strerror}")
    return options, functions, device


def show_epoch(history: History, epochs: int) -> None:
    last = history.epochs[-1]
    print(
        f"{history.method:<7} {history.loss:<9} seed {history.seed}  epoch {last.epoch:>{len(str(epochs))}}/{epochs}  "
        f"loss {last.loss:.4f}  lr {last.lr:.2e}  {last.seconds:.2f} s",
        flush=True,
    )


def train_all(options: argparse.Namespace, implementations: Sequence[LossFunctions], digits: Digits) -> list[Row]:
    """A row per method and implementation. Fused and reference take turns, so that a busy machine slows both alike."""
    rows = []
    for name in options.method:
        histories: dict[str, list[History]] = {functions.name: [] for functions in implementations}
        accuracies: dict[str, list[Accuracies]] = {functions.name: [] for functions in implementations}
        for seed in range(options.seeds):
            for functions in implementations:
                network, history = train_network(
                    name,
                    functions,
                    digits,
                    seed=seed,
                    temperature=options.temperature or TEMPERATURES[name],
                    epochs=options.epochs,
                    batch_size=options.batch_size,
                    on_epoch=lambda history: show_epoch(history, options.epochs),
                )
                histories[functions.name].append(history)
                accuracies[functions.name].append(evaluate_encoder(network.encoder, digits))
        rows += [Row(f"{TITLES[name]}, {loss}", accuracies[loss], histories[loss]) for loss in histories]
    return rows


def config(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Everything that decides the numbers, and nothing that names the machine."""
    return {
        "methods": options.method,
        "loss": options.loss,
        "backend": None if options.loss == "reference" else options.backend,
        "seeds": list(range(options.seeds)),
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "temperatures": {name: options.temperature or TEMPERATURES[name] for name in options.method},
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "queue_size": QUEUE_SIZE,
        "momentum": MOMENTUM,
        "device": device_name(device),
        "threads": options.threads,
    }


def failed(error: Exception) -> int:
    print(f"train.py: {error}", file=sys.stderr)
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the reference training; returns the exit status."""
    options, implementations, device = read_options(argv)
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.deterministic = True
    began, cpu_began = time.perf_counter(), time.process_time()
    try:
        digits = load_digits()
    except (OSError, ValueError) as error:
        return failed(error)
    digits = Digits(digits.images.to(device), digits.labels.to(device))
    raw = evaluate_features(digits.images.flatten(1).cpu(), digits.labels.cpu())
    random = [evaluate_encoder(build_network(seed, device).encoder, digits) for seed in range(options.seeds)]
    try:
        trained = train_all(options, implementations, digits)
    except FloatingPointError as error:
        return failed(error)
    baselines = [Row("raw pixels", [raw]), Row("random network", random)]
    rows = [*baselines, *trained]
    comparisons: list[Comparison] = []
    if options.loss == "both":
        for fused, reference in zip(trained[::2], trained[1::2], strict=True):
            comparisons += compare(fused, reference)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began

    result = {
        "schema": 1,
        "config": config(options, device),
        "versions": versions(fused=options.loss != "reference"),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "summary": [summary_entry(row) for row in rows],
        "comparisons": [asdict(comparison) for comparison in comparisons],
        "baselines": {"raw": asdict(raw), "random": [asdict(accuracies) for accuracies in random]},
        "runs": [entry for row in trained for entry in run_entries(row)],
    }
    write_json(options.out / "result.json", result)

    over = f"mean ± sd over {options.seeds} seeds" if options.seeds > 1 else "one seed"
    print(f"\naccuracy on the 500 test digits, frozen features, % ({over})\n\n{table(rows)}")
    if comparisons:
        print(f"\n{comparison_table(comparisons)}")
    print(f"\n{seconds:.1f} s, {cpu_seconds:.1f} CPU s\n{options.out / 'result.json'}")
    try:
        save_figure(options.out / "result.png", baselines, trained)
    except ImportError as error:
        print(f"no figure ({error}); for one: pip install matplotlib")
    else:
        print(options.out / "result.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
