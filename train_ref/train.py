"""Train a network on images with a contrastive loss and see what its features are worth.

python train_ref/train.py                            digits, SimCLR, fused loss, three seeds: under a minute on one core
python train_ref/train.py --loss both --method all   fused losses beside their dense twins, same seeds and batches
python train_ref/train.py --loss reference           without fastnce
python train_ref/train.py --preset cifar10-gpu --data-dir DIR    docs/reference-runs.md has this and the others
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

if not __package__:
    # Run as a file: import the package from the repository, not its modules as top-level names.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from train_ref import files
from train_ref.data import as_float
from train_ref.evaluate import Accuracies, evaluate_encoder, evaluate_features
from train_ref.figure import save_figure
from train_ref.implementations import LossFunctions
from train_ref.loop import History, train_network
from train_ref.methods import TITLES
from train_ref.model import build_network
from train_ref.options import Run, parser, read_options, set_numerics
from train_ref.report import (
    Comparison,
    Row,
    compare,
    comparison_table,
    device_name,
    read_entry,
    run_entries,
    run_entry,
    summary_entry,
    table,
    versions,
    write_json,
)
from train_ref.unfinished import Unfinished, clocks


def show_epoch(history: History, epochs: int) -> None:
    last = history.epochs[-1]
    print(
        f"{history.method:<7} {history.loss:<9} seed {history.seed}  epoch {last.epoch:>{len(str(epochs))}}/{epochs}  "
        f"loss {last.loss:.4f}  lr {last.lr:.2e}  {last.seconds:.2f} s",
        flush=True,
    )


def train_all(run: Run, kept: Unfinished) -> list[Row]:
    """A row per method and implementation. Fused and reference take turns, so that a busy machine slows both alike."""
    rows = []
    for name in run.methods:
        histories: dict[str, list[History]] = {functions.name: [] for functions in run.implementations}
        accuracies: dict[str, list[Accuracies]] = {functions.name: [] for functions in run.implementations}
        for seed in range(run.seeds):
            for functions in run.implementations:
                entry = kept.find(method=name, loss=functions.name, seed=seed) or kept.add(train_one(run, name, functions, seed))
                history, found = read_entry(entry)
                histories[functions.name].append(history)
                accuracies[functions.name].append(found)
        rows += [Row(f"{TITLES[name]}, {loss}", accuracies[loss], histories[loss]) for loss in histories]
    return rows


def train_one(run: Run, method: str, functions: LossFunctions, seed: int) -> dict[str, Any]:
    """A training, evaluated, as result.json has it."""
    network, history = train_network(
        method,
        functions,
        run.data,
        seed=seed,
        temperature=run.preset.temperatures[method],
        epochs=run.preset.epochs,
        batch_size=run.preset.batch_size,
        on_epoch=lambda history: show_epoch(history, run.preset.epochs),
        preset=run.preset,
    )
    return run_entry(history, evaluate_encoder(network.encoder, run.data))


def config(run: Run) -> dict[str, Any]:
    """Everything that decides the numbers, and nothing that names the machine."""
    preset = asdict(run.preset)
    return {
        "preset": run.preset_name,
        "methods": run.methods,
        "loss": run.loss,
        "backend": run.backend,
        "seeds": list(range(run.seeds)),
        **preset,
        "learning_rate": run.preset.peak_learning_rate(run.preset.batch_size),
        "device": device_name(run.device),
        "threads": run.threads,
    }


def data_entry(run: Run) -> dict[str, Any]:
    """Which images, how many and from what; source and files are their own names, without their place."""
    data = run.data
    return {
        "name": data.name,
        "source": data.source,
        "files": data.files,
        "unpublished": list(data.unpublished),
        "training_images": data.n_train,
        "test_images": data.n_test,
        "subset": data.is_subset,
        "held_out": data.held_out,
        "described": data.describe(),
    }


def wants_pairs(argv: Sequence[str]) -> list[str] | None:
    """The other arguments when the method is clip, which is another script's; None for all other methods.

    Exits with status 2 when clip is asked for beside another method.
    """
    methods = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    methods.add_argument("--method", nargs="+", default=[])
    found, rest = methods.parse_known_args(argv)
    if "clip" not in found.method:
        return None
    if found.method != ["clip"]:
        parser().error("argument --method: clip trains two towers on pairs, the others one network on images; run it alone")
    return rest


@files.command("train.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the reference training; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    pairs = wants_pairs(argv)
    if pairs is not None:
        from train_ref import train_pairs

        return train_pairs.main(pairs)

    run = read_options(argv)
    set_numerics(run.threads)
    began = clocks()
    about = {"data": data_entry(run), "config": config(run), "versions": versions(fused=run.loss != "reference")}
    try:
        kept = Unfinished(run.out, about, run.resume, read_entry, began)
    except ValueError as error:
        parser().error(f"argument --resume: {error}")
    with kept.explained(len(run.methods) * len(run.implementations) * run.seeds, run.again):
        return train_and_write(run, about, kept)


def train_and_write(run: Run, about: dict[str, Any], kept: Unfinished) -> int:
    """All that is left to train, the result and its picture; returns the exit status."""
    print(run.data.describe(), flush=True)
    for name in run.data.unpublished:
        print(f"{name} is not the published file: it has another md5", flush=True)
    # All of it, once: a batch is then an index away, and 50,000 images of 32x32 are 150 MB in bytes.
    data = run.data.to(run.device)
    run = replace(run, data=data)
    raw = evaluate_features(as_float(data.images).flatten(1), data)
    random = [
        evaluate_encoder(build_network(seed, run.device, run.preset.network, data.images.shape[1]).encoder, data)
        for seed in range(run.seeds)
    ]
    trained = train_all(run, kept)
    baselines = [Row("raw pixels", [raw]), Row("random network", random)]
    rows = [*baselines, *trained]
    comparisons: list[Comparison] = []
    if run.loss == "both":
        for fused, reference in zip(trained[::2], trained[1::2], strict=True):
            comparisons += compare(fused, reference)
    seconds, cpu_seconds = kept.seconds

    result = {
        "schema": 1,
        **about,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "summary": [summary_entry(row) for row in rows],
        "comparisons": [asdict(comparison) for comparison in comparisons],
        "baselines": {"raw": asdict(raw), "random": [asdict(accuracies) for accuracies in random]},
        "runs": [entry for row in trained for entry in run_entries(row)],
    }
    write_json(run.out / "result.json", result)
    kept.remove()

    over = f"mean ± sd over {run.seeds} seeds" if run.seeds > 1 else "one seed"
    print(f"\naccuracy on the {data.tested_on}, frozen features, % ({over})\n\n{table(rows)}")
    if comparisons:
        print(f"\n{comparison_table(comparisons)}")
    print(f"\n{seconds:.1f} s, {cpu_seconds:.1f} CPU s\n{run.out / 'result.json'}")
    try:
        save_figure(run.out / "result.png", baselines, trained, f"{data.name}, {data.tested_on}")
    except ImportError as error:
        print(f"no figure ({error}); for one: pip install matplotlib")
    else:
        print(run.out / "result.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
