"""Promises about the source itself: imports, their direction and cost; the public names and their docstrings; the text of all files."""

from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import fastnce

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastnce"


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    """Its dotted name below the package: losses, backends, backends.reference; __init__ for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_of(path): path for path in sources("fastnce")}

# Data walks down: losses give the rules of pairs, statistics asks, autograd registers, a backend computes. Losses know no kernels. Backends
# know neither losses nor each other, and no module knows one above it. A new module takes its place in this table.
MAY_IMPORT: dict[str, set[str]] = {
    "_version": set(),
    "files": set(),
    "compiled": set(),
    "compiled.find": set(),
    "compiled.build": {"compiled.find"},
    "precision": set(),
    "pairs": set(),
    "tiles": set(),
    "problem": {"precision", "pairs"},
    "arguments": {"precision"},
    "relations": {"arguments"},
    "hints": {"arguments", "relations"},
    "queue": {"arguments"},
    "backends.trial": set(),
    "backends.proof_losses": {"backends.torch_tiles", "backends.trial", "formulas", "pairs", "problem"},
    "backends.proof": {
        "backends.proof_losses",
        "backends.torch_tiles",
        "backends.trial",
        "backends._gpu.limits",
        "backends._gpu.tiles",
        "pairs",
        "precision",
        "problem",
    },
    "backends.verdicts": {"backends.proof", "backends.trial", "compiled.find", "files"},
    "backends": {"arguments", "backends._gpu.limits", "problem", *(m for m in MODULES if re.fullmatch(r"backends\.[a-z]\w*", m))},
    "listed": {"precision", "tiles"},
    "schemas": {"pairs", "problem"},
    "hardest": {"backends._tiled.gemm", "precision", "pairs", "problem", "tiles"},
    "autograd": {"backends", "hardest", "listed", "precision", "problem", "schemas"},
    "wide": {"precision", "autograd"},
    "fused": {"arguments", "autograd", "backends", "pairs", "precision", "problem"},
    "statistics": {"backends", "arguments", "hints", "precision", "autograd", "pairs", "problem", "relations", "wide"},
    "formulas": {"precision"},
    "negatives": {"arguments", "listed", "autograd", "statistics"},
    "dense_small": {"arguments", "precision", "autograd", "problem"},
    "losses": {"losses.queries", "losses.views"},
    "losses.queries": {
        "arguments",
        "formulas",
        "hints",
        "negatives",
        "pairs",
        "problem",
        "queue",
        "relations",
        "dense_small",
        "fused",
        "statistics",
        "wide",
    },
    "losses.views": {
        "arguments",
        "dense_small",
        "formulas",
        "fused",
        "hints",
        "pairs",
        "problem",
        "relations",
        "statistics",
        "wide",
    },
    "retrieval": {"arguments", "hints", "precision", "autograd", "pairs", "problem", "relations", "statistics"},
    "logit_scale": set(),
    "loss_module": {"arguments", "logit_scale", "statistics"},
    "moco_module": {"arguments", "autograd", "formulas", "logit_scale", "loss_module", "losses", "queue"},
    "modules": {"arguments", "formulas", "logit_scale", "loss_module", "losses", "negatives"},
    "selftest": {"backends.trial", "losses"},
    "__init__": {"_version", "arguments", "logit_scale", "losses", "moco_module", "modules", "queue", "retrieval", "statistics"},
    "__main__": {
        "__init__",
        "backends",
        "backends.proof",
        "backends.verdicts",
        "compiled.build",
        "files",
        "compiled.find",
        "pairs",
        "problem",
        "selftest",
    },
}
# A backend may also import modules of its own folder, and helpers that start with an underscore.
BACKEND_MAY_IMPORT = {"compiled.find", "precision", "pairs", "problem", "tiles"}


def names_imported(tree: ast.AST, package: str = "") -> Iterator[str]:
    """Absolute dotted names, those of `from a import b` as a.b; relative imports count from `package`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            start = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{start}.{alias.name}" for alias in node.names)


