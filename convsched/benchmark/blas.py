"""The number of threads of NumPy's matrix products, so that a baseline runs on as many as the kernel.

NumPy's wheels carry OpenBLAS as a library of their own beside the package. It reads its environment
variable once, when it is loaded; later only its C function changes the number. With another BLAS there is
nothing to call, and `blas_threads` yields False: the baseline then runs on the BLAS's own number.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

# (setter, getter), as they are called in the wheels of NumPy 2 and in a plain OpenBLAS of either width.
_FUNCTIONS = (
    ("scipy_openblas_set_num_threads64_", "scipy_openblas_get_num_threads64_"),
    ("scipy_openblas_set_num_threads", "scipy_openblas_get_num_threads"),
    ("openblas_set_num_threads64_", "openblas_get_num_threads64_"),
    ("openblas_set_num_threads", "openblas_get_num_threads"),
)


@contextmanager
def blas_threads(threads: int) -> Iterator[bool]:
    """Within the block NumPy's matrix products run on `threads` threads; yields whether that is so."""
    functions = _openblas()
    if functions is None:
        yield False
        return
    setter, getter = functions
    before = getter()
    setter(threads)
    try:
        yield True
    finally:
        setter(before)


@cache
def _openblas() -> tuple[Any, Any] | None:
    """(setter, getter) of the OpenBLAS that NumPy has loaded, or None."""
    package = Path(np.__file__).parent
    for folder in (package.parent / "numpy.libs", package / ".dylibs"):
        for file in sorted(folder.glob("*openblas*")):
            library = ctypes.CDLL(str(file))  # loaded by NumPy already: this is a second handle to it
            for setter, getter in _FUNCTIONS:
                if hasattr(library, setter) and hasattr(library, getter):
                    return getattr(library, setter), getattr(library, getter)
    return None
