"""`convsched tune`: a measured schedule for every layer of a network, remembered for `compile`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from convsched.autotune import tune as autotune
    from convsched.autotune.tune import Budget, Tuned, Tuner
    from convsched.explain.cases import Case

INTERRUPTED = 130


def run(cases: list[Case], budget: str, threads: int, layout: str, file: Path | None) -> int:
    """Tune the distinct layers, print a line each and a total; the exit code."""
    from convsched.autotune.cache import ScheduleCache
    from convsched.autotune.tune import Budget, TuneError, Tuner, shares

    whole = Budget.parse(budget)
    problems = [(case.problem, case.count) for case in cases]
    parts = shares(problems, 1.0)
    done: list[tuple[Case, Tuned]] = []
    failed = 0
    with Tuner(ScheduleCache(file), threads, layout) as tuner:
        for case, part in zip(cases, parts, strict=True):
            share = Budget(whole.seconds * part, max(1, whole.candidates * part))
            try:
                done.append((case, _tuned(tuner, case, share)))
            except KeyboardInterrupt:
                click.echo("interrupted; what was measured is kept, and the next run goes on from there")
                _total(done)
                return INTERRUPTED
            except TuneError as error:
                click.echo(f"{case.problem.text}: {error}")
                failed += 1
    _total(done)
    return 1 if failed else 0


def _tuned(tuner: Tuner, case: Case, budget: Budget) -> Tuned:
    """Tune one layer with a bar that shows the best so far."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(20), TimeRemainingColumn(compact=True))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(case.problem.text, total=min(budget.seconds, 1e9))

        def report(progress: autotune.Progress) -> None:
            text = (f"{case.problem.text}: {progress.tried} tried, {progress.failed} failed, "
                    f"best {progress.speed:.3f}x the default")
            bar.update(task, description=text, completed=max(0.0, budget.seconds - progress.left))

        tuner.report = report
        result = tuner.tune(case.problem, budget)
    failures = "".join(f"; {count} x {reason}" for reason, count in result.failures.items())
    rate = case.problem.flops / result.seconds * 1e-9
    click.echo(f"{case.problem.text}  x{case.count}  {result.seconds * 1e3:.3f} ms  {rate:.1f} GFLOP/s  "
               f"{result.speed:.3f}x the default  {result.tried} tried"
               f"{'' if result.complete else ' (budget spent)'}{failures}")
    return result


def _total(done: list[tuple[Case, Tuned]]) -> None:
    """The network's time before and after, each layer as often as it occurs."""
    if not done:
        return
    before = sum(case.count * result.default_seconds for case, result in done)
    after = sum(case.count * result.seconds for case, result in done)
    click.echo(f"{len(done)} layers: {before * 1e3:.3f} ms with the defaults, {after * 1e3:.3f} ms tuned, "
               f"{before / after:.3f}x")
