"""What a comparison of libraries found, and how it is told: tables, geometric means, totals of networks, JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table

from convsched.autotune.measure.measure import Timing
from convsched.benchmark.environment import versions
from convsched.machine import host
from convsched.problem import Conv2d
from convsched.problem.layout import Layout

OURS = "convsched"
AUTO = "auto"  # the algorithm that `compile` picks
MAJOR = ("onnxruntime", "OpenVINO", "PyTorch")  # the best of these is the one to beat; ncnn is shown apart


@dataclass(frozen=True)
class Settings:
    """What is compared: ours by each of the `algorithms`, the first of which the ratios are about, and the other
    `libraries`; and how: `sample` seconds of each in each of `repeats` rounds."""

    algorithms: tuple[str, ...]
    libraries: tuple[str, ...]
    threads: int
    repeats: int
    sample: float
    layout: Layout

    @property
    def ours(self) -> dict[str, str]:
        """The names of ours in tables, and their algorithms.

        >>> Settings(("auto", "direct"), (), 1, 1, 1e-3, "nchw").ours
        {'convsched': 'auto', 'ours direct': 'direct'}
        """
        first, *others = self.algorithms
        return {OURS: first, **{f"ours {algorithm}": algorithm for algorithm in others}}


@dataclass(frozen=True)
class Result:
    """One layer: seconds a call by each name, errors against the oracle, the algorithms that ours ran; notes on what
    failed, and why an algorithm that was asked for does not apply."""

    layer: Conv2d
    timings: Mapping[str, Timing]
    errors: Mapping[str, float]
    algorithms: Mapping[str, str]
    notes: tuple[str, ...]
    inapplicable: Mapping[str, str]
    peak: float  # FLOP/s of one core in the same run

    def rate(self, name: str) -> float:
        """GFLOP/s, nan for what did not run."""
        timing = self.timings.get(name)
        return self.layer.flops / timing.minimum * 1e-9 if timing else math.nan

    def ratio(self, *names: str) -> float:
        """Our speed over that of the fastest of these; nan if none of them, or we, ran."""
        rates = [self.rate(name) for name in names if name in self.timings]
        return self.rate(OURS) / max(rates) if rates else math.nan

    def failed(self, names: Iterable[str]) -> bool:
        """Whether any of these neither ran nor had a reason not to."""
        return any(name not in self.timings and name not in self.inapplicable for name in names)


def line(result: Result) -> str:
    """A layer's result in plain text, as it comes."""
    rates = "  ".join(f"{name} {result.rate(name):.0f}" + (f" ({result.algorithms[name]})" if name in result.algorithms
                      else "") for name in result.timings)
    reasons = [f"{name}: {why}" for name, why in result.inapplicable.items()]
    notes = "".join(f"\n  {note}" for note in (*result.notes, *reasons))
    return f"{result.layer.text}: {rates} GFLOP/s; ours/best {number(result.ratio(*MAJOR), 2)}{notes}"


@dataclass(frozen=True)
class Column:
    """A column of the table: a layer's number with so many digits, and the text of the last row."""

    name: str
    of: Callable[[Result], float]
    digits: int
    mean: str = ""


def table(results: Sequence[Result], settings: Settings) -> Table:
    """GFLOP/s of all, ours as % of the peak, and our speed over the others'; geometric means last."""
    view = Table(
        title=f"GFLOP/s, {settings.threads} thread(s), convsched's arrays {settings.layout}, its algorithm"
        f" {settings.algorithms[0]}", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False,
        caption="ours/best: against the fastest of onnxruntime, OpenVINO and PyTorch; of all: and ncnn. Minima of"
        f" {settings.repeats} interleaved rounds.", caption_justify="left",
    )  # fmt: skip
    found = _columns(results, settings)
    view.add_column("layer (bias, ReLU)", overflow="fold")
    for column in found:
        view.add_column(column.name, justify="right", no_wrap=True)
    for result in results:
        view.add_row(result.layer.text.removesuffix(" bias act=relu"),
                     *(number(column.of(result), column.digits) for column in found))
    view.add_section()
    view.add_row("geometric mean; under a name, ours over it",
                 *(column.mean for column in found), style="bold")
    return view


def _columns(results: Sequence[Result], settings: Settings) -> list[Column]:
    means, threads = summary(results, settings), settings.threads

    def rate(name: str) -> Callable[[Result], float]:
        return lambda result: result.rate(name)

    def ratio(title: str, name: str, *others: str) -> Column:
        return Column(title, lambda result: result.ratio(*others), 2, number(means[name], 2))

    return [
        Column(OURS, rate(OURS), 1),
        *(Column(name, rate(name), 1, number(means[f"over {name}"], 2)) for name in _others(settings)),
        Column("peak", lambda result: result.peak * threads * 1e-9, 1),
        Column("% peak", lambda result: _share(result, threads), 1, number(means["percent of peak"], 1)),
        ratio("ours/best", "over the best", *MAJOR),
        *([ratio("ours/ncnn", "over ncnn", "ncnn")] if "ncnn" in settings.libraries else []),
        ratio("ours/best\nof all", "over the best of all", *settings.libraries),
        *([ratio("ours/direct", "over ours direct", "ours direct")] if "ours direct" in settings.ours else []),
    ]


