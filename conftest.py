"""For all tests in all folders: the user's caches are neither read nor written, and no result depends on a library that lies there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fastnce
from fastnce.compiled import build, find

# The caches of tests, unless the environment names others. Libraries that are compiled for tests stay there, since they take minutes. A
# folder of this name that another user has made does no harm: nothing is loaded from it, and building there is refused.
OWN = Path(tempfile.gettempdir()) / f"fastnce-tests-{os.getuid()}"
OWN.mkdir(mode=0o700, exist_ok=True)
for variable, name in (("FASTNCE_CACHE_DIR", "fastnce"), ("TRITON_CACHE_DIR", "triton"), ("MPLCONFIGDIR", "matplotlib")):
    os.environ.setdefault(variable, str(OWN / name))

# No test finds a library of csrc/cpu by itself. So "auto" is "torch" on a CPU, and "cpu" needs the fixture `compiled`.
as_users_have_it, find.candidates = find.candidates, lambda kind: iter(()) if kind == "cpu" else as_users_have_it(kind)


@pytest.fixture(scope="session", autouse=True)
def examples(doctest_namespace: dict[str, object]) -> None:
    """Examples in docstrings need not import torch and fastnce."""
    doctest_namespace |= {"torch": torch, "fastnce": fastnce}


@pytest.fixture(scope="session")
def compiled_library() -> Path:
    """The library of csrc/cpu, in a folder where no process finds it by itself."""
    try:
        build.compiler()
    except build.BuildError as reason:
        pytest.skip(str(reason))
    return build.build("cpu", build.folder() / "compiled")


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For one test, libraries are looked for as users have it."""
    monkeypatch.delenv("FASTNCE_NATIVE", raising=False)
    monkeypatch.setattr(find, "candidates", as_users_have_it)
    find.objection.cache_clear()
    yield
    find.objection.cache_clear()


@pytest.fixture
def compiled(compiled_library: Path, libraries: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """backend="cpu" runs, and "auto" takes it, for one test."""
    monkeypatch.setattr(find, "candidates", lambda kind: iter([(compiled_library, None)]) if kind == "cpu" else as_users_have_it(kind))
    assert find.objection("cpu") is None
