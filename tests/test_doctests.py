"""Every example in a docstring runs; the schedule layer's run in test_steps.py as well, where they belong."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import convsched

NAMES = [module.name for module in pkgutil.walk_packages(convsched.__path__, "convsched.")]
PACKAGES = ("convsched.kernels", "convsched.autotune")
NAMES += [module.name for package in PACKAGES for module in pkgutil.iter_modules(
    importlib.import_module(package).__path__, package + ".")]


@pytest.mark.parametrize("name", NAMES)
def test_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name), optionflags=doctest.REPORT_UDIFF).failed == 0
