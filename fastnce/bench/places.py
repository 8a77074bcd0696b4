"""Where this package was found: in a checkout, whose bench/ then belongs to it, or installed."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
CHECKOUT = (ROOT / "bench" / "run.py").is_file() and (ROOT / "pyproject.toml").is_file()


def of_checkout(name: str) -> ModuleType:
    """A module of the checkout's bench/: what measures GPUs is not installed.

    Raises ImportError where there is no checkout.
    """
    if not CHECKOUT:
        raise ImportError(f"bench/{name}.py is in a checkout of fastnce, and this one is installed")
    return importlib.import_module(f"bench.{name}")
