"""Train two towers on pairs, as CLIP does, and see how often each half of a held-out pair finds the other.

python train_ref/train.py --method clip                                 halves of digits, fused loss: seconds on one core
python train_ref/train.py --method clip --data emoji --data-dir DIR     images of emoji and their names
python train_ref/train.py --method clip --data tatoeba --data-dir DIR --variant all
                                                                        sentences and translations: what to do about repeated ones
python train_ref/train.py --method clip --data tatoeba --data-dir DIR --variant all --min-copies 3 --one-of-each --hard-negatives 4
                                                                        hard negatives, mined from translations that may be correct
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if not __package__:
    # Run as a file: import the package from the repository, not its modules as top-level names.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from train_ref import files
from train_ref.implementations import LossFunctions
from train_ref.options import RESUME, again, number, read_device, read_implementations, read_out, set_numerics
from train_ref.report import device_name, versions, write_json
from train_ref.two_towers.data import PairData, load_digit_halves, load_emoji, load_tatoeba
from train_ref.two_towers.figure import save_figure
from train_ref.two_towers.loop import WEIGHT_DECAY, History, Settings, train_towers
from train_ref.two_towers.objectives import VARIANTS
from train_ref.two_towers.report import (
    Comparison,
    Row,
    compare,
    comparison_table,
    difference_table,
    differences,
    mined_table,
    read_entry,
    run_entries,
    run_entry,
    summary_entry,
    table,
)
from train_ref.two_towers.retrieval import DIRECTIONS, FURTHER, Retrieval, chance, evaluate
from train_ref.two_towers.towers import LARGEST_SCALE, TwoTowers, build_towers
from train_ref.unfinished import Unfinished, clocks

# Chosen on the validation pairs with seed 0 and the plain loss; R@1 in %, left to right. tatoeba, 8 epochs in batches of 4096: with
# temperature 0.05 and 0.1 34.5 and 37.9 (learning rate 1e-2), with 0.2 and 0.3 40.1 and 40.5 (2e-2); 33.9 with all n-grams and 33.3 with
# two fifths left out, where one fifth gave 34.5. digit-halves: 17.0. emoji: 6.5 and 11.5 after 10 and 20 epochs;
# 4.0 after 10 with temperature 0.05.
# One pair of each of 3146 sentences, 4 hard negatives, 10 epochs: 4.2, 4.3 and 4.0 in batches of 256, 512 and (2 hard negatives) 1024; 3.8
# after 20 epochs of 256.
SETTINGS = {
    "digit-halves": Settings(epochs=40, batch_size=256, temperature=0.1, learning_rate=4e-3, dropout=0.0),
    "emoji": Settings(epochs=20, batch_size=512, temperature=0.1, learning_rate=2e-3, dropout=0.0),
    "tatoeba": Settings(epochs=5, batch_size=4096, temperature=0.2, learning_rate=2e-2, dropout=0.2),
}


def by_data(what: str) -> str:
    return ", ".join(f"{name} {getattr(settings, what):g}" for name, settings in SETTINGS.items())


def parser() -> argparse.ArgumentParser:
    count = number(int, "a whole number of at least 1", lambda n: n >= 1)
    batch = number(int, "a whole number of at least 2", lambda n: n >= 2)
    start = number(float, f"a number of at least {1 / LARGEST_SCALE:g}", lambda x: 1 / LARGEST_SCALE <= x < math.inf)
    p = argparse.ArgumentParser(
        prog="train.py --method clip",
        description="Contrastive training of two towers on pairs, evaluated by retrieval.",
        allow_abbrev=False,
    )
    p.add_argument("--data", choices=[*SETTINGS], default="digit-halves", help="default: digit-halves, which is in the repository")
    p.add_argument("--data-dir", type=Path, metavar="DIR", help="the folder with the file of emoji or tatoeba, or that file")
    p.add_argument(
        "--variant",
        nargs="+",
        choices=[*VARIANTS, "all"],
        default=["plain"],
        help="what pairs with equal ids are to each other: negatives, neither, or positives; one or several (default: plain)",
    )
    p.add_argument(
        "--min-copies",
        type=count,
        metavar="N",
        help="tatoeba: train on the pairs whose English sentence has at least N of them (default: 1)",
    )
    p.add_argument(
        "--one-of-each",
        action="store_true",
        help="tatoeba: train on one pair of every English sentence, hold out another, and leave the rest, unlabelled, to --hard-negatives",
    )
    p.add_argument(
        "--hard-negatives",
        type=number(int, "a whole number of at least 0", lambda n: n >= 0),
        default=0,
        metavar="K",
        help="mine the K nearest right halves of other pairs for every left half before each epoch but the first, correct ones included "
        "(default: 0)",
    )
    p.add_argument(
        "--candidates",
        choices=["test", "validation"],
        default="test",
        help="the held-out pairs to search among; settings were chosen on validation (default: test)",
    )
    p.add_argument(
        "--loss",
        choices=["fused", "reference", "both"],
        default="fused",
        help="fastnce, the dense losses of train_ref/truth/losses.py, or both side by side (default: fused)",
    )
    p.add_argument("--seeds", type=count, metavar="N", help="use the seeds 0 to N-1 (default: 3, with --quick 1)")
    p.add_argument("--epochs", type=count, metavar="N", help=f"default: {by_data('epochs')}; with --quick 2")
    p.add_argument("--batch-size", type=batch, metavar="B", help=f"pairs (default: {by_data('batch_size')})")
    p.add_argument(
        "--temperature", type=start, metavar="X", help=f"at first; 1 / temperature is learned (default: {by_data('temperature')})"
    )
    p.add_argument(
        "--backend",
        metavar="NAME",
        help="fastnce's backend for the fused losses (default: auto; with --loss both on a CPU: torch)",
    )
    p.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    p.add_argument("--threads", type=count, default=1, metavar="N", help="CPU threads (default: 1)")
    p.add_argument("--out", type=Path, metavar="DIR", help="for result.json and result.png (default: a new folder in ./runs)")
    p.add_argument("--resume", action="store_true", help=RESUME)
    p.add_argument("--quick", action="store_true", help="one seed, two epochs: does it run?")
    return p


def load(p: argparse.ArgumentParser, options: argparse.Namespace) -> PairData:
    """The data that the options ask for. Exits with status 2 and names the option when they cannot be had."""
    if options.min_copies is not None and options.data != "tatoeba":
        p.error(f"argument --min-copies: the pairs of {options.data} have no repeated sentences; it is for --data tatoeba")
    if options.one_of_each and options.data != "tatoeba":
        p.error(f"argument --one-of-each: the pairs of {options.data} have no repeated sentences; it is for --data tatoeba")
    data = read_data(p, options)
    if not len(data.train):
        p.error(f"argument --min-copies: no English sentence has {options.min_copies} training pairs")
    if options.hard_negatives >= len(data.corpus):
        p.error(f"argument --hard-negatives: {options.hard_negatives} is not less than the {len(data.corpus)} pairs to mine from")
    return data


def read_data(p: argparse.ArgumentParser, options: argparse.Namespace) -> PairData:
    """From the repository, or from the file in --data-dir."""
    if options.data == "digit-halves":
        if options.data_dir is not None:
            p.error("argument --data-dir: digit-halves are in the repository; choose the data with --data emoji or tatoeba")
        return load_digit_halves()
    if options.data_dir is None:
        p.error(f"argument --data-dir: --data {options.data} is not in the repository; name the folder with its file")
    try:
        if options.data == "emoji":
            return load_emoji(options.data_dir)
        return load_tatoeba(options.data_dir, options.min_copies or 1, options.one_of_each)
    except (OSError, ValueError) as error:
        p.error(f"argument --data-dir: {error}")


def read_options(argv: Sequence[str]) -> tuple[argparse.Namespace, PairData, Settings, list[LossFunctions], torch.device]:
    """The options with their defaults filled in. Exits with status 2 and names the option when one cannot be used."""
    p = parser()
    options = p.parse_args(argv)
    options.seeds = options.seeds or (1 if options.quick else 3)
    options.variant = [variant for variant in VARIANTS if variant in options.variant or "all" in options.variant]
    device = read_device(p, options.device)
    if options.loss == "reference" and options.backend:
        p.error("argument --backend: the reference losses have no backends; use --loss fused or both")
    # On a CPU, auto may solve small problems densely, and dense against dense would compare nothing.
    options.backend = options.backend or ("torch" if options.loss == "both" and device.type == "cpu" else "auto")
    implementations = read_implementations(p, options.loss, options.backend, device)
    data, chosen = load(p, options), SETTINGS[options.data]
    settings = Settings(
        epochs=options.epochs or (2 if options.quick else chosen.epochs),
        batch_size=options.batch_size or min(chosen.batch_size, len(data.train)),
        temperature=options.temperature or chosen.temperature,
        learning_rate=chosen.learning_rate,
        dropout=chosen.dropout,
        hard_negatives=options.hard_negatives,
    )
    if settings.batch_size > len(data.train):
        p.error(f"argument --batch-size: {settings.batch_size} is more than the {len(data.train)} training pairs of {options.data}")
    out = read_out(p, options, f"{options.data}-{options.loss}")
    options.again, options.out = ["--method", "clip", *again(argv, options, out)], out
    return options, data, settings, implementations, device


def show_epoch(history: History, epochs: int) -> None:
    last = history.epochs[-1]
    print(
        f"{history.variant:<14} {history.loss:<9} seed {history.seed}  epoch {last.epoch:>{len(str(epochs))}}/{epochs}  "
        f"loss {last.loss:.4f}  scale {last.logit_scale:.2f}  lr {last.lr:.2e}  {last.seconds:.2f} s",
        flush=True,
    )


def retrieve(towers: TwoTowers, data: PairData, candidates: str) -> dict[str, Retrieval]:
    """Both directions among the held-out pairs; and among further pairs of training ids, where some are held out."""
    found = evaluate(towers, data, getattr(data, candidates))
    further = getattr(data, f"further_{candidates}")
    if len(further):
        found |= dict(zip(FURTHER, evaluate(towers, data, further).values(), strict=True))
    return found


def train_all(
    options: argparse.Namespace,
    data: PairData,
    settings: Settings,
    implementations: Sequence[LossFunctions],
    device: torch.device,
    kept: Unfinished,
) -> list[Row]:
    """A row per variant and implementation. All of them take turns, so that a busy machine slows them alike."""
    keys = [(variant, functions) for variant in options.variant for functions in implementations]
    histories: list[list[History]] = [[] for _ in keys]
    found: list[list[dict[str, Retrieval]]] = [[] for _ in keys]
    for seed in range(options.seeds):
        for place, (variant, functions) in enumerate(keys):
            entry = kept.find(variant=variant, loss=functions.name, seed=seed)
            if entry is None:
                towers, history = train_towers(
                    data,
                    settings,
                    variant,
                    functions,
                    seed=seed,
                    device=device,
                    on_epoch=lambda history: show_epoch(history, settings.epochs),
                )
                entry = kept.add(run_entry(history, retrieve(towers, data, options.candidates)))
            history, retrieved = read_entry(entry)
            histories[place].append(history)
            found[place].append(retrieved)
    return [Row(f"{variant}, {f.name}", found[place], histories[place]) for place, (variant, f) in enumerate(keys)]


def config(options: argparse.Namespace, data: PairData, settings: Settings, device: torch.device) -> dict[str, Any]:
    """Everything that decides the numbers, and nothing that names the machine."""
    return {
        "data": data.name,
        "files": data.files,
        "left": data.left_name,
        "right": data.right_name,
        "min_copies": options.min_copies or 1,
        "one_of_each": options.one_of_each,
        "training_pairs": len(data.train),
        "unlabelled_pairs": len(data.unlabelled),
        "training_ids": len(data.ids[data.train].unique()),
        "candidates": options.candidates,
        "n_candidates": len(getattr(data, options.candidates)),
        "n_further": len(getattr(data, f"further_{options.candidates}")),
        "variants": options.variant,
        "loss": options.loss,
        "backend": None if options.loss == "reference" else options.backend,
        "seeds": list(range(options.seeds)),
        **asdict(settings),
        "weight_decay": WEIGHT_DECAY,
        "device": device_name(device),
        "threads": options.threads,
    }


@files.command("train.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the reference training of two towers; returns the exit status."""
    began = clocks()
    options, data, settings, implementations, device = read_options(sys.argv[1:] if argv is None else argv)
    set_numerics(options.threads)
    about = {"config": config(options, data, settings, device), "versions": versions(fused=options.loss != "reference")}
    try:
        kept = Unfinished(options.out, about, options.resume, read_entry, began)
    except ValueError as error:
        parser().error(f"argument --resume: {error}")
    with kept.explained(len(options.variant) * len(implementations) * options.seeds, options.again):
        return train_and_write(options, data, settings, implementations, device, about, kept)


