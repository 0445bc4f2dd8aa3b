"""Kernels stay within their arrays: each lies against a page that the process may not touch.

A kernel that reads or writes outside an array ends its process, so the calls are made by another one, which names each
before it makes it; after one that ends it, a new process makes the rest. Every call is made twice: with arrays that
end where the page begins, and with arrays that begin where it ends.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from convsched.kernels.run.bound import BoundKernel
from convsched.kernels.run.kernel import Kernel
from convsched.machine import Isa, Machine, host
from convsched.plan.families import named
from convsched.plan.plan import Plan, Target
from convsched.problem import Conv2d, Linear, Problem
from convsched.problem.layout import from_layout, to_layout
from convsched.problem.reference import convolve
from convsched.schedule import Schedule

LAYOUTS = ("nchw", "nhwc", "nchw16c")
EXACT = ("direct", "im2col")
FLOAT32 = 2e-4  # of max |error| over the greatest output, of other algorithms

Side = Literal["before", "after"]
"""Where the page is."""


@dataclass(frozen=True)
class Case:
    """A layer by one algorithm's default recipe for an instruction set, with some parameters replaced."""

    problem: Problem
    algorithm: str = "direct"
    isa: Isa = "avx512"
    changed: Mapping[str, Any] = field(default_factory=dict)

    def schedule(self, layout: str) -> Schedule:
        """The recipe's steps."""
        recipe = named(self.algorithm, self.problem).default(Machine.example(self.isa), layout, 1)
        return replace(recipe, **self.changed).schedule(self.problem, layout)


LAYERS: dict[str, Problem] = {
    "dense": Conv2d(6, 20, 3, padding=1, input_size=(5, 11), residual=True, activation="relu"),
    "dense, no padding": Conv2d(16, 32, 3, input_size=(7, 9), residual=True),
    "dilated": Conv2d(5, 18, 3, padding=2, dilation=2, input_size=(7, 11)),
    "1x1": Conv2d(7, 21, 1, input_size=(5, 7), residual=True),
    "1x1, stride 2": Conv2d(16, 32, 1, 2, input_size=(8, 9)),
    "1x1, stride 3, few maps": Conv2d(5, 3, 1, 3, input_size=(7, 50)),
    "stride 2": Conv2d(6, 24, 3, 2, padding=1, input_size=(8, 13), residual=True),
    "stride 2, few maps": Conv2d(5, 3, 3, 2, padding=1, input_size=(5, 37)),
    "stride 2, few maps, no padding": Conv2d(3, 2, 3, 2, input_size=(5, 35), residual=True),
    "stride 3, few maps": Conv2d(3, 4, 2, 3, input_size=(5, 50)),
    "stride 4, few maps": Conv2d(3, 4, (1, 3), 4, padding=(0, 1), input_size=(2, 67)),
    "grouped": Conv2d(12, 24, 3, padding=1, groups=3, input_size=(6, 9)),
    "grouped, stride 2": Conv2d(12, 48, 3, 2, groups=3, input_size=(6, 9), residual=True),
    "depthwise": Conv2d(19, 19, 3, padding=1, groups=19, input_size=(6, 17), residual=True),
    "depthwise, stride 2": Conv2d(19, 19, 3, 2, padding=1, groups=19, input_size=(7, 33)),
    "depthwise, stride 2, no padding": Conv2d(18, 18, 3, 2, groups=18, input_size=(5, 34), residual=True),
    "depthwise, stride 3": Conv2d(3, 3, 3, 3, groups=3, input_size=(7, 52)),
    "depthwise 1x1, stride 4": Conv2d(5, 5, 1, 4, groups=5, input_size=(5, 66)),
    "first": Conv2d(3, 32, 3, 2, padding=1, input_size=(9, 17)),
    "first, 7x7": Conv2d(3, 16, 7, 2, padding=3, input_size=(9, 14)),
    "linear": Linear(30, 41, batch_size=3),
    "linear, one image": Linear(37, 19, bias=False, activation="relu"),
}
OTHERS: dict[str, Case] = {
    "dense, not copied": Case(LAYERS["dense"], changed={"pack": "none", "skip": ""}),
    "dense, products with padding left out": Case(LAYERS["dense"], changed={"pack": "none", "skip": "hw"}),
    "dense, a tile moved back": Case(
        Conv2d(16, 32, 3, input_size=(7, 9)), changed={"tail": "overlap", "rows": 1, "pixels": 4}),
    "im2col": Case(LAYERS["dense"], "im2col"),
    "im2col, matrix": Case(LAYERS["dense"], "im2col", changed={"indirect": False}),
    "im2col, stride 2": Case(LAYERS["stride 2"], "im2col"),
    "im2col, 1x1, stride 2": Case(LAYERS["1x1, stride 2"], "im2col"),
    "im2col, grouped": Case(LAYERS["grouped"], "im2col", "avx2"),
    "F(2,3)": Case(LAYERS["dense"], "winograd(2,3)"),
    "F(4,3)": Case(LAYERS["dense, no padding"], "winograd(4,3)"),
    "F(2,3), stride 2": Case(LAYERS["stride 2"], "winograd(2,3)"),
    "F(2,3), dilated": Case(LAYERS["dilated"], "winograd(2,3)", "avx2"),
    "F(2,3), grouped": Case(LAYERS["grouped"], "winograd(2,3)"),
    "F(2,5), row": Case(Conv2d(9, 17, (1, 5), padding=(0, 2), input_size=(3, 11)), "winograd(2,5)"),
    "fft": Case(LAYERS["dense"], "fft(8)"),
    "fft, row": Case(Conv2d(5, 17, (1, 7), input_size=(2, 17)), "fft(16)", "avx2"),
    "strassen": Case(LAYERS["dense"], "strassen(1)"),
    "strassen, 1x1": Case(LAYERS["1x1"], "strassen(2)"),
    "strassen, linear": Case(LAYERS["linear"], "strassen(1)", "avx2"),
}
ROWS: dict[str, Case] = {  # of every length about that of a run that fills a vector with some of its elements
    f"depthwise {rows}x{taps}, stride {stride}, {width} wide": Case(
        Conv2d(2, 2, (rows, taps), stride, groups=2, bias=False, input_size=(rows, width)))
    for stride, rows, taps in ((2, 1, 1), (2, 1, 2), (3, 1, 3), (3, 4, 1), (4, 1, 1))
    for width in range(15 * stride + taps, 17 * stride + taps)}
