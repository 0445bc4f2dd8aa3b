"""Layers read from ONNX files equal what ONNX's reference evaluator computes for the same file."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from convsched.errors import ModelError
from convsched.graph.onnx.layers import ModelLayer, read_model
from convsched.problem import Conv2d, Linear
from convsched.problem.reference import convolve

INPUT = ("x", (1, 4, 9, 11))


def integers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)


def save(
    folder: Path,
    nodes: list[Any],
    weights: dict[str, np.ndarray],
    *,
    inputs: tuple[tuple[str, tuple[int | str | None, ...]], ...] = (INPUT,),
    outputs: tuple[str, ...] = ("y",),
    opset: int = 17,
) -> Path:
    """Writes a model whose outputs have no declared shape."""
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


def only(path: Path, **options: Any) -> ModelLayer:
    (layer,) = read_model(path, **options).layers
    return layer


def check(path: Path, layer: ModelLayer, shape: tuple[int, ...] = INPUT[1]) -> None:
    """The layer computes the model's first output."""
    x = integers(*shape, seed=1)
    results: Any = ReferenceEvaluator(str(path)).run(None, {"x": x})
    expected = results[0]
    y = convolve(layer.problem, x.reshape(layer.problem.input_shape), layer.weight, layer.bias)
    np.testing.assert_allclose(y.reshape(expected.shape), expected, rtol=1e-5, atol=1e-4)
    assert layer.weight.dtype == np.float32
    assert layer.weight.shape == layer.problem.weight_shape
    assert (layer.bias is not None) == layer.problem.bias


def conv(output: str = "y", *, bias: bool = False, **attributes: Any) -> Any:
    return helper.make_node("Conv", ["x", "w", "b"] if bias else ["x", "w"], [output], **attributes)


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"kernel_shape": [3, 2], "pads": [1, 0, 1, 1]},
        {"strides": [2, 1], "pads": [0, 1, 2, 3]},
        {"dilations": [2, 3], "pads": [2, 2, 2, 2]},
        {"group": 2},
        {"auto_pad": "VALID", "strides": [2, 2]},
        {"auto_pad": "SAME_UPPER"},
        {"auto_pad": "SAME_LOWER"},
        {"auto_pad": "SAME_UPPER", "strides": [2, 3]},
        {"auto_pad": "SAME_LOWER", "strides": [2, 3]},
        {"auto_pad": "NOTSET"},
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [False, True])
def test_conv(tmp_path: Path, attributes: dict[str, Any], bias: bool) -> None:
    weights = {"w": integers(6, 4 // attributes.get("group", 1), 3, 2), "b": integers(6)}
    path = save(tmp_path, [conv(bias=bias, **attributes)], weights)
    layer = only(path)
    assert isinstance(layer.problem, Conv2d)
    assert layer.problem.bias == bias
    check(path, layer)


def test_same_padding_counts_the_dilation(tmp_path: Path) -> None:
    path = save(tmp_path, [conv(auto_pad="SAME_UPPER", dilations=[2, 3])], {"w": integers(6, 4, 3, 2)})
    problem = only(path).problem
    assert problem == Conv2d(4, 6, (3, 2), 1, (2, 1, 2, 2), (2, 3), bias=False, input_size=(9, 11))


def test_a_1d_convolution_is_one_of_height_1(tmp_path: Path) -> None:
    node = conv(strides=[2], pads=[1, 3], dilations=[2], bias=True)
    weights = {"w": integers(6, 4, 3), "b": integers(6)}
    path = save(tmp_path, [node], weights, inputs=(("x", (1, 4, 17)),))
    layer = only(path)
    assert layer.problem == Conv2d(4, 6, (1, 3), (1, 2), (0, 1, 0, 3), (1, 2), input_size=(1, 17))
    check(path, layer, (1, 4, 17))


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm(tmp_path: Path, transposed: int) -> None:
    matrix = integers(10, 7)
    node = helper.make_node("Gemm", ["x", "w", "b"], ["t"], transB=transposed, alpha=0.5, beta=2.0)
    weights = {"w": matrix.T if transposed else matrix, "b": integers(7)}
    nodes = [node, helper.make_node("Relu", ["t"], ["y"])]
    path = save(tmp_path, nodes, weights, inputs=(("x", (3, 10)),))
    layer = only(path)
    assert layer.problem == Linear(10, 7, batch_size=3, activation="relu")
    check(path, layer, (3, 10))


@pytest.mark.parametrize("shape", [(3, 10), (2, 5, 10)])
def test_matmul_with_an_addition(tmp_path: Path, shape: tuple[int, ...]) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["t"]), helper.make_node("Add", ["t", "b"], ["y"])]
    path = save(tmp_path, nodes, {"w": integers(10, 7), "b": integers(7)}, inputs=(("x", shape),))
    layer = only(path)
    assert layer.problem == Linear(10, 7, batch_size=int(np.prod(shape[:-1])))
    check(path, layer, shape)