def train_and_write(
    options: argparse.Namespace,
    data: PairData,
    settings: Settings,
    implementations: Sequence[LossFunctions],
    device: torch.device,
    about: dict[str, Any],
    kept: Unfinished,
) -> int:
    """All that is left to train, the result and its picture; returns the exit status."""
    candidates = getattr(data, options.candidates)
    further = getattr(data, f"further_{options.candidates}")
    by_chance = dict.fromkeys(DIRECTIONS, chance(data.ids[candidates]))
    if len(further):
        by_chance |= dict.fromkeys(FURTHER, chance(data.ids[further]))
    untrained = [retrieve(build_towers(data, seed, device), data, options.candidates) for seed in range(options.seeds)]
    baselines = [Row("chance", [by_chance]), Row("untrained towers", untrained)]
    trained = train_all(options, data, settings, implementations, device, kept)
    rows, changes = [*baselines, *trained], differences(trained)
    comparisons: list[Comparison] = []
    if options.loss == "both":
        for fused, reference in zip(trained[::2], trained[1::2], strict=True):
            comparisons += compare(fused, reference)
    seconds, cpu_seconds = kept.seconds

    result = {
        "schema": 1,
        **about,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "summary": [summary_entry(row) for row in rows],
        "differences": [change.entry() for change in changes],
        "comparisons": [asdict(comparison) for comparison in comparisons],
        "runs": [entry for row in trained for entry in run_entries(row)],
    }
    write_json(options.out / "result.json", result)
    kept.remove()

    over = f"mean ± sd over {options.seeds} seeds" if options.seeds > 1 else "one seed"
    copies, among = trained[0].histories[0].false_negatives, f"{len(candidates)} {options.candidates} pairs"
    print(
        f"\n{data.name}: {len(data.train)} training pairs, in batches of {settings.batch_size}; a row meets {copies:.3f} others with its id"
    )
    if settings.hard_negatives:
        print(mined_table(trained))
    print(f"retrieval among {among}, frozen towers, % ({over})\n\n{table(rows, data)}")
    if changes:
        print(f"\n{difference_table(changes)}")
    if len(further):
        print(f"\nthe same among {len(further)} further pairs of training sentences\n\n{table(rows, data, FURTHER)}")
        if changes:
            print(f"\n{difference_table(changes, FURTHER)}")
    if comparisons:
        print(f"\n{comparison_table(comparisons)}")
    print(f"\n{seconds:.1f} s, {cpu_seconds:.1f} CPU s\n{options.out / 'result.json'}")
    try:
        save_figure(options.out / "result.png", baselines, trained, data)
    except ImportError as error:
        print(f"no figure ({error}); for one: pip install matplotlib")
    else:
        print(options.out / "result.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
