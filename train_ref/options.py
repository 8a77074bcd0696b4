"""The options of train.py: read, completed from a preset, and refused, by name, before anything is computed or written."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from train_ref.data import ImageData
from train_ref.datasets import DATASETS, load_data
from train_ref.implementations import LARGEST_SCALE, LossFunctions, dense_losses, fused_losses
from train_ref.methods import METHODS, Method
from train_ref.model import EMBEDDING
from train_ref.presets import PRESETS, Preset, preset_for
from train_ref.unfinished import NAME

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Run:
    """All that a command asks for: preset is the recipe with the command's changes to it, again the arguments that resume the run."""

    methods: list[Method[Any]]
    loss: str
    implementations: list[LossFunctions]
    backend: str | None
    preset_name: str
    preset: Preset
    data: ImageData
    seeds: int
    device: torch.device
    threads: int
    out: Path
    resume: bool
    again: list[str]


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
    batch = number(int, "a whole number of at least 2", lambda n: n >= 2)
    positive = number(float, "a positive number", lambda x: x > 0 and math.isfinite(x))
    p = argparse.ArgumentParser(description="Contrastive training on images, evaluated on frozen features.", allow_abbrev=False)
    p.add_argument(
        "--method",
        nargs="+",
        choices=[*METHODS, "all"],
        default=["simclr"],
        help="one or several, or all that the data are for: clip trains on halves of digits (default: simclr)",
    )
    p.add_argument("--preset", choices=list(PRESETS), help="a recipe; the options below change it (default: the first for the data)")
    p.add_argument("--data", choices=DATASETS, help="default: the preset's; digits ship with the project")
    p.add_argument("--data-dir", type=Path, metavar="DIR", help="where Fashion-MNIST or CIFAR-10 lie; nothing is downloaded")
    p.add_argument(
        "--held-out",
        type=count,
        metavar="N",
        help="evaluate on the last N training images, which then do not train, instead of the test images: for choosing settings",
    )
    p.add_argument(
        "--loss",
        choices=["fused", "reference", "both"],
        default="fused",
        help="fastnce, the dense losses of train_ref/truth/losses.py, or both side by side (default: fused)",
    )
    p.add_argument("--seeds", type=count, metavar="N", help="use the seeds 0 to N-1 (default: 3, with --quick 1)")
    p.add_argument("--epochs", type=count, metavar="N", help="default: the preset's, with --quick 2")
    p.add_argument("--batch-size", type=batch, metavar="B", help="images (default: the preset's)")
    p.add_argument("--temperature", type=positive, metavar="X", help="for all methods, clip's at first (default: the preset's for each)")
    p.add_argument("--learning-rate", type=positive, metavar="X", help="the highest; for SGD per 256 images (default: the preset's)")
    p.add_argument(
        "--backend",
        metavar="NAME",
        help="fastnce's backend for the fused losses (default: auto; with --loss both on a CPU: torch)",
    )
    p.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the preset's)")
    p.add_argument("--threads", type=count, default=1, metavar="N", help="CPU threads (default: 1; see README.md)")
    p.add_argument("--out", type=Path, metavar="DIR", help="for result.json and result.png (default: a new folder in ./runs)")
    p.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --out that was stopped: the same command, which trains what is not finished there",
    )
    p.add_argument("--quick", action="store_true", help="one seed, two epochs: does it run?")
    return p


def read_out(p: argparse.ArgumentParser, options: argparse.Namespace, name: str) -> Path:
    """The folder for the result, made where there is none; by default a new one with this name."""
    out: Path = options.out or Path("runs") / f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{name}"
    if options.resume and not (out / NAME).is_file():
        p.error(f"argument --resume: there is no {out / NAME}; --out names the folder of a run that was stopped")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        p.error(f"argument --out: cannot make the folder {out}: {error.strerror}")
    return out


def again(argv: Sequence[str], options: argparse.Namespace, out: Path) -> list[str]:
    """The arguments that resume a run."""
    return [*argv, *([] if options.out else ["--out", str(out)]), *([] if options.resume else ["--resume"])]


