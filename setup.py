"""Everything is declared in pyproject.toml; the default wheel is pure Python, built without a compiler and without importing torch.

FASTNCE_BUILD=cpu,cuda pip install --no-build-isolation .    also compiles csrc/cpu and csrc/cuda into the wheel; an editable install, into
the user's cache. FASTNCE_BUILD=cpu takes a C++ compiler, cuda nvcc too.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

KINDS = [kind for kind in os.environ.get("FASTNCE_BUILD", "").split(",") if kind]


class Build(build_py):
    def run(self):
        super().run()
        if not KINDS:
            return
        root = Path(__file__).resolve().parent
        known = sorted(path.name for path in (root / "csrc").iterdir() if path.is_dir())
        if unknown := sorted(set(KINDS) - set(known)):
            raise SystemExit(f"FASTNCE_BUILD names {', '.join(unknown)}; known are {', '.join(known)}")
        if importlib.util.find_spec("torch") is None:
            asked = f"FASTNCE_BUILD={','.join(KINDS)}"
            raise SystemExit(
                f"{asked} needs the torch that will load the library, and this isolated build environment has none. "
                f"Run: {asked} pip install --no-build-isolation ."
            )
        sys.path.insert(0, str(root))
        from fastnce.compiled import build

        for kind in KINDS:
            try:
                build.build(kind, None if self.editable_mode else Path(self.build_lib) / "fastnce" / "_lib")
            except build.BuildError as error:
                raise SystemExit(f"FASTNCE_BUILD={kind}: {error}") from None


class Wheel(bdist_wheel):
    """With a library inside, for this system; for any Python 3, because the library knows none."""

    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = not KINDS

    def get_tag(self):
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if KINDS else tag


setup(cmdclass={"build_py": Build, "bdist_wheel": Wheel})
