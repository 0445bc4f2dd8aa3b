"""Layers with data to run them on: the layer tables with random arrays, or a model file's trained weights.

Weights are drawn as He et al. (2015) initialise them, N(0, 2 / fan-in), so that outputs keep the scale of
the inputs; inputs are what a ReLU before the layer would give, max(0, N(0, 1)), but for those of layers
that read the network's own input: N(0, 1), or a photograph.
"""

from __future__ import annotations

import importlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convsched.errors import ModelError
from convsched.graph.onnx.layers import ModelLayer
from convsched.problem import Conv2d, Problem
from convsched.problem.reference import not_finite

Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Case:
    """A layer, how often it occurs, and its weights where a file gave them (else they are drawn)."""

    name: str
    problem: Problem
    count: int = 1
    weight: Array | None = None
    bias: Array | None = None
    reads_input: bool = False


@dataclass(frozen=True, eq=False)
class Arrays:
    """What a layer is run on, in the problem's NCHW shapes; bias and residual only where it has them."""

    x: Array
    weight: Array
    bias: Array | None
    residual: Array | None


    def flaw(self) -> str:
        """Which array is not finite, so that no answer can be checked; empty where all are."""
        arrays = {"input": self.x, "weights": self.weight, "bias": self.bias, "residual": self.residual}
        found = {kind: not_finite(array) for kind, array in arrays.items() if array is not None}
        return "; ".join(f"{flaw} of its {kind} are not finite" for kind, flaw in found.items() if flaw)


def table_case(name: str, problem: Problem, count: int) -> Case:
    """A layer of a built-in table; one with fewer than 5 input channels reads the network's input."""
    return Case(name, problem, count, reads_input=problem.C < 5)


def model_case(layer: ModelLayer) -> Case:
    """A layer of a model file, with the file's weights and bias."""
    return Case(layer.name, layer.problem, layer.count, layer.weight, layer.bias, layer.reads_input)


def make_arrays(case: Case, image: Array | None = None, seed: int = 0) -> Arrays:
    """The arrays of a case: the same for the same seed. `image` is (H, W, 3), see `read_image`."""
    problem, random = case.problem, np.random.default_rng(seed)
    x = random.standard_normal(problem.input_shape, np.float32)
    if not case.reads_input:
        x = np.maximum(x, 0)
    elif image is not None and isinstance(problem, Conv2d) and problem.C in (1, 3):
        x = np.ascontiguousarray(np.broadcast_to(fit_image(image, problem), problem.input_shape))
    weight = case.weight
    if weight is None:
        fan_in = problem.weights // problem.M
        weight = random.standard_normal(problem.weight_shape, np.float32) * np.float32(np.sqrt(2 / fan_in))
    bias = case.bias
    if bias is None and problem.bias:
        bias = random.standard_normal(problem.bias_shape, np.float32) * np.float32(0.1)
    residual = random.standard_normal(problem.output_shape, np.float32) if problem.residual else None
    return Arrays(x, weight, bias, residual)


def relative_error(y: Array, expected: NDArray[np.float64]) -> float:
    """max |y - expected| / rms(expected): an error in units of what the outputs are like; inf for NaN."""
    largest = float(np.max(np.abs(y - expected)))
    scale = float(np.sqrt(np.mean(np.square(expected))))
    if np.isnan(largest):
        return float("inf")
    return largest / scale if scale else largest


def read_image(path: Path) -> Array:
    """An image as (H, W, 3), scaled to about zero mean and unit variance.

    `.npy`: a float array (H, W, 3), (3, H, W) or (H, W), taken as it is; another file is read by
    scikit-image. Raises ModelError.
    """
    if not path.is_file():
        raise ModelError(f"{path}: there is no such file")
    if path.suffix == ".npy":
        try:
            return _rgb(path, np.load(path, allow_pickle=False))
        except (ValueError, EOFError, MemoryError) as error:
            raise ModelError(f"{path}: cannot be read as an array: {error}") from error
    pixels = _rgb(path, _read_pixels(path))
    return np.asarray((pixels - pixels.mean()) / max(float(pixels.std()), 1e-6), np.float32)


def fit_image(image: Array, problem: Conv2d) -> Array:
    """(C, H, W) of an image: cut to the layer's proportions around its middle, then the nearest pixels."""
    height, width = image.shape[:2]
    scale = min(height / problem.H, width / problem.W)
    row, column = (height - scale * problem.H) / 2, (width - scale * problem.W) / 2
    rows = (row + (np.arange(problem.H) + 0.5) * scale).astype(np.intp).clip(0, height - 1)
    columns = (column + (np.arange(problem.W) + 0.5) * scale).astype(np.intp).clip(0, width - 1)
    pixels = image[rows][:, columns]
    channels = pixels.transpose(2, 0, 1) if problem.C == 3 else pixels.mean(axis=2)[np.newaxis]
    return np.ascontiguousarray(channels, np.float32)


def _rgb(path: Path, array: NDArray[Any]) -> Array:
    """An array of pixels as (H, W, 3)."""
    if array.ndim == 4 and array.shape[0] == 1:
        array = array[0]
    if array.ndim == 2:
        array = array[:, :, np.newaxis]
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or not array.size:
        shapes = "(H, W, 3), (3, H, W) or (H, W)"
        raise ModelError(f"{path}: an array of shape {array.shape} is not an image: use {shapes}")
    color = array[:, :, :3] if array.shape[2] > 1 else np.repeat(array, 3, axis=2)
    return np.asarray(color, np.float32)


def _read_pixels(path: Path) -> NDArray[Any]:
    try:
        reader = importlib.import_module("skimage.io")
    except ImportError as error:
        fix = "pip install scikit-image, or give a .npy array"
        raise ModelError(f"reading a picture needs scikit-image: {fix}") from error
    try:
        return np.asarray(reader.imread(io.BytesIO(path.read_bytes())))  # by itself it leaves files open
    except Exception as error:  # each image format's reader raises errors of its own
        raise ModelError(f"{path}: cannot be read as an image: {error}") from error
