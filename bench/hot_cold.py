"""What hot and cold measurement choose for a network's layers, and what each loses by the other: `python
bench/hot_cold.py`.

Hot, a kernel finds all data in the caches, as in a loop over one layer; cold, its weights are in memory and only the
input was just written, as in a network. Each layer is tuned within `--budget`, or not at all with `--no-tune`, in the
schedule cache, whose records hold the seconds of both; the choice among them is that of `compile`. The two winners are
then timed in turn, hot and cold, on arrays that they have given the right answer for:

    loss of the cold choice, hot   = hot(cold's winner) / hot(hot's winner) - 1
    loss of the hot choice, cold   = cold(hot's winner) / cold(cold's winner) - 1

The tuner times only those candidates cold that were no slower than the best so far. `--also n` times cold, in turn with
hot's winner, those n of the others that are fastest hot.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from convsched.algebra.accuracy import BOUNDS
from convsched.autotune.measure.evict import evict
from convsched.autotune.measure.measure import interleave
from convsched.autotune.search.budget import Budget
from convsched.autotune.search.tuner import Tuner
from convsched.autotune.store.cache import ScheduleCache
from convsched.autotune.store.record import Key, Record
from convsched.autotune.store.winner import choose
from convsched.autotune.workers.candidate import Prepared, prepared
from convsched.errors import ConvschedError, ModelError
from convsched.machine import host
from convsched.networks.known import network
from convsched.plan.plan import Target
from convsched.problem import Problem
from convsched.problem.layout import LAYOUTS, Layout

PATH = click.Path(path_type=Path, dir_okay=False)


class AnswerError(ConvschedError):
    """A stored schedule that does not give the right answer."""


@dataclass(frozen=True)
class Winner:
    """A choice, and its seconds a call, timed in turn with the other one's."""

    algorithm: str
    recipe: str
    schedule: str
    hot: float
    cold: float


@dataclass(frozen=True)
class Choice:
    """A layer: the winner by hot and by cold time, of how many candidates with such times."""

    problem: str
    by_hot: Winner
    by_cold: Winner
    timed_hot: int
    timed_cold: int

    @property
    def is_same(self) -> bool:
        """Whether both choose one candidate."""
        return (self.by_hot.algorithm, self.by_hot.schedule) == (self.by_cold.algorithm, self.by_cold.schedule)

    @property
    def hot_loss(self) -> float:
        """What the cold choice loses hot."""
        return self.by_cold.hot / self.by_hot.hot - 1

    @property
    def cold_loss(self) -> float:
        """What the hot choice loses cold."""
        return self.by_hot.cold / self.by_cold.cold - 1


@dataclass(frozen=True)
class Timer:
    """Times kernels in turn for so many seconds each way."""

    layout: Layout
    threads: int
    seconds: float

    def prepare(self, record: Record) -> Prepared:
        """A record's kernel, its answer checked. Raises AnswerError."""
        kernel = prepared(record.plan(host.machine()))
        kernel.call()
        if not kernel.error() <= BOUNDS["fast"]:
            raise AnswerError(f"{record.problem}, {record.algorithm}: an error of {kernel.error():.1e}")
        return kernel

    def hot(self, *kernels: Prepared) -> list[float]:
        """The least seconds a call of each with warm caches."""
        calls = {str(i): kernel.call for i, kernel in enumerate(kernels)}
        found = interleave(calls, repeats=1000, budget=self.seconds)
        return [found[name].minimum for name in calls]

    def cold(self, *kernels: Prepared) -> list[float]:
        """The least seconds of single calls of each with its weights in memory."""
        calls = {str(i): kernel.call for i, kernel in enumerate(kernels)}
        cool = {str(i): partial(self._cool, kernel) for i, kernel in enumerate(kernels)}
        found = interleave(calls, repeats=1000, min_seconds=0.0, budget=self.seconds, prepare=cool)
        return [found[name].minimum for name in calls]

    def _cool(self, kernel: Prepared) -> None:
        evict(host.machine(), self.threads)
        np.max(kernel.x)  # the layer before has just written it


@click.command()
@click.option("--network", "name", default="resnet50", show_default=True, help="A known network.")
@click.option("--layer", "wanted", default="k=3x3", show_default=True, help="Only layers with this in their text.")
@click.option("--budget", default="20s", show_default=True, help="Tuning of a layer.")
@click.option("--tune/--no-tune", "tunes", default=True, help="Whether to tune, or to take what is in the cache.")
@click.option("--algorithm", help="Tune and choose among schedules of this only.")
@click.option("--also", default=0, show_default=True, help="Candidates to time cold that the tuner did not.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--layout", type=click.Choice([*LAYOUTS]), default="nchw", show_default=True)
@click.option("--seconds", default=2.0, show_default=True, help="Timing of the winners, hot and cold each.")
@click.option("--json", "json_file", type=PATH, help="Write results here.")
def main(name: str, wanted: str, budget: str, tunes: bool, algorithm: str | None, also: int, threads: int,
         layout: Layout, seconds: float, json_file: Path | None) -> None:
    """The choices of hot and cold measurement, and what each loses."""
    problems = layers_of(name, wanted)
    cache, timer, choices = ScheduleCache(), Timer(layout, threads, seconds), list[Choice]()
    if tunes:
        with Tuner(cache, Target(host.machine(), layout, threads), algorithm) as tuner:
            for problem in problems:
                tuned = tuner.tune(problem, Budget.parse(budget))
                click.echo(f"{problem.text}: {tuned.tried} candidates, {tuned.speed:.3f} x the default")
    for problem in problems:
        known = records_of(cache, problem, timer, algorithm)
        choice = compare(timed_cold_too(known, also, timer), timer)
        if choice is None:
            click.echo(f"{problem.text}: nothing in the cache is timed both ways; tune it", err=True)
        else:
            choices.append(choice)
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table(choices, timer))
    if json_file is not None:
        json_file.write_text(json.dumps(to_json(choices, timer), indent=1) + "\n")


