"""What follows a layer in an ONNX file is folded into it where that gives the same output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from convsched.graph.onnx.layers import ModelLayer, read_model
from convsched.problem.reference import convolve
from convsched.problem.rules import Activation

INPUT = (1, 4, 9, 11)


def integers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)


WEIGHTS = {"w": integers(6, 4, 3, 3), "b": integers(6)}


def save(
    folder: Path,
    nodes: list[Any],
    constants: dict[str, np.ndarray] | None = None,
    *,
    bias: bool = False,
    outputs: tuple[str, ...] = ("y",),
    opset: int = 17,
) -> Path:
    """Writes a model of a convolution of x into t and the nodes after it, which may read a number, c."""
    conv = helper.make_node("Conv", ["x", "w", "b"] if bias else ["x", "w"], ["t"])
    weights = WEIGHTS | (constants or {})
    graph = helper.make_graph(
        [conv, *nodes],
        "test",
        [helper.make_tensor_value_info(*value) for value in (("x", 1, INPUT), ("c", 1, ()))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    path = folder / "model.onnx"
    opsets = [helper.make_opsetid("", opset)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def only(path: Path) -> ModelLayer:
    (layer,) = read_model(path).layers
    return layer


def check(path: Path, layer: ModelLayer) -> None:
    """The layer computes the model's first output."""
    x = integers(*INPUT, seed=1)
    with np.errstate(over="ignore", invalid="ignore"):  # the evaluator's sigmoid
        results: Any = ReferenceEvaluator(str(path)).run(None, {"x": x, "c": np.float32(0)})
    y = convolve(layer.problem, x, layer.weight, layer.bias)
    np.testing.assert_allclose(y, results[0], rtol=1e-5, atol=1e-4)


def batch_norm(source: str, target: str) -> tuple[Any, dict[str, np.ndarray]]:
    random = np.random.default_rng(5)
    names = ["gamma", "beta", "mean", "variance"]
    values = {name: random.uniform(0.5, 2, 6).astype(np.float32) for name in names}
    return helper.make_node("BatchNormalization", [source, *names], [target], epsilon=1e-3), values


@pytest.mark.parametrize("bias", [False, True])
def test_batch_normalisation_is_folded(tmp_path: Path, bias: bool) -> None:
    node, values = batch_norm("t", "y")
    path = save(tmp_path, [node], values, bias=bias)
    layer = only(path)
    assert layer.problem.bias
    check(path, layer)


def test_a_chain_of_scales_and_shifts_is_folded(tmp_path: Path) -> None:
    norm, values = batch_norm("t1", "t2")
    nodes = [
        helper.make_node("Identity", ["t"], ["t1"]),
        norm,
        helper.make_node("Mul", ["t2", "scalar"], ["t3"]),
        helper.make_node("Add", ["channels", "t3"], ["t4"]),
        helper.make_node("Sub", ["channels", "t4"], ["t5"]),
        helper.make_node("Div", ["t5", "scalar"], ["t6"]),
        helper.make_node("Relu", ["t6"], ["y"]),
    ]
    constants = {"scalar": np.array([2.5], np.float32), "channels": integers(6, 1, 1, seed=3), **values}
    path = save(tmp_path, nodes, constants, bias=True)
    layer = only(path)
    assert layer.problem.activation == "relu"
    check(path, layer)


@pytest.mark.parametrize(
    "nodes",
    [
        [helper.make_node("Div", ["constant", "t"], ["y"])],
        [helper.make_node("Add", ["t", "rows"], ["y"])],
        [helper.make_node("Add", ["t", "t"], ["y"])],
        [helper.make_node("Softmax", ["t"], ["y"])],
        [helper.make_node("Clip", ["t", "", "c"], ["y"])],
    ],
    ids=["constant / y", "a constant for each row", "y + y", "softmax", "a computed bound"],
)
def test_what_cannot_be_folded_is_left(tmp_path: Path, nodes: list[Any]) -> None:
    layer = only(save(tmp_path, nodes, {"constant": np.array([2], np.float32), "rows": integers(7, 1)}))
    assert (layer.problem.bias, layer.problem.activation) == (False, None)
    np.testing.assert_array_equal(layer.weight, WEIGHTS["w"])


ACTIVATIONS: list[tuple[str, dict[str, Any], Any]] = [
    ("Relu", {}, "relu"),
    ("Sigmoid", {}, "sigmoid"),
    ("Tanh", {}, "tanh"),
    ("HardSwish", {}, "hardswish"),
    ("HardSigmoid", {"alpha": 1 / 6}, "hardsigmoid"),
    ("HardSigmoid", {}, ("clip", 0.0, 1.0)),
    ("HardSigmoid", {"alpha": 0.3, "beta": 0.1}, ("clip", 0.0, 1.0)),
    ("LeakyRelu", {}, ("leaky_relu", pytest.approx(0.01))),
    ("LeakyRelu", {"alpha": 0.25}, ("leaky_relu", 0.25)),
    ("Elu", {"alpha": 0.5}, ("elu", 0.5)),
    ("Softplus", {}, None),
]


