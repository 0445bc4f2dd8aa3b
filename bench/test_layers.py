"""Kernels against the NumPy baseline, layer by layer: `pytest bench --benchmark-enable`.

One group for each layer: the kernel with its weights bound, and im2col with one matrix product, both on one
thread. Each answer is checked against the float64 oracle before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import convsched as cs
from convsched.algebra.accuracy import BOUNDS
from convsched.benchmark.baseline import gemm_baseline
from convsched.benchmark.blas import blas_threads
from convsched.benchmark.cases import Case, make_arrays, relative_error
from convsched.benchmark.run import bound_call
from convsched.problem import Conv2d
from convsched.problem.reference import convolve

LAYERS = {
    "ResNet stem 7x7 s2": Conv2d(3, 64, 7, 2, 3, input_size=224, activation="relu"),
    "ResNet 3x3 64 at 56": Conv2d(64, 64, 3, 1, 1, input_size=56, activation="relu"),
    "ResNet 3x3 256 at 14": Conv2d(256, 256, 3, 1, 1, input_size=14, activation="relu"),
    "ResNet 3x3 512 at 7": Conv2d(512, 512, 3, 1, 1, input_size=7, activation="relu"),
    "ResNet 1x1 256-64 at 56": Conv2d(256, 64, 1, input_size=56, activation="relu"),
    "ResNet 1x1 s2 512-1024 at 28": Conv2d(512, 1024, 1, 2, input_size=28),
    "MobileNet depthwise 32 at 112": Conv2d(32, 32, 3, 1, 1, groups=32, input_size=112, activation="relu"),
    "MobileNet depthwise s2 64 at 112": Conv2d(64, 64, 3, 2, 1, groups=64, input_size=112, activation="relu"),
    "MobileNet 1x1 512 at 14": Conv2d(512, 512, 1, input_size=14, activation="relu"),
    "AlexNet 5x5 in 2 groups": Conv2d(96, 256, 5, 1, 2, groups=2, input_size=27, activation="relu"),
    "odd 3x3 17-23, dilated": Conv2d(17, 23, 3, 1, 2, 2, input_size=(29, 31), activation="hardswish"),
}


@pytest.mark.parametrize("engine", ["kernel", "numpy"])
@pytest.mark.parametrize("name", LAYERS)
def test_layer(benchmark: Any, name: str, engine: str) -> None:
    layer = LAYERS[name]
    benchmark.group = name
    benchmark.extra_info["problem"] = layer.text
    arrays = make_arrays(Case(name, layer))
    expected = convolve(layer, arrays.x, arrays.weight, arrays.bias)
    with blas_threads(1):
        call, output = engines(layer, arrays)[engine]
        assert relative_error(output(), expected) <= BOUNDS["normal"]
        benchmark(call)
    if benchmark.stats is not None:
        benchmark.extra_info["GFLOP/s"] = layer.flops / benchmark.stats.stats.min * 1e-9


def engines(layer: Conv2d, arrays: Any) -> dict[str, tuple[Callable[[], object], Callable[[], np.ndarray]]]:
    """For each engine, a call that runs the layer, and one that runs it and gives the output."""

    def numpy() -> np.ndarray:
        return gemm_baseline(layer, arrays.x, arrays.weight, arrays.bias)

    call, result = bound_call(cs.compile(layer, threads=1), layer, arrays, "nchw")

    def kernel() -> np.ndarray:
        call()
        return result

    return {"kernel": (call, kernel), "numpy": (numpy, numpy)}
