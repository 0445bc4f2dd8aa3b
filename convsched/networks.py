"""The layers of known networks, at batch 1, as their papers give them.

A network is a list of distinct problems with how often each occurs, so that a total is
sum(count * problem.macs). Batch normalisation after a convolution is folded into its weights and bias.
A sum of two branches is the residual of the convolution that ends the main branch, together with the
activation that follows the sum; a squeeze-and-excitation is two 1x1 convolutions on a 1x1 map.

Totals that these tables reproduce (convolutions only, unless said otherwise) are in `tests/test_networks.py`;
Sze et al., "Efficient Processing of Deep Neural Networks" (Proc. IEEE 2017, table II) is the source of most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from convsched.errors import ModelError
from convsched.parameters import Activation
from convsched.problem import Conv2d, Linear, Problem


@dataclass(frozen=True)
class Layer:
    """A distinct problem of a network, the name of its first occurrence, and how often it occurs."""

    name: str
    problem: Problem
    count: int


@dataclass(frozen=True)
class Network:
    """A network's name (as on the command line) and its layers, in the order of first occurrence."""

    name: str
    layers: tuple[Layer, ...]

    @property
    def convolutions(self) -> tuple[Layer, ...]:
        """The layers that are convolutions."""
        return tuple(layer for layer in self.layers if isinstance(layer.problem, Conv2d))

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the convolutions."""
        return sum(layer.count * layer.problem.macs for layer in self.convolutions)

    @property
    def weights(self) -> int:
        """Filter elements of the convolutions, without bias."""
        return sum(layer.count * layer.problem.weights for layer in self.convolutions)

    @property
    def total_macs(self) -> int:
        """Multiply-accumulates of all layers, the classifier included."""
        return sum(layer.count * layer.problem.macs for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Weights and bias of all layers, the classifier included; folded normalisation is in the bias."""
        return sum(layer.count * layer.problem.parameters for layer in self.layers)


def network(name: str) -> Network:
    """A known network by its name, whatever the case, with - for _ if you like. Raises ModelError.

    >>> network("ResNet-50").convolutions[0].problem.text
    'conv2d c=3 m=64 k=7x7 in=224x224 stride=2x2 pad=3,3,3,3 bias act=relu'
    """
    wanted = _plain(name)
    for known, build in NETWORKS.items():
        if _plain(known) == wanted:
            return build()
    raise ModelError(f"network {name!r} is not known; use one of {', '.join(NETWORKS)}")


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


@dataclass(frozen=True)
class _Map:
    """A square feature map: what one layer hands to the next."""

    channels: int
    size: int

    def pooled(self, kernel: int, stride: int, padding: int = 0) -> _Map:
        """After pooling; a window that would reach over the padded edge is left out."""
        return _Map(self.channels, (self.size + 2 * padding - kernel) // stride + 1)


class _Layers:
    """Collects a network's layers in order; equal problems become one layer with a count."""

    def __init__(self) -> None:
        self.first: dict[Problem, str] = {}
        self.counts: dict[Problem, int] = {}

    def add(self, name: str, problem: Problem) -> None:
        self.first.setdefault(problem, name)
        self.counts[problem] = self.counts.get(problem, 0) + 1

    def conv(
        self, name: str, x: _Map, m: int, kernel: int | tuple[int, int], stride: int = 1, *,
        padding: int | None = None, groups: int = 1, bias: bool = True,
        activation: Activation = "relu", residual: bool = False,
    ) -> _Map:  # fmt: skip
        """Add a convolution; unless given, padding keeps the size at stride 1."""
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        problem = Conv2d(
            x.channels, m, sides, stride, (sides[0] // 2, sides[1] // 2) if padding is None else padding,
            groups=groups, bias=bias, input_size=x.size, activation=activation, residual=residual,
        )  # fmt: skip
        self.add(name, problem)
        return _Map(m, problem.E)

    def linear(self, name: str, c: int, m: int, activation: Activation = None) -> int:
        self.add(name, Linear(c, m, activation=activation))
        return m

    def network(self, name: str) -> Network:
        return Network(name, tuple(Layer(self.first[p], p, count) for p, count in self.counts.items()))


def _concat(maps: Iterable[_Map]) -> _Map:
    branches = list(maps)
    return _Map(sum(branch.channels for branch in branches), branches[0].size)


def lenet5() -> Network:
    """LeCun et al. 1998 as it is trained today: 28x28 padded by 2 and all 6 x 16 maps of C3 connected.

    2,550 conv weights, the 2.6 k of Sze et al.; but 357,600 conv MACs. Their 283 k is the paper's 340,908
    connections less the 58 k of C5 and F6: bias, subsampling and output counted, and 60 of C3's 96 pairs
    of maps. No dense pair of 5x5 layers with 6 and 16 maps has 283 k MACs.
    """
    net = _Layers()
    x = net.conv("c1", _Map(1, 28), 6, 5, activation="tanh").pooled(2, 2)
    x = net.conv("c3", x, 16, 5, padding=0, activation="tanh").pooled(2, 2)
    c = net.linear("c5", x.channels * x.size**2, 120, "tanh")
    net.linear("output", net.linear("f6", c, 84, "tanh"), 10)
    return net.network("lenet5")


def alexnet() -> Network:
    """Krizhevsky et al. 2012, on 227x227, with the two groups of the original."""
    net = _Layers()
    x = net.conv("conv1", _Map(3, 227), 96, 11, 4, padding=0).pooled(3, 2)
    x = net.conv("conv2", x, 256, 5, groups=2).pooled(3, 2)
    x = net.conv("conv3", x, 384, 3)
    x = net.conv("conv4", x, 384, 3, groups=2)
    x = net.conv("conv5", x, 256, 3, groups=2).pooled(3, 2)
    _three_linear(net, x)
    return net.network("alexnet")


def vgg16() -> Network:
    """Simonyan and Zisserman 2014, configuration D."""
    net = _Layers()
    x = _Map(3, 224)
    for stage, (m, repeats) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)), 1):
        for i in range(1, repeats + 1):
            x = net.conv(f"conv{stage}_{i}", x, m, 3)
        x = x.pooled(2, 2)
    _three_linear(net, x)
    return net.network("vgg16")


