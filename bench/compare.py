"""Convolution layers against other libraries: `python bench/compare.py`.

Every layer runs with bias and ReLU on the same arrays in every library that is installed, one after
another in each round of one interleaved run; the time is the minimum over rounds. All answers, ours and
theirs, are checked against the float64 oracle first. The FMA peak is measured in the same rounds by a
generated kernel of multiply-adds.

`--set` names the layers: `dense`, `conv:vgg16,resnet50`, `5x5` and others of `layer_sets.py`. For networks the
total times of their layers follow. `--algorithm auto,direct` times ours by several algorithms in the same run.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parent))

import layer_sets
import peers
import results
from results import AUTO, Result, Settings
from rich.console import Console

import convsched
from convsched.autotune.measure.measure import Timing, interleave, peak_call
from convsched.benchmark.cases import Arrays, Case, make_arrays, relative_error
from convsched.benchmark.run import bound_call
from convsched.errors import ConvschedError, LoweringError
from convsched.plan.families import named, parse_name
from convsched.problem import Conv2d
from convsched.problem.layout import LAYOUTS, Layout, from_layout
from convsched.problem.reference import convolve

ALL = ",".join(peer.name for peer in peers.PEERS)
SETTLE = 0.025  # seconds after which other libraries' threads no longer spin: 20 ms in ncnn, less elsewhere
PATH = click.Path(path_type=Path, dir_okay=False)
ERROR_LIMIT = 2e-4  # of max |error| / rms(output): the loosest accuracy class, since ncnn runs Winograd
WIDTH = 200  # columns of a table that goes to no terminal


@click.command()
@click.option("--set", "text", default="dense", show_default=True,
              help=f"dense[:networks a,b], conv[:networks], a,b, or one of {', '.join(layer_sets.FIXED)}.")
@click.option("--layer", "wanted", default="", help="Only layers with this in their text.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=15, show_default=True, help="Rounds.")
@click.option("--sample", default=5.0, show_default=True, help="Milliseconds of one library in one round.")
@click.option("--ours-layout", type=click.Choice([*LAYOUTS]), default="nchw", show_default=True)
@click.option("--algorithm", default=AUTO, show_default=True,
              help="Ours: auto (each layer's best), direct or another, or several, the first for the ratios.")
@click.option("--tune", "budget", help="Tune each layer of ours by each algorithm before, within such a budget: 10s.")
@click.option("--peers", "chosen", default=ALL, show_default=True)
@click.option("--json", "json_file", type=PATH, help="Write results here.")
def main(
    text: str,
    wanted: str,
    threads: int,
    repeats: int,
    sample: float,
    ours_layout: Layout,
    algorithm: str,
    budget: str | None,
    chosen: str,
    json_file: Path | None,
) -> None:
    """Compare convsched's kernels with other libraries on the layers of a set."""
    faulthandler.enable()  # a library that dies takes all down: at least show in which call
    chosen_set, algorithms = set_of(text, wanted), algorithms_of(algorithm)
    libraries = installed(chosen.split(",") if chosen else [])
    names = tuple(peer.name for peer in libraries)
    warn_of_load()
    run = Run(Settings(algorithms, names, threads, repeats, sample * 1e-3, ours_layout), libraries)
    found: list[Result] = []
    try:
        if budget is not None:
            for layer in chosen_set.layers:
                tune(layer, budget, run.settings)
        for layer in chosen_set.layers:
            found.append(run.layer(layer))
            click.echo(results.line(found[-1]))
    except KeyboardInterrupt:
        click.echo("stopped", err=True)
    totals = results.totals(found, chosen_set.counts, names)
    console = Console()
    console = console if console.is_terminal else Console(width=WIDTH)
    console.print(results.table(found, run.settings))
    if totals:
        console.print(results.totals_table(totals, names))
    if json_file is not None:
        versions = {peer.name: peer.version for peer in libraries}
        json_file.write_text(json.dumps(results.to_json(found, totals, run.settings, versions), indent=1) + "\n")
    sys.exit(1 if any(result.failed(run.settings.ours) for result in found) else 0)


