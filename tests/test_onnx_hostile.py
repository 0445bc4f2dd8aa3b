"""ONNX files that are damaged, or made to take memory and time: read as far as they make sense, else a ModelError.

What is counted here is what a small file describes: elements that folding makes, nodes that inlining makes.
"""

from __future__ import annotations

import resource
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from convsched.errors import ModelError, ModelWarning
from convsched.graph.onnx import file as onnx_file
from convsched.graph.onnx import read as onnx_read
from convsched.graph.onnx.file import Graph
from convsched.graph.onnx.layers import ModelLayer, ModelLayers, read_model

OPSETS = [helper.make_opsetid("", 17), helper.make_opsetid("d", 1)]
CONV = helper.make_node("Conv", ["x", "w"], ["y"], name="conv")
WEIGHT = numpy_helper.from_array(np.ones((8, 3, 3, 3), np.float32), "w")
GIB = 2**30


@contextmanager
def bounded_memory(extra: int = GIB) -> Iterator[None]:
    """Within it the process can take `extra` bytes of addresses more; then allocations fail."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    pages = int(statm.read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def make(nodes: list[Any], weights: list[Any], functions: list[Any] | None = None) -> Any:
    """A model of the nodes, from x, an image of 3 x 8 x 8, to y."""
    graph = helper.make_graph(
        nodes, "test", [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 3, 8, 8))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], weights,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=OPSETS, ir_version=8, functions=functions or [])


def read(folder: Path, model: Any) -> ModelLayers:
    """What is read of a model's file, with 1 GiB of memory at most."""
    path = folder / "model.onnx"
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    with bounded_memory():
        return read_model(path)


def chain(kind: str, count: int, first: str = "w", **attributes: Any) -> list[Any]:
    """Nodes of one input, each of the one before, the last of which makes "end"."""
    names = [first, *(f"{kind}{i}" for i in range(count - 1)), "end"]
    return [helper.make_node(kind, [a], [b], **attributes) for a, b in pairwise(names)]


def function(name: str, *nodes: Any) -> Any:
    return helper.make_function("d", name, ["a"], ["b"], nodes, OPSETS)


def call(name: str, source: str, target: str) -> Any:
    return helper.make_node(name, [source], [target], domain="d")


def doubled(levels: int) -> list[Any]:
    """Functions of which each calls the next one twice; the last is one node."""
    pairs = [function(f"F{i}", call(f"F{i + 1}", "a", "t"), call(f"F{i + 1}", "t", "b")) for i in range(levels)]
    return [*pairs, function(f"F{levels}", helper.make_node("Relu", ["a"], ["b"]))]


def nested(levels: int) -> list[Any]:
    """Functions of which each calls the next one."""
    calls = [function(f"F{i}", call(f"F{i + 1}", "a", "b")) for i in range(levels)]
    return [*calls, function(f"F{levels}", helper.make_node("Relu", ["a"], ["b"]))]


@pytest.mark.parametrize("kind", ["Concat", "Gather", "Add"])
def test_what_doubles_and_is_not_needed_is_not_made(tmp_path: Path, kind: str) -> None:
    """2^40 numbers, or axes, of which no layer asks."""
    one = numpy_helper.from_array(np.ones((1, 1) if kind == "Gather" else 1, np.int64), "s0")
    attributes: dict[str, Any] = {"axis": 0} if kind != "Add" else {}
    nodes = [helper.make_node(kind, [f"s{i}"] * 2, [f"s{i + 1}"], **attributes) for i in range(40)]
    if kind == "Gather":
        with pytest.raises(ModelError, match=r"the tensor 's6' has 65 axes; up to 64 are read"):
            read(tmp_path, make([*nodes, CONV], [WEIGHT, one]))
    else:
        assert len(read(tmp_path, make([*nodes, CONV], [WEIGHT, one])).layers) == 1


def test_doubled_weights_are_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("Concat", [f"s{i}"] * 2, [f"s{i + 1}"], axis=0) for i in range(40)]
    last = helper.make_node("Conv", ["x", "s40"], ["y"])
    stored = numpy_helper.from_array(np.ones((8, 3, 3, 3), np.float32), "s0")
    with pytest.raises(ModelError, match=r"Concat s12 makes a constant of .* constant nodes may make .* in all: store"):
        read(tmp_path, make([*nodes, last], [stored]))


