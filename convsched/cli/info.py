"""`convsched info`: the machine, what it can do as measured, and what would disturb a measurement now."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime

from convsched.autotune.measure.calibrate import Calibration, calibration, current_conditions
from convsched.benchmark.environment import describe

NAME_COLUMNS = 9  # of the names: the longest of them, convsched


def print_info(echo: Callable[[str], None], refresh: bool = False) -> None:
    """Prints what is known at once, then what may have to be measured first (about 2 s)."""
    for name, value in describe().items():
        echo(f"{name:<{NAME_COLUMNS}}  {value}")
    measured = calibration(refresh)
    for name, value in calibration_lines(measured):
        echo(f"{name:<{NAME_COLUMNS}}  {value}")
    for reason in current_conditions(measured) or ("nothing is known to disturb it",):
        echo(f"{'timing':<{NAME_COLUMNS}}  {reason}")


def calibration_lines(measured: Calibration) -> Iterator[tuple[str, str]]:
    """The measured figures by name, those of one core first.

    >>> gb = {"l1": 231e9, "l2": 117.4e9, "l3": 98e9, "dram": 31.26e9}
    >>> lines = calibration_lines(Calibration("a", 233.3e9, gb, gb, 21e-6, 0.0))
    >>> dict(lines)["read"]
    'L1 231, L2 117, L3 98.0, memory 31.3 GB/s on one core'
    """
    yield "peak", f"{measured.peak / 1e9:.1f} GFLOP/s on one core, multiply-adds"
    yield "read", _rates(measured.bandwidth)
    yield "copy", f"{_rates(measured.copy_bandwidth)}, read and written"
    if measured.launch_seconds:
        yield "launch", f"{measured.launch_seconds * 1e6:.0f} us to share a stage among all cores"
    when = datetime.fromtimestamp(measured.time).strftime("%Y-%m-%d %H:%M")
    yield "measured", f"{when}; --refresh measures again"
    for reason in measured.conditions:
        yield "while", reason


def _rates(bandwidth: Mapping[str, float]) -> str:
    names = {"dram": "memory"}
    parts = (f"{names.get(level, level.upper())} {_three(rate / 1e9)}" for level, rate in bandwidth.items())
    return f"{', '.join(parts)} GB/s on one core"


def _three(number: float) -> str:
    """Three digits, as far as they are not before the point."""
    return f"{number:.{0 if number >= 100 else 1 if number >= 10 else 2}f}"
