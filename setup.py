"""Everything is declared in pyproject.toml. This file never imports torch: the default wheel is pure Python, built without a compiler."""

from setuptools import setup

setup()
