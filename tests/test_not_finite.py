"""Data that are not finite are said to be so, with the layer's name, and are no failure of a kernel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import convsched as cs
from convsched.cli import main as cli
from convsched.errors import ModelWarning
from convsched.graph.onnx.layers import read_model
from convsched.problem import Conv2d
from convsched.problem.reference import not_finite


def model(path: Path, constants: dict[str, NDArray[Any]], *after: Any) -> Path:
    """A convolution named "first" of x by w (and b) into t, and what follows it."""
    constants = {"w": np.ones((8, 4, 3, 3), np.float32), **constants}
    conv = helper.make_node("Conv", ["x", "w", *(["b"] if "b" in constants else [])], ["t"], name="first")
    output = after[-1].output[0] if after else "t"
    graph = helper.make_graph(
        [conv, *after], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 12, 12])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def weights(value: float) -> NDArray[np.float32]:
    """Ones, and one other number."""
    w = np.ones((8, 4, 3, 3), np.float32)
    w[0, 0, 0, 0] = value
    return w


def bench(path: Path, *more: str) -> Result:
    return CliRunner().invoke(cli.main, ["bench", str(path), "--seconds", "0.001", *more])


@pytest.mark.parametrize(("constants", "said"), [
    ({"w": weights(np.nan)}, "first: 1 of 288 (1 NaN) of its weights are not finite"),
    ({"w": weights(-np.inf)}, "first: 1 of 288 (0 NaN) of its weights are not finite"),
    ({"b": np.array([np.inf, np.nan, *[0] * 6], np.float32)}, "first: 2 of 8 (1 NaN) of its bias are not finite"),
    ({"w": np.full((8, 4, 3, 3), 1e38, np.float32)}, "of its right outputs are beyond float32"),
], ids=["nan", "inf", "bias", "overflow"])
@pytest.mark.filterwarnings("ignore:Conv first")
def test_bench_says_that_data_are_not_finite(tmp_path: Path, constants: dict[str, Any], said: str) -> None:
    result = bench(model(tmp_path / "m.onnx", constants), "--json", str(tmp_path / "r.json"))
    assert result.exit_code == 0, result.output
    assert said in result.output
    assert "WRONG" not in result.output
    assert "bad" not in result.output
    (layer,) = json.loads((tmp_path / "r.json").read_text())["layers"]
    assert layer["status"] == "not finite"
    assert said in layer["not_finite"]
    assert layer["failure"] is None


def test_bench_says_that_an_image_is_not_finite(tmp_path: Path) -> None:
    np.save(tmp_path / "image.npy", np.full((12, 12, 3), np.nan, np.float32))
    result = CliRunner().invoke(cli.main, ["bench", "lenet5", "--layer", "c=1 m=6", "--seconds", "0.001",
                                           "--image", str(tmp_path / "image.npy")])
    assert result.exit_code == 0, result.output
    assert "of its input are not finite" in result.output


def test_weights_that_are_not_finite_warn_with_the_name_of_their_layer(tmp_path: Path) -> None:
    with pytest.warns(ModelWarning, match=r"Conv first: 1 of 288 .1 NaN. of its weights, .* not finite") as warned:
        (layer,) = read_model(model(tmp_path / "m.onnx", {"w": weights(np.nan)})).layers
    assert len(warned) == 1
    assert np.isnan(layer.weight).sum() == 1


@pytest.mark.parametrize(("spread", "epsilon"), [(-1.0, 1e-5), (0.0, 0.0), (np.nan, 1e-5)])
def test_a_variance_that_is_not_positive_warns_with_the_name_of_its_node(
    tmp_path: Path, spread: float, epsilon: float
) -> None:
    ones = np.ones(8, np.float32)
    variance = ones.copy()
    variance[3] = spread
    norm = helper.make_node("BatchNormalization", ["t", "gamma", "beta", "mean", "variance"], ["y"], name="norm",
                            epsilon=epsilon)
    path = model(tmp_path / "m.onnx", {"gamma": ones, "beta": ones, "mean": ones, "variance": variance}, norm)
    with pytest.warns(ModelWarning) as warned:
        (layer,) = read_model(path).layers
    messages = [str(one.message) for one in warned]
    assert messages[0].startswith("BatchNormalization norm: 1 of 8 variances plus epsilon are not positive")
    assert any(message.startswith("Conv first: 36 of 288") for message in messages)
    assert not np.isfinite(layer.weight[3]).any()
    assert np.isfinite(np.delete(layer.weight, 3, axis=0)).all()


def test_what_overflows_when_folded_warns_with_the_name_of_its_layer(tmp_path: Path) -> None:
    scale = helper.make_node("Mul", ["t", "factor"], ["y"])
    tensors = {"w": np.full((8, 4, 3, 3), 1e20, np.float32), "factor": np.array(1e30, np.float32)}
    path = model(tmp_path / "m.onnx", tensors, scale)
    with pytest.warns(ModelWarning, match="Conv first: 288 of 288 .0 NaN. of its weights"):
        read_model(path)


def test_counts_of_what_is_not_finite() -> None:
    assert not_finite(np.array([1.0, -2.0])) == ""
    assert not_finite(np.array([1.0, np.nan, np.inf, -np.inf])) == "3 of 4 (1 NaN)"


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_strict_kernel_keeps_inf_and_nan_where_the_definition_has_them(bad: float) -> None:
    layer = Conv2d(16, 16, 3, padding=1, input_size=20, bias=False)
    x = np.ones(layer.input_shape, np.float32)
    x[0, 3, 5, 6] = bad
    y = cs.compile(layer, accuracy="strict", threads=1, cache=False).bind(np.ones(layer.weight_shape, np.float32))(x)
    spoilt = np.zeros(layer.output_shape, bool)
    spoilt[0, :, 4:7, 5:8] = True
    np.testing.assert_array_equal(np.isnan(y) if np.isnan(bad) else np.isposinf(y), spoilt)
    assert np.isfinite(y[~spoilt]).all()
