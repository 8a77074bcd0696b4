"""Files that are written whole or not at all, and commands whose failures are one line instead of a traceback."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

P = ParamSpec("P")


def write(path: Path, content: str | bytes) -> None:
    """Write a file in one step; text as UTF-8.

    The content goes into a file beside it, is flushed to the disk, and then renamed. So a reader finds the old content or all of the new,
    also where the disk is full or the process is ended. Raises OSError, which names path; nothing is left behind then.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # some file systems find out only here that there is no room
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


class Stopped(Exception):
    """A command ends with this line and this status."""

    def __init__(self, line: str, status: int = 1) -> None:
        super().__init__(line)
        self.status = status


def stopped(error: BaseException, more: str = "") -> Stopped:
    """The line and the status for an error that has ended a command: Ctrl-C, an OSError, or another error in its own words."""
    if isinstance(error, KeyboardInterrupt):
        return Stopped(f"interrupted{more}", 130)  # a shell's status: 128 and the number of the signal
    if isinstance(error, OSError) and error.strerror:
        return Stopped(": ".join(filter(None, [str(error.filename or ""), error.strerror])) + more)
    return Stopped(f"{error}{more}")


def command(program: str) -> Callable[[Callable[P, int]], Callable[P, int]]:
    """For a main() that returns the exit status: Ctrl-C and an OSError become a line on stderr instead of a traceback."""

    def decorate(main: Callable[P, int]) -> Callable[P, int]:
        @functools.wraps(main)
        def run(*args: P.args, **kwargs: P.kwargs) -> int:
            try:
                status = main(*args, **kwargs)
                sys.stdout.flush()
                return status
            except (Stopped, KeyboardInterrupt, OSError) as error:
                end = error if isinstance(error, Stopped) else stopped(error)
            try:
                sys.stdout.flush()
            except OSError:
                # There is no room where the output goes. Python would report that once more when it ends.
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            print(f"{program}: {end}", file=sys.stderr)
            return end.status

        return run

    return decorate