def imports_of(module: str) -> set[str]:
    """The modules of the package that one of them imports, also inside functions."""
    path = MODULES[module]
    package = "fastnce" + "".join(f".{part}" for part in path.relative_to(PACKAGE).parts[:-1])
    found = set()
    for name in names_imported(ast.parse(path.read_text()), package):
        if name.split(".")[0] == "fastnce":
            inside = name.removeprefix("fastnce").removeprefix(".")
            while inside not in MODULES and "." in inside:
                inside = inside.rpartition(".")[0]
            found.add(inside if inside in MODULES else "__init__")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    folder, _, rest = module.partition(".")
    if folder == "backends" and rest and module not in MAY_IMPORT:
        own = rest.split(".")[0]
        allowed = BACKEND_MAY_IMPORT | {m for m in MODULES if m.startswith(("backends._", f"backends.{own}"))}
    else:
        assert module in MAY_IMPORT, f"a new module: give {module} its place in MAY_IMPORT"
        allowed = MAY_IMPORT[module]
    assert imports_of(module) <= allowed


def test_the_table_names_no_module_that_is_gone() -> None:
    assert MAY_IMPORT.keys() <= MODULES.keys()


def test_imports_make_no_circle() -> None:
    graphlib.TopologicalSorter({module: imports_of(module) for module in MODULES}).prepare()


