"""An ONNX file as a graph that can be asked: who made this tensor, who reads it, what shape and value it has.

Shapes are found in one walk over the nodes, in the file's order, each by ONNX's own shape inference for that node
alone. Values come from initializers, Constant nodes, and nodes of constants only (a Cast from float16, a Transpose
of a weight matrix), which ONNX's reference evaluator runs. A Shape node counts as constant where the shape is known:
what a file computes from it, above all where a Reshape leads, is known by the time the walk comes there.

Nothing is made whose size is not bounded first: 2 KB of Concat nodes, each of the one before with itself, describe
2^32 numbers.
"""

from __future__ import annotations

import importlib
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from convsched.errors import ModelError
from convsched.graph.onnx.read import (
    Model,
    Node,
    Shape,
    attributes,
    data_inputs,
    first_line,
    known_shape,
    operator,
    read_file,
    require_onnx,
    title,
    with_inner,
)
from convsched.lazy import cached_property

# Nodes that only move numbers: from inputs that are partly known, the outputs are partly known.
_MOVES = frozenset(("Identity", "Cast", "Squeeze", "Unsqueeze", "Concat", "Slice", "Gather"))

# Nodes worth computing when all their inputs are constant: what exporters put before a weight or a size.
FOLDABLE = _MOVES | frozenset(("Transpose", "Reshape", "Add", "Sub", "Mul", "Div", "DequantizeLinear"))

# What folding may make: so many elements, and this many times those that the file stores. Exporters put two or three
# nodes before a weight, and none that makes more elements of it.
FOLDED_ELEMENTS = 2**20
FOLDED_TIMES_STORED = 8

RANK_LIMIT = 64  # axes of a tensor; no exporter comes near
SIZE_ELEMENTS = 4096  # of a tensor that shape inference may ask for: sizes, axes, pads, the parts of a Split
INNER_GATHERS = 12  # in subgraphs, whose inference is ONNX's own: each can double the number of axes

# What ONNX's inference writes before its reason, which `title` says already.
_ERROR_PREFIX = r".*\[(Shape|Type)InferenceError\] "


class TensorError(ValueError):
    """A tensor or a node of a file that cannot be read; only what needs it is passed over."""


