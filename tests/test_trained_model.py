"""Trained networks, a photograph, and the first layers run with our kernels.

The networks are the detector of text, the classifier of its direction and the reader of it (PP-OCR, Du et
al. 2020) that the package rapidocr-onnxruntime carries; the photograph is the one of the astronaut Eileen
Collins in scikit-image. Random data have no large offsets, no dead channels and no outliers in the weights;
trained data have all three.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx.reference import ReferenceEvaluator

import convsched as cs
from convsched.algebra.accuracy import BOUNDS
from convsched.benchmark.cases import make_arrays, model_case, relative_error
from convsched.cli import main as cli
from convsched.graph.onnx.file import Graph
from convsched.graph.onnx.layers import ModelLayer, ModelLayers, read_model
from convsched.problem.reference import convolve


@dataclass(frozen=True)
class Network:
    """A file, the input size it is run on (height, width), and what is in it.

    `counts` are the distinct layers and all of them; `opening` names, for each of the first layers, the
    scale and shift that stand between its activation and the next layer ("" for none); `opening_end` is
    the tensor after the last of them.
    """

    file: str
    input_size: tuple[int, int]
    counts: tuple[int, int]
    macs: int
    first: str
    skipped: tuple[str, ...]
    opening: tuple[str, ...] = ()
    opening_end: str = ""


TRANSPOSED = "transposed convolution is not supported"
DETECTOR = Network(
    "ch_PP-OCRv4_det_infer.onnx",
    (224, 224),
    (40, 62),
    273_655_616,
    "conv2d c=3 m=16 k=3x3 in=224x224 stride=2x2 pad=1,1,1,1 bias",
    tuple(f"ConvTranspose p2o.ConvTranspose.{index}: {TRANSPOSED}" for index in (0, 2)),
    opening=("", "whswish_b_1", "whswish_b_2", ""),
    opening_end="p2o.Add.19",
)
CLASSIFIER = Network(
    "ch_ppocr_mobile_v2.0_cls_infer.onnx",
    (48, 192),
    (43, 54),
    16_315_376,
    "conv2d c=3 m=8 k=3x3 in=48x192 stride=2x2 pad=1,1,1,1 bias act=hardswish",
    (),
    opening=("", "", ""),
    opening_end="relu_1.tmp_0",
)
READER = Network(
    "ch_PP-OCRv4_rec_infer.onnx",
    (48, 320),
    (35, 47),
    701_701_440,
    "conv2d c=3 m=16 k=3x3 in=48x320 stride=2x2 pad=1,1,1,1 bias",
    tuple(  # the products of attention, of two computed matrices
        f"MatMul p2o.MatMul.{index}: '{name}' is computed by {node}, not a constant"
        for index, name, node in (
            (2, "transpose_45.tmp_0", "Transpose p2o.Transpose.2"),
            (4, "transpose_44.tmp_0_slice_2", "Squeeze p2o.Squeeze.2"),
            (14, "transpose_48.tmp_0", "Transpose p2o.Transpose.5"),
            (16, "transpose_47.tmp_0_slice_2", "Squeeze p2o.Squeeze.5"),
        )
    ),
)


@pytest.fixture(scope="module")
def folder() -> Path:
    """Where the models are. The package is not imported: that needs OpenCV and its libraries."""
    found = find_spec("rapidocr_onnxruntime")
    if found is None or found.origin is None:
        pytest.fail("the trained models are missing: pip install rapidocr-onnxruntime", pytrace=False)
    return Path(found.origin).parent / "models"


@pytest.fixture(scope="module")
def detector(folder: Path) -> ModelLayers:
    return read_model(folder / DETECTOR.file, input_size=DETECTOR.input_size)


def photograph(size: tuple[int, int]) -> np.ndarray:
    """(1, 3, H, W): the middle of the picture at half its size, blue first, from [0, 255] to [-1, 1].

    That is how the package prepares a picture for its models: (pixels / 255 - 0.5) / 0.5.
    """
    from skimage.data import astronaut

    height, width = size
    top, left = 256 - height, 256 - width  # of 512 x 512
    picture: Any = astronaut
    pixels = picture()[top : top + 2 * height : 2, left : left + 2 * width : 2, ::-1]
    scaled = (pixels.astype(np.float32) / 255 - np.float32(0.5)) / np.float32(0.5)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1))[np.newaxis]


def run_opening(network: Network, path: Path) -> Iterator[tuple[str, np.ndarray, float]]:
    """Runs the first layers one after another; gives their names, outputs and errors."""
    graph = Graph.load(path, network.input_size)
    x = photograph(network.input_size)
    layers = read_model(path, input_size=network.input_size).layers
    for layer, affine in zip(layers, network.opening, strict=False):
        y = cs.compile(layer.problem).bind(layer.weight, layer.bias)(x)
        error = relative_error(y, convolve(layer.problem, x, layer.weight, layer.bias))
        if affine:
            scale, shift = graph.constant(f"{affine}.w_0"), graph.constant(f"{affine}.w_1")
            assert scale is not None
            assert shift is not None
            y = y * scale + shift
        yield layer.name, y, error
        x = y


def run_graph(path: Path, x: np.ndarray, tensor: str) -> np.ndarray:
    """The value of a tensor inside a model by ONNX's own evaluator.

    Before opset 14 the evaluator's BatchNormalization mixes the statistics of its input into the trained
    ones, as if in training (onnx/onnx#8442): of theirs it takes 1 - momentum, which is none for 1.
    """
    model = onnx.load(path)
    for node in model.graph.node:
        if node.op_type == "BatchNormalization":
            kept = [item for item in node.attribute if item.name != "momentum"]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("momentum", 1.0)])
    producer = next(index for index, node in enumerate(model.graph.node) if tensor in node.output)
    del model.graph.node[producer + 1 :]
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, None))
    outputs: Any = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x})
    return np.asarray(outputs[0])


@pytest.mark.parametrize("network", [DETECTOR, CLASSIFIER, READER], ids=lambda network: network.file)
def test_all_layers_are_read(folder: Path, network: Network) -> None:
    model = read_model(folder / network.file, input_size=network.input_size)
    layers = model.layers
    assert model.skipped == network.skipped
    assert (len(layers), sum(layer.count for layer in layers)) == network.counts
    assert sum(layer.count * layer.problem.macs for layer in layers) == network.macs
    assert [layer.reads_input for layer in layers] == [True] + [False] * (len(layers) - 1)
    assert layers[0].problem.text == network.first


@pytest.mark.parametrize("network", [DETECTOR, CLASSIFIER], ids=lambda network: network.file)
def test_the_first_layers_on_a_photograph(folder: Path, network: Network) -> None:
    """Each is within the bound of the oracle, and all together of what ONNX's evaluator gives."""
    path = folder / network.file
    steps = list(run_opening(network, path))
    assert len(steps) == len(network.opening)
    assert {name: error for name, _, error in steps if not error <= BOUNDS["normal"]} == {}
    y = steps[-1][1]
    expected = run_graph(path, photograph(network.input_size), network.opening_end)
    assert y.shape == expected.shape
    assert relative_error(y, expected.astype(np.float64)) <= BOUNDS["normal"]


def layer_error(layer: ModelLayer, seed: int) -> float:
    arrays = make_arrays(model_case(layer), seed=seed)
    y = cs.compile(layer.problem).bind(layer.weight, layer.bias)(arrays.x)
    return relative_error(y, convolve(layer.problem, arrays.x, layer.weight, layer.bias))


@pytest.mark.parametrize("index", range(DETECTOR.counts[0]))
def test_every_layer_with_its_trained_weights(detector: ModelLayers, index: int) -> None:
    layer = detector.layers[index]
    assert layer_error(layer, index) <= BOUNDS["normal"], layer.problem.text


def test_the_benchmark_of_a_trained_network(folder: Path, tmp_path: Path, detector: ModelLayers) -> None:
    """`convsched bench model.onnx` on the photograph: of three layers, so that it takes seconds."""
    image, results = tmp_path / "photograph.npy", tmp_path / "results.json"
    x = photograph(DETECTOR.input_size)
    np.save(image, x)
    arguments = ["bench", str(folder / DETECTOR.file), "--input-size", "224x224", "--image", str(image)]
    arguments += ["--layer", "m=16 ", "--seconds", "0.01", "--json", str(results)]
    run = CliRunner().invoke(cli.main, arguments)
    assert run.exit_code == 0, run.output
    for line in DETECTOR.skipped:
        assert f"passed over: {line}" in run.output
    data = json.loads(results.read_text())
    assert data["skipped"] == list(DETECTOR.skipped)
    layers = {layer["name"]: layer for layer in data["layers"]}
    assert layers.keys() == {layer.name for layer in detector.layers if layer.problem.M == 16}
    for layer in layers.values():
        assert layer["status"] == "ok"
        assert layer["error"] <= BOUNDS["normal"]
        assert layer["kernel"]["minimum"] > 0
        assert layer["baseline"]["minimum"] > 0
        assert layer["problem"] in run.output


def test_the_first_layer_of_a_benchmark_reads_the_image(detector: ModelLayers) -> None:
    x = photograph(DETECTOR.input_size)
    pixels = np.ascontiguousarray(x[0].transpose(1, 2, 0))
    first, second = (model_case(layer) for layer in detector.layers[:2])
    np.testing.assert_array_equal(make_arrays(first, pixels).x, x)
    np.testing.assert_array_equal(make_arrays(second, pixels).x, make_arrays(second).x)
