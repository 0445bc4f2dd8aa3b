"""Layer tables of the networks of the big machines, 1998 to 2016: LeNet-5 to Inception-v3."""

from __future__ import annotations

from convsched.networks.table import LayerList, Map, Network, concat


def lenet5() -> Network:
    """LeCun et al. 1998 as it is trained today: 28x28 padded by 2 and all 6 x 16 maps of C3 connected.

    2,550 conv weights, the 2.6 k of Sze et al.; but 357,600 conv MACs. Their 283 k is the paper's 340,908
    connections less the 58 k of C5 and F6: bias, subsampling and output counted, and 60 of C3's 96 pairs
    of maps. No dense pair of 5x5 layers with 6 and 16 maps has 283 k MACs.
    """
    net = LayerList()
    x = net.conv("c1", Map(1, 28), 6, 5, activation="tanh").pooled(2, 2)
    x = net.conv("c3", x, 16, 5, padding=0, activation="tanh").pooled(2, 2)
    c = net.linear("c5", x.channels * x.size**2, 120, "tanh")
    net.linear("output", net.linear("f6", c, 84, "tanh"), 10)
    return net.network("lenet5")


def alexnet() -> Network:
    """Krizhevsky et al. 2012, on 227x227, with the two groups of the original."""
    net = LayerList()
    x = net.conv("conv1", Map(3, 227), 96, 11, 4, padding=0).pooled(3, 2)
    x = net.conv("conv2", x, 256, 5, groups=2).pooled(3, 2)
    x = net.conv("conv3", x, 384, 3)
    x = net.conv("conv4", x, 384, 3, groups=2)
    x = net.conv("conv5", x, 256, 3, groups=2).pooled(3, 2)
    _three_linear(net, x)
    return net.network("alexnet")


def vgg16() -> Network:
    """Simonyan and Zisserman 2014, configuration D."""
    net = LayerList()
    x = Map(3, 224)
    for stage, (m, repeats) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)), 1):
        for i in range(1, repeats + 1):
            x = net.conv(f"conv{stage}_{i}", x, m, 3)
        x = x.pooled(2, 2)
    _three_linear(net, x)
    return net.network("vgg16")


def _three_linear(net: LayerList, x: Map) -> None:
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
    net = LayerList()
    x = net.conv("conv1", Map(3, 224), 64, 7, 2).pooled(3, 2)
    x = net.conv("conv2_reduce", x, 64, 1)
    x = net.conv("conv2", x, 192, 3).pooled(3, 2)
    for name, (one, reduce3, three, reduce5, five, pool) in _GOOGLENET.items():
        if name in ("4a", "5a"):
            x = x.pooled(3, 2)
        x = concat((
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
    net = LayerList()
    x = net.conv("conv1", Map(3, 227), 96, 7, 2, padding=0).pooled(3, 2)
    for i, squeeze in enumerate((16, 16, 32, 32, 48, 48, 64, 64), 2):
        s = net.conv(f"fire{i}.squeeze", x, squeeze, 1)
        x = concat((
            net.conv(f"fire{i}.expand1x1", s, 4 * squeeze, 1),
            net.conv(f"fire{i}.expand3x3", s, 4 * squeeze, 3),
        ))  # fmt: skip
        if i in (4, 8):
            x = x.pooled(3, 2)
    net.conv("conv10", x, 1000, 1)
    return net.network("squeezenet")


def resnet18() -> Network:
    """He et al. 2015, projection shortcuts where the shape changes."""
    net = LayerList()
    x = net.conv("conv1", Map(3, 224), 64, 7, 2).pooled(3, 2, 1)
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
    net = LayerList()
    x = net.conv("conv1", Map(3, 224), 64, 7, 2).pooled(3, 2, 1)
    for stage, (m, repeats) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), 2):
        for i in range(repeats):
            name, stride = f"conv{stage}_{i + 1}", 2 if stage > 2 and i == 0 else 1
            y = net.conv(f"{name}.b", net.conv(f"{name}.a", x, m, 1, stride), m, 3)
            _project(net, name, x, Map(4 * m, y.size))
            x = net.conv(f"{name}.c", y, 4 * m, 1, residual=True)
    net.linear("fc", x.channels, 1000)
    return net.network("resnet50")


