"""Candidates a second that tuning checks and measures, and where its time goes: `python bench/tuner_rate.py`.

Every pointwise layer of MobileNetV1 is tuned for some seconds on one thread, into a cache of its own, with
nothing in the object cache: each candidate is compiled. A line a layer gives the rate, and the milliseconds
of CPU a candidate takes, in all and in each part, without what the model does while the worker compiles: on a
machine that others use too, the rate is lower than these allow. The last line has the medians over the layers.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import click

from convsched.autotune.search.budget import Budget, Progress
from convsched.autotune.search.tuner import LayerSearch, Tuner
from convsched.autotune.store.cache import ScheduleCache
from convsched.autotune.workers import candidate, worker
from convsched.kernels import jit, objects
from convsched.kernels.run import code
from convsched.machine import host
from convsched.networks.known import network
from convsched.plan import plan
from convsched.plan.families import named
from convsched.plan.plan import Plan, Target
from convsched.problem import Linear, Problem

# The parts of a job in the worker's process: what does each, and those that contain others.
PARTS = {"apply": (plan, "apply"), "emit": (code, "emit"), "llvm": (jit, "compile_object"),
         "prepare": (candidate, "prepared"), "check": (candidate, "_wrong"), "race": (candidate, "race"),
         "cold": (candidate, "cold")}
INSIDE_PREPARE = ("apply", "emit", "llvm")


@click.command()
@click.option("--seconds", default=3.0, show_default=True, help="Tuning of a layer.")
def main_command(seconds: float) -> None:
    """Candidates a second, and milliseconds of CPU a candidate."""
    problems = dict.fromkeys(layer.problem for layer in network("mobilenetv1").layers
                             if layer.problem.R == layer.problem.S == 1 and layer.problem.H > 1)
    rates, times = [], []
    for problem in problems:
        rate, parts = tuned(problem, seconds)
        rates.append(rate)
        times.append(sum(parts.values()))
        split = "  ".join(f"{name} {milliseconds:.1f}" for name, milliseconds in parts.items())
        print(f"{problem.text:48} {rate:5.1f} /s  {times[-1]:5.1f} ms of CPU: {split}", flush=True)
    print(f"medians of {len(rates)} layers: {statistics.median(rates):.1f} candidates a second, "
          f"{statistics.median(times):.1f} ms of CPU a candidate")


def tuned(problem: Problem, seconds: float) -> tuple[float, dict[str, float]]:
    """Candidates a second on a problem, and milliseconds of CPU a candidate by part."""
    spent = defaultdict[str, float](float)

    def note(progress: Progress) -> None:
        if progress.outcome.status == "ok":
            for name, seconds in json.loads(progress.outcome.message).items():
                spent[name] += seconds

    with tempfile.TemporaryDirectory() as folder:
        tuner = Tuner(ScheduleCache(Path(folder) / "schedules.sqlite"), Target(host.machine()), report=note)
        tuner.worker = worker.Worker(module=Path(__file__).stem)
        with tuner:
            first = named("direct", Linear(8, 8))
            tuner.worker.run(candidate.Job(Plan.of(first, tuner.target)))  # its start is not counted
            time_part(LayerSearch, "_estimate", "estimate", spent)
            time_part(LayerSearch, "_look_ahead", "ahead", spent)
            time_part(Tuner, "settle", "store", spent)
            start, own = perf_counter(), process_time()
            found = tuner.tune(problem, Budget(seconds=seconds))
            whole, own = perf_counter() - start, process_time() - own
    for name in INSIDE_PREPARE:
        spent["prepare"] -= spent[name]
    spent["estimate"] -= spent["ahead"]
    spent["other"] = own - spent["estimate"] - spent["ahead"] - spent["store"]
    del spent["ahead"]
    return found.tried / whole, {name: 1e3 * spent[name] / found.tried for name in spent}


def time_part(owner: Any, name: str, part: str, spent: dict[str, float]) -> None:
    """Replace a function of a module or class by one that adds its seconds of CPU to a part."""
    function: Callable[..., Any] = getattr(owner, name)
    function = getattr(function, "untimed", function)

    def timed(*arguments: Any, **named: Any) -> Any:
        start = process_time()
        try:
            return function(*arguments, **named)
        finally:
            spent[part] += process_time() - start

    timed.untimed = function  # type: ignore[attr-defined]
    setattr(owner, name, timed)


def main(descriptor: int) -> None:
    """The worker's process: without an object cache, and telling in its outcomes where their time went."""
    spent = defaultdict[str, float](float)
    for part, (owner, name) in PARTS.items():
        time_part(owner, name, part, spent)
    objects.read_entry = lambda key: None
    objects.write_entry = lambda key, header, code: None
    run = candidate.run_job

    def run_job(job: candidate.Job, compiled: Callable[[], object] = lambda: None) -> candidate.Outcome:
        spent.clear()
        outcome = run(job, compiled)
        return replace(outcome, message=json.dumps(spent)) if outcome.status == "ok" else outcome

    candidate.run_job = run_job
    worker.main(descriptor)


if __name__ == "__main__":
    main_command()
