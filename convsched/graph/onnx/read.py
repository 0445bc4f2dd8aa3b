"""Reading an ONNX file: the model for batch 1, with local functions inlined and the sizes of its inputs fixed.

A file is not trusted. A few kilobytes of functions that call one another twice describe 2^30 nodes, so what inlining
makes is counted before it is made; tensors must be made once and before they are read, so that a model has no cycles.
Whatever goes wrong is a ModelError with the file's name, and the node's where there is one.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from convsched.errors import ModelError

Shape = tuple[int | None, ...]
Node = Any  # onnx.NodeProto: the package is optional, so its types cannot be named
Model = Any  # onnx.ModelProto

# What inlining local functions may make. The largest models that are exported with functions have some 20,000 nodes.
INLINED_NODES = 100_000
INLINED_BYTES = 2**28
FUNCTION_DEPTH = 100  # functions within functions; the inliner goes down by recursion

_FunctionName = tuple[str, str, str]  # domain, name, overload


def read_file(path: Path, input_size: tuple[int, int] | None) -> Model:
    """The file's model for batch 1; `input_size` (height, width) fills in what the file leaves open.

    Raises ModelError for a file that is missing, cannot be read, describes more than INLINED_NODES, is not in order,
    or whose input size is open or another.
    """
    onnx = require_onnx()
    if not path.is_file():
        raise ModelError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'there is no such file'}")
    try:
        model = onnx.load(path)
        _check_names(model)
    except Exception as error:  # protobuf's errors, and those of the file with the external data
        raise ModelError(f"{path}: cannot be read as an ONNX model: {first_line(error)}") from error
    if not model.graph.node:
        raise ModelError(f"{path}: cannot be read as an ONNX model: it has no nodes")
    if model.functions:
        model = _inline(path, model)
    _check_order(path, model)
    for value in data_inputs(model):
        _fix_size(path, value, input_size)
    return model


def require_onnx() -> Any:
    """The onnx package with the parts used here. Raises ModelError, which says how to install it."""
    try:
        onnx = importlib.import_module("onnx")
        for part in ("onnx.helper", "onnx.numpy_helper", "onnx.shape_inference"):
            importlib.import_module(part)
    except ImportError as error:
        raise ModelError("reading a model needs the onnx package: pip install 'convsched[onnx]'") from error
    return onnx


def attributes(node: Node) -> dict[str, Any]:
    """A node's attributes as Python values; byte strings as text. Raises ValueError for one that is malformed."""
    onnx = require_onnx()
    values = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}


def operator(node: Node) -> str:
    """The name of a node's operator; one of another domain than ONNX's own has the domain in front."""
    return str(node.op_type) if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


def title(node: Node) -> str:
    """A node as messages name it, in one line: its operator, and its name or else its first output's."""
    text = f"{operator(node)} {node.name or next(iter(node.output), '') or 'without a name'}"
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def with_inner(nodes: Iterable[Node]) -> Iterator[Node]:
    """The nodes and those of their subgraphs (of If and Loop), at any depth."""
    pending = list(nodes)
    while pending:
        node = pending.pop()
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                pending.extend(graph.node)


