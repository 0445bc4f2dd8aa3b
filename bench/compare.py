"""Convolution layers against other libraries: `python bench/compare.py`.

Every layer runs with bias and ReLU on the same arrays in every library that is installed, one after
another in each round of one interleaved run; the time is the minimum over rounds. All answers, ours and
theirs, are checked against the float64 oracle first. The FMA peak is measured in the same rounds by a
generated kernel of multiply-adds.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parent))

import peers
from rich import box
from rich.console import Console
from rich.table import Table

import convsched
from convsched.autotune.measure import Timing, interleave, peak_call
from convsched.errors import ConvschedError
from convsched.explain.bench import bound_call
from convsched.explain.cases import Arrays, Case, make_arrays, relative_error
from convsched.explain.environment import versions
from convsched.kernels.arrays import from_layout
from convsched.machine import Machine
from convsched.names import LAYOUTS, Layout
from convsched.networks import network
from convsched.problem import Conv2d
from convsched.reference import convolve

OURS = "convsched"
ALL = ",".join(peer.name for peer in peers.PEERS)
SETTLE = 0.025  # seconds after which other libraries' threads no longer spin: 20 ms in ncnn, less elsewhere
PATH = click.Path(path_type=Path, dir_okay=False)
MAJOR = ("onnxruntime", "OpenVINO", "PyTorch")  # the best of these is the one to beat; ncnn is shown apart
ERROR_LIMIT = 2e-4  # of max |error| / rms(output): the loosest accuracy class, since ncnn runs Winograd

# (channels in and out, height and width, filter): layers for the blocked layout, of ResNet and MobileNet.
BLOCKED = ((64, 56, 3), (256, 14, 3), (512, 14, 1), (256, 28, 1))


@dataclass(frozen=True)
class Result:
    """One layer: seconds a call in each library, errors against the oracle, notes on those that failed."""

    layer: Conv2d
    timings: Mapping[str, Timing]
    errors: Mapping[str, float]
    notes: tuple[str, ...]
    peak: float  # FLOP/s of one core in the same run

    def rate(self, name: str) -> float:
        """GFLOP/s, nan for a library that did not run."""
        timing = self.timings.get(name)
        return self.layer.flops / timing.minimum * 1e-9 if timing else math.nan

    def ratio(self, *names: str) -> float:
        """Our speed over that of the fastest of the libraries; nan if none of them, or we, ran."""
        rates = [self.rate(name) for name in names if name in self.timings]
        return self.rate(OURS) / max(rates) if rates else math.nan


@click.command()
@click.option("--set", "layer_set", default="dense", show_default=True, help="dense[:networks a,b], blocked, or a,b.")
@click.option("--layer", "wanted", default="", help="Only layers with this in their text.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=15, show_default=True, help="Rounds.")
@click.option("--sample", default=5.0, show_default=True, help="Milliseconds of one library in one round.")
@click.option("--ours-layout", type=click.Choice([*LAYOUTS]), default="nchw", show_default=True)
@click.option("--algorithm", help="Ours: direct, winograd or another (default: each layer's best).")
@click.option("--tune", "budget", help="Tune each layer of ours before, within such a budget: 10s.")
@click.option("--peers", "chosen", default=ALL, show_default=True)
@click.option("--json", "json_file", type=PATH, help="Write results here.")
def main(
    layer_set: str,
    wanted: str,
    threads: int,
    repeats: int,
    sample: float,
    ours_layout: Layout,
    algorithm: str | None,
    budget: str | None,
    chosen: str,
    json_file: Path | None,
) -> None:
    """Compare convsched's kernels with other libraries on the layers of a set."""
    faulthandler.enable()  # a library that dies takes all down: at least show in which call
    layers = [layer for layer in layers_of(layer_set) if wanted in layer.text]
    if not layers:
        raise click.UsageError(f"no layer of {layer_set} has {wanted!r} in its text")
    libraries = installed(chosen.split(",") if chosen else [])
    warn_of_load()
    run = Run(libraries, threads, repeats, sample * 1e-3, ours_layout, algorithm)
    if budget is not None:
        for layer in layers:
            tuned = convsched.tune(layer, budget=budget, threads=threads, layout=ours_layout, algorithm=algorithm)
            click.echo(f"{layer.text}: {tuned.speed:.3f} of the default's speed, {tuned.tried} candidates")
    results: list[Result] = []
    try:
        for layer in layers:
            results.append(run.layer(layer))
            click.echo(line(results[-1]))
    except KeyboardInterrupt:
        click.echo("stopped", err=True)
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table(results, libraries, run))
    if json_file is not None:
        json_file.write_text(json.dumps(to_json(results, libraries, run), indent=1) + "\n")
    sys.exit(1 if any(OURS not in result.timings for result in results) else 0)


