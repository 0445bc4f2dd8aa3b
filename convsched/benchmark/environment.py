"""What a result was obtained with: the versions that generated code depends on, and the machine."""

from __future__ import annotations

import math
import platform
from importlib import metadata
from pathlib import Path

from convsched.kernels import objects
from convsched.machine import affinity_cores, cache_folder, host, machine_cores, quota_cores

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
    """The machine, its cores, the folder of the caches, the object cache's size and all versions, for
    `convsched info`."""
    machine = host.machine()
    return {
        "machine": machine.text,
        "cores": f"{machine.cores}: {_limits()}",
        "cache": str(cache_folder()),
        "objects": _objects(),
        **versions(),
    }


def _objects() -> str:
    """The compiled kernels on disk."""
    entries, size = objects.usage()
    return f"{entries} compiled kernels, {size / 2**20:.1f} of at most {objects.LIMIT_BYTES >> 20} MiB"


def _limits() -> str:
    """What the number of cores is the least of."""
    quota = quota_cores(Path("/"))
    granted = "no cgroup quota" if quota == math.inf else f"a cgroup quota of {quota:g}"
    return f"{machine_cores()} in the machine, {affinity_cores()} by affinity, {granted}"