def test_weights_that_are_broadcast_without_measure_are_refused(tmp_path: Path) -> None:
    sides = [numpy_helper.from_array(np.ones(shape, np.float32), name)
             for name, shape in (("a", (10**5, 1)), ("b", (1, 10**5)))]  # fmt: skip
    nodes = [helper.make_node("Mul", ["a", "b"], ["ab"], name="grow"), helper.make_node("MatMul", ["x", "ab"], ["y"])]
    with pytest.raises(ModelError, match="Mul grow makes a constant of 10000000000 elements"):
        read(tmp_path, make(nodes, sides))


def test_sizes_that_double_are_not_followed(tmp_path: Path) -> None:
    """The sizes of a shape, joined with themselves 40 times."""
    nodes = [helper.make_node("Shape", ["x"], ["s0"])]
    nodes += [helper.make_node("Concat", [f"s{i}"] * 2, [f"s{i + 1}"], axis=0) for i in range(40)]
    nodes += [helper.make_node("Reshape", ["x", "s40"], ["r"]), CONV]
    assert len(read(tmp_path, make(nodes, [WEIGHT])).layers) == 1


def test_a_split_into_2_to_the_31_parts_is_not_made(tmp_path: Path) -> None:
    split = helper.make_node("Split", ["x"], ["part"], num_outputs=2**31 - 1, name="split")
    model = make([split, CONV, helper.make_node("Conv", ["part", "w"], ["z"])], [WEIGHT])
    model.opset_import[0].version = 18
    assert "(Split split: num_outputs=2147483647, but it has 1 outputs)" in read(tmp_path, model).skipped[0]


def test_doubled_axes_in_a_branch_are_not_followed(tmp_path: Path) -> None:
    gathers = [helper.make_node("Gather", [f"s{i}"] * 2, [f"s{i + 1}"]) for i in range(40)]
    branch = helper.make_graph(gathers, "b", [], [helper.make_tensor_value_info("s40", TensorProto.INT64, None)])
    nodes = [helper.make_node("If", ["flag"], ["z"], then_branch=branch, else_branch=branch), CONV]
    stored = [numpy_helper.from_array(np.array(True), "flag"), numpy_helper.from_array(np.zeros((1, 1), int), "s0")]
    assert len(read(tmp_path, make(nodes, [WEIGHT, *stored])).layers) == 1


