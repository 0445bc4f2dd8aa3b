"""A benchmark's result for people (a table, or a line for each layer) and for programs (JSON)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from convsched.algebra.accuracy import BOUNDS
from convsched.autotune.measure.measure import Timing
from convsched.benchmark.environment import versions
from convsched.benchmark.run import Row, Settings, Total, total
from convsched.machine import host
from convsched.problem.parse import names_within

GAP_COLUMNS = 2  # columns of the terminal between two of the table
COLUMNS = ("layer", "count", "algorithm", "ms", "GFLOP/s", "% peak", "x NumPy", "error")


@dataclass(frozen=True)
class Report:
    """The rows so far of `planned`; `peak` is the measured FMA peak of one core in FLOP/s."""

    network: str
    settings: Settings
    peak: float
    planned: int
    rows: tuple[Row, ...] = ()
    skipped: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every planned layer has its row: nothing has stopped the run."""
        return len(self.rows) == self.planned

    @property
    def total(self) -> Total:
        """The sums over the timed layers, each as often as it occurs."""
        return total(self.rows)

    @property
    def failures(self) -> tuple[Row, ...]:
        """The rows without a right answer."""
        return tuple(row for row in self.rows if row.status in ("WRONG", "FAILED"))

    def share_of_peak(self, flops_per_second: float) -> float:
        """Of the peak of all threads, in percent."""
        return 100 * flops_per_second / (self.peak * self.settings.threads)


