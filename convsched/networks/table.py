"""The layers of a network as a list of distinct problems, and how the tables of networks are written.

A table is a program: it follows a feature map through the network and adds a layer at each step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from convsched.problem import Conv2d, Linear, Problem
from convsched.problem.rules import Activation


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
    def parameters(self) -> int:
        """Weights and bias of all layers, the classifier included; folded normalisation is in the bias."""
        return sum(layer.count * layer.problem.parameters for layer in self.layers)


@dataclass(frozen=True)
class Map:
    """A square feature map: what one layer hands to the next."""

    channels: int
    size: int

    def pooled(self, kernel: int, stride: int, padding: int = 0) -> Map:
        """After pooling; a window that would reach over the padded edge is left out."""
        return Map(self.channels, (self.size + 2 * padding - kernel) // stride + 1)


class LayerList:
    """Collects a network's layers in order; equal problems become one layer with a count."""

    def __init__(self) -> None:
        self.first: dict[Problem, str] = {}
        self.counts: dict[Problem, int] = {}

    def add(self, name: str, problem: Problem) -> None:
        """Add a layer, or one more occurrence of it."""
        self.first.setdefault(problem, name)
        self.counts[problem] = self.counts.get(problem, 0) + 1

    def conv(
        self, name: str, x: Map, m: int, kernel: int | tuple[int, int], stride: int = 1, *,
        padding: int | None = None, groups: int = 1, bias: bool = True,
        activation: Activation = "relu", residual: bool = False,
    ) -> Map:  # fmt: skip
        """Add a convolution; unless given, padding keeps the size at stride 1."""
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        problem = Conv2d(
            x.channels, m, sides, stride, (sides[0] // 2, sides[1] // 2) if padding is None else padding,
            groups=groups, bias=bias, input_size=x.size, activation=activation, residual=residual,
        )  # fmt: skip
        self.add(name, problem)
        return Map(m, problem.E)

    def linear(self, name: str, c: int, m: int, activation: Activation = None) -> int:
        """Add a fully connected layer with c inputs; the number of its outputs, m."""
        self.add(name, Linear(c, m, activation=activation))
        return m

    def network(self, name: str) -> Network:
        """The network of the layers added so far."""
        return Network(name, tuple(Layer(self.first[p], p, count) for p, count in self.counts.items()))


def concat(maps: Iterable[Map]) -> Map:
    """Maps of one size, their channels one after another."""
    branches = list(maps)
    return Map(sum(branch.channels for branch in branches), branches[0].size)