def set_of(text: str, wanted: str) -> layer_sets.LayerSet:
    """The layers of a set with `wanted` in their text."""
    try:
        found = layer_sets.layer_set(text).having(wanted)
    except ConvschedError as error:
        raise click.UsageError(f"{error}, or {', '.join((*layer_sets.OF_NETWORKS, *layer_sets.FIXED))}") from error
    if not found.layers:
        raise click.UsageError(f"no layer of {text} has {wanted!r} in its text")
    return found


def algorithms_of(text: str) -> tuple[str, ...]:
    """The algorithms of a text with commas between them: auto, or what `compile` takes.

    >>> algorithms_of("auto,winograd(4,3),direct")
    ('auto', 'winograd(4,3)', 'direct')
    """
    found = tuple(dict.fromkeys(re.split(r",(?![^(]*\))", text)))
    for name in found:
        try:
            if name != AUTO:
                parse_name(name)
        except LoweringError as error:
            raise click.UsageError(f"{error}; or {AUTO}") from error
    return found


def why_not(algorithm: str, layer: Conv2d) -> str:
    """Why an algorithm does not apply to a layer, or is not accurate enough for it; empty if it does."""
    try:
        if algorithm != AUTO:
            named(algorithm, layer).require("normal")
    except LoweringError as error:
        return str(error)
    return ""


def tune(layer: Conv2d, budget: str, settings: Settings) -> None:
    """Tune a layer by each of the algorithms that apply to it; auto searches all of them."""
    for algorithm in settings.algorithms:
        if why_not(algorithm, layer):
            continue
        tuned = convsched.tune(layer, budget=budget, threads=settings.threads, layout=settings.layout,
                               algorithm=None if algorithm == AUTO else algorithm)
        click.echo(f"{layer.text}, {algorithm}: {tuned.speed:.3f} of the default's speed, {tuned.tried} candidates")


def warn_of_load() -> None:
    """Other processes on the same cores spoil a comparison, and one of OpenMP's barriers most of all."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5:
        click.echo(f"load average {load:.1f}: other processes run, so do not trust these times", err=True)


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
    """A comparison with these libraries."""

    settings: Settings
    libraries: list[peers.Peer]

    def layer(self, layer: Conv2d) -> Result:
        """Prepares, checks and times one layer everywhere."""
        arrays = make_arrays(Case("", layer))
        expected = convolve(layer, arrays.x, arrays.weight, arrays.bias)
        ours = self.settings.ours
        inapplicable = {name: why for name, algorithm in ours.items() if (why := why_not(algorithm, layer))}
        prepares = {name: partial(self._ours, algorithm) for name, algorithm in ours.items()
                    if name not in inapplicable} | {peer.name: peer.prepare for peer in self.libraries}
        ready: dict[str, peers.Prepared] = {}  # whole, since a call may use memory that `output` holds
        errors: dict[str, float] = {}
        notes = []
        for name, prepare in prepares.items():
            try:
                prepared = prepare(layer, arrays, self.settings.threads)
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
        algorithms = {name: ready[name].keep[0].algorithm for name in ours if name in ready}
        return Result(layer, timings, errors, algorithms, tuple(notes), inapplicable, peak)

    def _ours(self, algorithm: str, layer: Conv2d, arrays: Arrays, threads: int) -> peers.Prepared:
        layout = self.settings.layout
        kernel = convsched.compile(layer, threads=threads, layout=layout,
                                   algorithm=None if algorithm == AUTO else algorithm)
        call, output = bound_call(kernel, layer, arrays, layout)
        return peers.Prepared(call, lambda: from_layout(output, layer.output_shape, layout), (kernel,))

    def _time(self, calls: Mapping[str, Callable[[], object]]) -> tuple[Mapping[str, Timing], float]:
        """Times in interleaved rounds, and the peak of one core measured in the same rounds.

        With several threads, a pause and a call that does not count come before each sample: the threads
        of the library before may still spin, and the own ones be asleep.
        """
        peak, flops = peak_call()
        timings = interleave(
            {**calls, "peak": peak},
            repeats=self.settings.repeats,
            min_seconds=self.settings.sample,
            settle=SETTLE if self.settings.threads > 1 else 0.0,
        )
        return {name: timings[name] for name in calls}, flops / timings["peak"].minimum


if __name__ == "__main__":
    main()
