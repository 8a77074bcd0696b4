"""Put the fused losses through five gates: formula, operator, replay, free run, outcome.

python train_ref/validate.py                   every backend that runs here, three dtypes: five minutes of one core
python train_ref/validate.py --quick           a minute: fewer scenes, steps and seeds, no outcome
python train_ref/validate.py --installed       the fastnce that is installed, not that of the checkout
python train_ref/validate.py --gate replay --backend torch --dtype bfloat16
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if not __package__:
    # Run as a file: import the packages of the repository, not the modules of this folder as top-level names. An installed fastnce is
    # found where the repository comes last.
    sys.path.insert(len(sys.path) if "--installed" in sys.argv else 1, str(Path(__file__).resolve().parent.parent))
    del sys.path[0]

import torch

from train_ref import files
from train_ref.data import DIGITS_SHA256, N_TRAIN, ImageData, load_digits
from train_ref.gates.cases import Case, cases
from train_ref.gates.figure import save_figure
from train_ref.gates.formula import formula
from train_ref.gates.free_run import free_run
from train_ref.gates.operator import operator
from train_ref.gates.outcome import LEAST_SEEDS, outcome
from train_ref.gates.replay import LIMITS, Recording, record, replay
from train_ref.gates.report import GATES, Report, markdown, progress, versions
from train_ref.gates.scenes import SCENES
from train_ref.gates.subject import Subject, dtype_name
from train_ref.gates.tested import of_checkout, package, tested
from train_ref.gates.trainings import Trainings
from train_ref.gates.verdict import Verdict, failure
from train_ref.implementations import dense_losses, fused_losses
from train_ref.report import device_name, write_json

DTYPES = {dtype_name(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
OPTION_OF = {gate: gate.replace(" ", "-") for gate in GATES}


@dataclass(frozen=True)
class Sizes:
    """How much a run does."""

    pairs: int = 67
    large: int = 530
    wide: int = 140
    thin: int = 1  # of the operator's kinds and temperatures
    scenes: tuple[str, ...] = tuple(SCENES)
    steps: int = 125
    checkpoints: int = 25
    stop_after: int | None = None
    seeds: int = 5
    gates: tuple[str, ...] = GATES
    batch_size: int = 256

    def cases(self) -> list[Case]:
        return list(cases(self.pairs, self.large, self.wide, self.thin))


FULL = Sizes()
# Twenty checkpoints of a schedule of forty steps; the first fifty steps of trainings. Five whole ones, for the outcome, take minutes.
QUICK = Sizes(scenes=("simclr", "clip"), steps=40, checkpoints=20, stop_after=10, seeds=3, gates=GATES[:-1])
EPOCHS = 40
# A call on 20 rows takes Triton's interpreter a second of CPU time, one on 140 four: no trainings, and of the operator's calls a
# quarter of the kinds and temperatures, in small, and all ragged, wide and large ones: 140 rows are more than its largest tile.
INTERPRETED = Sizes(
    pairs=9, large=140, wide=20, thin=4, scenes=("simclr", "clip"), steps=20, checkpoints=20, gates=GATES[:3], batch_size=40
)


@dataclass(frozen=True)
class Options:
    """The command line, checked and completed."""

    subjects: list[Subject]
    left_out: list[str]
    gates: list[str]
    sizes: Sizes
    arguments: Sequence[str]
    device: torch.device
    threads: int
    out: Path


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description="Validate fused contrastive losses against dense references, from formula to training.")
    p.add_argument("--quick", action="store_true", help="about a minute: fewer scenes, steps and seeds, float16 and outcome left out")
    p.add_argument("--backend", nargs="+", metavar="NAME", help="fastnce's backends (default: all that run on the device)")
    p.add_argument("--dtype", nargs="+", choices=[*DTYPES], help="of the features (default: all; with --quick float32 and bfloat16)")
    p.add_argument("--gate", nargs="+", choices=[*OPTION_OF.values()], help="default: all; with --quick all but outcome")
    p.add_argument("--seeds", type=count, metavar="N", help=f"of free run and outcome (default: {FULL.seeds}, with --quick {QUICK.seeds})")
    p.add_argument("--installed", action="store_true", help="test the installed fastnce; without it, that of this checkout")
    p.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    p.add_argument("--threads", type=count, default=1, metavar="N", help="CPU threads (default: 1)")
    p.add_argument("--out", type=Path, metavar="DIR", help="for report.md, .json and .png (default: a new folder in ./runs)")
    return p


def read_options(argv: Sequence[str] | None) -> Options:
    """Exits with status 2 and names the option when one cannot be used."""
    p = parser()
    given = p.parse_args(argv)
    sizes = QUICK if given.quick else FULL
    sizes = replace(sizes, seeds=given.seeds or sizes.seeds)
    gates = [gate for gate in GATES if (OPTION_OF[gate] in given.gate if given.gate else gate in sizes.gates)]
    if "outcome" in gates:
        sizes = replace(sizes, stop_after=None)  # its trainings have to end
        if given.gate and sizes.seeds < LEAST_SEEDS:
            p.error(f"argument --seeds: outcome needs at least {LEAST_SEEDS}, not {sizes.seeds}")
    try:
        device = torch.device(given.device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        p.error(f"argument --device: {given.device!r} cannot be used: {str(error).splitlines()[0]}")
    dtypes = [dtype for name, dtype in DTYPES.items() if name in (given.dtype or (list(DTYPES)[:2] if given.quick else DTYPES))]
    names, left_out = read_backends(p, given.backend, device)
    if given.installed and of_checkout():
        p.error(f"argument --installed: fastnce is imported from {package()}, this checkout; 'pip install .' installs a copy")
    left_out += [f"{gate}: not asked for" for gate in GATES if gate not in gates]
    left_out += [f"{name}: not asked for" for name, dtype in DTYPES.items() if dtype not in dtypes]
    left_out += [f"replay of {name}: not in --quick" for name in SCENES if name not in sizes.scenes and "replay" in gates]
    subjects = [Subject(name, fused_losses(name), dtype, device) for name in names for dtype in dtypes]
    if any(map(interpreted, subjects)):
        left_out.append(f"triton: runs in Triton's interpreter, {len(INTERPRETED.cases())} of {len(sizes.cases())} calls, smaller batches")
        if torch.bfloat16 in dtypes:
            left_out.append("triton bfloat16: Triton's interpreter truncates float32 to bfloat16, where GPUs round")
        subjects = [subject for subject in subjects if not interpreted(subject) or subject.dtype != torch.bfloat16]
    if not subjects:
        p.error("argument --dtype: nothing is left to validate: " + left_out[-1])
    out = given.out or Path("runs") / f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-validate"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        p.error(f"argument --out: cannot make the folder {out}: {error.strerror}")
    # The options that decide the numbers: not where the report goes.
    shown = {name: value for name, value in vars(given).items() if value and name not in ("out", "threads", "device")}
    arguments = [part for name, value in shown.items() for part in spelled(name, value)]
    return Options(subjects, left_out, gates, sizes, arguments, device, given.threads, out)


def spelled(name: str, value: bool | int | list[str]) -> list[str]:
    """An option as it is written on the command line."""
    return [f"--{name}", *(value if isinstance(value, list) else [] if value is True else [str(value)])]


def read_backends(p: argparse.ArgumentParser, asked: list[str] | None, device: torch.device) -> tuple[list[str], list[str]]:
    """The backends that run on the device, and why the others do not; one that was asked for has to run."""
    try:
        from fastnce.backends import BACKENDS
    except ModuleNotFoundError as error:
        p.error(f"fastnce is needed ({error}); run 'pip install -e .' in the repository")
    # "auto", the choice for users without a choice, comes last: on the CPU small problems have a way of their own there.
    every = [*BACKENDS, "auto"]
    names, left_out = [], [f"backend {name}: not asked for" for name in every if asked and name not in asked]
    for name in dict.fromkeys(asked or every):
        try:
            view = torch.eye(2, 8, device=device)
            fused_losses(name).nt_xent(view, view)
        except (ValueError, NotImplementedError) as error:
            reason = " ".join(str(error).split())
            if asked:
                p.error(f"argument --backend: {name!r} cannot be used on {device}: {reason}")
            left_out.append(f"backend {name}: {reason}")
        except RuntimeError:
            names.append(name)  # the gates will say it
        else:
            names.append(name)
    return names, left_out


def interpreted(subject: Subject) -> bool:
    return subject.name == "triton" and subject.device.type == "cpu"


class Workshop:
    """Things that several verdicts need, made once: recordings of the reference, trainings by seed."""

    def __init__(self, data: ImageData, sizes: Sizes) -> None:
        self.data, self.sizes = data, sizes
        self.trainings = Trainings(data, EPOCHS, sizes.batch_size, sizes.stop_after)
        self._recordings: list[Recording] = []

    @property
    def recordings(self) -> list[Recording]:
        if not self._recordings:
            images, labels = self.data.images[:N_TRAIN], self.data.labels[:N_TRAIN]
            size = {"steps": self.sizes.steps, "checkpoints": self.sizes.checkpoints, "batch_size": self.sizes.batch_size}
            self._recordings = [record(scene, images, labels, **size) for scene in self.sizes.scenes]
        return self._recordings

    def gate(self, name: str, subject: Subject, yardstick: bool = False) -> Verdict:
        """The verdict of one gate about one subject, with the CPU time that it took."""
        run: dict[str, Callable[[], Verdict]] = {
            "formula": lambda: formula(subject),
            "operator": lambda: operator(subject, self.sizes.cases()),
            "replay": lambda: replay(subject, self.recordings),
            "free run": lambda: free_run(subject, self.trainings, self.sizes.seeds),
            "outcome": lambda: outcome(subject, self.trainings, self.sizes.seeds),
        }
        began = time.process_time()
        if name not in self.sizes.gates:
            return Verdict(name, subject.label, not_run=["everything: Triton's interpreter is too slow"], yardstick=yardstick)
        try:
            verdict = run[name]()
        except Exception as error:  # the others still have something to say
            traceback.print_exc()
            verdict = Verdict(name, subject.label, [failure("the gate itself", 0.0, error)])
        verdict.cpu_seconds, verdict.yardstick = round(time.process_time() - began, 2), yardstick
        return verdict


def verdicts(options: Options, data: ImageData) -> Iterator[Verdict]:
    """Gate by gate. The dense reference has to pass the formula gate too, and the noise controls all others."""
    usual = Workshop(data, replace(options.sizes, gates=GATES))
    slow = Workshop(data, INTERPRETED)
    controls = [replace(control, device=options.device) for control in usual.trainings.controls]
    names = list(dict.fromkeys(subject.name for subject in options.subjects))
    # Without such a subject the controls' trainings are compared with none.
    trained = any(subject.dtype in LIMITS and not interpreted(subject) for subject in options.subjects)
    for gate in options.gates:
        if gate == "formula":
            yield usual.gate(gate, Subject("reference losses", dense_losses(), device=options.device), yardstick=True)
            for name in names:
                yield usual.gate(gate, next(subject for subject in options.subjects if subject.name == name))
            continue
        if gate in ("operator", "replay") or trained:
            for control in controls:
                yield usual.gate(gate, control, yardstick=True)
        for subject in options.subjects:
            yield (slow if interpreted(subject) else usual).gate(gate, subject)


def set_numerics(options: Options) -> None:
    """Plain float32 products and the same order of sums in every run: the dense reference is the yardstick."""
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)


def conditions(options: Options, found: Sequence[Verdict]) -> dict[str, Any]:
    """Everything that decides the numbers. No name of the machine; a path only of an installed package."""
    sizes = options.sizes
    orders = {name: notes["order_sha256"] for verdict in found if verdict.gate == "replay" for name, notes in verdict.notes.items()}
    for verdict in found:
        if verdict.gate == "free run" and verdict.notes:
            orders |= {f"seed {seed}": digest for seed, digest in enumerate(verdict.notes["order_sha256"]) if digest}
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **tested(),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "device": f"{device_name(options.device)}, {platform.machine()}, threads {options.threads}",
        "command": shlex.join(["validate.py", *options.arguments]),
        "sizes": f"operator {len(sizes.cases())} calls; replay {sizes.checkpoints} checkpoints of {sizes.steps} steps; "
        f"trainings {sizes.stop_after or EPOCHS} of {EPOCHS} epochs of batches of {sizes.batch_size}, seeds 0 to {sizes.seeds - 1}",
        "arithmetic": "TF32 off, deterministic algorithms on",
        "data": f"digits, sha256 {DIGITS_SHA256[:16]}",
        "order of batches, sha256": ", ".join(f"{name} {digest[:12]}" for name, digest in orders.items()) or "no training",
    }


@files.command("validate.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the gates; returns the exit status: 0 if all that ran passed, 1 if a gate failed or nothing ran."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product; cuBLAS is not deterministic without
    options = read_options(argv)
    set_numerics(options)
    try:
        data = load_digits().to(options.device)
    except (OSError, ValueError) as error:
        print(f"validate.py: {error}", file=sys.stderr)
        return 1
    began, cpu_began = time.perf_counter(), time.process_time()
    found = []
    for verdict in verdicts(options, data):
        print(progress(verdict), flush=True)
        found.append(verdict)
    report = Report(conditions(options, found), found, options.left_out)
    report.conditions["time taken"] = f"{time.perf_counter() - began:.0f} s, {time.process_time() - cpu_began:.0f} s of CPU time"
    page = markdown(report)
    files.write(options.out / "report.md", page)
    write_json(options.out / "report.json", report.fields())
    print(f"\n{page}\n{options.out / 'report.md'}\n{options.out / 'report.json'}")
    try:
        save_figure(options.out / "report.png", report)
    except ImportError as error:
        print(f"no figure ({error}); for one: pip install matplotlib")
    else:
        print(options.out / "report.png")
    return 0 if report.status == "pass" else 1


if __name__ == "__main__":
    sys.exit(main())