def _project(net: LayerList, name: str, x: Map, y: Map) -> None:
    """The 1x1 shortcut of a block from x to a map shaped as y, where the identity does not fit."""
    if x != y:
        net.conv(f"{name}.shortcut", x, y.channels, 1, x.size // y.size, activation=None)


def densenet121() -> Network:
    """Huang et al. 2016, growth 32.

    Normalisation comes before a convolution here: only those that directly follow one fold into its bias.
    """
    net = LayerList()
    growth, repeats = 32, (6, 12, 24, 16)
    x = net.conv("conv1", Map(3, 224), 64, 7, 2).pooled(3, 2, 1)
    for block, count in enumerate(repeats, 1):
        for i in range(1, count + 1):
            name = f"dense{block}_{i}"
            y = net.conv(f"{name}.a", x, 4 * growth, 1)
            x = concat((x, net.conv(f"{name}.b", y, growth, 3, bias=False, activation=None)))
        if block < len(repeats):
            half = x.channels // 2
            x = net.conv(f"transition{block}", x, half, 1, bias=False, activation=None).pooled(2, 2)
    net.linear("fc", x.channels, 1000)
    return net.network("densenet121")


def inception_v3() -> Network:
    """Szegedy et al. 2015, on 299x299, without the auxiliary classifier; modules named as in torchvision."""
    net = LayerList()
    x = net.conv("conv1a", Map(3, 299), 32, 3, 2, padding=0)
    x = net.conv("conv2a", x, 32, 3, padding=0)
    x = net.conv("conv2b", x, 64, 3).pooled(3, 2)
    x = net.conv("conv3b", x, 80, 1)
    x = net.conv("conv4a", x, 192, 3, padding=0).pooled(3, 2)
    for name, pool in (("5b", 32), ("5c", 64), ("5d", 64)):
        double = _chain(net, f"{name}.double", x, (64, 1), (96, 3), (96, 3))
        five = _chain(net, f"{name}.5x5", x, (48, 1), (64, 5))
        x = concat((net.conv(f"{name}.1x1", x, 64, 1), five, double, net.conv(f"{name}.pool", x, pool, 1)))
    double = _chain(net, "6a.double", x, (64, 1), (96, 3))
    x = concat((
        net.conv("6a.3x3", x, 384, 3, 2, padding=0),
        net.conv("6a.double3", double, 96, 3, 2, padding=0),
        x.pooled(3, 2),
    ))  # fmt: skip
    for name, m in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        seven = _chain(net, f"{name}.7x7", x, (m, 1), (m, (1, 7)), (192, (7, 1)))
        double = _chain(
            net, f"{name}.double", x, (m, 1), (m, (7, 1)), (m, (1, 7)), (m, (7, 1)), (192, (1, 7))
        )  # fmt: skip
        x = concat((net.conv(f"{name}.1x1", x, 192, 1), seven, double, net.conv(f"{name}.pool", x, 192, 1)))
    three = net.conv("7a.3x3_1", x, 192, 1)
    seven = _chain(net, "7a.7x7", x, (192, 1), (192, (1, 7)), (192, (7, 1)))
    x = concat((
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
        x = concat((net.conv(f"{name}.1x1", x, 320, 1), *split, net.conv(f"{name}.pool", x, 192, 1)))
    net.linear("fc", x.channels, 1000)
    return net.network("inception_v3")


def _chain(net: LayerList, name: str, x: Map, *convs: tuple[int, int | tuple[int, int]]) -> Map:
    """Convolutions one after another, given as (channels, kernel)."""
    for i, (m, kernel) in enumerate(convs, 1):
        x = net.conv(f"{name}_{i}", x, m, kernel)
    return x