def test_weights_may_be_constant_nodes_of_float16_in_another_order(tmp_path: Path) -> None:
    value = integers(4, 6, 3, 3).astype(np.float16)
    nodes = [
        helper.make_node("Constant", [], ["half"], value=numpy_helper.from_array(value)),
        helper.make_node("Cast", ["half"], ["single"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["single"], ["w"], perm=[1, 0, 2, 3]),
        conv(),
    ]
    path = save(tmp_path, nodes, {})
    layer = only(path)
    np.testing.assert_array_equal(layer.weight, value.transpose(1, 0, 2, 3).astype(np.float32))
    check(path, layer)


def test_float16_initializers(tmp_path: Path) -> None:
    path = save(tmp_path, [conv()], {"w": integers(6, 4, 3, 3).astype(np.float16)})
    assert only(path).weight.dtype == np.float32


def test_dequantised_weights(tmp_path: Path) -> None:
    q = integers(6, 4, 3, 3).astype(np.int8)
    weights: dict[str, np.ndarray] = {"q": q, "scale": np.array(0.25, np.float32), "zero": np.array(1, np.int8)}
    node = helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["w"])
    path = save(tmp_path, [node, conv()], weights)
    layer = only(path)
    np.testing.assert_array_equal(layer.weight, (q.astype(np.float32) - 1) / 4)


def test_equal_problems_are_one_layer(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "first"], ["t"], name="one", pads=[1] * 4),
        helper.make_node("Conv", ["t", "second"], ["u"], name="two", pads=[1] * 4),
        helper.make_node("Conv", ["u", "other"], ["y"], name="three"),
    ]
    weights = {"first": integers(4, 4, 3, 3), "second": integers(4, 4, 3, 3, seed=9)}
    weights["other"] = integers(4, 4, 1, 1)
    layers = read_model(save(tmp_path, nodes, weights)).layers
    assert [(layer.name, layer.count) for layer in layers] == [("one", 2), ("three", 1)]
    assert [layer.reads_input for layer in layers] == [True, False]
    np.testing.assert_array_equal(layers[0].weight, weights["first"])


