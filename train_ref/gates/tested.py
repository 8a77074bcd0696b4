"""Which fastnce a validation has tested: where it lies, a digest of its sources, and whether its compiled kernels ran."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def package() -> Path:
    """The folder of the fastnce that is imported."""
    import fastnce

    return Path(fastnce.__file__).resolve().parent


def of_checkout() -> bool:
    """Whether that is the one beside this file. Scripts put their checkout first, so that it comes before an installed package."""
    return package().parent == ROOT


def tested() -> dict[str, str]:
    """For the conditions of a report."""
    from fastnce.compiled import find

    where = "the checkout of this script, not an installed package (that one: --installed)" if of_checkout() else f"installed, {package()}"
    digest = find.digest_of(sorted(package().rglob("*.py")))

    def kernels(kind: str) -> str:
        missing = find.objection(kind)
        return f"off, {missing.partition(' (')[0]}" if missing else f"on, {find.level(kind)}"

    return {
        "tested fastnce": f"{where}; sha256 of its Python files {digest[:16]}",
        "compiled kernels": "; ".join(f"{kind} {kernels(kind)}" for kind in ("cpu", "cuda")),
    }