def layers_of(name: str, wanted: str) -> list[Problem]:
    """The distinct layers of a network with a text in theirs."""
    try:
        found = [layer.problem for layer in network(name).layers if wanted in layer.problem.text]
    except ModelError as error:
        raise click.UsageError(str(error)) from error
    if not found:
        raise click.UsageError(f"no layer of {name} has {wanted!r} in its text")
    return found


def records_of(cache: ScheduleCache, problem: Problem, timer: Timer, algorithm: str | None) -> list[Record]:
    """What the cache has of a problem for this machine, of one algorithm or of all."""
    key = Key.of(problem, Target(host.machine(), timer.layout, timer.threads))
    return [record for record in cache.records(key) if algorithm in (None, record.algorithm)]


def timed_cold_too(records: Sequence[Record], also: int, timer: Timer) -> list[Record]:
    """The records, the fastest hot of those without a cold time given one, on the scale of the hot winner's."""
    base = choose(records, "hot")
    if base is None or base.cold is None:
        return list(records)
    missing = [record for record in records if record.status == "ok" and record.hot and record.cold is None]
    found = {record: record for record in records}
    for record in sorted(missing, key=lambda one: one.hot or math.inf)[:also]:
        own, others = timer.cold(timer.prepare(record), timer.prepare(base))
        found[record] = replace(record, cold=base.cold * own / others)
    return list(found.values())


def compare(records: Sequence[Record], timer: Timer) -> Choice | None:
    """The winners of both measurements, timed in turn; None where nothing is timed both ways."""
    by_hot, by_cold = choose(records, "hot"), choose(records, "cold")
    if by_hot is None or by_cold is None:
        return None
    kernels = [timer.prepare(record) for record in dict.fromkeys((by_hot, by_cold))]
    hot, cold = timer.hot(*kernels), timer.cold(*kernels)
    right = [record for record in records if record.status == "ok"]
    return Choice(by_hot.problem, _winner(by_hot, hot[0], cold[0]), _winner(by_cold, hot[-1], cold[-1]),
                  sum(record.hot is not None for record in right), sum(record.cold is not None for record in right))


def _winner(record: Record, hot: float, cold: float) -> Winner:
    return Winner(record.algorithm, record.recipe, record.schedule, hot, cold)


def table(choices: Sequence[Choice], timer: Timer) -> Table:
    """Two rows a layer, one where both choose the same; the greatest and the mean losses last."""
    view = Table(title=f"hot and cold choices, {timer.threads} thread(s), {timer.layout}", title_justify="left",
                 box=box.SIMPLE_HEAD, show_edge=False, caption_justify="left",
                 caption="loss: of this choice where the other measurement is what counts; timed: candidates.")
    for column in ("layer", "chosen by", "algorithm", "recipe"):
        view.add_column(column, overflow="fold")
    for column in ("timed", "hot ms", "cold ms", "loss %"):
        view.add_column(column, justify="right", no_wrap=True)
    for choice in choices:
        if choice.is_same:
            timed = f"{choice.timed_hot}, {choice.timed_cold}"
            view.add_row(choice.problem, "both", *_cells(choice.by_hot, timed, 0.0))
        else:
            view.add_row(choice.problem, "hot", *_cells(choice.by_hot, str(choice.timed_hot), choice.cold_loss))
            view.add_row("", "cold", *_cells(choice.by_cold, str(choice.timed_cold), choice.hot_loss))
        view.add_section()
    for name, of in _LOSSES.items():
        losses = [of(choice) for choice in choices]
        if losses:
            view.add_row(name, *[""] * 6, f"{100 * statistics.mean(losses):.1f}", style="bold")
    return view


_LOSSES: dict[str, Callable[[Choice], float]] = {
    "mean loss of the hot choice, cold": lambda choice: choice.cold_loss,
    "mean loss of the cold choice, hot": lambda choice: choice.hot_loss,
}


def _cells(winner: Winner, timed: str, loss: float) -> Iterable[str]:
    return (winner.algorithm, winner.recipe, timed, f"{1e3 * winner.hot:.3f}", f"{1e3 * winner.cold:.3f}",
            f"{100 * loss:.1f}")


def to_json(choices: Sequence[Choice], timer: Timer) -> dict[str, Any]:
    """Everything in plain types; times are in seconds a call."""
    return {"machine": host.machine().text, **asdict(timer),
            "layers": [{**asdict(choice), "is_same": choice.is_same, "hot_loss": choice.hot_loss,
                        "cold_loss": choice.cold_loss} for choice in choices]}


if __name__ == "__main__":
    main()