def test_the_network_s_input_is_known_behind_scaling_and_transposition(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Sub", ["x", "mean"], ["a"]),
        helper.make_node("Transpose", ["a"], ["b"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["b", "w"], ["y"]),
    ]
    weights = {"mean": np.array([1, 2, 3], np.float32), "w": integers(6, 3, 3, 3)}
    path = save(tmp_path, nodes, weights, inputs=(("x", (None, "h", None, 3)),))
    layer = only(path, input_size=(9, 11))
    assert layer.reads_input
    assert layer.problem.input_shape == (1, 3, 9, 11)


def reshaped(source: str, sized: str, target: str, **attributes: Any) -> list[Any]:
    """Nodes that give `source` the shape (first size of `sized`, -1), as exporters of a flattening write."""
    return [
        helper.make_node("Shape", [sized], [f"{target}_shape"], **attributes),
        helper.make_node("Slice", [f"{target}_shape", "start", "end"], [f"{target}_first"]),
        helper.make_node("Cast", [f"{target}_first"], [f"{target}_cast"], to=TensorProto.INT64),
        helper.make_node("Concat", [f"{target}_cast", "rest"], [f"{target}_sizes"], axis=0),
        helper.make_node("Reshape", [source, f"{target}_sizes"], [target]),
    ]


SIZES = {"start": np.array([0]), "end": np.array([1]), "rest": np.array([-1])}


@pytest.mark.parametrize("opset", [11, 17])  # ONNX's inference follows sizes to a Reshape from 14 on
def test_shapes_that_the_graph_computes(tmp_path: Path, opset: int) -> None:
    """The second reshaping takes its sizes from the first one's result."""
    nodes = [
        *reshaped("x", "x", "flat"),
        helper.make_node("Relu", ["flat"], ["t"]),
        *reshaped("t", "t", "again"),
        helper.make_node("MatMul", ["again", "w"], ["y"]),
    ]
    weights = {"w": integers(20, 7), **SIZES}
    path = save(tmp_path, nodes, weights, inputs=(("x", (3, 4, 5)),), opset=opset)
    assert only(path).problem == Linear(20, 7, bias=False, batch_size=3)


@pytest.mark.parametrize(
    ("attributes", "rows"), [({"start": 1}, 4), ({"start": -1}, 5), ({"end": 2}, 3)], ids=str
)
def test_a_part_of_a_shape(tmp_path: Path, attributes: dict[str, int], rows: int) -> None:
    nodes = [*reshaped("x", "x", "flat", **attributes), helper.make_node("MatMul", ["flat", "w"], ["y"])]
    path = save(tmp_path, nodes, {"w": integers(60 // rows, 7), **SIZES}, inputs=(("x", (3, 4, 5)),))
    assert only(path).problem == Linear(60 // rows, 7, bias=False, batch_size=rows)


def test_a_shape_that_depends_on_values_stays_unknown(tmp_path: Path) -> None:
    nodes = [
        conv(),
        helper.make_node("NonZero", ["flat"], ["indices"]),
        *reshaped("flat", "indices", "known"),  # the rank of `flat`, which is known: 2
        *reshaped("flat", "indices", "open", start=1),  # how many numbers are not zero
        helper.make_node("MatMul", ["known", "m15"], ["s"]),
        helper.make_node("MatMul", ["open", "m15"], ["u"]),
    ]
    weights = {"w": integers(6, 4, 3, 3), "m15": integers(15, 7), **SIZES}
    path = save(tmp_path, nodes, weights, inputs=(INPUT, ("flat", (3, 10))), outputs=("y", "s", "u"))
    model = read_model(path)
    assert model.layers[1].problem == Linear(15, 7, bias=False, batch_size=2)
    assert model.skipped == ("MatMul u: the shape of its input 'open' is not known",)


SKIPPED = {
    "w is an input": (
        [helper.make_node("Conv", ["x", "other"], ["s"])],
        "Conv s: 'other' is an input of the model, without a value in the file: store it as an initializer",
    ),
    "w is computed": (
        [helper.make_node("Relu", ["other"], ["r"], name="relu"), helper.make_node("Conv", ["x", "r"], ["s"])],
        "Conv s: 'r' is computed by Relu relu, not a constant",
    ),
    "kernel_shape": (
        [conv("s", kernel_shape=[3, 2])],
        "Conv s: its kernel_shape [3, 2] is not that of its weights, [3, 3]: correct the attribute, or leave it out",
    ),
    "a kernel_shape of one side": ([conv("s", kernel_shape=[3])], "Conv s: its kernel_shape [3] is not"),
    "3-dimensional": ([helper.make_node("Conv", ["cube", "w3"], ["s"])], "Conv s: it is 3-dimensional"),
    "transposed": ([helper.make_node("ConvTranspose", ["x", "wt"], ["s"])], "ConvTranspose s: transposed"),
    "two inputs": ([helper.make_node("MatMul", ["x", "x"], ["s"])], "MatMul s: 'x' is an input of the model"),
    "a cube of weights": (
        [helper.make_node("MatMul", ["x", "cubes"], ["s"])],
        "MatMul s: its constant has shape (2, 11, 5)",
    ),
    "transA": (
        [helper.make_node("Gemm", ["flat", "m"], ["s"], transA=1)],
        "Gemm s: its input is transposed",
    ),
    "Gemm of another size": (
        [helper.make_node("Gemm", ["flat", "m"], ["s"], transB=1)],
        "Gemm s: its weights (7, 10) do not fit its 10 input features",
    ),
    "an addend for each row": (
        [helper.make_node("Gemm", ["flat", "m", "rows"], ["s"])],
        "Gemm s: its addend (3, 1) is not one number for each output",
    ),
    "unknown shape": (
        [
            helper.make_node("NonZero", ["flat"], ["n"]),
            helper.make_node("Cast", ["n"], ["c"], to=TensorProto.FLOAT),
            helper.make_node("MatMul", ["c", "m"], ["s"]),
        ],
        "MatMul s: the shape of its input 'c' is not known",
    ),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_what_is_passed_over_is_told(tmp_path: Path, name: str) -> None:
    nodes, reason = SKIPPED[name]
    inputs = (INPUT, ("other", (6, 4, 3, 3)), ("cube", (1, 2, 5, 5, 5)), ("flat", (3, 10)))
    weights = {"w": integers(6, 4, 3, 3), "w3": integers(2, 2, 3, 3, 3), "wt": integers(4, 2, 3, 3)}
    weights |= {"m": integers(10, 7), "cubes": integers(2, 11, 5), "rows": integers(3, 1)}
    model = read_model(save(tmp_path, [conv(), *nodes], weights, inputs=inputs, outputs=("y", "s")))
    assert len(model.layers) == 1
    (line,) = model.skipped
    assert line.startswith(reason)


def test_weights_that_are_inputs_with_a_default_are_read(tmp_path: Path) -> None:
    weights = {"w": integers(6, 4, 3, 3), "b": integers(6)}
    inputs = (INPUT, ("w", (6, 4, 3, 3)), ("b", (6,)))
    path = save(tmp_path, [conv(bias=True)], weights, inputs=inputs)
    layer = only(path)
    np.testing.assert_array_equal(layer.weight, weights["w"])
    check(path, layer)


def test_sparse_weights_are_said_to_be_sparse(tmp_path: Path) -> None:
    path = save(tmp_path, [conv()], {"w": integers(6, 4, 3, 3)})
    model = onnx.load(path)
    values = numpy_helper.from_array(np.ones(1, np.float32), "w")
    indices = numpy_helper.from_array(np.zeros(1, np.int64))
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [6, 4, 3, 3]))
    del model.graph.initializer[:]
    onnx.save(model, path)
    with pytest.raises(ModelError, match="'w' is stored as a sparse tensor, which is not supported: store it as an"):
        read_model(path)


def test_why_a_shape_is_not_known_is_told(tmp_path: Path) -> None:
    nodes = [
        conv("y"),
        helper.make_node("Add", ["x", "odd"], ["a"], name="misfit"),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w"], ["s"]),
    ]
    weights = {"w": integers(6, 4, 3, 3), "odd": integers(5)}
    model = read_model(save(tmp_path, nodes, weights, outputs=("y", "s")))
    reason = "the shape of its input 'b' is not known (Add misfit: Incompatible dimensions)"
    assert model.skipped == (f"Conv s: {reason}",)


def test_a_layer_that_breaks_a_rule_is_passed_over(tmp_path: Path) -> None:
    nodes = [conv(), helper.make_node("Conv", ["x", "w"], ["s"], group=3)]
    model = read_model(save(tmp_path, nodes, {"w": integers(6, 4, 3, 3)}, outputs=("y", "s")))
    assert len(model.layers) == 1
    assert "groups" in model.skipped[0]


def test_a_model_without_layers(tmp_path: Path) -> None:
    path = save(tmp_path, [helper.make_node("Relu", ["x"], ["y"])], {})
    with pytest.raises(ModelError, match="no layer to read: it has no convolution or matrix product"):
        read_model(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"not a model", bytes(range(256)) * 10, b'{"format": "json"}'],
    ids=["empty", "text", "bytes", "json"],
)
def test_a_file_that_is_no_model(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="cannot be read as an ONNX model") as caught:
        read_model(path)
    assert str(caught.value).startswith(str(path))


def test_a_truncated_model(tmp_path: Path) -> None:
    path = save(tmp_path, [conv()], {"w": integers(6, 4, 3, 3)})
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ModelError, match="cannot be read as an ONNX model"):
        read_model(path)


def test_a_model_whose_weights_file_is_missing(tmp_path: Path) -> None:
    path = save(tmp_path, [conv()], {"w": integers(6, 4, 3, 3)})
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelError, match="cannot be read as an ONNX model"):
        read_model(path)


def test_a_node_without_weights_is_passed_over(tmp_path: Path) -> None:
    bare = helper.make_node("Conv", ["x"], ["s"])
    shape = helper.make_node("Shape", [], ["u"])
    model = read_model(save(tmp_path, [conv(), bare, shape], {"w": integers(6, 4, 3, 3)}, outputs=("y", "s")))
    assert len(model.layers) == 1
    assert model.skipped == ("Conv s: it has one input, and no weights",)


def test_a_malformed_node_is_passed_over(tmp_path: Path) -> None:
    nodes = [conv(), helper.make_node("Conv", ["x", "w", "b"], ["s"])]
    weights = {"w": integers(6, 4, 3, 3), "b": integers(5)}
    model = read_model(save(tmp_path, nodes, weights, outputs=("y", "s")))
    assert len(model.layers) == 1
    assert "Conv s: it or what follows it is malformed" in model.skipped[0]


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ((("Conv", ("x", "w"), "y"), ("Relu", ("z",), "z")), "Relu z reads 'z', which nothing before"),
        ((("Relu", ("y",), "z"), ("Conv", ("z", "w"), "y")), "Relu z reads 'y', which nothing before"),
        ((("Conv", ("x", "w"), "y"), ("Relu", ("y",), "y")), "Relu y makes 'y', which is there"),
        ((("Conv", ("x", "w"), "w"),), "Conv w makes 'w', which is there"),
    ],
    ids=["itself", "cycle", "twice", "weights"],
)
def test_tensors_that_are_made_of_themselves(tmp_path: Path, nodes: Any, message: str) -> None:
    made = [helper.make_node(kind, inputs, [output]) for kind, inputs, output in nodes]
    with pytest.raises(ModelError, match=message):
        read_model(save(tmp_path, made, {"w": integers(4, 4, 1, 1)}))


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.onnx: there is no such file"):
        read_model(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="is a folder, not a file"):
        read_model(tmp_path)


