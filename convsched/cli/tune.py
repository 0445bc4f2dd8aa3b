"""`convsched tune`: a measured schedule for every layer of a network, remembered for `compile`."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from convsched.autotune.search import budget
from convsched.options import INTERRUPTED_EXIT_CODE
from convsched.problem.parse import names_within

if TYPE_CHECKING:
    from convsched.autotune.search.budget import Budget
    from convsched.autotune.search.network import TunedLayer, TunedNetwork
    from convsched.autotune.search.tuner import Tuner
    from convsched.benchmark.cases import Case
    from convsched.options import Accuracy

BAR_COLUMNS = 20  # of the terminal, for the bar of the budget


def run(cases: list[Case], budget: str, threads: int, layout: str, file: Path | None,
        accuracy: Accuracy = "normal", algorithm: str | None = None) -> int:
    """Tune the distinct layers, print a line each and a total; the exit code."""
    from convsched.autotune.search.budget import Budget
    from convsched.autotune.search.network import tune_network
    from convsched.autotune.search.tuner import Tuner
    from convsched.autotune.store.cache import ScheduleCache
    from convsched.machine import host
    from convsched.plan.plan import Target

    whole = Budget.parse(budget)
    layers = [(case.problem, case.count) for case in cases]
    target = Target(host.machine(), layout, threads, accuracy)
    with Tuner(ScheduleCache(file), target, algorithm) as tuner, _live(tuner, whole):
        network = tune_network(tuner, layers, whole, lambda layer: click.echo(line(layer, _columns())))
    for problem, why in network.failures.items():
        click.echo(wrapped(f"{problem.text}: {why}", _columns()))
    if network.interrupted:
        text = "interrupted; what was measured is kept, and the next run goes on from there"
        click.echo(wrapped(text, _columns()))
    if network.layers:
        click.echo(wrapped(total(network), _columns()))
    if network.interrupted:
        return INTERRUPTED_EXIT_CODE
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
    columns = (BarColumn(BAR_COLUMNS), TextColumn("{task.description}", markup=False))
    together = sys.stdout.isatty()  # lines are then to appear above the bar; a file gets them as they are
    with Progress(*columns, console=console, transient=True, redirect_stdout=together) as bar:
        task = bar.add_task("measuring the defaults", total=1.0)

        def report(progress: budget.Progress) -> None:
            text = status(progress, console.width - BAR_COLUMNS - 1)
            bar.update(task, description=text, completed=used(whole, progress.left))

        tuner.report = report
        yield


def _columns() -> int | None:
    """The width of the terminal; None where the output is not one."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def wrapped(text: str, columns: int | None) -> str:
    """A text on as many lines as it needs, broken between words; on one line where there is no width."""
    if columns is None:
        return text
    return textwrap.fill(text, columns, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def status(progress: budget.Progress, columns: int) -> str:
    """Where the search of a layer stands, and what is left of the whole budget."""
    left = progress.left
    rest = f"{max(0.0, left.seconds):.0f} s" if left.candidates == float("inf") else f"{left.candidates:g} candidates"
    end = f"{progress.speed:.3f}x the default, {progress.tried} tried, {progress.failed} failed"
    (name,) = names_within([progress.problem], columns - len(f"{rest} left    {end}"))
    return f"{rest} left  {name}  {end}"


def used(whole: Budget, left: Budget) -> float:
    """How much of the budget is spent, from 0 to 1."""
    shares = [rest / all_ for all_, rest in ((whole.seconds, left.seconds), (whole.candidates, left.candidates))
              if 0 < all_ < float("inf")]
    return min(1.0, max(0.0, 1.0 - min(shares, default=1.0)))


def line(layer: TunedLayer, columns: int | None = None) -> str:
    """What tuning found for a layer, in one line, or in several of a narrow terminal's columns."""
    tuned = layer.tuned
    rate = tuned.problem.flops / tuned.seconds * 1e-9
    numbers = (f"x{layer.count}  {tuned.seconds * 1e3:.3f} ms  {rate:.1f} GFLOP/s  {tuned.speed:.3f}x the default  "
               f"{tuned.tried} tried{'' if tuned.complete else ' (budget spent)'}")  # fmt: skip
    room = len(tuned.problem.text) if columns is None else columns - len(f"  {numbers}")
    (name,) = names_within([tuned.problem], room)
    failures = "".join(f"; {count} x {reason}" for reason, count in tuned.failures.items())
    return wrapped(f"{name}  {numbers}{failures}", columns)


def total(network: TunedNetwork) -> str:
    """The network's time before and after, each layer as often as it occurs."""
    before, after = network.default_seconds, network.seconds
    return (f"{len(network.layers)} layers: {before * 1e3:.3f} ms with the defaults, {after * 1e3:.3f} ms tuned, "
            f"{before / after:.3f}x")
