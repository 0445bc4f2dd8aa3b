"""What can be folded into a layer of an ONNX graph: per-channel affine nodes, then one activation."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from convsched.errors import ModelWarning
from convsched.graph.onnx.file import Graph, TensorError
from convsched.graph.onnx.read import Node, attributes, operator, title
from convsched.problem.rules import Activation

# Elementwise nodes of which exporters build the two self-gated activations.
_GATE_OPS = frozenset(("Add", "Sub", "Mul", "Div", "Clip", "Sigmoid", "HardSigmoid", "Min", "Max"))
_GATE_NODES = 5  # x * clip(x + 3, 0, 6) / 6 has four

# Points on both sides of every kink; hard swish and SiLU differ by 0.1 and more at some of them.
_SAMPLES = np.linspace(-8, 8, 65, dtype=np.float32).reshape(1, -1, 1, 1)


@dataclass(frozen=True, eq=False)
class Ending:
    """activation(scale * y + shift), with one scale and shift for each output channel."""

    scale: NDArray[np.float64]
    shift: NDArray[np.float64]
    activation: Activation


def follow(graph: Graph, tensor: str, channels: int, axis: int, rank: int) -> Ending:
    """What happens to a layer's output as far as it can be folded; `axis` of `rank` is that of channels."""
    scale, shift = np.ones(channels), np.zeros(channels)
    while (node := graph.only_consumer(tensor)) is not None:
        affine = _affine(graph, node, tensor, channels, axis, rank)
        if affine is None:
            break
        scale, shift = scale * affine[0], shift * affine[0] + affine[1]
        tensor = node.output[0]
    if node is None:
        return Ending(scale, shift, _gated(graph, tensor))
    if operator(node) == "HardSigmoid" and not _is_usual_hard_sigmoid(node):
        slope, offset = _hard_sigmoid(node)  # clip(slope y + offset, 0, 1)
        return Ending(scale * slope, shift * slope + offset, ("clip", 0.0, 1.0))
    return Ending(scale, shift, _activation(graph, node))


Affine = tuple[NDArray[np.float64], NDArray[np.float64]]


def _affine(graph: Graph, node: Node, tensor: str, channels: int, axis: int, rank: int) -> Affine | None:
    """(scale, shift) of a node that is affine in each channel, else None."""
    if operator(node) == "Identity":
        return np.ones(channels), np.zeros(channels)
    if operator(node) == "BatchNormalization":
        return _batch_norm(graph, node) if axis == 1 and node.input[0] == tensor else None
    if operator(node) not in ("Add", "Sub", "Mul", "Div") or len(set(node.input)) != 2:
        return None
    left = node.input[0] == tensor
    constant = graph.constant(node.input[1 if left else 0])
    if constant is None or not np.issubdtype(constant.dtype, np.floating):
        return None
    value = _per_channel(constant, channels, axis, rank)
    if value is None:
        return None
    ones, zeros = np.ones(channels), np.zeros(channels)
    match operator(node):
        case "Add":
            return ones, value
        case "Sub":
            return (ones, -value) if left else (-ones, value)
        case "Mul":
            return value, zeros
        case _:  # a constant divided by the output is not affine; nor is a division by zero
            return (ones / value, zeros) if left and np.all(value) else None


def _per_channel(constant: np.ndarray, channels: int, axis: int, rank: int) -> NDArray[np.float64] | None:
    """A constant as one number a channel, if that is how it broadcasts."""
    if constant.size == 1 and constant.ndim <= max(rank, 1):
        return np.full(channels, float(constant.reshape(())))
    if rank == 0 or constant.ndim > rank:
        return None
    shape = (1,) * (rank - constant.ndim) + constant.shape
    if any(size != (channels if position == axis else 1) for position, size in enumerate(shape)):
        return None
    return constant.reshape(channels).astype(np.float64)


def _batch_norm(graph: Graph, node: Node) -> Affine | None:
    """scale = gamma / sqrt(variance + epsilon), shift = beta - scale mean; None in training mode."""
    values = attributes(node)
    parameters = [graph.constant(name) for name in node.input[1:5]]
    if values.get("training_mode", 0) or sum(map(bool, node.output)) > 1 or len(parameters) < 4:
        return None
    found = [parameter.astype(np.float64) for parameter in parameters if parameter is not None]
    if len(found) < 4:
        return None
    gamma, beta, mean, variance = found
    spread = variance + values.get("epsilon", 1e-5)
    if bad := np.count_nonzero(~(spread > 0)):  # NaN too
        warnings.warn(f"{title(node)}: {bad} of {spread.size} variances plus epsilon are not positive, so that their "
                      "channels are not finite", ModelWarning, stacklevel=2)
    scale = gamma / np.sqrt(spread)
    return scale, beta - scale * mean


