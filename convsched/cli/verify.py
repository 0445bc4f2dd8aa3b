"""`convsched cache verify`: whether the stored winners still are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from convsched.cli.output import _file, _opened, _print
from convsched.machine import host
from convsched.options import INTERRUPTED_EXIT_CODE

if TYPE_CHECKING:
    from convsched.autotune.store.recheck import Check


@click.command()
@click.option("--layer", "layers", multiple=True, metavar="TEXT",
              help="Only problems with this in their text; may be given more than once.")  # fmt: skip
@click.option("--budget", default="60s", show_default=True, help="60s, 5m, or 20 candidates.")
@click.option("--forget", is_flag=True, help="Remove the bad ones, and check the next best in their place.")
@_file
@click.pass_context
def verify(context: click.Context, layers: tuple[str, ...], budget: str, forget: bool, file: Path | None) -> None:
    """Run the winners of this machine again, in turn with the default, and report what has changed.

    A winner is bad if its answer is wrong, its schedule no longer fits, it fails, or it is slower than the
    default by more than the noise. The exit code is 1 if any is.
    """
    with _opened(file) as store:
        from convsched.autotune.measure.measure import now
        from convsched.autotune.search.budget import Budget
        from convsched.autotune.store.recheck import recheck, winners
        from convsched.autotune.workers.worker import Worker

        limit, start = Budget.parse(budget), now()
        records = winners(store, host.machine(), layers)
        if not records:
            wanted = f" is for {' or '.join(map(repr, layers))}" if layers else ""
            click.echo(f"no winner of this machine in {store.path}{wanted}")
            context.exit(1 if layers else 0)
        checks: list[Check] = []
        interrupted = False

        def spent() -> bool:
            return now() - start >= limit.seconds or len(checks) >= limit.candidates

        try:
            with Worker() as worker:
                for check in recheck(store, records, worker.run, spent, forget):
                    checks.append(check)
                    click.echo(f"{len(checks)}: {check.record.problem}: {check.verdict}", err=True)
        except KeyboardInterrupt:
            interrupted = True
        _report(checks, len(records), "interrupted" if interrupted else "the budget is spent")
        context.exit(INTERRUPTED_EXIT_CODE if interrupted else 1 if any(check.is_bad for check in checks) else 0)


def _report(checks: Sequence[Check], records: int, why: str) -> None:
    """The table of what was checked, and a line of counts with `why` there are not more."""
    columns = ("problem", "layout", "threads", "accuracy", "algorithm", "speed-up", "now", "spread", "flags",
               "verdict")  # fmt: skip
    if checks:
        _print(columns, [_row(check) for check in checks])
    bad = sum(check.is_bad for check in checks)
    done = len({check.record.key for check in checks})
    click.echo(f"{done} of {records} winners checked, {bad} bad{'' if done == records else f'; {why}'}")


def _row(check: Check) -> tuple[str, ...]:
    record, outcome = check.record, check.outcome
    return (
        record.problem, record.layout, str(record.threads), record.accuracy, record.algorithm, _times(check.then),
        _times(check.now), f"{outcome.spread:.1%}" if outcome.samples else "-", " ".join(outcome.flags),
        f"{check.verdict}: {outcome.message}" if outcome.message else check.verdict,
    )  # fmt: skip


def _times(speed: float | None) -> str:
    return f"{speed:.3f}" if speed and speed > 0 else "-"  # nan is not
