"""`convsched tune`: a measured schedule for every layer of a network, remembered for `compile`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from convsched.autotune import tune as autotune
    from convsched.autotune.network import TunedLayer, TunedNetwork
    from convsched.autotune.tune import Budget, Tuner
    from convsched.explain.cases import Case
    from convsched.names import Accuracy

INTERRUPTED = 130


def run(cases: list[Case], budget: str, threads: int, layout: str, file: Path | None,
        accuracy: Accuracy = "normal", algorithm: str | None = None) -> int:
    """Tune the distinct layers, print a line each and a total; the exit code."""
    from convsched.autotune.cache import ScheduleCache
    from convsched.autotune.network import tune_network
    from convsched.autotune.tune import Budget, Tuner

    whole = Budget.parse(budget)
    layers = [(case.problem, case.count) for case in cases]
    with Tuner(ScheduleCache(file), threads, layout, accuracy, algorithm) as tuner, _live(tuner, whole):
        network = tune_network(tuner, layers, whole, lambda layer: click.echo(line(layer)))
    for problem, why in network.failures.items():
        click.echo(f"{problem.text}: {why}")
    if network.interrupted:
        click.echo("interrupted; what was measured is kept, and the next run goes on from there")
    if network.layers:
        click.echo(total(network))
    if network.interrupted:
        return INTERRUPTED
    return 1 if network.failures else 0


@contextmanager
def _live(tuner: Tuner, whole: Budget) -> Iterator[None]:
    """A bar of the budget with the current layer, on a terminal; elsewhere the lines must do."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    columns = (BarColumn(20), TextColumn("{task.description}", markup=False))
    together = sys.stdout.isatty()  # lines are then to appear above the bar; a file gets them as they are
    with Progress(*columns, console=console, transient=True, redirect_stdout=together) as bar:
        task = bar.add_task("measuring the defaults", total=1.0)

        def report(progress: autotune.Progress) -> None:
            bar.update(task, description=status(progress), completed=used(whole, progress.left))

        tuner.report = report
        yield


def status(progress: autotune.Progress) -> str:
    """Where the search of a layer stands, and what is left of the whole budget."""
    left = progress.left
    rest = f"{max(0.0, left.seconds):.0f} s" if left.candidates == float("inf") else f"{left.candidates:g} candidates"
    return (f"{rest} left  {progress.problem.text}  {progress.speed:.3f}x the default, "
            f"{progress.tried} tried, {progress.failed} failed")


def used(whole: Budget, left: Budget) -> float:
    """How much of the budget is spent, from 0 to 1."""
    shares = [rest / all_ for all_, rest in ((whole.seconds, left.seconds), (whole.candidates, left.candidates))
              if 0 < all_ < float("inf")]
    return min(1.0, max(0.0, 1.0 - min(shares, default=1.0)))


def line(layer: TunedLayer) -> str:
    """What tuning found for a layer, in one line."""
    tuned = layer.tuned
    failures = "".join(f"; {count} x {reason}" for reason, count in tuned.failures.items())
    return (f"{tuned.problem.text}  x{layer.count}  {tuned.seconds * 1e3:.3f} ms  "
            f"{tuned.problem.flops / tuned.seconds * 1e-9:.1f} GFLOP/s  {tuned.speed:.3f}x the default  "
            f"{tuned.tried} tried{'' if tuned.complete else ' (budget spent)'}{failures}")


def total(network: TunedNetwork) -> str:
    """The network's time before and after, each layer as often as it occurs."""
    before, after = network.default_seconds, network.seconds
    return (f"{len(network.layers)} layers: {before * 1e3:.3f} ms with the defaults, {after * 1e3:.3f} ms tuned, "
            f"{before / after:.3f}x")