def table(report: Report, columns: int, last: int | None = None) -> Table:
    """The table with its line of totals for a terminal of so many columns; `last` keeps only the latest rows.

    Layers have their short names where not every row fits in its line otherwise.
    """
    view = Table(title=title(report), title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    view.padding, view.pad_edge = (0, 1, 0, 0), False  # the table fits a terminal of 80 columns
    view.caption, view.caption_justify = caption(report), "left"
    view.add_column(COLUMNS[0], min_width=18)
    for column in COLUMNS[1:]:
        view.add_column(column, justify="left" if column == "algorithm" else "right", no_wrap=True)
    rows = report.rows if last is None else report.rows[-last:] if last > 0 else ()
    numbers = [cells(report, row) for row in rows]
    sums = total_cells(report)
    widths = [max(map(len, column)) for column in zip(COLUMNS[1:], sums[1:], *numbers, strict=True)]
    names = names_within([row.problem for row in rows], columns - sum(widths) - GAP_COLUMNS * len(widths))
    for row, name, shown in zip(rows, names, numbers, strict=True):
        style = {"ok": None, "WRONG": "bold red", "FAILED": "red", "n/a": "dim", "not finite": "yellow"}[row.status]
        view.add_row(f"{name}\n{row.reason}" if row.reason else name, *shown, style=style)
    view.add_section()
    view.add_row(*sums, style="bold")
    return view


def title(report: Report) -> str:
    """The line above the table: the network, threads, layout and type."""
    threads, layout = report.settings.threads, report.settings.layout
    return f"{report.network}: {threads} thread{'s' * (threads > 1)}, {layout}, float32"


def caption(report: Report) -> str:
    """What the columns are, and what was not read."""
    peak, accuracy = f"{report.peak * 1e-9:.1f} GFLOP/s a core", report.settings.accuracy
    lines = [
        f"FMA peak measured: {peak}.",
        f"error: max |error| / rms(output) against float64, at most {BOUNDS[accuracy]:g} ({accuracy}).",
        "x NumPy: speed-up over im2col and np.matmul on as many threads, timed in turn. Times are minima.",
        tuned_line(report),
        f"The layers compiled in {report.total.compile_seconds:.2f} s.",
        *(f"passed over: {line}" for line in report.skipped),
    ]
    if not report.complete:
        lines.append(f"{len(report.rows)} of {report.planned} layers so far.")
    return "\n".join(lines)


def tuned_line(report: Report) -> str:
    """Where the schedules of the rows are from."""
    tuned = sum(row.tuned for row in report.rows)
    compiled = sum(bool(row.algorithm) for row in report.rows)
    return f"Schedules: {tuned} from tuning, {compiled - tuned} analytic defaults."


def cells(report: Report, row: Row) -> tuple[str, ...]:
    """A row of the table, without the layer's name."""
    if row.reason:
        return (str(row.count), row.algorithm, "", "", "", "", row.status)
    rate = row.flops_per_second
    return (
        str(row.count),
        f"{row.algorithm}, tuned" if row.tuned else row.algorithm,
        _number(row.kernel.minimum * 1e3 if row.kernel else math.nan, 3),
        _number(rate * 1e-9, 1),
        _number(report.share_of_peak(rate), 1),
        _number(row.speedup, 2),
        f"{row.error:.1e}" if row.status == "ok" else f"{row.status} {row.error:.1e}",
    )


def total_cells(report: Report) -> tuple[str, ...]:
    """The line of the whole network: every layer as often as it occurs."""
    sums = report.total
    rate = sums.flops / sums.seconds if sums.seconds else math.nan
    return (
        "all, each as often as it occurs",
        str(sums.layers),
        "",
        _number(sums.seconds * 1e3, 3),
        _number(rate * 1e-9, 1),
        _number(report.share_of_peak(rate), 1),
        _number(sums.baseline_seconds / sums.seconds if sums.seconds else math.nan, 2),
        f"{len(report.failures)} bad" if report.failures else "",
    )


def line(report: Report, row: Row) -> str:
    """A row as one line of plain text, for output that is no terminal."""
    if row.reason:
        return f"{row.status}  {row.problem.text}: {row.reason}"
    count, algorithm, ms, rate, share, speedup, error = cells(report, row)
    numbers = f"{ms} ms  {rate} GFLOP/s  {share}% of peak  {speedup}x NumPy  error {error}"
    return f"{row.problem.text}  x{count}  {algorithm}  {numbers}"


def to_json(report: Report) -> dict[str, Any]:
    """Everything, in plain types; what was not measured is null. Times are in seconds a call."""
    return {
        "network": report.network,
        "complete": report.complete,
        "threads": report.settings.threads,
        "layout": report.settings.layout,
        **_machine_json(report.peak),
        "accuracy": report.settings.accuracy,
        "error_bound": BOUNDS[report.settings.accuracy],
        "layers": [_row_json(report, row) for row in report.rows],
        "skipped": list(report.skipped),
        "total": _total_json(report.total),
    }


def _total_json(sums: Total) -> dict[str, Any]:
    return {
        "layers": sums.layers,
        "seconds": sums.seconds,
        "baseline_seconds": sums.baseline_seconds,
        "flops": sums.flops,
        "flops_per_second": sums.flops / sums.seconds if sums.seconds else None,
        "compile_seconds": sums.compile_seconds,
    }


def _machine_json(peak: float) -> dict[str, Any]:
    machine = host.machine()
    return {
        "machine": machine.text,
        "cores": machine.cores,
        "peak_flops_per_second": peak,
        "versions": versions(),
    }


def _row_json(report: Report, row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "problem": row.problem.text,
        "count": row.count,
        "status": row.status,
        "failure": row.failure or None,
        "not_finite": row.not_finite or None,
        "algorithm": row.algorithm or None,
        "schedule": row.schedule or None,
        "tuned": row.tuned,
        "error": _finite(row.error),
        **_speed_json(report, row),
    }


def _speed_json(report: Report, row: Row) -> dict[str, Any]:
    return {
        "compile_seconds": _finite(row.compile_seconds),
        "flops": row.problem.flops,
        "flops_per_second": _finite(row.flops_per_second),
        "percent_of_peak": _finite(report.share_of_peak(row.flops_per_second)),
        "speedup": _finite(row.speedup),
        "kernel": _timing_json(row.kernel),
        "baseline": _timing_json(row.baseline),
    }


def _timing_json(timing: Timing | None) -> dict[str, Any] | None:
    if timing is None:
        return None
    return {
        "minimum": timing.minimum,
        "median": timing.median,
        "spread": timing.spread,
        "samples": len(timing.samples),
        "calls_a_sample": timing.batch,
    }


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"
