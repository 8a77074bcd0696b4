"""Tools that Triton looks for when it launches its first kernel, found before that and without importing Triton.

It compiles a small C module against Python and the GPU's driver, and keeps that and every kernel in a cache folder. Where one of these is
missing, a launch ends in a RuntimeError, a CalledProcessError or an assertion that names neither the cause nor a remedy.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache
from pathlib import Path

import torch


def missing() -> tuple[str, ...]:
    """The tools that are missing, each with a remedy. Looked for once in a process."""
    return _missing()


# Dynamo takes the answer as a constant, see backends/cpu.py.
missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _missing() -> tuple[str, ...]:
    found = [*_cache_folder(), *_driver()]
    return (*found, *([] if _is_compiled() else [*_compiler(), *_headers()]))


def _folder() -> Path:
    """Triton's cache."""
    return Path(os.environ.get("TRITON_CACHE_DIR") or Path(os.environ.get("TRITON_HOME") or os.path.expanduser("~"), ".triton", "cache"))


def _is_compiled() -> bool:
    """Whether the user compiles by a function of his own, or the module was compiled before."""
    knobs = getattr(sys.modules.get("triton"), "knobs", None)
    module = "hip_utils" if torch.version.hip else "cuda_utils"
    return bool(knobs and knobs.build.impl) or any(_folder().glob(f"*/{module}{sysconfig.get_config_var('EXT_SUFFIX')}"))


def _compiler() -> list[str]:
    given = os.environ.get("CC")
    if given is None:
        there = shutil.which("gcc") or shutil.which("clang")
        return [] if there else ["no C compiler: neither gcc nor clang is on PATH (install gcc, or name a compiler by CC)"]
    # Triton takes all of it as the name of one program.
    return [] if shutil.which(given) else [f"no C compiler: CC={given} is no program (unset CC, or give the path of one without options)"]


def _headers() -> list[str]:
    scheme = sysconfig.get_default_scheme()
    own = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    folders = [own, *(folder for name in ("CPATH", "C_INCLUDE_PATH") for folder in os.environ.get(name, "").split(os.pathsep) if folder)]
    # os.path and not Path: a folder that may not be read is none, and no exception.
    if any(os.path.isfile(os.path.join(folder, "Python.h")) for folder in folders):
        return []
    return [f"no Python.h in {own} (install the headers of this Python: python3-dev or python3-devel, or name their folder by CPATH)"]


def _driver() -> list[str]:
    """The library of NVIDIA's driver; that of AMD's is found in the process."""
    if torch.version.hip or os.environ.get("TRITON_LIBCUDA_PATH"):
        return []
    library, remedy = "libcuda.so.1", "name the folder of libcuda.so.1 by TRITON_LIBCUDA_PATH"
    try:
        listed = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, check=True).stdout.decode(errors="ignore")
    except (OSError, subprocess.CalledProcessError) as error:
        return [f"/sbin/ldconfig, which Triton asks for {library}, does not run: {error} ({remedy})"]
    paths = [Path(line.split()[-1]) for line in listed.splitlines() if library in line]
    paths = paths or [Path(folder, library) for folder in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if folder]
    if any(os.path.exists(path.with_name(library)) for path in paths):
        return []
    return [f"/sbin/ldconfig does not list {library} (run ldconfig as root, or {remedy})"]


def _cache_folder() -> list[str]:
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        return ["no folder for temporary files can be written (name one by TMPDIR)"]
    if os.environ.get("TRITON_CACHE_MANAGER"):
        return []
    folder = _folder()
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))
    if os.path.isdir(nearest) and os.access(nearest, os.W_OK | os.X_OK):
        return []
    return [f"Triton's cache folder {folder} cannot be written (name another by TRITON_CACHE_DIR)"]