def data_inputs(model: Model) -> Iterator[Any]:
    """The graph's inputs without the weights, which old files list among them."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return (value for value in model.graph.input if value.name not in weights)


def known_shape(value_type: Any) -> Shape | None:
    """The shape in an onnx.TypeProto, an axis of unknown size as None; None if there is no shape."""
    if not value_type.tensor_type.HasField("shape"):
        return None
    dims = value_type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else None for dim in dims)


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type's name."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _check_names(model: Model) -> None:
    """Raises ValueError for a name that is not UTF-8, which protobuf gives as bytes."""
    for name in _names(model):
        if not isinstance(name, str):
            raise ValueError(f"the name {name!r} is not UTF-8")


def _names(model: Model) -> Iterator[Any]:
    """All names in a model that are read here."""
    graphs = (model.graph.node, *(function.node for function in model.functions))
    for node in with_inner(node for nodes in graphs for node in nodes):
        yield from (node.name, node.op_type, node.domain, node.overload, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)
    for named in (*model.graph.input, *model.graph.output, *model.graph.initializer, *model.functions):
        yield named.name
    for function in model.functions:
        yield from (function.domain, function.overload)
    yield from (item.domain for item in model.opset_import)
    yield from (tensor.values.name for tensor in model.graph.sparse_initializer)


def _inline(path: Path, model: Model) -> Model:
    """The model without local functions."""
    _check_functions(path, model)
    try:
        return importlib.import_module("onnx.inliner").inline_local_functions(model)
    except Exception as error:  # the C++ side raises several unrelated types
        raise ModelError(f"{path}: its functions cannot be inlined: {first_line(error)}; "
                         "export the model again without functions") from error  # fmt: skip


def _check_functions(path: Path, model: Model) -> None:
    """Raises ModelError unless inlining ends and stays within the limits; it is counted, not done.

    nodes(f) = own nodes of f + sum of nodes(g) over the calls of g in f; likewise bytes and depth.
    """
    bodies = {(body.domain, body.name, body.overload): body for body in model.functions}
    calls = {name: _calls(body.node, bodies) for name, body in bodies.items()}
    try:
        order = [*TopologicalSorter(calls).static_order()]  # the called before the callers
    except CycleError as error:
        raise ModelError(f"{path}: its function {error.args[1][0][1]!r} calls itself; "
                         "export the model again without functions") from error  # fmt: skip
    nodes: dict[_FunctionName, int] = {}
    size: dict[_FunctionName, int] = {}
    depth: dict[_FunctionName, int] = {}
    for name in order:
        called = calls[name].items()
        nodes[name] = len(bodies[name].node) + sum(count * nodes[inner] for inner, count in called)
        size[name] = bodies[name].ByteSize() + sum(count * size[inner] for inner, count in called)
        depth[name] = 1 + max((depth[inner] for inner, _ in called), default=0)
        _check_inlined(path, f"its function {name[1]!r}", nodes[name], size[name], depth[name])
    called = _calls(model.graph.node, bodies).items()
    all_nodes, all_bytes = (sum(count * total[name] for name, count in called) for total in (nodes, size))
    _check_inlined(path, "the calls of its functions", all_nodes, all_bytes, max(depth.values()))


def _check_inlined(path: Path, what: str, nodes: int, size: int, depth: int) -> None:
    """Raises ModelError where functions would expand to more than the limits."""
    for number, limit, unit in ((nodes, INLINED_NODES, "nodes"), (size, INLINED_BYTES, "bytes"),
                                (depth, FUNCTION_DEPTH, "functions within functions")):  # fmt: skip
        if number > limit:
            raise ModelError(f"{path}: {what} would expand to more than {limit} {unit}; "
                             "export the model again without functions, or with fewer calls")  # fmt: skip


def _calls(nodes: Iterable[Node], bodies: dict[_FunctionName, Any]) -> Counter[_FunctionName]:
    """How often the nodes, and those of their subgraphs, call each function."""
    names = ((node.domain, node.op_type, node.overload) for node in with_inner(nodes))
    return Counter(name for name in names if name in bodies)


def _check_order(path: Path, model: Model) -> None:
    """Raises ModelError unless nodes read what is made before them and each tensor is made once: no cycles."""
    graph = model.graph
    sparse = (tensor.values for tensor in graph.sparse_initializer)
    known = {"", *(value.name for value in (*graph.input, *graph.initializer, *sparse))}
    for node in graph.node:
        what = f"{path}: cannot be read as an ONNX model: {title(node)}"
        for name in node.input:
            if name not in known:
                raise ModelError(f"{what} reads {name!r}, which nothing before it makes: export the model again")
        for name in filter(None, node.output):
            if name in known:
                raise ModelError(f"{what} makes {name!r}, which is there already: export the model again")
            known.add(name)


def _fix_size(path: Path, value: Any, input_size: tuple[int, int] | None) -> None:
    """Sets the open axes of a graph input (some exporters write 0 for open): batch 1, height and width as asked."""
    shape = tuple(size or None for size in known_shape(value.type) or ())
    wanted: dict[int, int] = {0: 1} if shape and shape[0] is None else {}
    spatial = _spatial_axes(shape)
    given = (input_size or ())[-len(spatial) :] if spatial else ()
    for axis, size in zip(spatial, given, strict=bool(given)):
        if shape[axis] not in (None, size):
            fixed = f"has the fixed shape {_show(shape)}, which {given} does not fit: leave the size out"
            raise ModelError(f"{path}: its input {value.name!r} {fixed}")
        wanted[axis] = size
    if any(shape[axis] is None and axis not in wanted for axis in spatial):
        hint = "--input-size HxW on the command line, input_size=(H, W) in Python"
        raise ModelError(f"{path}: its input {value.name!r} has the open shape {_show(shape)}: give {hint}")
    for axis, fixed_size in enumerate(shape):
        dim = value.type.tensor_type.shape.dim[axis]
        dim.Clear()
        if (known := wanted.get(axis, fixed_size)) is not None:
            dim.dim_value = known


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