def _three_linear(net: _Layers, x: _Map) -> None:
    """The classifier of AlexNet and VGG."""
    c = net.linear("fc6", x.channels * x.size**2, 4096, "relu")
    net.linear("fc8", net.linear("fc7", c, 4096, "relu"), 1000)


# Channels of an inception module: 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection.
_GOOGLENET = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}


def googlenet() -> Network:
    """Szegedy et al. 2014, without the auxiliary classifiers; maps of 55, 27, 13 and 6 as Sze et al. count.

    The pools have no padding and leave out partial windows: 1.43 G conv MACs. The paper's own maps are 56,
    28, 14 and 7, its pools being padded by 1: 1.58 G, with the same weights.
    """
    net = _Layers()
    x = net.conv("conv1", _Map(3, 224), 64, 7, 2).pooled(3, 2)
    x = net.conv("conv2_reduce", x, 64, 1)
    x = net.conv("conv2", x, 192, 3).pooled(3, 2)
    for name, (one, reduce3, three, reduce5, five, pool) in _GOOGLENET.items():
        if name in ("4a", "5a"):
            x = x.pooled(3, 2)
        x = _concat((
            net.conv(f"{name}.1x1", x, one, 1),
            net.conv(f"{name}.3x3", net.conv(f"{name}.3x3_reduce", x, reduce3, 1), three, 3),
            net.conv(f"{name}.5x5", net.conv(f"{name}.5x5_reduce", x, reduce5, 1), five, 5),
            net.conv(f"{name}.pool", x, pool, 1),
        ))  # fmt: skip
    net.linear("fc", x.channels, 1000)
    return net.network("googlenet")


def squeezenet() -> Network:
    """Iandola et al. 2016, SqueezeNet 1.0, on 227x227 (whose first map is the paper's 111x111).

    833 M MACs; the 861 M often quoted are of the released Caffe file, which pads its last 1x1 by 1.
    """
    net = _Layers()
    x = net.conv("conv1", _Map(3, 227), 96, 7, 2, padding=0).pooled(3, 2)
    for i, squeeze in enumerate((16, 16, 32, 32, 48, 48, 64, 64), 2):
        s = net.conv(f"fire{i}.squeeze", x, squeeze, 1)
        x = _concat((
            net.conv(f"fire{i}.expand1x1", s, 4 * squeeze, 1),
            net.conv(f"fire{i}.expand3x3", s, 4 * squeeze, 3),
        ))  # fmt: skip
        if i in (4, 8):
            x = x.pooled(3, 2)
    net.conv("conv10", x, 1000, 1)
    return net.network("squeezenet")