def warn_of_load() -> None:
    """Other processes on the same cores spoil a comparison, and one of OpenMP's barriers most of all."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5:
        click.echo(f"load average {load:.1f}: other processes run, so do not trust these times", err=True)


def layers_of(layer_set: str) -> list[Conv2d]:
    """The distinct layers of a set, with bias and ReLU, batch 1 and without a residual."""
    name, _, networks = layer_set.partition(":")
    if layer_set == "blocked":
        layers = [Conv2d(c, c, k, padding=k // 2, input_size=size) for c, size, k in BLOCKED]
    elif name == "dense":
        layers = [layer for layer in _convolutions(networks or "resnet50,vgg16,mobilenet_v1") if _is_dense(layer)]
    else:
        layers = list(_convolutions(layer_set))
    return list(dict.fromkeys(map(_plain, layers)))


def _convolutions(names: str) -> Iterable[Conv2d]:
    try:
        networks = [network(name) for name in names.split(",")]
    except ConvschedError as error:
        raise click.UsageError(f"{error}, or dense, or blocked") from error
    return [
        layer.problem
        for net in networks
        for layer in net.layers
        if isinstance(layer.problem, Conv2d)
    ]


def _is_dense(layer: Conv2d) -> bool:
    """A 3x3 or 1x1 layer at stride 1, of one group, from more than the three channels of an image."""
    return (
        layer.kernel_size in ((3, 3), (1, 1))
        and layer.stride == layer.dilation == (1, 1)
        and layer.groups == 1
        and layer.C >= 32
    )


def _plain(layer: Conv2d) -> Conv2d:
    return Conv2d(
        layer.C, layer.M, layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups,
        input_size=layer.input_size, activation="relu",
    )  # fmt: skip


def installed(names: Iterable[str]) -> list[peers.Peer]:
    """The peers of these names that are installed; a line for each that is not."""
    known = {peer.name.lower(): peer for peer in peers.PEERS}
    found = []
    for name in names:
        if name.lower() not in known:
            raise click.UsageError(f"peer {name!r} is not one of {', '.join(p.name for p in peers.PEERS)}")
        peer = known[name.lower()]
        try:
            click.echo(f"{peer.name} {peer.version}")
            found.append(peer)
        except ImportError:
            click.echo(f"{peer.name} is not installed: left out")
    return found


@dataclass(frozen=True)
class Run:
    """How to run: the libraries, and `sample` seconds of each in each of `repeats` rounds."""

    libraries: list[peers.Peer]
    threads: int
    repeats: int
    sample: float
    layout: Layout
    algorithm: str | None = None

    def layer(self, layer: Conv2d) -> Result:
        """Prepares, checks and times one layer everywhere."""
        arrays = make_arrays(Case("", layer))
        expected = convolve(layer, arrays.x, arrays.weight, arrays.bias)
        ready: dict[str, peers.Prepared] = {}  # whole, since a call may use memory that `output` holds
        errors: dict[str, float] = {}
        notes = []
        for name, prepare in {OURS: self._ours, **{p.name: p.prepare for p in self.libraries}}.items():
            try:
                prepared = prepare(layer, arrays, self.threads)
                prepared.call()
                prepared.call()  # the second call finds what the first one left behind
                errors[name] = relative_error(prepared.output(), expected)
            except Exception as error:  # whatever a library does, the others are still compared
                notes.append(f"{name} crashed: {type(error).__name__}: {error}")
                continue
            if errors[name] <= ERROR_LIMIT:
                ready[name] = prepared
            else:
                notes.append(f"{name} is wrong: error {errors[name]:.1e}")
        timings, peak = self._time({name: prepared.call for name, prepared in ready.items()})
        return Result(layer, timings, errors, tuple(notes), peak)

    def _ours(self, layer: Conv2d, arrays: Arrays, threads: int) -> peers.Prepared:
        kernel = convsched.compile(layer, threads=threads, layout=self.layout, algorithm=self.algorithm)
        call, output = bound_call(kernel, layer, arrays, self.layout)
        return peers.Prepared(call, lambda: from_layout(output, layer.output_shape, self.layout))

    def _time(self, calls: Mapping[str, Callable[[], object]]) -> tuple[Mapping[str, Timing], float]:
        """Times in interleaved rounds, and the peak of one core measured in the same rounds.

        With several threads, a pause and a call that does not count come before each sample: the threads
        of the library before may still spin, and the own ones be asleep.
        """
        peak, flops = peak_call()
        timings = interleave(
            {**calls, "peak": peak},
            repeats=self.repeats,
            min_seconds=self.sample,
            settle=SETTLE if self.threads > 1 else 0.0,
        )
        return {name: timings[name] for name in calls}, flops / timings["peak"].minimum


def line(result: Result) -> str:
    """A layer's result in plain text, as it comes."""
    rates = "  ".join(f"{name} {result.rate(name):.0f}" for name in result.timings)
    notes = "".join(f"\n  {note}" for note in result.notes)
    return f"{result.layer.text}: {rates} GFLOP/s; ours/best {_number(result.ratio(*MAJOR), 2)}{notes}"


