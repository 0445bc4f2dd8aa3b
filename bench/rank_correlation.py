"""How well the cost model orders schedules: `python bench/rank_correlation.py`.

For layers of each class a random sample of the space and the analytic default are checked against the
oracle and timed several times, each in turn with the default; the least times count. Spearman's rho is the
correlation of the ranks of the model's seconds with the ranks of the measured ones: 1 where the orders agree,
0 where the model knows nothing. Where most times are equal within the noise (`within 3%` of the fastest), so
are their ranks by chance, and rho is small whatever the model says. `race` is what the tuner makes of the
model: the fastest of the model's first twelve over the fastest of the sample, 1 where pruning loses nothing.

`--output` keeps the sample with its times; `--again` puts a changed model to the times of such a file.

Source: C. Spearman, "The Proof and Measurement of Association between Two Things" (Am. J. Psychol. 15, 1904).
"""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from convsched.autotune.measure.calibrate import calibration
from convsched.autotune.search.search import RACERS
from convsched.autotune.search.space import candidates
from convsched.autotune.workers.candidate import Job
from convsched.autotune.workers.worker import Worker
from convsched.errors import ConvschedError
from convsched.machine import host
from convsched.model.cost import Cost, Rates, cost
from convsched.plan.families import named
from convsched.plan.plan import Plan, Target
from convsched.problem import parse_problem
from convsched.schedule import parse_schedule

PATH = click.Path(path_type=Path, dir_okay=False)

CLASSES = {
    "3x3": ("conv2d c=64 m=64 k=3x3 in=28x28 pad=1,1,1,1 bias act=relu",
            "conv2d c=128 m=128 k=3x3 in=14x14 pad=1,1,1,1 bias act=relu",
            "conv2d c=64 m=128 k=3x3 in=28x28 stride=2x2 pad=1,1,1,1 bias act=relu"),
    "pointwise": ("conv2d c=32 m=64 k=1x1 in=56x56 bias act=relu",
                  "conv2d c=256 m=256 k=1x1 in=14x14 bias act=relu",
                  "conv2d c=128 m=512 k=1x1 in=14x14 bias act=relu",
                  "conv2d c=512 m=256 k=1x1 in=7x7 bias act=relu"),
    "depthwise": ("conv2d c=32 m=32 k=3x3 in=112x112 pad=1,1,1,1 g=32 bias act=relu",
                  "conv2d c=128 m=128 k=3x3 in=56x56 pad=1,1,1,1 g=128 bias act=relu",
                  "conv2d c=512 m=512 k=3x3 in=14x14 pad=1,1,1,1 g=512 bias act=relu"),
    "depthwise, stride 2": ("conv2d c=64 m=64 k=3x3 in=112x112 stride=2x2 pad=1,1,1,1 g=64 bias act=relu",
                            "conv2d c=256 m=256 k=3x3 in=28x28 stride=2x2 pad=1,1,1,1 g=256 bias act=relu"),
    "grouped": ("conv2d c=128 m=128 k=3x3 in=28x28 pad=1,1,1,1 g=4 bias act=relu",
                "conv2d c=64 m=64 k=3x3 in=28x28 pad=1,1,1,1 g=16 bias act=relu"),
    "first": ("conv2d c=3 m=32 k=3x3 in=112x112 stride=2x2 pad=1,1,1,1 bias act=relu",
              "conv2d c=3 m=64 k=3x3 in=56x56 pad=1,1,1,1 bias act=relu"),
    "linear": ("linear c=1024 m=1000 bias", "linear c=512 m=512 n=32 bias"),
}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """A candidate: its schedule, the model's bound, and its measured time over the default's."""

    schedule: str
    cost: Cost
    ratio: float


@dataclass(frozen=True)
class Ranking:
    """The samples of one layer, the default first, and how many candidates failed."""

    kind: str
    problem: str
    samples: tuple[Sample, ...]
    failed: int

    @property
    def rho(self) -> float:
        """Spearman's coefficient of the model's seconds and the measured ones."""
        return spearman([s.cost.seconds for s in self.samples], [s.ratio for s in self.samples])

    @property
    def race(self) -> float:
        """The fastest of the candidates that the tuner would race, over the fastest of all."""
        order = sorted(self.samples, key=lambda sample: sample.cost.seconds)
        return min(s.ratio for s in order[:RACERS]) / min(s.ratio for s in order)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--count", default=40, show_default=True, help="Candidates of each layer beside the default.")
@click.option("--repeats", default=3, show_default=True, help="Times each candidate is timed.")
@click.option("--threads", default=1, show_default=True, help="Threads.")
@click.option("--layout", default="nchw", show_default=True, help="Layout of the activations.")
@click.option("--only", "kinds", multiple=True, type=click.Choice(list(CLASSES)), help="Only this class.")
@click.option("--seed", default=0, show_default=True, help="Of the random sample.")
@click.option("--output", type=PATH, help="Write the samples to this JSON file.")
@click.option("--again", type=PATH, help="Take the times from this JSON file; measure nothing.")
def main(count: int, repeats: int, threads: int, layout: str, kinds: tuple[str, ...], seed: int,
         output: Path | None, again: Path | None) -> None:
    """Rank correlation of the cost model with measurement, for each class of layer."""
    known = json.loads(again.read_text()) if again else None
    if known:
        threads, layout = known["threads"], known["layout"]
    model = Model(layout, threads)
    made = known_rankings(known, model) if known else measured_rankings(model, kinds, count, seed, repeats)
    console = Console(stderr=True)
    rankings = []
    for ranking in made:
        rankings.append(ranking)
        console.print(f"{ranking.rho:6.2f}  {ranking.kind}: {ranking.problem}", highlight=False)
    Console().print(table(rankings))
    if output:
        figures = {"machine": host.machine().text, "threads": threads, "layout": layout,
                   "classes": by_class(rankings),
                   "layers": [{**asdict(r), "rho": r.rho, "race": r.race} for r in rankings]}
        output.write_text(json.dumps(figures, indent=1) + "\n")