CASES: dict[str, Case] = {
    **{name: Case(problem) for name, problem in LAYERS.items()},
    **{f"{name}, avx2": Case(problem, isa="avx2") for name, problem in LAYERS.items()}, **OTHERS}


def guarded(array: np.ndarray[Any, Any], side: Side) -> np.ndarray[Any, Any]:
    """A copy between two pages that may not be touched, against that of a side."""
    page = mmap.PAGESIZE
    size = -(-array.nbytes // page) * page
    memory = mmap.mmap(-1, size + 2 * page)
    first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for at in (first, first + page + size):
        if protect(ctypes.c_void_p(at), ctypes.c_size_t(page), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    start = page if side == "before" else page + size - array.nbytes
    copy = np.frombuffer(memory, array.dtype, array.size, start).reshape(array.shape)
    copy[...] = array
    return copy


def call(name: str, layout: str, side: Side) -> str:
    """Call a kernel whose input, output, weights and own memory are all guarded; "" if it is right."""
    case = {**CASES, **ROWS}[name]
    problem, rng = case.problem, np.random.default_rng(0)
    x, w, b, z = (rng.integers(-3, 4, shape).astype(np.float32) for shape in (
        problem.input_shape, problem.weight_shape, problem.bias_shape, problem.output_shape))
    bias, residual = b if problem.bias else None, z if problem.residual else None
    algorithm = named(case.algorithm, problem)
    kernel = Kernel(Plan(problem, Target(host.machine(), layout), algorithm, case.schedule(layout)))
    bound = kernel.bind(w, bias)
    conv = BoundKernel(kernel, {tensor: guarded(array, side) for tensor, array in bound.weights.items()})
    with_guards(conv, side)
    out = guarded(np.full(kernel.y_shape, np.nan, np.float32), side)
    given = None if residual is None else guarded(to_layout(residual, layout), side)
    assert conv(guarded(to_layout(x, layout), side), out=out, residual=given) is out
    wanted = convolve(problem, x, w, bias, residual)
    error = float(np.abs(from_layout(out, problem.output_shape, layout) - wanted).max())
    tolerance = 0 if case.algorithm in EXACT else FLOAT32 * float(np.abs(wanted).max())
    return "" if error <= tolerance else f"an error of {error:.3g}"


def with_guards(conv: BoundKernel, side: Side) -> None:
    """Give the kernel's next call a workspace whose local tensors are guarded."""
    workspace, names = conv._borrow(), conv.kernel.code.interface.names
    (table,) = workspace.tables
    for tensor, elements in conv.kernel.code.interface.local_elements.items():
        array = guarded(np.zeros(elements, np.float32), side)
        workspace.buffers.append({tensor: array})  # kept
        table[names.index(tensor)] = array.ctypes.data
    conv._idle.append(workspace)


Call = tuple[str, str, Side]


def results(calls: list[Call]) -> dict[Call, str]:
    """What is wrong with each call, as other processes make them; "" for nothing."""
    found: dict[Call, str] = {}
    while len(found) < len(calls):
        left = calls[len(found):]
        done = subprocess.run([sys.executable, str(Path(__file__)), json.dumps(left)], capture_output=True, text=True,
                              timeout=300)
        lines = done.stdout.splitlines()
        found.update(zip(left, lines, strict=False))
        if len(lines) < len(left):
            assert done.returncode < 0, done.stderr
            found[left[len(lines)]] = f"it touches what lies {left[len(lines)][2]} an array (signal {-done.returncode})"
    return found


def applies(name: str, layout: str) -> bool:
    """Whether the layer has the layout: fully connected ones have no order of axes to choose."""
    return layout == "nchw" or not isinstance({**CASES, **ROWS}[name].problem, Linear)


GROUPS = {"layers": list(LAYERS), "others": list(OTHERS), "avx2": [f"{name}, avx2" for name in LAYERS]}
QUICK = [*(("layers", layout) for layout in LAYOUTS), ("others", "nchw")]


@pytest.mark.parametrize(("group", "layout"), [
    pytest.param(group, layout, marks=() if (group, layout) in QUICK else pytest.mark.slow)
    for group in GROUPS for layout in LAYOUTS])
def test_no_kernel_leaves_its_arrays(group: str, layout: str) -> None:
    names = GROUPS[group]
    calls: list[Call] = [(n, layout, side) for n in names if applies(n, layout) for side in ("before", "after")]
    assert {c: wrong for c, wrong in results(calls).items() if wrong} == {}


def test_no_kernel_leaves_rows_of_which_it_reads_some_elements() -> None:
    calls: list[Call] = [(name, "nchw", side) for name in ROWS for side in ("before", "after")]
    assert {c: wrong for c, wrong in results(calls).items() if wrong} == {}


@pytest.mark.parametrize("side", ["before", "after"])
def test_the_pages_are_guarded(side: Side) -> None:
    """One element more than an array has ends a process."""
    at = {"before": "-1", "after": "n"}[side]
    code = ("import ctypes, runpy, sys, numpy as np\n"
            "n = 7\n"
            f"a = runpy.run_path({str(Path(__file__))!r})['guarded'](np.ones(n, np.float32), {side!r})\n"
            "p = ctypes.cast(a.ctypes.data, ctypes.POINTER(ctypes.c_float))\n"
            "print(sum(p[i] for i in range(n)), flush=True)\n"
            f"print(p[{at}])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["7.0"]
    assert done.returncode < 0


def main() -> None:
    """Make the calls that the argument lists; a line for each: what is wrong with it."""
    for name, layout, side in json.loads(sys.argv[1]):
        print(call(name, layout, side), flush=True)


if __name__ == "__main__":
    main()
