"""Tuning a network: every distinct layer once, and the budget where the network's time is.

A layer weighs ``count * seconds`` of its default. After all defaults are measured, the layers share what is
left of the budget by weight, the heaviest first; what one does not use goes to those after it, and what is
left at the end goes round again, until all searches are complete or the budget is spent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

from convsched.autotune.search.budget import Budget, Tuned, TuneError
from convsched.autotune.search.tuner import LayerSearch, Tuner
from convsched.problem import Problem

LEAST_SECONDS = 0.1  # about a candidate: a rest that is not worth another round


@dataclass(frozen=True)
class TunedLayer:
    """A layer, how often it occurs, and what tuning found."""

    count: int
    tuned: Tuned


@dataclass(frozen=True)
class TunedNetwork:
    """The layers that were tuned, those that failed and why, and whether Ctrl-C ended it."""

    layers: tuple[TunedLayer, ...]
    failures: Mapping[Problem, str]
    interrupted: bool

    @property
    def default_seconds(self) -> float:
        """The tuned layers, each as often as it occurs, with their defaults."""
        return sum(layer.count * layer.tuned.default_seconds for layer in self.layers)

    @property
    def seconds(self) -> float:
        """The same with what was found."""
        return sum(layer.count * layer.tuned.seconds for layer in self.layers)


def tune_network(tuner: Tuner, layers: Iterable[tuple[Problem, int]], budget: Budget,
                 report: Callable[[TunedLayer], None] = lambda _: None) -> TunedNetwork:
    """Tune the layers of a network, given with how often each occurs, within one budget.

    ``report`` gets a layer each time that its search pauses or ends. A layer that fails leaves its budget to
    the others. Ctrl-C ends the tuning: all that was measured is in the cache, and the next run goes on from it.
    """
    network = _Network(tuner, report)
    tuner.begin(budget)
    try:
        network.open(layers)
        network.run()
        return network.result(interrupted=False)
    except BaseException as error:
        for layer in network.layers:
            if not layer.is_finished:
                layer.search.mark(complete=False)
        if not isinstance(error, KeyboardInterrupt):
            raise
        return network.result(interrupted=True)


@dataclass(eq=False)
class _Layer:
    """A layer while it is tuned."""

    search: LayerSearch
    count: int
    weight: float = 0.0
    tuned: Tuned | None = None

    @property
    def is_finished(self) -> bool:
        """Whether what it has measured is what it has found."""
        return self.tuned is not None and self.tuned.tried == self.search.measured


@dataclass
class _Network:
    """The layers of one network."""

    tuner: Tuner
    report: Callable[[TunedLayer], None]
    layers: list[_Layer] = field(default_factory=list)
    failures: dict[Problem, str] = field(default_factory=dict)

    def open(self, layers: Iterable[tuple[Problem, int]]) -> None:
        """Measure the defaults of the distinct layers, and put the heaviest first."""
        counts = Counter[Problem]()
        for problem, count in layers:
            counts[problem] += count
        for problem, count in counts.items():
            try:
                layer = _Layer(LayerSearch(self.tuner, problem), count)
            except TuneError as error:
                self.failures[problem] = str(error)
                continue
            self.layers.append(layer)
            if self.tried(layer, layer.search.run_default):
                layer.weight = count * layer.search.default_seconds
        self.layers.sort(key=lambda layer: -layer.weight)

    def run(self) -> None:
        """Search them all, round after round."""
        open_ = list(self.layers)
        while open_:
            for index, layer in enumerate(open_):
                share = part(self.tuner.left, layer.weight, sum(rest.weight for rest in open_[index:]))
                self.tried(layer, partial(self.search, layer, share))
            left = self.tuner.left
            spent = left.seconds < LEAST_SECONDS or left.candidates < 1
            open_ = [] if spent else [layer for layer in open_ if layer in self.layers and not layer.search.complete]

    def search(self, layer: _Layer, share: Budget) -> None:
        layer.search.run(share)
        before, layer.tuned = layer.tuned, layer.search.finish()
        if before is None or before.tried < layer.tuned.tried or before.complete < layer.tuned.complete:
            self.report(TunedLayer(layer.count, layer.tuned))

    def tried(self, layer: _Layer, action: Callable[[], object]) -> bool:
        """Do something for a layer; one that fails is out, and False."""
        try:
            action()
        except TuneError as error:
            layer.search.mark(complete=False)
            self.layers.remove(layer)
            self.failures[layer.search.problem] = str(error)
            return False
        return True

    def result(self, interrupted: bool) -> TunedNetwork:
        done = tuple(TunedLayer(layer.count, layer.tuned) for layer in self.layers if layer.tuned)
        return TunedNetwork(done, self.failures, interrupted)


def part(left: Budget, weight: float, total: float) -> Budget:
    """The share of a layer in what is left, of which all from it on weigh ``total``; whole candidates."""
    share = weight / total if total else 1.0
    candidates = left.candidates * share
    return Budget(left.seconds * share, candidates if candidates == float("inf") else round(candidates))
