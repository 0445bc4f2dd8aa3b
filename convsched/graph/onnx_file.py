"""An ONNX file as a graph that can be asked: who made this tensor, who reads it, what shape and value it has.

`Graph.load` is the only place that opens a model file. Shapes come from ONNX's own shape inference after
the open sizes of the inputs are fixed; values come from initializers, Constant nodes, and nodes of
constants only (a Cast from float16, a Transpose of a weight matrix), which ONNX's reference evaluator runs.
A Shape node counts as constant where the shape is known: what a file computes from it, above all where a
Reshape leads, makes further shapes known, so inference and folding take turns until nothing is new.
"""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from convsched.errors import ModelError
from convsched.lazy import cached_property

Shape = tuple[int | None, ...]
Node = Any  # onnx.NodeProto: the package is optional, so its types cannot be named
Model = Any  # onnx.ModelProto

# Nodes worth computing when all their inputs are constant: what exporters put before a weight or a size.
FOLDABLE = frozenset({
    "Identity", "Cast", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Concat", "Slice", "Gather",
    "Add", "Sub", "Mul", "Div", "DequantizeLinear",
})  # fmt: skip


@dataclass(frozen=True, eq=False)
class Graph:
    """A loaded model; tensors are named as in the file."""

    path: Path
    model: Model
    _values: dict[str, np.ndarray | None] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path, input_size: tuple[int, int] | None = None) -> Graph:
        """Reads a model for batch 1; `input_size` (height, width) fills in what the file leaves open.

        Raises ModelError for a file that is missing, is no ONNX, or whose input size is open or another.
        """
        onnx = require_onnx()
        model = _read(onnx, Path(path))
        for value in _data_inputs(model):
            _fix_size(Path(path), value, input_size)
        del model.graph.value_info[:]  # sizes of another batch or image; inference finds the right ones
        for value in model.graph.output:
            value.type.tensor_type.ClearField("shape")
        graph = cls(Path(path), _infer_shapes(onnx, Path(path), model))
        while graph._fold_sizes(onnx):
            graph = cls(Path(path), _infer_shapes(onnx, Path(path), graph.model))
        return graph

    @property
    def nodes(self) -> list[Node]:
        """The nodes, in the file's order: a node comes after those that make its inputs."""
        return list(self.model.graph.node)

    @cached_property
    def inputs(self) -> frozenset[str]:
        """The names of the tensors that a caller gives."""
        return frozenset(value.name for value in _data_inputs(self.model))

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

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """The known shapes; an axis of unknown size is None."""
        graph = self.model.graph
        shapes: dict[str, Shape] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        for value in (*graph.input, *graph.value_info, *graph.output):
            if value.type.tensor_type.HasField("shape"):
                shapes[value.name] = _dims(value)
        return shapes

    def only_consumer(self, tensor: str) -> Node | None:
        """The one node that reads a tensor, if there is exactly one and nobody outside sees the tensor."""
        nodes = self.consumers.get(tensor, [])
        return nodes[0] if len(nodes) == 1 and tensor not in self.outputs else None

    def constant(self, tensor: str) -> np.ndarray | None:
        """The value of a tensor that does not depend on the inputs, or None."""
        if tensor not in self._values:
            self._values[tensor] = None  # a tensor that depends on itself is no constant
            self._values[tensor] = self._evaluate(tensor)
        return self._values[tensor]

    @cached_property
    def _initializers(self) -> dict[str, Any]:
        return {tensor.name: tensor for tensor in self.model.graph.initializer}

    def _evaluate(self, tensor: str) -> np.ndarray | None:
        onnx = require_onnx()
        if tensor in self._initializers:
            return np.asarray(onnx.numpy_helper.to_array(self._initializers[tensor]))
        node = self.producers.get(tensor)
        if node is None or (node.op_type not in FOLDABLE and node.op_type != "Constant"):
            return None
        feeds = {name: self.constant(name) for name in node.input if name}
        if any(value is None for value in feeds.values()):
            return None
        try:
            return self.run([node], feeds, tensor)
        except Exception:  # an operator that the evaluator lacks: the tensor counts as computed
            return None

    def _fold_sizes(self, onnx: Any) -> bool:
        """Writes known sizes, and what is computed from them, into the model as Constants; whether any.

        Shape(x), Slice, Concat, Reshape(x, .)  ->  Constant, Constant, Constant, Reshape(x, .)
        """
        folded: set[str] = set()
        for node in self.nodes:
            if node.op_type == "Shape" and node.input:
                value = self._known_shape(node)
            elif not folded.isdisjoint(node.input):
                value = self.constant(node.output[0])
            else:
                continue
            if value is not None:
                name = node.output[0]
                tensor = onnx.numpy_helper.from_array(value, name)
                node.CopyFrom(onnx.helper.make_node("Constant", [], [name], node.name, value=tensor))
                self._values[name] = value
                folded.add(name)
        return bool(folded)

    def _known_shape(self, node: Node) -> np.ndarray | None:
        """The value of a Shape node, if the sizes that it asks for are known."""
        shape = self.shapes.get(node.input[0])
        if shape is None:
            return None
        values = attributes(node)
        sizes = shape[values.get("start", 0) : values.get("end")]
        return None if None in sizes else np.array(sizes, np.int64)

    def run(self, nodes: list[Node], feeds: dict[str, Any], output: str) -> np.ndarray:
        """Runs a few nodes by ONNX's reference evaluator."""
        onnx = require_onnx()
        reference = importlib.import_module("onnx.reference")
        inputs = [onnx.helper.make_value_info(name, onnx.TypeProto()) for name in feeds]
        outputs = [onnx.helper.make_value_info(output, onnx.TypeProto())]
        graph = onnx.helper.make_graph(nodes, "part", inputs, outputs)
        imports = {item.domain: item.version for item in self.model.opset_import}
        if any(node.op_type == "DequantizeLinear" for node in nodes):
            imports[""] = max(imports.get("", 19), 19)  # the evaluator starts at 19, with the same meaning
        opsets = [onnx.helper.make_opsetid(*item) for item in imports.items()]
        model = onnx.helper.make_model(graph, opset_imports=opsets)
        return np.asarray(reference.ReferenceEvaluator(model).run(None, feeds)[0])


