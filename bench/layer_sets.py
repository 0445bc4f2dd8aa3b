"""The layers that libraries are compared on: named sets, and the convolutions of networks.

`dense:a,b` and `conv:a,b` are those layers of networks a and b that are 3x3 or 1x1 at stride 1 without groups, and
all their convolutions; `a,b` is short for the latter, and without networks both are of three known ones. Sets of
networks know how often each layer occurs, so that a network's total can be told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from convsched.networks.known import Network, network
from convsched.problem import Conv2d

USUAL = "resnet50,vgg16,mobilenet_v1"

# (channels in and out, height and width, filter): layers for the blocked layout, of ResNet and MobileNet.
BLOCKED = ((64, 56, 3), (256, 14, 3), (512, 14, 1), (256, 28, 1))
# Channels in and out of square products of matrices, and the image of as many pixels.
SQUARE = ((512, (16, 32)), (1024, (32, 32)), (2048, (32, 64)))


@dataclass(frozen=True)
class LayerSet:
    """Distinct layers with bias and ReLU, at batch 1 and without a residual; for each network that the set is of,
    how often each of its layers occurs."""

    layers: tuple[Conv2d, ...]
    counts: Mapping[str, Mapping[Conv2d, int]] = field(default_factory=dict)

    def having(self, text: str) -> LayerSet:
        """The layers with this in their text."""
        counts = {name: {layer: count for layer, count in own.items() if text in layer.text}
                  for name, own in self.counts.items()}
        return LayerSet(tuple(layer for layer in self.layers if text in layer.text),
                        {name: own for name, own in counts.items() if own})


def layer_set(text: str) -> LayerSet:
    """The set of a text. Raises ModelError for a network that is not known.

    >>> [layer.text for layer in layer_set("gemm").layers][0]
    'conv2d c=512 m=512 k=1x1 in=16x32 bias act=relu'
    >>> layer_set("conv:vgg16") == layer_set("vgg16")
    True
    """
    if text in FIXED:
        return LayerSet(tuple(dict.fromkeys(map(plain, FIXED[text]()))))
    kind, _, names = text.partition(":")
    if kind not in OF_NETWORKS:
        kind, names = "conv", text
    keep = OF_NETWORKS[kind]
    networks = [network(name) for name in (names or USUAL).split(",")]
    counts = {net.name: _counts(net, keep) for net in networks}
    return LayerSet(tuple(dict.fromkeys(layer for own in counts.values() for layer in own)), counts)


def plain(layer: Conv2d) -> Conv2d:
    """The layer that all libraries can be given: with bias and ReLU, whatever it had."""
    return Conv2d(layer.C, layer.M, layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups,
                  input_size=layer.input_size, activation="relu")


def _counts(net: Network, keep: Callable[[Conv2d], bool]) -> Mapping[Conv2d, int]:
    """How often each plain layer occurs: two that differ in their activation or residual become one."""
    found = Counter[Conv2d]()
    for layer in net.layers:
        if isinstance(layer.problem, Conv2d) and keep(layer.problem):
            found[plain(layer.problem)] += layer.count
    return found


def _is_dense(layer: Conv2d) -> bool:
    """A 3x3 or 1x1 layer at stride 1, of one group, from more than the three channels of an image."""
    return (layer.kernel_size in ((3, 3), (1, 1)) and layer.stride == layer.dilation == (1, 1)
            and layer.groups == 1 and layer.C >= 32)


def _with_filters(names: str, *sizes: tuple[int, int]) -> Iterator[Conv2d]:
    """The layers of networks with filters of these sizes, at stride 1."""
    for name in names.split(","):
        for layer in network(name).layers:
            problem = layer.problem
            if isinstance(problem, Conv2d) and problem.kernel_size in sizes and problem.stride == (1, 1):
                yield problem


def _large() -> Iterator[Conv2d]:
    """Filters of 256 and 1024 taps along a line, and of 31x31."""
    yield from (Conv2d(32, 32, (1, taps), input_size=(1, 4096)) for taps in (256, 1024))
    yield Conv2d(32, 32, 31, padding=15, input_size=112)


OF_NETWORKS: Mapping[str, Callable[[Conv2d], bool]] = {"dense": _is_dense, "conv": lambda layer: True}

FIXED: Mapping[str, Callable[[], Iterable[Conv2d]]] = {
    "blocked": lambda: (Conv2d(c, c, k, padding=k // 2, input_size=size) for c, size, k in BLOCKED),
    "5x5": lambda: _with_filters("googlenet,alexnet", (5, 5)),  # AlexNet's has two groups
    "1x7": lambda: _with_filters("inception_v3", (1, 7), (7, 1)),
    "large": _large,
    "gemm": lambda: (Conv2d(c, c, 1, input_size=size) for c, size in SQUARE),
}
