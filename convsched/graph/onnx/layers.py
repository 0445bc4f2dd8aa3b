"""The convolution and fully connected layers of an ONNX file, with their trained weights.

What follows a layer is folded into it where nothing else reads the layer's output. First all that is affine
for each output channel, in float64, batch normalisation (Ioffe and Szegedy 2015) above all:

    scale (w * x + b) + shift = (scale w) * x + (scale b + shift),   scale = gamma / sqrt(variance + epsilon)

then one activation. A residual addition is not folded: it stays a node of its own.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convsched.errors import ModelError, ModelWarning, ProblemError
from convsched.graph.onnx.file import Graph, TensorError
from convsched.graph.onnx.fuse import follow
from convsched.graph.onnx.read import Node, Shape, attributes, operator, title
from convsched.problem import Conv2d, Linear, Problem
from convsched.problem.reference import not_finite

# Nodes that multiply and add but are not read as layers, with the reason.
OTHER_CONTRACTIONS = {
    "ConvTranspose": "transposed convolution is not supported",
    "DeformConv": "deformable convolution is not supported",
    "ConvInteger": "integer convolution is not supported",
    "QLinearConv": "quantised convolution is not supported",
    "MatMulInteger": "integer matrix product is not supported",
    "QLinearMatMul": "quantised matrix product is not supported",
    "Einsum": "einsum is not supported",
    "LSTM": "recurrent layers are not supported",
    "GRU": "recurrent layers are not supported",
    "RNN": "recurrent layers are not supported",
    "Attention": "attention is not supported",
    "If": "layers in branches are not read",
    "Loop": "layers in loops are not read",
    "Scan": "layers in loops are not read",
}

# What may stand between the network's input and its first layer: reordering, and the scaling of pixels.
_PREPARES = frozenset(("Transpose", "Identity", "Cast", "Add", "Sub", "Mul", "Div", "BatchNormalization"))


@dataclass(frozen=True, eq=False)
class ModelLayer:
    """One layer: `name` of the first node with this problem, `count` nodes in all, the first one's weights.

    `weight` has the problem's `weight_shape` and `bias` its `bias_shape` (None without bias), both float32.
    `reads_input`: whether its input is the network's own, up to the order of axes and scaling.
    """

    name: str
    problem: Problem
    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    count: int
    reads_input: bool


@dataclass(frozen=True, eq=False)
class ModelLayers:
    """What was found in a file: the layers, and one line with the reason for each that was passed over."""

    layers: tuple[ModelLayer, ...]
    skipped: tuple[str, ...]


def read_model(path: str | Path, *, input_size: tuple[int, int] | None = None) -> ModelLayers:
    """The distinct layers of an ONNX file for batch 1, in the file's order, and what was passed over.

    `input_size` is (height, width), for models that leave it open. Raises ModelError for a file that is
    missing or cannot be read, and for one without any layer; a ModelWarning names each layer whose weights are not
    finite.
    """
    graph = Graph.load(path, input_size)
    found: list[ModelLayer] = []
    skipped: list[str] = []
    for node in graph.nodes:
        if operator(node) not in _READERS and operator(node) not in OTHER_CONTRACTIONS:
            continue
        try:
            with np.errstate(all="ignore"):  # what is not finite is said with the layer's name
                found.append(_read_layer(graph, node))
        except (_SkipError, ProblemError, TensorError) as reason:
            skipped.append(f"{title(node)}: {reason}")
        except (ValueError, TypeError, IndexError, OverflowError) as error:  # sizes that ONNX does not allow
            skipped.append(f"{title(node)}: it or what follows it is malformed: {error}")
    if not found:
        why = "; ".join(skipped) or "it has no convolution or matrix product"
        raise ModelError(f"{path}: no layer to read: {why}")
    return ModelLayers(_distinct(found), tuple(skipped))


class _SkipError(Exception):
    """Why a node is passed over."""


@dataclass(frozen=True, eq=False)
class _Core:
    """A layer before folding: its problem without activation, and float64 weights, output channels first."""

    problem: Problem
    weight: NDArray[np.float64]
    bias: NDArray[np.float64]


def _read_layer(graph: Graph, node: Node) -> ModelLayer:
    if operator(node) in OTHER_CONTRACTIONS:
        raise _SkipError(OTHER_CONTRACTIONS[operator(node)])
    if len(node.input) < 2:
        raise _SkipError("it has one input, and no weights")
    core = _READERS[operator(node)](graph, node)
    channel_axis = 1 if isinstance(core.problem, Conv2d) else -1
    rank = len(graph.shapes.get(node.output[0], ()))
    ending = follow(graph, node.output[0], core.problem.M, channel_axis % rank if rank else 1, rank)
    weight = core.weight * ending.scale.reshape(-1, *[1] * (core.weight.ndim - 1))
    bias = core.bias * ending.scale + ending.shift
    for kind, values in (("weights", weight), ("bias", bias)):
        if flaw := not_finite(values.astype(np.float32)):
            warnings.warn(f"{title(node)}: {flaw} of its {kind}, with what is folded into it, are not "
                          "finite float32 numbers", ModelWarning, stacklevel=2)
    problem = _with(core.problem, bool(np.any(bias)) or core.problem.bias, ending.activation)
    return ModelLayer(
        str(node.name or node.output[0]),
        problem,
        np.ascontiguousarray(weight, np.float32),
        bias.astype(np.float32) if problem.bias else None,
        1,
        _reads_input(graph, node.input[0]),
    )


def _with(problem: Problem, bias: bool, activation: Any) -> Problem:
    """The same layer with or without bias, and with an activation."""
    match problem:
        case Conv2d():
            return Conv2d(
                problem.C, problem.M, problem.kernel_size, problem.stride, problem.padding, problem.dilation,
                problem.groups, bias,
                input_size=problem.input_size, batch_size=problem.N, activation=activation,
            )  # fmt: skip
        case Linear():
            return Linear(problem.C, problem.M, bias, batch_size=problem.N, activation=activation)


def _conv(graph: Graph, node: Node) -> _Core:
    """Conv of rank 4, or of rank 3 as one of height 1."""
    weight = _weights(graph, node.input[1])
    if weight.ndim not in (3, 4):
        raise _SkipError(f"it is {weight.ndim - 2}-dimensional; 1 and 2 dimensions are supported")
    batch, channels, *size = _shape(graph, node.input[0], weight.ndim)
    ones = [1] * len(size)
    values = attributes(node)
    stride, dilation = values.get("strides", ones), values.get("dilations", ones)
    kernel = list(weight.shape[2:])
    if values.get("kernel_shape", kernel) != kernel:
        raise _SkipError(f"its kernel_shape {values['kernel_shape']} is not that of its weights, {kernel}: "
                         "correct the attribute, or leave it out")  # fmt: skip
    padding = _padding(values, size, kernel, stride, dilation)
    if len(size) == 1:  # an axis of height 1 in front
        size, kernel, stride, dilation = [1, *size], [1, *kernel], [1, *stride], [1, *dilation]
        padding = [0, padding[0], 0, padding[1]]
    with_bias = len(node.input) > 2 and bool(node.input[2])
    out_channels = weight.shape[0]
    problem = Conv2d(
        channels, out_channels, kernel, stride, padding, dilation, values.get("group", 1), with_bias,
        input_size=size, batch_size=batch,
    )  # fmt: skip
    if weight.size != problem.weights:
        raise _SkipError(f"its weights {weight.shape} do not fit its {channels} input channels")
    bias = _weights(graph, node.input[2]) if with_bias else np.zeros(out_channels)
    return _Core(problem, weight.reshape(problem.weight_shape), bias.reshape(out_channels))


def _gemm(graph: Graph, node: Node) -> _Core:
    """Gemm: alpha A B + beta C, with B (or its transpose) and C constant."""
    values = attributes(node)
    if values.get("transA", 0):
        raise _SkipError("its input is transposed (transA), which is not supported")
    weight = _weights(graph, node.input[1]) * values.get("alpha", 1.0)
    weight = weight if values.get("transB", 0) else weight.T
    batch, features = _shape(graph, node.input[0], 2)
    if weight.ndim != 2 or features != weight.shape[1]:
        raise _SkipError(f"its weights {weight.T.shape} do not fit its {features} input features")
    out_features = weight.shape[0]
    with_bias = len(node.input) > 2 and bool(node.input[2])
    bias = np.zeros(out_features)
    if with_bias:
        addend = _weights(graph, node.input[2]) * values.get("beta", 1.0)
        if addend.size not in (1, out_features) or (addend.ndim == 2 and addend.shape[0] != 1):
            raise _SkipError(f"its addend {addend.shape} is not one number for each output")
        bias = bias + addend.reshape(-1)
    return _Core(Linear(features, out_features, with_bias, batch_size=batch), weight, bias)


def _matmul(graph: Graph, node: Node) -> _Core:
    """MatMul with a constant matrix on the right; leading axes of the left side are rows of a batch."""
    matrix = _weights(graph, node.input[1])
    if matrix.ndim != 2:
        raise _SkipError(f"its constant has shape {matrix.shape}, not that of a matrix")
    *leading, features = _shape(graph, node.input[0], None)
    if features != matrix.shape[0]:
        raise _SkipError(f"its constant {matrix.shape} does not fit its {features} input features")
    rows = math.prod(leading)
    problem = Linear(features, matrix.shape[1], False, batch_size=rows)
    return _Core(problem, matrix.T, np.zeros(matrix.shape[1]))


_READERS: dict[str, Callable[[Graph, Node], _Core]] = {"Conv": _conv, "Gemm": _gemm, "MatMul": _matmul}


def _padding(
    values: dict[str, Any], size: list[int], kernel: list[int], stride: list[int], dilation: list[int]
) -> list[int]:
    """ONNX's pads, all starts and then all ends, with `auto_pad` worked out."""
    match values.get("auto_pad", "NOTSET"):
        case "NOTSET":
            return list(values.get("pads", [0] * 2 * len(size)))
        case "VALID":
            return [0] * 2 * len(size)
        case "SAME_UPPER" | "SAME_LOWER" as mode:
            extents = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
            totals = [
                max(0, (-(-n // s) - 1) * s + extent - n)
                for n, s, extent in zip(size, stride, extents, strict=True)
            ]
            small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
            return small + large if mode == "SAME_UPPER" else large + small
        case other:
            raise _SkipError(f"its auto_pad {other!r} is not one of NOTSET, VALID, SAME_UPPER, SAME_LOWER")


def _weights(graph: Graph, tensor: str) -> NDArray[np.float64]:
    value = graph.constant(tensor)
    if value is None:
        raise _SkipError(graph.why_computed(tensor))
    if not np.issubdtype(value.dtype, np.floating):
        raise _SkipError(f"{tensor!r} holds {value.dtype}, not floating-point numbers")
    return value.astype(np.float64)


def _shape(graph: Graph, tensor: str, rank: int | None) -> list[int]:
    shape: Shape | None = graph.shapes.get(tensor)
    if shape is None or any(size is None for size in shape):
        why = graph.unknown.get(tensor, "")
        raise _SkipError(f"the shape of its input {tensor!r} is not known{f' ({why})' if why else ''}")
    if rank is not None and len(shape) != rank:
        raise _SkipError(f"its input has {len(shape)} axes, not {rank}")
    return [size for size in shape if size is not None]


def _reads_input(graph: Graph, tensor: str) -> bool:
    """Whether a tensor is the network's input, up to the order of axes and scaling."""
    while tensor not in graph.inputs:
        node = graph.producers.get(tensor)
        if node is None or operator(node) not in _PREPARES:
            return False
        computed = [name for name in node.input if name and graph.constant(name) is None]
        if len(computed) != 1:
            return False
        tensor = computed[0]
    return True


def _distinct(layers: list[ModelLayer]) -> tuple[ModelLayer, ...]:
    """Each problem once, in order of first appearance."""
    counts = Counter(layer.problem for layer in layers)
    first: dict[Problem, ModelLayer] = {}
    for layer in layers:
        first.setdefault(layer.problem, layer)
    return tuple(replace(layer, count=counts[problem]) for problem, layer in first.items())
