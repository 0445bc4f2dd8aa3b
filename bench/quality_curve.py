"""What a longer search gives: `python bench/quality_curve.py mobilenet_v1 resnet50 --budgets 15s,60s,600s`.

A network is tuned within each budget into a schedule cache of its own. Then, layer by layer, what each budget found
is timed in turn with the default, the two alone, as their weights share the caches; its time is that of the default
divided by the ratio, and a budget's network time is the sum over layers, each as often as it occurs. A search of a
budget stands for itself: none goes on from a shorter one.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from convsched import compile
from convsched.autotune.measure.measure import interleave
from convsched.autotune.search.budget import Budget
from convsched.autotune.search.network import tune_network
from convsched.autotune.search.tuner import Tuner
from convsched.autotune.store.cache import ScheduleCache
from convsched.benchmark.cases import make_arrays, table_case
from convsched.benchmark.run import bound_call
from convsched.machine import host
from convsched.networks.known import Layer, network
from convsched.plan.choice import choose
from convsched.plan.plan import Target

PATH = click.Path(path_type=Path, dir_okay=False)
DEFAULT = "default"


@dataclass(frozen=True)
class Curve:
    """The seconds of a network by budget ("default" for none); the layers that a search made slower than their
    default beyond ``SLOWER``; candidates measured by budget."""

    network: str
    seconds: Mapping[str, float]
    slower: Mapping[str, Sequence[str]]
    tried: Mapping[str, int]


SLOWER = 1.03


@click.command()
@click.argument("networks", nargs=-1, required=True)
@click.option("--budgets", default="15s,60s,600s", show_default=True)
@click.option("--seconds", default=1.0, show_default=True, help="Timing a layer at the end.")
@click.option("--algorithm", help="Only schedules of this, such as direct.")
@click.option("--json", "json_file", type=PATH, help="Write results here.")
@click.option("--plot", type=PATH, help="Draw the curves into this file (.svg, .png); needs matplotlib.")
def main(networks: tuple[str, ...], budgets: str, seconds: float, algorithm: str | None, json_file: Path | None,
         plot: Path | None) -> None:
    """Tune networks within several budgets and compare what they find."""
    curves = [measure(name, budgets.split(","), seconds, algorithm) for name in networks]
    for curve in curves:
        Console().print(table(curve))
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(curve) for curve in curves], indent=1) + "\n")
    if plot is not None:
        draw(curves, plot)


def measure(name: str, budgets: Sequence[str], seconds: float, algorithm: str | None) -> Curve:
    """Tune within each budget, then time all that was found in turn."""
    layers = network(name).layers
    caches: dict[str, ScheduleCache] = {}
    tried: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for budget in budgets:
            caches[budget] = ScheduleCache(Path(folder) / f"{budget}.sqlite")
            with Tuner(caches[budget], Target(host.machine()), algorithm) as tuner:
                found = tune_network(tuner, [(layer.problem, layer.count) for layer in layers], Budget.parse(budget))
            tried[budget] = sum(layer.tuned.tried for layer in found.layers)
            click.echo(f"{name}, {budget}: {tried[budget]} candidates, {found.default_seconds * 1e3:.3f} ms with the "
                       f"defaults, {found.seconds * 1e3:.3f} ms tuned")
        totals = dict.fromkeys([DEFAULT, *budgets], 0.0)
        slower: dict[str, list[str]] = {budget: [] for budget in budgets}
        for layer in layers:
            times = timed(layer, caches, seconds, algorithm)
            for budget, taken in times.items():
                totals[budget] += layer.count * taken
                if taken > SLOWER * times[DEFAULT]:
                    slower[budget].append(f"{layer.problem.text}: {times[DEFAULT] / taken:.3f}")
    return Curve(name, totals, slower, tried)


def timed(layer: Layer, caches: Mapping[str, ScheduleCache], seconds: float,
          algorithm: str | None) -> dict[str, float]:
    """Seconds of a call with the default, and with what each cache has, each in turn with the default; equal
    schedules are timed once."""
    case = table_case(layer.name, layer.problem, layer.count)
    arrays = make_arrays(case, None)
    chosen = algorithm or choose(layer.problem, Target(host.machine())).name
    kernels = {DEFAULT: compile(layer.problem, threads=1, cache=False, algorithm=chosen)}
    kernels |= {budget: compile(layer.problem, threads=1, cache=cache, algorithm=algorithm)
                for budget, cache in caches.items()}
    names = {name: f"{kernel.algorithm} {kernel.schedule}" for name, kernel in kernels.items()}
    ratios, least = {names[DEFAULT]: 1.0}, float("inf")
    default = bound_call(kernels[DEFAULT], layer.problem, arrays, "nchw")[0]
    for name, text in names.items():
        if text not in ratios:
            tuned = bound_call(kernels[name], layer.problem, arrays, "nchw")[0]
            timings = interleave({"default": default, "tuned": tuned}, repeats=1000, budget=seconds)
            ratios[text] = timings["tuned"].minimum / timings["default"].minimum
            least = min(least, timings["default"].minimum)
    if least == float("inf"):
        least = interleave({"default": default}, repeats=1000, budget=seconds)["default"].minimum
    return {name: least * ratios[text] for name, text in names.items()}


def table(curve: Curve) -> Table:
    """A line a budget."""
    view = Table(title=f"{curve.network}: 1 thread", title_justify="left")
    for column in ("budget", "candidates", "ms", "x default", "% of the best", "slower layers"):
        view.add_column(column, justify="left" if column == "budget" else "right")
    best = min(curve.seconds.values())
    for budget, taken in curve.seconds.items():
        view.add_row(budget, str(curve.tried.get(budget, "")), f"{taken * 1e3:.3f}",
                     f"{curve.seconds[DEFAULT] / taken:.3f}", f"{100 * best / taken:.1f}",
                     "; ".join(curve.slower.get(budget, ())))
    return view


def draw(curves: Sequence[Curve], file: Path) -> None:
    """Speed-up over the default against the seconds of the budget."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for curve in curves:
        points = [(Budget.parse(budget).seconds, curve.seconds[DEFAULT] / taken)
                  for budget, taken in curve.seconds.items() if budget != DEFAULT]
        axes.plot(*zip(*points, strict=True), marker="o", label=curve.network)
    axes.set(xscale="log", xlabel="budget, s", ylabel="speed-up over the analytic default")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file)


if __name__ == "__main__":
    main()