def _activation(graph: Graph, node: Node) -> Activation:
    """The activation that one node is, or None."""
    values = attributes(node)
    match operator(node):
        case "Relu":
            return "relu"
        case "Sigmoid":
            return "sigmoid"
        case "Tanh":
            return "tanh"
        case "HardSwish":
            return "hardswish"
        case "HardSigmoid":
            return "hardsigmoid"
        case "LeakyRelu":
            return ("leaky_relu", float(values.get("alpha", 0.01)))
        case "Elu":
            return ("elu", float(values.get("alpha", 1.0)))
        case "Swish" if float(values.get("alpha", 1.0)) == 1.0:
            return "silu"
        case "Clip":
            return _clip(graph, node)
        case _:
            return None


def _clip(graph: Graph, node: Node) -> Activation:
    """Clip's bounds are attributes before opset 11, then optional inputs."""
    values = attributes(node)
    bounds = [float(values.get("min", -math.inf)), float(values.get("max", math.inf))]
    for position, name in enumerate(node.input[1:3]):
        if not name:
            continue
        constant = graph.constant(name)
        if constant is None:
            return None
        bounds[position] = float(constant.reshape(()))
    # Exporters write "no bound" as the largest float32.
    lo, hi = (math.copysign(math.inf, bound) if abs(bound) > 3.4e38 else bound for bound in bounds)
    match lo, hi:
        case 0.0, math.inf:
            return "relu"
        case 0.0, 6.0:
            return "relu6"
        case _ if lo == -math.inf and hi == math.inf:
            return None
        case _ if not lo <= hi:
            return None
        case _:
            return ("clip", lo, hi)


def _hard_sigmoid(node: Node) -> tuple[float, float]:
    values = attributes(node)
    return float(values.get("alpha", 0.2)), float(values.get("beta", 0.5))


def _is_usual_hard_sigmoid(node: Node) -> bool:
    """Whether it is clip(y / 6 + 1/2, 0, 1), the "hardsigmoid" of a problem."""
    slope, offset = _hard_sigmoid(node)
    return math.isclose(slope, 1 / 6, rel_tol=1e-6) and offset == 0.5


def _gated(graph: Graph, tensor: str) -> Activation:
    """SiLU or hard swish written as several nodes that all hang on `tensor`, or None.

    The nodes are gathered until they end in one tensor, and then known by their values at some points: the
    ways to write x * clip(x + 3, 0, 6) / 6 are many.
    """
    nodes: list[Node] = []
    inside = {tensor}
    best: Activation = None
    while len(nodes) < _GATE_NODES and (node := _next_gate_node(graph, nodes, inside)) is not None:
        nodes.append(node)
        inside.add(node.output[0])
        if _is_closed(graph, nodes, inside):
            best = _by_values(graph, tensor, nodes) or best
    return best


def _next_gate_node(graph: Graph, nodes: list[Node], inside: set[str]) -> Node | None:
    """A further elementwise node that reads only tensors inside and single constants."""

    def usable(name: str) -> bool:
        if name in inside or not name:
            return True
        value = graph.constant(name)
        return value is not None and value.size == 1

    for tensor in sorted(inside):
        for node in graph.consumers.get(tensor, []):
            if node not in nodes and operator(node) in _GATE_OPS and all(map(usable, node.input)):
                return node
    return None


def _is_closed(graph: Graph, nodes: list[Node], inside: set[str]) -> bool:
    """Whether only the last node's output is read outside the nodes."""
    hidden = inside - {nodes[-1].output[0]}
    seen_outside = any(node not in nodes for tensor in hidden for node in graph.consumers.get(tensor, []))
    return not seen_outside and not hidden & graph.outputs


def _by_values(graph: Graph, tensor: str, nodes: list[Node]) -> Activation:
    """The self-gated activation that the nodes compute, known by its values."""
    names = {name for node in nodes for name in node.input if name} - {node.output[0] for node in nodes}
    feeds = {name: _SAMPLES if name == tensor else graph.constant(name) for name in sorted(names)}
    x = _SAMPLES.astype(np.float64)
    try:
        got = graph.run(nodes, feeds, nodes[-1].output[0])
    except TensorError:  # operators that the evaluator lacks, or that are malformed
        return None
    for name, expected in (("silu", x / (1 + np.exp(-x))), ("hardswish", x * np.clip(x / 6 + 0.5, 0, 1))):
        if got.shape == x.shape and np.allclose(got, expected, rtol=0, atol=1e-5):
            return name
    return None