def resnet18() -> Network:
    """He et al. 2015, projection shortcuts where the shape changes."""
    net = _Layers()
    x = net.conv("conv1", _Map(3, 224), 64, 7, 2).pooled(3, 2, 1)
    for stage, m in enumerate((64, 128, 256, 512), 2):
        for i in range(2):
            name, stride = f"conv{stage}_{i + 1}", 2 if stage > 2 and i == 0 else 1
            y = net.conv(f"{name}.a", x, m, 3, stride)
            _project(net, name, x, y)
            x = net.conv(f"{name}.b", y, m, 3, residual=True)
    net.linear("fc", x.channels, 1000)
    return net.network("resnet18")


def resnet50() -> Network:
    """He et al. 2015 (v1): a bottleneck strides in its first 1x1, as in the paper (v1.5: in its 3x3)."""
    net = _Layers()
    x = net.conv("conv1", _Map(3, 224), 64, 7, 2).pooled(3, 2, 1)
    for stage, (m, repeats) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), 2):
        for i in range(repeats):
            name, stride = f"conv{stage}_{i + 1}", 2 if stage > 2 and i == 0 else 1
            y = net.conv(f"{name}.b", net.conv(f"{name}.a", x, m, 1, stride), m, 3)
            _project(net, name, x, _Map(4 * m, y.size))
            x = net.conv(f"{name}.c", y, 4 * m, 1, residual=True)
    net.linear("fc", x.channels, 1000)
    return net.network("resnet50")


def _project(net: _Layers, name: str, x: _Map, y: _Map) -> None:
    """The 1x1 shortcut of a block from x to a map shaped as y, where the identity does not fit."""
    if x != y:
        net.conv(f"{name}.shortcut", x, y.channels, 1, x.size // y.size, activation=None)


def densenet121() -> Network:
    """Huang et al. 2016, growth 32.

    Normalisation comes before a convolution here: only those that directly follow one fold into its bias.
    """
    net = _Layers()
    growth, repeats = 32, (6, 12, 24, 16)
    x = net.conv("conv1", _Map(3, 224), 64, 7, 2).pooled(3, 2, 1)
    for block, count in enumerate(repeats, 1):
        for i in range(1, count + 1):
            name = f"dense{block}_{i}"
            y = net.conv(f"{name}.a", x, 4 * growth, 1)
            x = _concat((x, net.conv(f"{name}.b", y, growth, 3, bias=False, activation=None)))
        if block < len(repeats):
            half = x.channels // 2
            x = net.conv(f"transition{block}", x, half, 1, bias=False, activation=None).pooled(2, 2)
    net.linear("fc", x.channels, 1000)
    return net.network("densenet121")


def mobilenet_v1() -> Network:
    """Howard et al. 2017, width 1.0, on 224x224."""
    net = _Layers()
    x = net.conv("conv1", _Map(3, 224), 32, 3, 2)
    blocks = (
        (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1)
    )  # fmt: skip
    for i, (m, stride) in enumerate(blocks, 2):
        y = net.conv(f"conv{i}.dw", x, x.channels, 3, stride, groups=x.channels)
        x = net.conv(f"conv{i}.pw", y, m, 1)
    net.linear("fc", x.channels, 1000)
    return net.network("mobilenet_v1")


@dataclass(frozen=True)
class _Squeeze:
    """The channels and the two activations of a squeeze-and-excitation."""

    channels: int
    inner: Activation
    outer: Activation


def _inverted_residual(
    net: _Layers, name: str, x: _Map, expanded: int, m: int, kernel: int, stride: int,
    activation: Activation, squeeze: _Squeeze | None = None,
) -> _Map:  # fmt: skip
    """Expand, filter each channel, weigh the channels, project; add the input where the shapes agree."""
    y = x if expanded == x.channels else net.conv(f"{name}.expand", x, expanded, 1, activation=activation)
    y = net.conv(f"{name}.dw", y, expanded, kernel, stride, groups=expanded, activation=activation)
    if squeeze:
        s = net.conv(f"{name}.squeeze", _Map(expanded, 1), squeeze.channels, 1, activation=squeeze.inner)
        net.conv(f"{name}.excite", s, expanded, 1, activation=squeeze.outer)
    identity = stride == 1 and m == x.channels
    return net.conv(f"{name}.project", y, m, 1, activation=None, residual=identity)


# Expansion, channels, repeats, first stride.
_MOBILENET_V2 = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
)  # fmt: skip