@pytest.mark.parametrize(("op", "attributes", "expected"), ACTIVATIONS, ids=str)
def test_activation(tmp_path: Path, op: str, attributes: dict[str, Any], expected: Any) -> None:
    path = save(tmp_path, [helper.make_node(op, ["t"], ["y"], **attributes)])
    layer = only(path)
    assert layer.problem.activation == expected
    if expected is not None:
        check(path, layer)


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ({"min": 0.0, "max": 6.0}, "relu6"),
        ({"min": 0.0}, "relu"),
        ({"min": 0.0, "max": 3.4028234663852886e38}, "relu"),
        ({"min": -1.0, "max": 2.0}, ("clip", -1.0, 2.0)),
        ({"max": 2.0}, ("clip", -float("inf"), 2.0)),
        ({}, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("opset", [6, 17])
def test_clip(tmp_path: Path, bounds: dict[str, Any], expected: Activation, opset: int) -> None:
    constants = {name: np.array(value, np.float32) for name, value in bounds.items()}
    if opset == 6:
        node = helper.make_node("Clip", ["t"], ["y"], **bounds)
    else:
        names = [name if name in bounds else "" for name in ("min", "max")]
        node = helper.make_node("Clip", ["t", *names], ["y"])
    path = save(tmp_path, [node], constants, opset=opset)
    assert only(path).problem.activation == expected


def gate(*steps: tuple[str, list[str]]) -> list[Any]:
    return [helper.make_node(step[0], step[1][:-1], [step[1][-1]]) for step in steps]


GATES = {
    "x clip(x + 3) / 6": (
        "hardswish",
        gate(
            ("Add", ["t", "3", "a"]),
            ("Clip", ["a", "0", "6", "e"]),
            ("Mul", ["t", "e", "f"]),
            ("Div", ["f", "6", "y"]),
        ),
    ),
    "x (clip(3 + x) / 6)": (
        "hardswish",
        gate(
            ("Add", ["3", "t", "a"]),
            ("Clip", ["a", "0", "6", "e"]),
            ("Div", ["e", "6", "f"]),
            ("Mul", ["f", "t", "y"]),
        ),
    ),
    "x sigmoid(x)": ("silu", gate(("Sigmoid", ["t", "a"]), ("Mul", ["t", "a", "y"]))),
    "x sigmoid(1 x)": (
        "silu",
        gate(("Mul", ["t", "1", "a"]), ("Sigmoid", ["a", "e"]), ("Mul", ["t", "e", "y"])),
    ),
    "x sigmoid(3 x)": (
        None,
        gate(("Mul", ["t", "3", "a"]), ("Sigmoid", ["a", "e"]), ("Mul", ["t", "e", "y"])),
    ),
    "x (x + 3)": (None, gate(("Add", ["t", "3", "a"]), ("Mul", ["t", "a", "y"]))),
}


@pytest.mark.parametrize("name", GATES)
def test_gated_activations_are_known_by_their_values(tmp_path: Path, name: str) -> None:
    expected, nodes = GATES[name]
    constants = {text: np.array(float(text), np.float32) for text in ("0", "1", "3", "6")}
    path = save(tmp_path, nodes, constants)
    layer = only(path)
    assert layer.problem.activation == expected
    if expected is not None:
        check(path, layer)


def test_a_gate_whose_inside_is_read_elsewhere_is_left(tmp_path: Path) -> None:
    nodes = gate(("Sigmoid", ["t", "a"]), ("Mul", ["t", "a", "y"]))
    path = save(tmp_path, nodes, outputs=("y", "a"))
    assert only(path).problem.activation is None


@pytest.mark.parametrize("outputs", [("y", "t"), ("y", "z")], ids=["an output", "another node"])
def test_an_activation_is_left_where_something_else_reads_the_layer(
    tmp_path: Path, outputs: tuple[str, ...]
) -> None:
    nodes = [helper.make_node("Relu", ["t"], ["y"]), helper.make_node("Neg", ["t"], ["z"])]
    path = save(tmp_path, nodes[: 2 if "z" in outputs else 1], outputs=outputs)
    assert only(path).problem.activation is None


def test_a_subgraph_is_a_reader_too(tmp_path: Path) -> None:
    branch = helper.make_graph(
        [helper.make_node("Neg", ["t"], ["inner"])],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("Relu", ["t"], ["y"]),
        helper.make_node("If", ["flag"], ["z"], then_branch=branch, else_branch=branch),
    ]
    model = read_model(save(tmp_path, nodes, {"flag": np.array(True)}, outputs=("y", "z")))
    assert model.layers[0].problem.activation is None
    assert model.skipped == ("If z: layers in branches are not read",)