def attributes(node: Node) -> dict[str, Any]:
    """A node's attributes as Python values; byte strings as text."""
    onnx = require_onnx()
    values = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}


def require_onnx() -> Any:
    """The onnx package with the parts used here. Raises ModelError, which says how to install it."""
    try:
        onnx = importlib.import_module("onnx")
        for part in ("onnx.helper", "onnx.numpy_helper", "onnx.shape_inference"):
            importlib.import_module(part)
    except ImportError as error:
        raise ModelError("reading a model needs the onnx package: pip install 'convsched[onnx]'") from error
    return onnx


def _read(onnx: Any, path: Path) -> Model:
    """The file's model, with local functions inlined."""
    if not path.is_file():
        raise ModelError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'there is no such file'}")
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf's errors, and those of the file with the external data
        raise ModelError(f"{path}: cannot be read as an ONNX model: {_first_line(error)}") from error
    if not model.graph.node:
        raise ModelError(f"{path}: cannot be read as an ONNX model: it holds no graph")
    if model.functions:
        inliner = importlib.import_module("onnx.inliner")
        model = inliner.inline_local_functions(model)
    _check_order(path, model)
    return model


def _check_order(path: Path, model: Model) -> None:
    """Raises ModelError unless nodes read what is made before them and each tensor is made once: no cycles."""
    graph = model.graph
    sparse = (tensor.values for tensor in graph.sparse_initializer)
    known = {"", *(value.name for value in (*graph.input, *graph.initializer, *sparse))}
    for node in graph.node:
        what = f"{path}: cannot be read as an ONNX model: {node.op_type} {node.name or 'without a name'}"
        for name in node.input:
            if name not in known:
                raise ModelError(f"{what} reads {name!r}, which nothing before it makes")
        for name in filter(None, node.output):
            if name in known:
                raise ModelError(f"{what} makes {name!r}, which is there already")
            known.add(name)


def _infer_shapes(onnx: Any, path: Path, model: Model) -> Model:
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception as error:  # the C++ side raises several unrelated types
        raise ModelError(f"{path}: its shapes do not fit together: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _data_inputs(model: Model) -> Iterator[Any]:
    """The graph's inputs without the weights, which old files list among them."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return (value for value in model.graph.input if value.name not in weights)


def _read_names(node: Node) -> Iterable[str]:
    """The tensors a node reads, those its subgraphs (of If and Loop) read included."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from _read_names(inner)


def _dims(value: Any) -> Shape:
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None for dim in dims)


def _fix_size(path: Path, value: Any, input_size: tuple[int, int] | None) -> None:
    """Sets the open axes of a graph input: batch 1, and height and width as asked."""
    shape = _dims(value)
    wanted: dict[int, int] = {0: 1} if shape and shape[0] is None else {}
    spatial = _spatial_axes(shape)
    given = (input_size or ())[-len(spatial) :] if spatial else ()
    for axis, size in zip(spatial, given, strict=bool(given)):
        if shape[axis] not in (None, size):
            fixed = f"has the fixed shape {_show(shape)}, which {given} does not fit"
            raise ModelError(f"{path}: its input {value.name!r} {fixed}")
        wanted[axis] = size
    if any(shape[axis] is None and axis not in wanted for axis in spatial):
        hint = "--input-size HxW on the command line, input_size=(H, W) in Python"
        raise ModelError(f"{path}: its input {value.name!r} has the open shape {_show(shape)}: give {hint}")
    for axis, size in wanted.items():
        value.type.tensor_type.shape.dim[axis].dim_value = size


def _spatial_axes(shape: Shape) -> tuple[int, ...]:
    """The axes of height and width (of a signal: length) of an image; none for other tensors.

    Channels come last only where the last axis, and not the second, has 1, 3 or 4 of them.
    """
    if len(shape) not in (3, 4):
        return ()
    last = shape[-1] in (1, 3, 4) and shape[1] not in (1, 3, 4)
    return tuple(range(1, len(shape) - 1)) if last else tuple(range(2, len(shape)))


def _show(shape: Shape) -> str:
    return "(" + ", ".join("?" if size is None else str(size) for size in shape) + ")"
