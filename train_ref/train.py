"""Train networks on images with contrastive losses and see what the frozen ones are worth.

python train_ref/train.py                            digits, SimCLR, fused loss, three seeds: under a minute on one core
python train_ref/train.py --method clip              left and right halves of digits find each other
python train_ref/train.py --loss both --method all   fused losses beside their dense twins, same seeds and batches
python train_ref/train.py --loss reference           without fastnce
python train_ref/train.py --preset cifar10-gpu --data-dir DIR    docs/reference-runs.md has this and the others
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

if not __package__:
    # Run as a file: import the package from the repository, not its modules as top-level names.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from train_ref import files
from train_ref.evaluate import Values
from train_ref.figure import save_figure
from train_ref.implementations import LossFunctions
from train_ref.loop import History, train_network
from train_ref.methods import Method
from train_ref.options import Run, parser, read_options, set_numerics
from train_ref.report import Row, Section, device_name, read_entry, run_entry, summary_entry, versions, write_json
from train_ref.unfinished import Unfinished, clocks


def show_epoch(history: History, epochs: int) -> None:
    last = history.epochs[-1]
    scale = "" if last.logit_scale is None else f"scale {last.logit_scale:.2f}  "
    print(
        f"{history.method:<7} {history.loss:<9} seed {history.seed}  epoch {last.epoch:>{len(str(epochs))}}/{epochs}  "
        f"loss {last.loss:.4f}  {scale}lr {last.lr:.2e}  {last.seconds:.2f} s",
        flush=True,
    )


def train_and_judge(run: Run, kept: Unfinished) -> list[Section]:
    """A section for every evaluation that the methods have; all that is left to train is trained."""
    sections = []
    for evaluation in dict.fromkeys(method.evaluation for method in run.methods):
        methods = [method for method in run.methods if method.evaluation is evaluation]
        untrained = [evaluation.judge(methods[0].build(seed, run.data, run.preset), run.data) for seed in range(run.seeds)]
        baselines = [Row(evaluation.baseline, [evaluation.without_network(run.data)]), Row(evaluation.untrained, untrained)]
        trained = [row for method in methods for row in train_method(run, method, kept)]
        sections.append(Section(evaluation, baselines, trained, run.loss == "both"))
    return sections


def train_method(run: Run, method: Method[Any], kept: Unfinished) -> list[Row]:
    """A row per implementation. Fused and reference take turns, so that a busy machine slows both alike."""
    histories: dict[str, list[History]] = {functions.name: [] for functions in run.implementations}
    values: dict[str, list[Values]] = {functions.name: [] for functions in run.implementations}
    for seed in range(run.seeds):
        for functions in run.implementations:
            entry = kept.find(method=method.name, loss=functions.name, seed=seed) or kept.add(train_one(run, method, functions, seed))
            history, found = read_entry(entry)
            histories[functions.name].append(history)
            values[functions.name].append(found)
    return [Row(f"{method.title}, {loss}", values[loss], histories[loss]) for loss in histories]


def train_one(run: Run, method: Method[Any], functions: LossFunctions, seed: int) -> dict[str, Any]:
    """A training, evaluated, as result.json has it."""
    network, history = train_network(
        method,
        functions,
        run.data,
        seed=seed,
        temperature=run.preset.temperatures[method.name],
        epochs=run.preset.epochs,
        batch_size=run.preset.batch_size,
        on_epoch=lambda history: show_epoch(history, run.preset.epochs),
        preset=run.preset,
    )
    return run_entry(history, method.evaluation.judge(network, run.data))


def config(run: Run) -> dict[str, Any]:
    """Everything that decides the numbers, and nothing that names the machine."""
    preset = asdict(run.preset)
    return {
        "preset": run.preset_name,
        "methods": [method.name for method in run.methods],
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


@files.command("train.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the reference training; returns the exit status."""
    run = read_options(sys.argv[1:] if argv is None else argv)
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
    sections = train_and_judge(replace(run, data=data), kept)
    seconds, cpu_seconds = kept.seconds

    result = {
        "schema": 2,
        **about,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "summary": [summary_entry(row) for section in sections for row in section.rows],
        "comparisons": [asdict(comparison) for section in sections for comparison in section.comparisons],
        "baselines": {row.label: row.values for section in sections for row in section.baselines},
        "runs": [run_entry(*one) for section in sections for row in section.trained for one in zip(row.histories, row.values, strict=True)],
    }
    write_json(run.out / "result.json", result)
    kept.remove()

    for section in sections:
        print(f"\n{section.text(data.tested_on, run.seeds)}")
    print(f"\n{seconds:.1f} s, {cpu_seconds:.1f} CPU s\n{run.out / 'result.json'}")
    try:
        save_figure(run.out / "result.png", sections, f"{data.name}, {data.tested_on}")
    except ImportError as error:
        print(f"no figure ({error}); for one: pip install matplotlib")
    else:
        print(run.out / "result.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