def module_level(tree: ast.Module) -> ast.Module:
    """Without the bodies of functions, which run later."""

    class WithoutFunctions(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

    return WithoutFunctions().visit(tree)


@pytest.mark.parametrize("module", [m for m in MODULES if not m.startswith("backends.triton.")])
def test_triton_is_imported_by_its_backend_only_when_asked(module: str) -> None:
    tree = module_level(ast.parse(MODULES[module].read_text()))
    assert not {name for name in names_imported(tree) if name.split(".")[0] == "triton"}


def python(code: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, from the root of the repository."""
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )


def test_works_without_triton_and_without_a_gpu() -> None:
    """And brings nothing along that torch has not already: no plotting, no test tools, no other numerics."""
    code = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
import torch
before = {name.partition(".")[0] for name in sys.modules}
import fastnce
z = torch.eye(4).requires_grad_()
fastnce.info_nce(z, z, temperature=1.0).backward()
fastnce.sup_con(z, torch.tensor([0, 0, 1, 1])).backward()
print(*sorted({name.partition(".")[0] for name in sys.modules} - before - set(sys.stdlib_module_names)))
print(torch.cuda.is_available(), "triton" in sys.modules)
"""
    assert python(code, CUDA_VISIBLE_DEVICES="").stdout.split("\n")[:2] == ["fastnce", "False False"]


def test_import_costs_at_most_a_fifth_of_that_of_torch() -> None:
    """On top of torch, which is imported first in the same process: a busy machine slows both. The least of three, the others are noise."""
    ratios = []
    for _ in range(3):
        report = python("import torch; import fastnce", "-X", "importtime").stderr
        found = re.findall(r"^import time:\s+\d+ \|\s+(\d+) \| (torch|fastnce)$", report, re.MULTILINE)
        assert [name for _, name in found] == ["torch", "fastnce"]
        ratios.append(int(found[1][0]) / int(found[0][0]))
    assert 0 < min(ratios) <= 0.2


# Public names ---------------------------------------------------------------------------------------------------------------------------

FUNCTIONS = [name for name in fastnce.__all__ if inspect.isfunction(getattr(fastnce, name))]
CLASSES = [name for name in fastnce.__all__ if inspect.isclass(getattr(fastnce, name))]


def public_methods(name: str) -> list[tuple[str, typing.Any]]:
    """Written in the class itself."""
    return [(n, f) for n, f in vars(getattr(fastnce, name)).items() if inspect.isfunction(f) and (not n.startswith("_") or n == "__init__")]


def test_public_names_are_listed_sorted_and_there() -> None:
    assert list(fastnce.__all__) == sorted(fastnce.__all__)
    assert {*FUNCTIONS, *CLASSES, "__version__"} == set(fastnce.__all__)
    imported = {n for n, v in vars(fastnce).items() if inspect.isfunction(v) or inspect.isclass(v)}
    assert imported == {*FUNCTIONS, *CLASSES}


def sections(text: str) -> dict[str, str]:
    """The parts of a docstring by their headings (Args, Returns, ...), "" the text before the first of them, each without its margin."""
    found, heading = {"": []}, ""
    for line in inspect.cleandoc(text).splitlines():
        if match := re.fullmatch(r"(Args|Attributes|Returns|Raises|Example):", line):
            heading = match[1]
            assert heading not in found, f"{heading} twice"
            found[heading] = []
        elif not heading or line.startswith(" ") or not line:
            found[heading].append(line)
        else:  # text after a section
            heading = ""
            found[""].append(line)
    return {name: inspect.cleandoc("\n".join(["", *lines])).strip() for name, lines in found.items()}


def entries(section: str) -> dict[str, str]:
    """The name of each entry and its text; of `a, b: text`, both have it."""
    found = re.findall(r"^(\w+(?:, \w+)*): (.*(?:\n +.*)*)", section, re.MULTILINE)
    return {name: text for names, text in found for name in names.split(", ")}


def lacks(thing: typing.Any, method: bool = False) -> list[str]:
    """The parts that a public docstring lacks. That of a method needs no errors and no example, and without arguments only its sentence."""
    text, is_class = thing.__doc__ or "", inspect.isclass(thing)
    parts, is_tuple = sections(text), is_class and issubclass(thing, tuple)
    wanted = ["Attributes"] if is_tuple else ["Args", "Raises", "Example"] if is_class else ["Args", "Returns", "Raises", "Example"]
    names = set(thing._fields) if is_tuple else inspect.signature(thing).parameters.keys() - ({"self"} if method else set())
    if method:
        wanted = ["Args", "Returns"][: 1 + (thing.__annotations__["return"] != "None")] if names else []
    missing = [heading for heading in wanted if not parts.get(heading)]
    if not re.match(r"\S.{20,}\.(\n|$)", parts[""]):
        missing.append("a first sentence")
    described = entries(parts.get("Attributes" if is_tuple else "Args", ""))
    missing += [f"the argument {name}" for name in names if len(described.get(name, "").split()) < 3]
    missing += [f"{name}, which is no argument" for name in described.keys() - names]
    if not (is_tuple or method):
        if ">>> " not in parts.get("Example", ""):
            missing.append("an example that runs")
        if not any(name.endswith(("Error", "Exception")) for name in entries(parts.get("Raises", ""))):
            missing.append("an exception by its name")
    return missing


@pytest.mark.parametrize("name", FUNCTIONS + CLASSES)
def test_public_names_say_what_they_are(name: str) -> None:
    """A sentence, every argument, the result, the errors and an example; of a method a sentence, every argument and the result."""
    assert lacks(getattr(fastnce, name)) == []
    for method, function in public_methods(name):
        assert method in ("__init__", "extra_repr") or lacks(function, method=True) == [], method


def test_a_docstring_that_lacks_something_is_found() -> None:
    def documented(x: int) -> int:
        """The number that follows another one.

        Args:
            x: any integer at all.

        Returns:
            x + 1.

        Raises:
            TypeError: x is no number.

        Example:
            >>> 1 + 1
            2
        """
        return x + 1

    assert lacks(documented) == []
    whole = documented.__doc__
    for part, lost in (
        ("Args:", ["Args", "the argument x"]),
        ("x: any integer at all.", ["Args", "the argument x"]),
        ("any integer at all.", ["the argument x"]),
        ("x: any", ["the argument x", "y, which is no argument"]),
        ("Returns:", ["Returns"]),
        ("Raises:", ["Raises", "an exception by its name"]),
        ("TypeError: ", ["an exception by its name"]),
        (">>> 1 + 1", ["an example that runs"]),
        ("The number that follows another one.", ["a first sentence"]),
    ):
        documented.__doc__ = whole.replace(part, "y: any" if part == "x: any" else "")
        assert lacks(documented) == lost, part
        optional = ("Raises", "an exception by its name", "an example that runs")
        assert lacks(documented, method=True) == [one for one in lost if one not in optional], part


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n not in ("debug", "merge")])
def test_public_functions_give_shapes(name: str) -> None:
    """Each tensor among the arguments has a shape, or is one number."""
    function = getattr(fastnce, name)
    described = entries(sections(function.__doc__)["Args"])
    for argument, hint in typing.get_type_hints(function).items():
        if argument != "return" and torch.Tensor in (hint, *typing.get_args(hint)) and float not in typing.get_args(hint):
            assert re.search(r"\((\w+ ?\* ?)?\w+,( ?\w+)*\)", described[argument]), argument