@pytest.mark.parametrize(("functions", "message"), [
    (doubled(40), "its function 'F24' would expand to more than 100000 nodes; export the model again without"),
    (nested(200), "its function 'F100' would expand to more than 100 functions within functions"),
    ([function("F0", call("F0", "a", "b"))], "its function 'F0' calls itself; export the model again without"),
    ([function("F0", call("F1", "a", "b")), function("F1", call("F0", "a", "b"))], "its function 'F[01]' calls itself"),
], ids=["doubled", "nested", "itself", "each other"])  # fmt: skip
def test_functions_without_measure_are_refused(tmp_path: Path, functions: list[Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read(tmp_path, make([CONV, call("F0", "y", "z")], [WEIGHT], functions))


def test_many_calls_and_large_functions_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [call("F0", "y", f"z{i}") for i in range(9)]
    model = make([CONV, *calls], [WEIGHT], doubled(2))
    assert len(read(tmp_path, model).layers) == 1
    monkeypatch.setattr(onnx_read, "INLINED_NODES", 50)
    with pytest.raises(ModelError, match="the calls of its functions would expand to more than 50 nodes"):
        read(tmp_path, model)
    monkeypatch.setattr(onnx_read, "INLINED_NODES", 100)
    monkeypatch.setattr(onnx_read, "INLINED_BYTES", 1000)
    with pytest.raises(ModelError, match="the calls of its functions would expand to more than 1000 bytes"):
        read(tmp_path, model)


def test_functions_are_inlined(tmp_path: Path) -> None:
    """A layer inside a function that is called twice."""
    constant = helper.make_node("Constant", [], ["v"], value=WEIGHT)
    body = function("F0", constant, helper.make_node("Conv", ["a", "v"], ["b"]))
    model = make([call("F0", "x", "y"), call("F0", "x", "z")], [], [body])
    (layer,) = read(tmp_path, model).layers
    assert (layer.count, layer.problem.weight_shape) == (2, (8, 3, 3, 3))


def test_a_long_chain_before_a_weight(tmp_path: Path) -> None:
    model = make([*chain("Identity", 1500), helper.make_node("Conv", ["x", "end"], ["y"])], [WEIGHT])
    np.testing.assert_array_equal(read(tmp_path, model).layers[0].weight, numpy_helper.to_array(WEIGHT))


def test_a_long_chain_that_is_not_constant(tmp_path: Path) -> None:
    model = make([*chain("Identity", 1500, "x"), CONV, helper.make_node("Conv", ["x", "end"], ["z"])], [WEIGHT])
    assert "'end' is computed by Identity end, not a constant" in read(tmp_path, model).skipped[0]


def damaged_weight(change: Callable[[Any], None]) -> Any:
    tensor = TensorProto()
    tensor.CopyFrom(WEIGHT)
    change(tensor)
    return tensor


@pytest.mark.parametrize("change", [
    lambda t: setattr(t, "data_type", 111), lambda t: setattr(t, "data_type", 0),
    lambda t: setattr(t, "data_type", TensorProto.STRING), lambda t: setattr(t, "raw_data", b"123"),
    lambda t: t.dims.__setitem__(0, 10**9), lambda t: t.dims.__setitem__(0, -8), lambda t: t.dims.extend([2**40] * 9),
    lambda t: t.ClearField("raw_data"), lambda t: setattr(t, "data_type", TensorProto.INT4),
], ids=["unknown type", "no type", "strings", "few bytes", "many", "negative", "too many", "no data",
         "int4"])  # fmt: skip
def test_weights_that_are_damaged(tmp_path: Path, change: Callable[[Any], None]) -> None:
    with pytest.raises(ModelError, match=r"model\.onnx: no layer to read: Conv conv: .*'w'"):
        read(tmp_path, make([CONV], [damaged_weight(change)]))


def test_folding_counts_what_it_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As much as the limit and 8 times what is stored, and not one element more."""
    monkeypatch.setattr(onnx_file, "FOLDED_ELEMENTS", 216)
    model = make([*chain("Identity", 9), CONV], [WEIGHT])
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    assert Graph.load(path).constant("end") is not None
    onnx.save(make([*chain("Identity", 10), CONV], [WEIGHT]), path)
    with pytest.raises(ModelError, match=r"Identity end makes a constant of 216 elements, and .* may make 1944"):
        Graph.load(path).constant("end")


def test_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    content = make([CONV], [WEIGHT]).SerializeToString().replace(b"conv", b"co\x80v")
    with pytest.raises(ModelError, match=r"cannot be read as an ONNX model: the name b'co\\x80v' is not UTF-8"):
        read(tmp_path, content)


def test_a_name_of_several_lines_is_one_line(tmp_path: Path) -> None:
    node = helper.make_node("Conv", ["x", "y"], ["z"], name="one\ntwo")
    assert read(tmp_path, make([CONV, node], [WEIGHT])).skipped[0].startswith("Conv one?two: 'y' is computed by Conv")


def test_operators_of_other_domains_are_not_those_of_onnx(tmp_path: Path) -> None:
    """Neither a layer, nor an activation, nor folded, though their names are the same."""
    nodes = [
        helper.make_node("Identity", ["w"], ["v"], domain="d"),
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Relu", ["c"], ["y"], domain="d"),
        helper.make_node("Conv", ["x", "w"], ["z"], domain="d"),
        helper.make_node("Conv", ["x", "v"], ["u"]),
    ]
    found = read(tmp_path, make(nodes, [WEIGHT]))
    assert [(layer.count, layer.problem.activation) for layer in found.layers] == [(1, None)]
    assert found.skipped == ("Conv u: 'v' is computed by d.Identity v, not a constant",)


def seeds() -> dict[str, bytes]:
    """Models with what the reader looks at: layers, what is folded, sizes, subgraphs, functions."""
    values = {"scale": np.ones(8, np.float32), "six": np.array(6, np.float32), "zero": np.array(0, np.float32),
              "flat": np.array([1, -1]), "start": np.array([0]), "end1": np.array([1])}  # fmt: skip
    stored = [WEIGHT, *(numpy_helper.from_array(value, name) for name, value in values.items())]
    ending = [
        helper.make_node("Conv", ["x", "w"], ["t"], pads=[1, 1, 1, 1], strides=[2, 2], kernel_shape=[3, 3], group=1),
        helper.make_node("BatchNormalization", ["t", *["scale"] * 4], ["u"], epsilon=1e-3),
        helper.make_node("Clip", ["u", "zero", "six"], ["y"]),
    ]
    gate = [
        helper.make_node("Conv", ["x", "w"], ["t"], auto_pad="SAME_UPPER", dilations=[1, 2]),
        helper.make_node("HardSigmoid", ["t"], ["h"], alpha=0.2),
        helper.make_node("Mul", ["t", "h"], ["y"]),
    ]
    sizes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Slice", ["s", "start", "end1"], ["n"]),
        helper.make_node("Concat", ["n", "flat"], ["sizes"], axis=0),
        helper.make_node("Reshape", ["x", "flat"], ["f"]),
        helper.make_node("Transpose", ["m"], ["mt"], perm=[1, 0]),
        helper.make_node("Gemm", ["f", "mt", "scale"], ["y"], alpha=0.5, transB=0),
    ]
    matrix = numpy_helper.from_array(np.ones((8, 192), np.float32), "m")
    branch = helper.make_graph([helper.make_node("Neg", ["y"], ["i"])], "b", [],
                               [helper.make_tensor_value_info("i", TensorProto.FLOAT, None)])  # fmt: skip
    inner = [CONV, helper.make_node("If", ["scale"], ["z"], then_branch=branch, else_branch=branch),
             call("F0", "y", "q")]  # fmt: skip
    models = [make(ending, stored), make(gate, stored), make(sizes, [*stored, matrix]), make(inner, stored, doubled(2))]
    return {f"seed {number}": model.SerializeToString() for number, model in enumerate(models)}


SEEDS = seeds()
TENSOR_NAMES = ["x", "w", "y", "t", "scale", "six", "flat", "", "nothing"]
OPERATORS = ["Conv", "Gemm", "MatMul", "Concat", "Gather", "Reshape", "Shape", "Cast", "Split", "If", "F0", "", "Clip",
             "BatchNormalization", "DequantizeLinear", "Constant", "ConstantOfShape", "Expand", "Range", "Loop"]
NUMBERS = st.sampled_from([0, 1, -1, 2, 3, 8, 111, 2**31 - 1, -(2**31), 2**62]) | st.integers(-(2**63), 2**63 - 1)


def parts(message: Any) -> Iterator[tuple[Any, Any, int | None]]:
    """Every field that is set in a protobuf, at any depth: the message, the field, and the index in a list."""
    for descriptor, value in message.ListFields():
        listed = getattr(descriptor, "is_repeated", False)
        for index, item in enumerate(value) if listed else [(None, value)]:
            yield message, descriptor, index
            if descriptor.message_type is not None:
                yield from parts(item)


def mutate(model: Any, data: st.DataObject) -> None:
    """Changes one field: another number, name or type, another value's copy, or nothing in its place."""
    fields = [*parts(model)]
    message, descriptor, index = fields[data.draw(st.integers(0, len(fields) - 1))]
    values = getattr(message, descriptor.name)
    if descriptor.message_type is not None:
        if index is None or data.draw(st.booleans()):
            message.ClearField(descriptor.name)
        else:
            values.add().CopyFrom(values[data.draw(st.integers(0, len(values) - 1))])
        return
    new = data.draw(another(descriptor))
    try:
        if index is None:
            setattr(message, descriptor.name, new)
        else:
            values[index] = new
    except (ValueError, TypeError, OverflowError):  # beyond the field's 32 bits, or not of its enumeration
        message.ClearField(descriptor.name)


def another(descriptor: Any) -> st.SearchStrategy[Any]:
    """A value for a field of this type."""
    match descriptor.cpp_type:
        case descriptor.CPPTYPE_STRING if descriptor.type == descriptor.TYPE_BYTES:
            return st.binary(max_size=40)
        case descriptor.CPPTYPE_STRING:
            return st.sampled_from(OPERATORS if descriptor.name == "op_type" else TENSOR_NAMES)
        case descriptor.CPPTYPE_FLOAT | descriptor.CPPTYPE_DOUBLE:
            return st.floats(width=32)
        case _:
            return NUMBERS


def read_mutated(folder: Path, data: st.DataObject) -> None:
    """Reads a model in which a few fields, then perhaps a few bytes, are changed: layers or a ModelError."""
    model = onnx.load_from_string(SEEDS[data.draw(st.sampled_from([*SEEDS]))])
    for _ in range(data.draw(st.integers(1, 4))):
        mutate(model, data)
    content = bytearray(model.SerializeToString())
    for _ in range(data.draw(st.sampled_from([0, 0, 1, 3]))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    refused = ""
    layers: tuple[ModelLayer, ...] = ()
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            layers = read(folder, bytes(content)).layers
    except ModelError as error:
        refused = str(error)
    assert bool(layers) != refused.startswith(f"{folder / 'model.onnx'}: ")
    assert "\n" not in refused
    assert all(one.category is ModelWarning and "\n" not in str(one.message) for one in said)  # not finite weights
    assert all(layer.weight.shape == layer.problem.weight_shape for layer in layers)


@settings(derandomize=True, database=None)
@given(data=st.data())
def test_mutated_models(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    read_mutated(tmp_path_factory.getbasetemp(), data)


@pytest.mark.slow
@settings(max_examples=2500, database=None)
@given(data=st.data())
def test_mutated_models_widely(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    read_mutated(tmp_path_factory.getbasetemp(), data)
