"""What a result was obtained with: the versions that generated code depends on, and the machine."""

from __future__ import annotations

import platform
from importlib import metadata

from convsched.machine import Machine, cache_folder

PACKAGES = ("convsched", "numpy", "numba", "llvmlite", "onnx")


def versions() -> dict[str, str]:
    """Versions by name, of Python and of the packages that are installed (llvmlite's tells LLVM's)."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe() -> dict[str, str]:
    """The machine, its cores, the folder of the caches and all versions, for `convsched info`."""
    machine = Machine.host()
    return {
        "machine": machine.text,
        "cores": str(machine.cores),
        "cache": str(cache_folder()),
        **versions(),
    }