def mobilenet_v2() -> Network:
    """Sandler et al. 2018, width 1.0, on 224x224."""
    net = _Layers()
    x = net.conv("conv1", _Map(3, 224), 32, 3, 2, activation="relu6")
    for stage, (expansion, m, repeats, stride) in enumerate(_MOBILENET_V2, 1):
        for i in range(repeats):
            first = stride if i == 0 else 1
            x = _inverted_residual(net, f"b{stage}_{i + 1}", x, expansion * x.channels, m, 3, first, "relu6")
    x = net.conv("head", x, 1280, 1, activation="relu6")
    net.linear("fc", x.channels, 1000)
    return net.network("mobilenet_v2")


# Kernel, expanded channels, channels, squeeze, activation, stride: table 1 of the paper.
_MOBILENET_V3 = (
    (3, 16, 16, 0, "relu", 1), (3, 64, 24, 0, "relu", 2), (3, 72, 24, 0, "relu", 1),
    (5, 72, 40, 24, "relu", 2), (5, 120, 40, 32, "relu", 1), (5, 120, 40, 32, "relu", 1),
    (3, 240, 80, 0, "hardswish", 2), (3, 200, 80, 0, "hardswish", 1),
    (3, 184, 80, 0, "hardswish", 1), (3, 184, 80, 0, "hardswish", 1),
    (3, 480, 112, 120, "hardswish", 1), (3, 672, 112, 168, "hardswish", 1),
    (5, 672, 160, 168, "hardswish", 2), (5, 960, 160, 240, "hardswish", 1),
    (5, 960, 160, 240, "hardswish", 1),
)  # fmt: skip


def mobilenet_v3_large() -> Network:
    """Howard et al. 2019, Large 1.0, on 224x224; squeezed to a quarter, in multiples of 8."""
    net = _Layers()
    x = net.conv("conv1", _Map(3, 224), 16, 3, 2, activation="hardswish")
    for i, (kernel, expanded, m, squeezed, activation, stride) in enumerate(_MOBILENET_V3, 1):
        squeeze = _Squeeze(squeezed, "relu", "hardsigmoid") if squeezed else None
        x = _inverted_residual(net, f"b{i}", x, expanded, m, kernel, stride, activation, squeeze)
    x = net.conv("head", x, 960, 1, activation="hardswish")
    net.linear("fc2", net.linear("fc1", x.channels, 1280, "hardswish"), 1000)
    return net.network("mobilenet_v3_large")


# Expansion, kernel, first stride, channels, repeats: table 1 of the paper.
_EFFICIENTNET = (
    (1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4), (6, 3, 1, 320, 1),
)  # fmt: skip


