"""Layer tables of the networks made for small machines: depthwise and grouped convolutions, 2017 to 2019."""

from __future__ import annotations

import math
from dataclasses import dataclass

from convsched.networks.table import LayerList, Map, Network
from convsched.problem.rules import Activation


def mobilenet_v1() -> Network:
    """Howard et al. 2017, width 1.0, on 224x224."""
    net = LayerList()
    x = net.conv("conv1", Map(3, 224), 32, 3, 2)
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
    net: LayerList, name: str, x: Map, expanded: int, m: int, kernel: int, stride: int,
    activation: Activation, squeeze: _Squeeze | None = None,
) -> Map:  # fmt: skip
    """Expand, filter each channel, weigh the channels, project; add the input where the shapes agree."""
    y = x if expanded == x.channels else net.conv(f"{name}.expand", x, expanded, 1, activation=activation)
    y = net.conv(f"{name}.dw", y, expanded, kernel, stride, groups=expanded, activation=activation)
    if squeeze:
        s = net.conv(f"{name}.squeeze", Map(expanded, 1), squeeze.channels, 1, activation=squeeze.inner)
        net.conv(f"{name}.excite", s, expanded, 1, activation=squeeze.outer)
    identity = stride == 1 and m == x.channels
    return net.conv(f"{name}.project", y, m, 1, activation=None, residual=identity)


# Expansion, channels, repeats, first stride.
_MOBILENET_V2 = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
)  # fmt: skip


def mobilenet_v2() -> Network:
    """Sandler et al. 2018, width 1.0, on 224x224."""
    net = LayerList()
    x = net.conv("conv1", Map(3, 224), 32, 3, 2, activation="relu6")
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
    net = LayerList()
    x = net.conv("conv1", Map(3, 224), 16, 3, 2, activation="hardswish")
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

    net = LayerList()
    x = net.conv("stem", Map(3, size), channels(32), 3, 2, activation="silu")
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
    net = LayerList()
    x = net.conv("conv1", Map(3, 224), 24, 3, 2).pooled(3, 2, 1)
    for stage, (m, repeats) in enumerate(((240, 4), (480, 8), (960, 4)), 2):
        for i in range(repeats):
            name, stride = f"stage{stage}_{i + 1}", 2 if i == 0 else 1
            y = net.conv(f"{name}.a", x, m // 4, 1, groups=1 if (stage, i) == (2, 0) else 3)
            y = net.conv(f"{name}.dw", y, m // 4, 3, stride, groups=m // 4, activation=None)
            made = m - x.channels if i == 0 else m
            net.conv(f"{name}.b", y, made, 1, groups=3, residual=i > 0)
            x = Map(m, y.size)
    net.linear("fc", x.channels, 1000)
    return net.network("shufflenet_v1")