def table(results: list[Result], libraries: list[peers.Peer], run: Run) -> Table:
    """GFLOP/s of all, ours as % of the peak, and our speed over the others'; geometric means last."""
    names = [peer.name for peer in libraries]
    view = Table(
        title=f"GFLOP/s, {run.threads} thread(s), convsched's arrays {run.layout}", title_justify="left",
        box=box.SIMPLE_HEAD, show_edge=False,
        caption="ours/best: against the fastest of onnxruntime, OpenVINO and PyTorch. Minima of"
        f" {run.repeats} interleaved rounds.", caption_justify="left",
    )  # fmt: skip
    view.add_column("layer (bias, ReLU)", overflow="fold")
    for column in (OURS, *names, "peak", "% peak", "ours/best", *(["ours/ncnn"] if "ncnn" in names else [])):
        view.add_column(column, justify="right", no_wrap=True)
    for result in results:
        share = 100 * result.rate(OURS) / (result.peak * run.threads * 1e-9)
        cells = [result.rate(OURS), *(result.rate(name) for name in names), result.peak * run.threads * 1e-9]
        ratios = [result.ratio(*MAJOR), *([result.ratio("ncnn")] if "ncnn" in names else [])]
        view.add_row(
            result.layer.text.removesuffix(" bias act=relu"),
            *(_number(cell, 1) for cell in cells),
            _number(share, 1),
            *(_number(ratio, 2) for ratio in ratios),
        )
    view.add_section()
    means = summary(results, libraries, run)
    view.add_row(
        "geometric mean; under a library, ours over it",
        "",
        *(_number(means[f"over {name}"], 2) for name in names),
        "",
        _number(means["percent of peak"], 1),
        _number(means["over the best"], 2),
        *([_number(means["over ncnn"], 2)] if "ncnn" in names else []),
        style="bold",
    )
    return view


def summary(results: list[Result], libraries: list[peers.Peer], run: Run) -> dict[str, float]:
    """Geometric means over the layers, of our speed over each library's, the best's, and the peak."""
    shares = [100 * result.rate(OURS) / (result.peak * run.threads * 1e-9) for result in results]
    return {
        "percent of peak": _mean(shares),
        "over the best": _mean([result.ratio(*MAJOR) for result in results]),
        **{f"over {peer.name}": _mean([result.ratio(peer.name) for result in results]) for peer in libraries},
    }


def to_json(results: list[Result], libraries: list[peers.Peer], run: Run) -> dict[str, Any]:
    """Everything in plain types; times are in seconds a call."""
    return {
        "machine": Machine.host().text,
        "versions": {**versions(), **{peer.name: peer.version for peer in libraries}},
        **asdict(replace(run, libraries=[])),
        "libraries": [peer.name for peer in libraries],
        "layers": [
            {
                "layer": result.layer.text,
                "peak_flops_per_second": result.peak,
                "errors": {name: _finite(error) for name, error in result.errors.items()},
                "notes": list(result.notes),
                "seconds": {
                    name: {"minimum": timing.minimum, "median": timing.median, "spread": timing.spread}
                    for name, timing in result.timings.items()
                },
            }
            for result in results
        ],
        "geometric_means": {name: _finite(mean) for name, mean in summary(results, libraries, run).items()},
    }


def _mean(values: Iterable[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.geometric_mean(finite) if finite else math.nan


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


if __name__ == "__main__":
    main()
