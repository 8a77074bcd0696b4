"""A run that is stopped loses one training at most: finished ones are on the disk, and --resume goes on with the others."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train_ref import files
from train_ref.report import write_json

NAME = "unfinished.json"
Clocks = tuple[float, float]  # seconds of the wall clock and of the processor


def clocks() -> Clocks:
    return time.perf_counter(), time.process_time()


class Unfinished:
    """The finished trainings of a run, in unfinished.json of its folder until its result is there.

    about: all that decides the numbers, as result.json has it; a run that is resumed has to agree with it. read makes
    an entry of result.json a training again. began: clocks() at the start of the command.
    Raises ValueError where `resume` is asked and the file is damaged or of another run.
    """

    def __init__(self, folder: Path, about: dict[str, Any], resume: bool, read: Callable[[dict[str, Any]], object], began: Clocks) -> None:
        self.path, self.about = folder / NAME, json.loads(json.dumps(about))
        self.runs: list[dict[str, Any]] = []
        self.on_disk = 0  # of them
        self.done = False
        self._began, self._before = began, (0.0, 0.0)
        if resume:
            self._load(read)

    def _load(self, read: Callable[[dict[str, Any]], object]) -> None:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            about, self.runs, self._before = found["about"], list(found["runs"]), (float(found["seconds"]), float(found["cpu_seconds"]))
            for run in self.runs:
                read(run)
            differs = [name for part in self.about for name, value in self.about[part].items() if about[part].get(name) != value]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{self.path} is damaged: {type(error).__name__}; without --resume the run begins anew") from error
        if differs:
            raise ValueError(f"{self.path} is of a run with another {', '.join(differs)}; without --resume the run begins anew")
        self.on_disk = len(self.runs)

    @property
    def seconds(self) -> Clocks:
        """Those of the commands before included."""
        (wall, cpu), (wall_began, cpu_began), (wall_before, cpu_before) = clocks(), self._began, self._before
        return wall_before + wall - wall_began, cpu_before + cpu - cpu_began

    def find(self, **which: Any) -> dict[str, Any] | None:
        """The training with these entries, where it is finished."""
        return next((run for run in self.runs if all(run[name] == value for name, value in which.items())), None)

    def add(self, run: dict[str, Any]) -> dict[str, Any]:
        """Keep a training, on the disk too."""
        seconds, cpu_seconds = self.seconds
        self.runs.append(run)
        write_json(self.path, {"about": self.about, "seconds": seconds, "cpu_seconds": cpu_seconds, "runs": self.runs})
        self.on_disk = len(self.runs)
        return run

    def remove(self) -> None:
        """The result is there."""
        self.done = True
        self.path.unlink(missing_ok=True)

    @contextmanager
    def explained(self, total: int, arguments: Sequence[str]) -> Iterator[None]:
        """Ctrl-C, an error of the system and a loss that is not finite end the command with a line that names the kept trainings.

        total: trainings of the run; arguments: those of train.py that go on with it.
        """
        try:
            yield
        except (KeyboardInterrupt, OSError, FloatingPointError) as error:
            if self.done:
                raise
            kept = f"; {self.on_disk} of {total} trainings are finished" + (f" and kept in {self.path}" if self.on_disk else "")
            script = os.path.relpath(Path(__file__).with_name("train.py"))
            # The same seed would give the same loss again.
            hopeless = isinstance(error, FloatingPointError) or not self.on_disk
            raise files.stopped(error, kept if hopeless else f"{kept}; to go on: {shlex.join(['python', script, *arguments])}") from None