def read_options(argv: Sequence[str]) -> Run:
    """The run with all defaults filled in. Exits with status 2 and names the option when one cannot be used."""
    p = parser()
    options = p.parse_args(argv)
    name = options.preset or preset_for(options.data or "digits")
    methods = read_methods(p, options.method, PRESETS[name].data)
    preset = read_preset(p, options, name, [method.name for method in methods])
    device = read_device(p, preset.device)
    if options.loss == "reference" and options.backend:
        p.error("argument --backend: the reference losses have no backends; use --loss fused or both")
    # On a CPU, auto may solve problems as small as these densely, and dense against dense would compare nothing.
    backend = options.backend or ("torch" if options.loss == "both" and device.type == "cpu" else "auto")
    implementations = read_implementations(p, options.loss, backend, device)
    data = read_data(p, options, preset)
    out = read_out(p, options, f"{'-'.join(method.name for method in methods)}-{options.loss}")
    return Run(
        methods=methods,
        loss=options.loss,
        implementations=implementations,
        backend=None if options.loss == "reference" else backend,
        preset_name=name,
        preset=preset,
        data=data,
        seeds=options.seeds or (1 if options.quick else 3),
        device=device,
        threads=options.threads,
        out=out,
        resume=options.resume,
        again=again(argv, options, out),
    )


def read_methods(p: argparse.ArgumentParser, asked: Sequence[str], data: str) -> list[Method[Any]]:
    """In the order of METHODS; all are those that the data are for."""
    for name in asked:
        if name != "all" and data not in METHODS[name].views:
            p.error(f"argument --method: {name} does not train on {data}; use it with --data {' or '.join(METHODS[name].views)}")
    return [m for m in METHODS.values() if m.name in asked or ("all" in asked and data in m.views)]


def read_preset(p: argparse.ArgumentParser, options: argparse.Namespace, name: str, methods: Sequence[str]) -> Preset:
    """The preset of that name as the other options change it."""
    preset = PRESETS[name]
    if options.data and options.data != preset.data:
        p.error(f"argument --data: preset {name} is for {preset.data}, not {options.data}")
    preset = replace(
        preset,
        epochs=options.epochs or (2 if options.quick else preset.epochs),
        batch_size=options.batch_size or preset.batch_size,
        learning_rate=options.learning_rate or preset.learning_rate,
        temperatures={m: options.temperature or preset.temperatures[m] for m in methods},
        device=options.device or preset.device,
    )
    if "moco" in methods and 2 * preset.batch_size > preset.queue_size:
        p.error(
            f"argument --batch-size: {preset.batch_size} images give {2 * preset.batch_size} keys a step and MoCo's "
            f"queue holds {preset.queue_size}; at most {preset.queue_size // 2} with --method moco"
        )
    if "clip" in methods and preset.temperatures["clip"] < 1 / LARGEST_SCALE:
        p.error(
            f"argument --temperature: {options.temperature:g} is less than {1 / LARGEST_SCALE:g}, and clip keeps its logit scale, "
            f"1 / temperature, at {LARGEST_SCALE:g} or below"
        )
    return preset


def set_numerics(threads: int) -> None:
    """Threads, the same sums in every run, and float32 that is float32: cuDNN's convolutions take TF32 unless they are told not to."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")


def read_device(p: argparse.ArgumentParser, name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        p.error(f"argument --device: {name!r} cannot be used: {str(error).splitlines()[0]}; --device cpu works anywhere, if slowly")
    return device


def read_implementations(p: argparse.ArgumentParser, loss: str, backend: str, device: torch.device) -> list[LossFunctions]:
    """Fused before reference."""
    found = []
    if loss != "reference":
        try:
            found.append(fused_losses(backend))
        except ModuleNotFoundError as error:
            p.error(f"argument --loss: {loss} needs fastnce ({error}); run 'pip install -e .' in the repository or use --loss reference")
        try:
            found[0].nt_xent(torch.eye(2, EMBEDDING, device=device))
        except (ValueError, RuntimeError) as error:  # NotImplementedError is a RuntimeError
            p.error(f"argument --backend: {backend!r} cannot be used on {device}: {error}")
    if loss != "fused":
        found.append(dense_losses())
    return found


def read_data(p: argparse.ArgumentParser, options: argparse.Namespace, preset: Preset) -> ImageData:
    """With the held-out images as test images where that is asked."""
    if options.data_dir and preset.data == "digits":
        p.error("argument --data-dir: digits ship with the project; it is for --data fashion-mnist and cifar10")
    try:
        data = load_data(preset.data, options.data_dir)
    except (OSError, ValueError) as error:
        p.error(f"argument --data-dir: {error}")
    if options.held_out:
        try:
            data = data.hold_out(options.held_out)
        except ValueError as error:
            p.error(f"argument --held-out: {error}")
    if preset.batch_size > data.n_train:
        p.error(f"argument --batch-size: {preset.batch_size} images, and {data.name} has {data.n_train} that train")
    return data