def _others(settings: Settings) -> tuple[str, ...]:
    """The names that are compared with ours: ours by other algorithms, and the libraries."""
    return (*list(settings.ours)[1:], *settings.libraries)


def _share(result: Result, threads: int) -> float:
    return 100 * result.rate(OURS) / (result.peak * threads * 1e-9)


def summary(results: Sequence[Result], settings: Settings) -> dict[str, float]:
    """Geometric means over the layers, of our speed over each other's, the best's, and the peak."""
    return {
        "percent of peak": _mean(_share(result, settings.threads) for result in results),
        "over the best": _mean(result.ratio(*MAJOR) for result in results),
        "over the best of all": _mean(result.ratio(*settings.libraries) for result in results),
        **{f"over {name}": _mean(result.ratio(name) for result in results) for name in _others(settings)},
    }


@dataclass(frozen=True)
class Total:
    """A network: how many layers it has of the set, equal ones too; seconds of all of them by each name that ran all;
    why others have none."""

    network: str
    layers: int
    seconds: Mapping[str, float]
    notes: tuple[str, ...]

    @property
    def ratio(self) -> float:
        """The time of the best single library over ours; nan without either."""
        others = [seconds for name, seconds in self.seconds.items() if name != OURS]
        return min(others) / self.seconds[OURS] if others and OURS in self.seconds else math.nan


def totals(results: Sequence[Result], counts: Mapping[str, Mapping[Conv2d, int]],
           libraries: Sequence[str]) -> list[Total]:
    """The totals of ours and of each library for those networks all of whose layers were measured."""
    found, known = [], {result.layer: result for result in results}
    for network, own in counts.items():
        if not own.keys() <= known.keys():
            continue
        seconds, notes = dict[str, float](), []
        for name in (OURS, *libraries):
            missing = sum(name not in known[layer].timings for layer in own)
            if missing:
                notes.append(f"{network}: no total of {name}, which did not run {missing} of {len(own)} layers")
            else:
                seconds[name] = sum(count * known[layer].timings[name].minimum for layer, count in own.items())
        found.append(Total(network, sum(own.values()), seconds, tuple(notes)))
    return found


def totals_table(found: Sequence[Total], libraries: Sequence[str]) -> Table:
    """Milliseconds of each network, and the best single library's over ours."""
    notes = "".join(f"\n{note}" for total in found for note in total.notes)
    view = Table(title="ms of a network's layers in the table above, each as often as it occurs", title_justify="left",
                 box=box.SIMPLE_HEAD, show_edge=False, caption_justify="left",
                 caption=f"best/ours: the least total of a single library over ours.{notes}")
    for column in ("network", "layers", OURS, *libraries, "best/ours"):
        view.add_column(column, justify="left" if column == "network" else "right", no_wrap=True)
    for total in found:
        view.add_row(total.network, str(total.layers),
                     *(number(1e3 * total.seconds.get(name, math.nan), 3) for name in (OURS, *libraries)),
                     number(total.ratio, 2))
    return view


def to_json(results: Sequence[Result], found: Sequence[Total], settings: Settings,
            peers: Mapping[str, str]) -> dict[str, Any]:
    """Everything in plain types; times are in seconds a call. `peers`: the libraries' versions."""
    return {
        "machine": host.machine().text,
        "versions": {**versions(), **peers},
        **asdict(settings),
        "layers": [
            {
                "layer": result.layer.text,
                "peak_flops_per_second": result.peak,
                "errors": {name: _finite(error) for name, error in result.errors.items()},
                "algorithms": dict(result.algorithms),
                "notes": list(result.notes),
                "inapplicable": dict(result.inapplicable),
                "seconds": {
                    name: {"minimum": timing.minimum, "median": timing.median, "spread": timing.spread}
                    for name, timing in result.timings.items()
                },
            }
            for result in results
        ],
        "geometric_means": {name: _finite(mean) for name, mean in summary(results, settings).items()},
        "totals": [{**asdict(total), "ratio": _finite(total.ratio)} for total in found],
    }


def _mean(values: Iterable[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.geometric_mean(finite) if finite else math.nan


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def number(value: float, digits: int) -> str:
    """A number with so many digits after the point; "-" where there is none."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"
