"""What is in a wheel: every module and source, and a library where one is asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from pretended import calls

from fastnce.compiled import find

ROOT = Path(__file__).resolve().parent.parent


def wheel(pretended: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Built from a copy, by the Python that runs this; prints the wheel's name, and whether torch was imported."""
    copy = pretended / "copy"
    for folder in ("fastnce", "csrc"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    code = "import sys; from setuptools import build_meta; print(build_meta.build_wheel('..'), 'torch' in sys.modules)"
    return subprocess.run([sys.executable, "-c", code], cwd=copy, env=os.environ | environment, capture_output=True, text=True)


def test_the_default_wheel_is_pure_and_complete(pretended: Path) -> None:
    """Every module, every source, and nothing else."""
    done = wheel(pretended, FASTNCE_BUILD="")
    name, torch = done.stdout.splitlines()[-1].split()
    assert name.endswith("-py3-none-any.whl") and torch == "False"
    found = {Path(path) for path in zipfile.ZipFile(pretended / name).namelist() if ".dist-info/" not in path}
    modules = {path.relative_to(ROOT) for path in (ROOT / "fastnce").rglob("*") if path.suffix == ".py" or path.name == "py.typed"}
    sources = {path.relative_to(ROOT / "csrc") for path in (ROOT / "csrc").rglob("*") if path.suffix in find.SUFFIXES}
    assert found == modules | {"fastnce" / Path("_csrc") / path for path in sources}
    assert not calls(pretended)


def test_a_wheel_with_libraries_is_of_this_system(pretended: Path) -> None:
    done = wheel(pretended, FASTNCE_BUILD="cpu,cuda")
    name = done.stdout.splitlines()[-1].split()[0]
    assert "-py3-none-linux_" in name
    found = [path for path in zipfile.ZipFile(pretended / name).namelist() if "/_lib/" in path]
    assert [Path(path).suffix for path in sorted(found)] == [".json", ".so"] * len(find.KINDS)
    assert [path.split("/")[-1].split("-")[1] for path in sorted(found)[::2]] == list(find.KINDS)


def test_a_wheel_with_an_unknown_library(pretended: Path) -> None:
    done = wheel(pretended, FASTNCE_BUILD="cpu,rocm")
    assert done.returncode and "FASTNCE_BUILD names rocm; known are cpu, cuda" in done.stderr
    assert not calls(pretended)
