"""The layers of known networks, at batch 1, as their papers give them.

A network is a list of distinct problems with how often each occurs, so that a total is
sum(count * problem.macs). Batch normalisation after a convolution is folded into its weights and bias.
A sum of two branches is the residual of the convolution that ends the main branch, together with the
activation that follows the sum; a squeeze-and-excitation is two 1x1 convolutions on a 1x1 map.

Totals that these tables reproduce (convolutions only, unless said otherwise) are in `tests/test_networks.py`;
Sze et al., "Efficient Processing of Deep Neural Networks" (Proc. IEEE 2017, table II) is the source of most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from convsched.errors import ModelError
from convsched.networks import classic, mobile
from convsched.networks.table import Layer, Network

__all__ = ["NETWORKS", "Layer", "Network", "network"]


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


# Every known network by its name on the command line.
NETWORKS: Mapping[str, Callable[[], Network]] = MappingProxyType({
    build.__name__: build
    for build in (
        classic.lenet5, classic.alexnet, classic.vgg16, classic.googlenet, classic.squeezenet, classic.resnet18,
        classic.resnet50, classic.densenet121, mobile.mobilenet_v1, mobile.mobilenet_v2,
        mobile.mobilenet_v3_large, mobile.efficientnet_b0, mobile.efficientnet_b4, mobile.shufflenet_v1,
        classic.inception_v3,
    )
})  # fmt: skip