@dataclass(eq=False)
class Graph:
    """A loaded model; tensors are named as in the file.

    `shapes` has the known shapes, in which an axis of unknown size is None; `unknown` says why a tensor has none,
    where there is more to say than that it depends on the data.
    """

    path: Path
    model: Model
    shapes: dict[str, Shape] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    _types: dict[str, Any] = field(default_factory=dict)
    _values: dict[str, np.ndarray | None] = field(default_factory=dict)
    _sizes: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    _folded: int = 0  # elements that were computed so far
    _stored: int = 0  # elements that were read so far

    @classmethod
    def load(cls, path: str | Path, input_size: tuple[int, int] | None = None) -> Graph:
        """Reads a model for batch 1; `input_size` (height, width) fills in what the file leaves open.

        Raises ModelError for a file that is missing, is not an ONNX model, describes tensors without measure, or
        whose input size is open or another.
        """
        graph = cls(Path(path), read_file(Path(path), input_size))
        graph._find_shapes()
        return graph

    @cached_property
    def nodes(self) -> list[Node]:
        """The nodes, in the file's order: a node comes after those that make its inputs."""
        return list(self.model.graph.node)

    @cached_property
    def inputs(self) -> frozenset[str]:
        """The names of the tensors that a caller gives."""
        return frozenset(value.name for value in data_inputs(self.model))

    @cached_property
    def outputs(self) -> frozenset[str]:
        """The names of the tensors that the model gives."""
        return frozenset(value.name for value in self.model.graph.output)

    @cached_property
    def producers(self) -> dict[str, Node]:
        """The node that makes a tensor, by the tensor's name; inputs and initializers have none."""
        return {name: node for node in self.nodes for name in node.output if name}

    @cached_property
    def consumers(self) -> dict[str, list[Node]]:
        """The nodes that read a tensor, each once; a node with a subgraph reads what the subgraph reads."""
        found: dict[str, list[Node]] = defaultdict(list)
        for node in self.nodes:
            for name in dict.fromkeys(_read_names(node)):
                found[name].append(node)
        return dict(found)

    def only_consumer(self, tensor: str) -> Node | None:
        """The one node that reads a tensor, if there is exactly one and nobody outside sees the tensor."""
        nodes = self.consumers.get(tensor, [])
        return nodes[0] if len(nodes) == 1 and tensor not in self.outputs else None

    def constant(self, tensor: str) -> np.ndarray | None:
        """The value of a tensor that does not depend on the inputs, or None.

        Raises TensorError for stored numbers that cannot be read, ModelError where folding makes too much.
        """
        pending = [tensor]
        while pending:
            name = pending[-1]
            node = self.producers.get(name)
            read = [] if node is None or not _is_foldable(node) else [*filter(None, node.input)]
            missing = next((source for source in read if source not in self._values), None)
            if name in self._values:
                pending.pop()
            elif missing is not None and all(self._values.get(source, 0) is not None for source in read):
                pending.append(missing)  # nothing is made of itself: `read_file` sees to that
            else:
                self._values[pending.pop()] = self._evaluate(name, node)
        return self._values[tensor]

    def why_computed(self, tensor: str) -> str:
        """Why a tensor that should be constant is not, for messages: where it comes from, and what would do."""
        fix = "store it as an initializer"
        if tensor in self.inputs:
            return f"{tensor!r} is an input of the model, without a value in the file: {fix}"
        if any(tensor == sparse.values.name for sparse in self.model.graph.sparse_initializer):
            return f"{tensor!r} is stored as a sparse tensor, which is not supported: {fix}, dense"
        node = self.producers.get(tensor)
        return f"{tensor!r} is computed{f' by {title(node)}' if node is not None else ''}, not a constant"

    def run(self, nodes: list[Node], feeds: dict[str, Any], output: str) -> np.ndarray:
        """Runs a few nodes by ONNX's reference evaluator. Raises TensorError for what it cannot run."""
        onnx = require_onnx()
        reference = importlib.import_module("onnx.reference")
        try:
            inputs = [onnx.helper.make_value_info(name, onnx.TypeProto()) for name in feeds]
            outputs = [onnx.helper.make_value_info(output, onnx.TypeProto())]
            graph = onnx.helper.make_graph(nodes, "part", inputs, outputs)
            imports = {item.domain: item.version for item in self.model.opset_import}
            if any(operator(node) == "DequantizeLinear" for node in nodes):
                imports[""] = max(imports.get("", 19), 19)  # the evaluator starts at 19, with the same meaning
            opsets = [onnx.helper.make_opsetid(*item) for item in imports.items()]
            model = onnx.helper.make_model(graph, opset_imports=opsets)
            with np.errstate(all="ignore"):
                return np.asarray(reference.ReferenceEvaluator(model).run(None, feeds)[0])
        except Exception as error:  # it raises several unrelated types for a malformed node
            raise TensorError(f"{title(nodes[-1])} cannot be evaluated: {first_line(error)}") from error

    @cached_property
    def _initializers(self) -> dict[str, Any]:
        return {tensor.name: tensor for tensor in self.model.graph.initializer}

    def _evaluate(self, tensor: str, node: Node | None) -> np.ndarray | None:
        """The value of a tensor whose node's inputs, if it has any, are in `_values`."""
        if node is None:
            return self._read(tensor, self._initializers[tensor]) if tensor in self._initializers else None
        if operator(node) == "Constant" and any(item.name == "value" for item in node.attribute):
            return self._read(tensor, attributes(node)["value"])
        shape = self.shapes.get(tensor)
        feeds = {name: self._values.get(name) for name in node.input if name}
        if not _is_foldable(node) or shape is None or None in shape or any(v is None for v in feeds.values()):
            return None
        elements = math.prod(size for size in shape if size is not None)
        limit = FOLDED_ELEMENTS + FOLDED_TIMES_STORED * self._stored
        if self._folded + elements > limit:
            raise ModelError(f"{self.path}: {title(node)} makes a constant of {elements} elements, and the file's "
                             f"constant nodes may make {limit} in all: store the result instead")  # fmt: skip
        self._folded += elements
        try:
            return self.run([node], feeds, tensor)
        except TensorError:  # an operator that the evaluator lacks: the tensor counts as computed
            return None

    def _read(self, name: str, stored: Any) -> np.ndarray:
        """The numbers of an onnx.TensorProto. Raises TensorError."""
        onnx = require_onnx()
        fix = "export the model again"
        if stored.data_type not in onnx.TensorProto.DataType.values():
            raise TensorError(f"the stored numbers of {name!r} are of the unknown type {stored.data_type}: {fix}")
        try:
            value = np.asarray(onnx.numpy_helper.to_array(stored))
        except Exception as error:  # several unrelated types, from this package and from NumPy
            raise TensorError(f"the stored numbers of {name!r} cannot be read ({first_line(error)}): {fix}") from error
        if value.shape != tuple(stored.dims):
            raise TensorError(f"the stored numbers of {name!r} do not have its shape {tuple(stored.dims)}: {fix}")
        self._stored += value.size
        return value

    def _find_shapes(self) -> None:
        """Fills in shapes and types, in one walk."""
        make_type = require_onnx().helper.make_tensor_type_proto
        for value in self.model.graph.input:
            self._set_type(value.name, value.type)
        for tensor in self.model.graph.initializer:
            self._set_type(tensor.name, make_type(tensor.data_type, list(tensor.dims)))
        for node in self.nodes:
            try:
                found = self._infer(node)
            except TensorError as error:  # where an input is unknown already, its reason is the better one
                causes = [self.unknown[name] for name in node.input if name in self.unknown]
                self.unknown |= dict.fromkeys(node.output, next(iter(causes), str(error)))
                continue
            for name, value_type in found.items():
                self._set_type(name, value_type)
            self._follow_sizes(node)

    def _set_type(self, name: str, value_type: Any) -> None:
        """Keeps the type of a tensor. Raises ModelError for one of too many axes."""
        shape = known_shape(value_type)
        self._types[name] = value_type
        if shape is None:
            return
        if len(shape) > RANK_LIMIT:
            raise ModelError(f"{self.path}: the tensor {name!r} has {len(shape)} axes; up to {RANK_LIMIT} are read")
        self.shapes[name] = shape

    def _infer(self, node: Node) -> dict[str, Any]:
        """The types of a node's outputs. Raises TensorError for a node that ONNX's inference refuses."""
        onnx = require_onnx()
        _check_inferable(node)
        part = onnx.ModelProto(ir_version=self.model.ir_version or 8, opset_import=self.model.opset_import)
        part.graph.node.append(node)
        for name in dict.fromkeys(_read_names(node)):
            if name in self._types:
                part.graph.input.add(name=name, type=self._types[name])
        for name in dict.fromkeys(filter(None, node.input)):
            if (stored := self._small_constant(name)) is not None:
                part.graph.initializer.append(stored)
        for name in filter(None, node.output):
            part.graph.output.add(name=name)
        try:
            inferred = onnx.shape_inference.infer_shapes(part, strict_mode=True)
        except Exception as error:  # the C++ side raises several unrelated types
            raise TensorError(f"{title(node)}: {re.sub(_ERROR_PREFIX, '', first_line(error))}") from error
        return {value.name: value.type for value in inferred.graph.output}

    def _small_constant(self, name: str) -> Any:
        """An onnx.TensorProto of a constant that may be sizes, axes or pads; None for another tensor."""
        if not self._is_small(name):
            return None
        if name in self._initializers:
            return self._initializers[name]
        try:
            value = self.constant(name)
            return None if value is None else require_onnx().numpy_helper.from_array(value, name)
        except (TensorError, TypeError, ValueError):
            return None

    def _is_small(self, name: str) -> bool:
        """Whether a tensor is a number, or a list of up to SIZE_ELEMENTS."""
        shape = self.shapes.get(name)
        return shape is not None and len(shape) <= 1 and all(n is not None and n <= SIZE_ELEMENTS for n in shape)

    def _follow_sizes(self, node: Node) -> None:
        """Keeps what is known of a Shape node's numbers, and of what is made of them by moving them about.

        A size that is not known stands as 0 in one array and as 1 in another; what is equal in both is known.
        """
        if not node.input or not node.output or not self._is_small(node.output[0]):
            return
        try:
            pair = self._read_sizes(node) if operator(node) == "Shape" else self._move_sizes(node)
        except (TensorError, TypeError, ValueError):  # malformed: nothing is known
            return
        if pair is None:
            return
        self._sizes[node.output[0]] = pair
        if np.array_equal(*pair):
            self._values[node.output[0]] = pair[0]

    def _read_sizes(self, node: Node) -> tuple[np.ndarray, np.ndarray] | None:
        """Both arrays of a Shape node."""
        shape = self.shapes.get(node.input[0])
        if shape is None:
            return None
        values = attributes(node)
        asked = shape[values.get("start", 0) : values.get("end")]
        least, most = ([unknown if size is None else size for size in asked] for unknown in (0, 1))
        return np.array(least, np.int64), np.array(most, np.int64)

    def _move_sizes(self, node: Node) -> tuple[np.ndarray, np.ndarray] | None:
        """Both arrays of the output of a node that moves numbers of which there are two; None for other nodes."""
        moved = {*(node.input if operator(node) == "Concat" else node.input[:1])} & self._sizes.keys()
        if operator(node) not in _MOVES or not moved:
            return None
        others = {name: self.constant(name) for name in node.input if name and name not in moved}
        if any(value is None for value in others.values()):
            return None
        least, most = ({**others, **{name: self._sizes[name][side] for name in moved}} for side in (0, 1))
        return self.run([node], least, node.output[0]), self.run([node], most, node.output[0])


def _is_foldable(node: Node) -> bool:
    return operator(node) == "Constant" or operator(node) in FOLDABLE


def _read_names(node: Node) -> Iterator[str]:
    """The tensors a node reads, those its subgraphs (of If and Loop) read included."""
    return (name for inner in with_inner([node]) for name in inner.input if name)


def _check_inferable(node: Node) -> None:
    """Raises TensorError for a node whose inference would take memory without measure."""
    inner = [*with_inner([node])]
    if len(inner) > 1 and sum(operator(part).startswith("Gather") for part in inner) > INNER_GATHERS:
        raise TensorError(f"{title(node)}: its branches are too large to follow")
    for part in inner:
        parts = next((item.i for item in part.attribute if item.name == "num_outputs"), 0)
        if operator(part) == "Split" and parts > len(part.output):  # inference makes a list of so many sizes
            raise TensorError(f"{title(part)}: num_outputs={parts}, but it has {len(part.output)} outputs")