class Model:
    """The cost model at this machine's calibrated rates, for schedules as text."""

    def __init__(self, layout: str, threads: int) -> None:
        self.rates = Rates.of(calibration())
        self.target = Target(host.machine(), layout, threads)

    def plan(self, problem: str, schedule: str) -> Plan:
        """A schedule of direct convolution."""
        parsed = parse_problem(problem)
        return Plan(parsed, self.target, named("direct", parsed), parse_schedule(schedule))

    def estimate(self, problem: str, schedule: str) -> Cost:
        """The bound; raises ScheduleError for a schedule that is not legal."""
        return cost(self.plan(problem, schedule).program, self.target.machine, self.rates, self.target.threads)


def measured_rankings(model: Model, kinds: Sequence[str], count: int, seed: int,
                      repeats: int) -> Iterator[Ranking]:
    """Check and time a sample of each layer's space."""
    with Worker() as worker:
        for kind in kinds or CLASSES:
            for problem in CLASSES[kind]:
                default, *others = schedules(problem, model, count, seed)
                samples, failed = [Sample(default, model.estimate(problem, default), 1.0)], 0
                for schedule in others:
                    job = Job(model.plan(problem, schedule), model.plan(problem, default))
                    outcomes = [worker.run(job) for _ in range(repeats)]
                    if any(outcome.status != "ok" for outcome in outcomes):
                        failed += 1
                        continue
                    hot, incumbent = (min(o.hot for o in outcomes), min(o.incumbent for o in outcomes))
                    samples.append(Sample(schedule, model.estimate(problem, schedule), hot / incumbent))
                yield Ranking(kind, problem, tuple(samples), failed)


def schedules(problem: str, model: Model, count: int, seed: int) -> list[str]:
    """The default and so many random candidates of the space that make a legal schedule."""
    parsed = parse_problem(problem)
    default, *others = candidates(parsed, model.target, named("direct", parsed))
    random.Random(seed).shuffle(others)
    found = [default.plan(model.target).schedule.text]
    for choice in others:
        try:
            schedule = choice.plan(model.target).schedule.text
            model.estimate(problem, schedule)
        except ConvschedError:
            continue
        if schedule not in found:
            found.append(schedule)
        if len(found) > count:
            break
    return found


def known_rankings(known: dict[str, Any], model: Model) -> Iterator[Ranking]:
    """The rankings of a file, with the model as it is now."""
    for layer in known["layers"]:
        samples = [Sample(old["schedule"], model.estimate(layer["problem"], old["schedule"]), old["ratio"])
                   for old in layer["samples"]]
        yield Ranking(layer["kind"], layer["problem"], tuple(samples), layer["failed"])


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """The correlation of ranks; equal numbers share the mean of their ranks. nan where nothing varies.

    >>> spearman([1, 2, 3, 4], [10, 20, 40, 30])
    0.8
    """
    one, other = ranks(first), ranks(second)
    if len(set(one)) < 2 or len(set(other)) < 2:
        return math.nan
    return round(float(np.corrcoef(one, other)[0, 1]), 6)


def ranks(values: Sequence[float]) -> list[float]:
    """The rank of each value from 1 up.

    >>> ranks([5, 7, 5, 1])
    [2.5, 4.0, 2.5, 1.0]
    """
    array = np.asarray(values)
    below = (array[None, :] < array[:, None]).sum(axis=1)
    equal = (array[None, :] == array[:, None]).sum(axis=1)
    return [float(rank) for rank in below + (equal + 1) / 2]


def by_class(rankings: Iterable[Ranking]) -> dict[str, float]:
    """The mean rho of each class's layers."""
    found: dict[str, list[float]] = {}
    for ranking in rankings:
        if math.isfinite(ranking.rho):
            found.setdefault(ranking.kind, []).append(ranking.rho)
    return {kind: statistics.mean(values) for kind, values in found.items()}


def table(rankings: Sequence[Ranking]) -> Table:
    """A row a layer, and the mean of each class on its last row."""
    view = Table(title="the cost model's order against the measured one")
    view.add_column("layer", overflow="fold")
    for column in ("candidates", "failed", "within 3%", "slowest/fastest", "race", "rho", "class rho"):
        view.add_column(column, justify="right")
    means, last = by_class(rankings), {ranking.kind: ranking for ranking in rankings}
    for ranking in rankings:
        ratios, ends = [s.ratio for s in ranking.samples], last[ranking.kind] is ranking
        mean = f"{means.get(ranking.kind, math.nan):.2f}" if ends else ""
        close = sum(ratio <= 1.03 * min(ratios) for ratio in ratios) / len(ratios)
        view.add_row(f"{ranking.kind}: {ranking.problem}", str(len(ratios)), str(ranking.failed), f"{close:.0%}",
                     f"{max(ratios) / min(ratios):.1f}", f"{ranking.race:.2f}", f"{ranking.rho:.2f}", mean,
                     end_section=ends)
    return view


if __name__ == "__main__":
    sys.exit(main())
