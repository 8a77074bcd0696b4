"""For all tests, wherever they lie: the user's caches are neither read nor written, and no result depends on what somebody has built."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastnce import build, native
from fastnce.backends import _native

# Where nothing else is given. What is compiled for tests outlives them: minutes of compilers are in it. A folder of this name that somebody
# else has made does no harm: nothing is loaded from it, and building there is refused.
OWN = Path(tempfile.gettempdir()) / f"fastnce-tests-{os.getuid()}"
OWN.mkdir(mode=0o700, exist_ok=True)
for variable, name in (("FASTNCE_CACHE_DIR", "fastnce"), ("TRITON_CACHE_DIR", "triton"), ("MPLCONFIGDIR", "matplotlib")):
    os.environ.setdefault(variable, str(OWN / name))

# The "cpu" backend has two forms: torch's operations, and compiled kernels where their library is found. A test has the first, whatever
# lies there, and the second where it asks for it.
if_found, _native.serves = _native.serves, lambda device, dtype: False
FORMS = ("tiles", "compiled")


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
    """Libraries are looked for, for one test, as users have it."""
    monkeypatch.delenv("FASTNCE_NATIVE", raising=False)
    monkeypatch.setattr(_native, "serves", if_found)
    native.objection.cache_clear()
    yield
    native.objection.cache_clear()


@pytest.fixture
def compiled(compiled_library: Path, libraries: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The "cpu" backend with the compiled kernels, for one test."""
    others = native.library_path
    monkeypatch.setattr(native, "library_path", lambda kind: compiled_library if kind == "cpu" else others(kind))
    assert native.objection("cpu") is None


@pytest.fixture(autouse=True)
def form(request: pytest.FixtureRequest) -> str:
    """Which of FORMS the "cpu" backend has in a test."""
    wanted: str = getattr(request, "param", FORMS[0])
    if wanted == "compiled":
        request.getfixturevalue("compiled")
    return wanted


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What is tested by the name of its backend is tested in both forms."""
    marks = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    names = [name.strip() for one in marks for name in (one.split(",") if isinstance(one, str) else one)]
    if "backend" in names and metafunc.definition.get_closest_marker("float64") is None:
        metafunc.parametrize("form", FORMS, indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where the form makes no difference, one of them is no test: for other backends, and in float64, which is not compiled."""

    def same(item: pytest.Item) -> bool:
        given = getattr(item, "callspec", None)
        chosen = given.params if given else {}
        return chosen.get("form") == "compiled" and (chosen["backend"] not in ("cpu", "auto") or chosen.get("dtype") == torch.float64)

    items[:] = [item for item in items if not same(item)]