@pytest.mark.parametrize("name", FUNCTIONS + CLASSES)
def test_public_names_have_types(name: str) -> None:
    thing = getattr(fastnce, name)
    for function in [thing] if name in FUNCTIONS else [f for _, f in public_methods(name)]:
        hints, parameters = typing.get_type_hints(function), set(inspect.signature(function).parameters) - {"self"}
        assert parameters | {"return"} == hints.keys()
    if name in CLASSES and not issubclass(thing, nn.Module):
        assert typing.get_type_hints(thing).keys() >= set(thing._fields)


def test_version() -> None:
    """One number, in the one file that the build reads; and the installed distribution, where there is one, is this source."""
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc|\.dev)\d+)?", fastnce.__version__)
    assert re.search(r'version = \{ attr = "fastnce\._version\.__version__" \}', (ROOT / "pyproject.toml").read_text())
    for distribution in importlib.metadata.distributions(name="fastnce"):
        assert distribution.version == fastnce.__version__


def test_typed_marker_is_packaged() -> None:
    assert (PACKAGE / "py.typed").is_file() and 'fastnce = ["py.typed"]' in (ROOT / "pyproject.toml").read_text()


# Text -----------------------------------------------------------------------------------------------------------------------------------

FOLDERS = ("fastnce", "tests", "bench", "train_ref", "examples", "docs", "csrc", "README.md", "CHANGELOG.md", "pyproject.toml", "setup.py")


def project_files() -> list[Path]:
    """The files that git tracks or would track; all files where there is no git."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *FOLDERS], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode == 0 and listed.stdout:
        return [path for name in listed.stdout.splitlines() if (path := ROOT / name).is_file()]
    found = [path for name in FOLDERS for path in ((ROOT / name).rglob("*") if (ROOT / name).is_dir() else [ROOT / name])]
    return [path for path in found if path.is_file() and "__pycache__" not in path.parts]


def lines_with(pattern: str, files: list[Path]) -> list[str]:
    """path:line of every match, binary files left out."""
    found = []
    for path in files:
        data = path.read_bytes()
        if b"\0" not in data:
            lines = enumerate(data.decode().splitlines(), 1)
            found += [f"{path.relative_to(ROOT)}:{number}" for number, line in lines if re.search(pattern, line)]
    return found


# Written in two halves, so that this file does not find itself.
MARKS = r"\b(TO" + "DO|FIX" + r"ME|XX" + "X|HA" + r"CK)\b"
PLACES = "/wo" + r"rk\b|/tm" + r"p/|\bsha" + r"red/|/ho" + "me/|/ro" + "ot/"


@pytest.mark.parametrize("pattern", [MARKS, PLACES], ids=["unfinished", "paths of one machine"])
def test_text_without(pattern: str) -> None:
    files = project_files()
    assert len(files) > 20 and Path(__file__) in files
    assert lines_with(pattern, files) == []


def test_the_patterns_find_what_they_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    file = tmp_path / "text.md"
    file.write_text("fine\n# TO" + "DO: later\nsee /wo" + "rk/main\nin /tm" + "p/x\n../sha" + "red/notes\nworks, tmp/, to do\n")
    assert lines_with(MARKS, [file]) == ["text.md:2"]
    assert lines_with(PLACES, [file]) == ["text.md:3", "text.md:4", "text.md:5"]


@pytest.mark.parametrize("path", sources("fastnce", "train_ref", "bench"), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 450, "split it by concept"