def _efficientnet(name: str, width: float, depth: float, size: int) -> Network:
    """Tan and Le 2019: channels times width, in multiples of 8 and never 10% fewer; repeats times depth."""

    def channels(base: int) -> int:
        rounded = max(8, int(base * width + 4) // 8 * 8)
        return rounded + 8 if rounded < 0.9 * base * width else rounded

    net = _Layers()
    x = net.conv("stem", _Map(3, size), channels(32), 3, 2, activation="silu")
    for stage, (expansion, kernel, stride, m, repeats) in enumerate(_EFFICIENTNET, 1):
        for i in range(math.ceil(repeats * depth)):
            squeeze = _Squeeze(max(1, x.channels // 4), "silu", "sigmoid")
            x = _inverted_residual(
                net, f"b{stage}_{i + 1}", x, expansion * x.channels, channels(m), kernel,
                stride if i == 0 else 1, "silu", squeeze,
            )  # fmt: skip
    x = net.conv("head", x, channels(1280), 1, activation="silu")
    net.linear("fc", x.channels, 1000)
    return net.network(name)


def efficientnet_b0() -> Network:
    """Tan and Le 2019, on 224x224."""
    return _efficientnet("efficientnet_b0", 1.0, 1.0, 224)


def efficientnet_b4() -> Network:
    """Tan and Le 2019, width 1.4, depth 1.8, on 380x380."""
    return _efficientnet("efficientnet_b4", 1.4, 1.8, 380)


def shufflenet_v1() -> Network:
    """Zhang et al. 2017, 1x with 3 groups; the very first 1x1 is not grouped, as in the paper.

    A unit with stride 2 concatenates its pooled input, so its last 1x1 makes only the missing channels.
    """
    net = _Layers()
    x = net.conv("conv1", _Map(3, 224), 24, 3, 2).pooled(3, 2, 1)
    for stage, (m, repeats) in enumerate(((240, 4), (480, 8), (960, 4)), 2):
        for i in range(repeats):
            name, stride = f"stage{stage}_{i + 1}", 2 if i == 0 else 1
            y = net.conv(f"{name}.a", x, m // 4, 1, groups=1 if (stage, i) == (2, 0) else 3)
            y = net.conv(f"{name}.dw", y, m // 4, 3, stride, groups=m // 4, activation=None)
            made = m - x.channels if i == 0 else m
            net.conv(f"{name}.b", y, made, 1, groups=3, residual=i > 0)
            x = _Map(m, y.size)
    net.linear("fc", x.channels, 1000)
    return net.network("shufflenet_v1")


def inception_v3() -> Network:
    """Szegedy et al. 2015, on 299x299, without the auxiliary classifier; modules named as in torchvision."""
    net = _Layers()
    x = net.conv("conv1a", _Map(3, 299), 32, 3, 2, padding=0)
    x = net.conv("conv2a", x, 32, 3, padding=0)
    x = net.conv("conv2b", x, 64, 3).pooled(3, 2)
    x = net.conv("conv3b", x, 80, 1)
    x = net.conv("conv4a", x, 192, 3, padding=0).pooled(3, 2)
    for name, pool in (("5b", 32), ("5c", 64), ("5d", 64)):
        double = _chain(net, f"{name}.double", x, (64, 1), (96, 3), (96, 3))
        five = _chain(net, f"{name}.5x5", x, (48, 1), (64, 5))
        x = _concat((net.conv(f"{name}.1x1", x, 64, 1), five, double, net.conv(f"{name}.pool", x, pool, 1)))
    double = _chain(net, "6a.double", x, (64, 1), (96, 3))
    x = _concat((
        net.conv("6a.3x3", x, 384, 3, 2, padding=0),
        net.conv("6a.double3", double, 96, 3, 2, padding=0),
        x.pooled(3, 2),
    ))  # fmt: skip
    for name, m in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        seven = _chain(net, f"{name}.7x7", x, (m, 1), (m, (1, 7)), (192, (7, 1)))
        double = _chain(
            net, f"{name}.double", x, (m, 1), (m, (7, 1)), (m, (1, 7)), (m, (7, 1)), (192, (1, 7))
        )  # fmt: skip
        x = _concat((net.conv(f"{name}.1x1", x, 192, 1), seven, double, net.conv(f"{name}.pool", x, 192, 1)))
    three = net.conv("7a.3x3_1", x, 192, 1)
    seven = _chain(net, "7a.7x7", x, (192, 1), (192, (1, 7)), (192, (7, 1)))
    x = _concat((
        net.conv("7a.3x3_2", three, 320, 3, 2, padding=0),
        net.conv("7a.7x7_4", seven, 192, 3, 2, padding=0),
        x.pooled(3, 2),
    ))  # fmt: skip
    for name in ("7b", "7c"):
        three = net.conv(f"{name}.3x3", x, 384, 1)
        double = _chain(net, f"{name}.double", x, (448, 1), (384, 3))
        split = [
            net.conv(f"{name}.{kernel[0]}x{kernel[1]}", y, 384, kernel)
            for y in (three, double)
            for kernel in ((1, 3), (3, 1))
        ]
        x = _concat((net.conv(f"{name}.1x1", x, 320, 1), *split, net.conv(f"{name}.pool", x, 192, 1)))
    net.linear("fc", x.channels, 1000)
    return net.network("inception_v3")


def _chain(net: _Layers, name: str, x: _Map, *convs: tuple[int, int | tuple[int, int]]) -> _Map:
    """Convolutions one after another, given as (channels, kernel)."""
    for i, (m, kernel) in enumerate(convs, 1):
        x = net.conv(f"{name}_{i}", x, m, kernel)
    return x


# Every known network by its name on the command line.
NETWORKS: Mapping[str, Callable[[], Network]] = MappingProxyType({
    build.__name__: build
    for build in (
        lenet5, alexnet, vgg16, googlenet, squeezenet, resnet18, resnet50, densenet121, mobilenet_v1,
        mobilenet_v2, mobilenet_v3_large, efficientnet_b0, efficientnet_b4, shufflenet_v1, inception_v3,
    )
})  # fmt: skip