def test_shapes_that_do_not_fit_together(tmp_path: Path) -> None:
    path = save(tmp_path, [conv()], {"w": integers(6, 5, 3, 3)})
    with pytest.raises(ModelError, match="5"):
        read_model(path)


def test_an_open_input_size_must_be_given(tmp_path: Path) -> None:
    inputs = (("x", ("batch", 4, None, "width")),)
    path = save(tmp_path, [conv()], {"w": integers(6, 4, 3, 3)}, inputs=inputs)
    with pytest.raises(ModelError, match=r"'x' has the open shape \(\?, 4, \?, \?\): give --input-size"):
        read_model(path)
    assert only(path, input_size=(9, 11)).problem.input_shape == (1, 4, 9, 11)


def test_a_fixed_input_size_cannot_be_changed(tmp_path: Path) -> None:
    path = save(tmp_path, [conv()], {"w": integers(6, 4, 3, 3)})
    assert only(path, input_size=(9, 11)).problem.input_shape == (1, 4, 9, 11)
    with pytest.raises(ModelError, match=r"fixed shape \(1, 4, 9, 11\), which \(8, 8\) does not fit"):
        read_model(path, input_size=(8, 8))


def test_without_the_onnx_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    path = save(tmp_path, [conv()], {"w": integers(6, 4, 3, 3)})
    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(ModelError, match=r"pip install 'convsched\[onnx\]'"):
        read_model(path)
