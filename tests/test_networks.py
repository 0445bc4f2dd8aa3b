"""The layer tables against the totals of the literature."""

from decimal import ROUND_HALF_UP, Decimal

import pytest

from convsched.errors import ModelError
from convsched.networks.known import NETWORKS, Network, network
from convsched.problem import Conv2d, Linear

# Convolution MACs and weights and how many convolutions: Sze et al., "Efficient Processing of Deep Neural
# Networks" (Proc. IEEE 2017), table II, to the digits printed there. LeNet-5's MACs have a test of their own.
SZE = {
    "lenet5": (None, "2.6k", 2),
    "alexnet": ("666M", "2.3M", 5),
    "vgg16": ("15.3G", "14.7M", 13),
    "googlenet": ("1.43G", "6.0M", 57),
    "resnet50": ("3.86G", "23.5M", 53),
}

# MACs and parameters of the whole network, as the papers or the reference implementations print them.
# MobileNetV1: table 8 of the paper. ShuffleNet: 137 M, table 2; parameters counted.
# V2: 300 M and 3.4 M. V3: 219 M and 5.4 M. EfficientNet: 0.39 B and 5.3 M, 4.2 - 4.4 B and 19 M. DenseNet,
# ResNet-18, Inception: torchvision's model cards (Inception without the auxiliary classifier, 23.8 M
# parameters). SqueezeNet: 1.25 M, table 1.
WHOLE = {
    "resnet18": (1.81e9, 11.69e6),
    "densenet121": (2.83e9, 7.98e6),
    "mobilenet_v1": (569e6, 4.2e6),
    "mobilenet_v2": (300e6, 3.5e6),
    "mobilenet_v3_large": (217e6, 5.48e6),
    "efficientnet_b0": (0.386e9, 5.29e6),
    "efficientnet_b4": (4.39e9, 19.3e6),
    "shufflenet_v1": (137e6, 1.87e6),
    "inception_v3": (5.71e9, 23.83e6),
    "alexnet": (724e6, 61.0e6),
    "vgg16": (15.47e9, 138.36e6),
    "googlenet": (1.43e9, 7.0e6),
    "squeezenet": (833e6, 1.25e6),
}


def printed(count: int, like: str) -> str:
    """A count with the unit and decimals of a printed one."""
    unit = {"k": 10**3, "M": 10**6, "G": 10**9}[like[-1]]
    step = Decimal(1).scaleb(-len(like[:-1].partition(".")[2]))
    return f"{(Decimal(count) / unit).quantize(step, ROUND_HALF_UP)}{like[-1]}"


def all_macs(net: Network) -> int:
    """Multiply-accumulates of all layers, the classifier included."""
    return sum(layer.count * layer.problem.macs for layer in net.layers)


@pytest.mark.parametrize(("name", "expected"), SZE.items())
def test_convolutions_match_sze(name: str, expected: tuple[str | None, str, int]) -> None:
    macs, weights, convolutions = expected
    net = network(name)
    assert printed(net.weights, weights) == weights
    assert sum(layer.count for layer in net.convolutions) == convolutions
    if macs:
        assert printed(net.macs, macs) == macs


def test_lenet5_connections() -> None:
    """Sze's 283 k are LeCun's 340,908 connections less the two inner products', not MACs of dense layers."""
    c1, c3, c5, f6, output = (layer.problem for layer in network("lenet5").layers)
    assert (c1.macs, c3.macs) == (117_600, 240_000)
    # With bias; C3 connects 60 of the 96 pairs of maps. A subsampled pixel has 4 inputs and a bias.
    connections = c1.macs + 6 * 28 * 28 + c3.macs * 60 // 96 + 16 * 10 * 10 + 5 * (6 * 14 * 14 + 16 * 5 * 5)
    connections += output.macs
    inner = sum(p.parameters for p in (c5, f6))
    assert connections + inner == 340_908  # the paper's own count
    assert printed(connections, "283k") == "283k"
    assert printed(inner, "58k") == "58k"


def test_mobilenet_v1_as_printed() -> None:
    net = network("mobilenet_v1")
    assert printed(all_macs(net), "569M") == "569M"
    assert printed(net.parameters, "4.2M") == "4.2M"


def test_efficientnet_b4_as_printed() -> None:
    assert printed(network("efficientnet_b4").macs, "4.4G") == "4.4G"


@pytest.mark.parametrize(("name", "expected"), WHOLE.items())
def test_whole_networks(name: str, expected: tuple[float, float]) -> None:
    """Within 1%, parameters 1.5%: a folded normalisation has one number a channel where files have two."""
    macs, parameters = expected
    net = network(name)
    assert all_macs(net) == pytest.approx(macs, rel=0.01)
    assert net.parameters == pytest.approx(parameters, rel=0.015)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_table_is_well_formed(name: str) -> None:
    net = network(name)
    assert net.name == name
    assert net == NETWORKS[name]()
    problems = [layer.problem for layer in net.layers]
    assert len(set(problems)) == len(problems)
    assert len({layer.name for layer in net.layers}) == len(net.layers)
    assert all(layer.count >= 1 and layer.problem.batch_size == 1 for layer in net.layers)
    assert all(isinstance(layer.problem, Conv2d) for layer in net.convolutions)
    assert net.convolutions[0] == net.layers[0]


def problem_of(net: Network, name: str) -> Conv2d | Linear:
    return next(layer.problem for layer in net.layers if layer.name == name)


def test_residuals_and_activations() -> None:
    resnet = network("resnet50")
    end = Conv2d(64, 256, 1, input_size=56, activation="relu", residual=True)
    assert problem_of(resnet, "conv2_1.c") == end
    assert problem_of(resnet, "conv3_1.shortcut") == Conv2d(256, 512, 1, 2, input_size=56)
    assert problem_of(resnet, "conv3_1.a") == Conv2d(256, 128, 1, 2, input_size=56, activation="relu")
    assert problem_of(network("resnet18"), "conv2_1.b").residual
    mobile = network("mobilenet_v2")
    assert problem_of(mobile, "b2_2.project") == Conv2d(144, 24, 1, input_size=56, residual=True)
    assert not problem_of(mobile, "b2_1.project").residual
    assert problem_of(network("mobilenet_v3_large"), "b4.excite").activation == "hardsigmoid"
    squeeze = Conv2d(32, 8, 1, input_size=1, activation="silu")
    assert problem_of(network("efficientnet_b0"), "b1_1.squeeze") == squeeze
    assert not problem_of(network("densenet121"), "dense1_1.b").bias


def test_counts_of_repeated_layers() -> None:
    counts = {layer.name: layer.count for layer in network("resnet50").layers}
    assert counts["conv2_1.b"] == 3
    assert counts["conv4_2.a"] == 5
    assert counts["conv4_1.c"] == 6
    assert sum(layer.count for layer in network("mobilenet_v1").convolutions) == 27


@pytest.mark.parametrize(
    "spelling", ["resnet50", "ResNet-50", "RESNET_50", "Inception-v3", "EfficientNet-B0", "LeNet-5"]
)
def test_names_are_forgiving(spelling: str) -> None:
    assert network(spelling).name.replace("_", "") == spelling.lower().replace("-", "").replace("_", "")


@pytest.mark.parametrize("name", ["resnet", "", "resnet-101", "model.onnx"])
def test_an_unknown_name_lists_the_known(name: str) -> None:
    with pytest.raises(ModelError, match=r"is not known; use one of lenet5, alexnet, .*, inception_v3$"):
        network(name)
