"""What this machine can do, measured once and kept: the FMA peak and the rates of its caches and memory.

The rates are those of one core. The working set of a level fits it with room to spare and exceeds the level
above: half of L1, half of L2, a quarter of L3 (the other cores use it too), four times L3. All are timed in
turn, over many rounds, each after a pass that is not timed, and the fastest round counts: what disturbs a
shared machine only ever makes a round slower. Conditions seen while measuring are kept with the figures.

The cache is one JSON file a machine, since several may share a home folder. One that does not verify, or
is another machine's, is measured anew; a folder that cannot be written means no cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from convsched.autotune.measure.measure import CLOCK, Clock, count_for, interleave, measure_peak, now, peak_call
from convsched.errors import MachineError
from convsched.kernels.probes.stream import stream_buffer, stream_kernel
from convsched.kernels.run.pool import run_all
from convsched.machine import Machine, cache_folder, cpu_counters, host, machine_key
from convsched.machine.conditions import timing_conditions

FORMAT = 1  # of the file, and of what its figures mean
LEVELS = ("l1", "l2", "l3", "dram")
PASS_SECONDS = 1e-3  # of a sample: long against a call (2 us), short against a scheduler's slice (4 ms)
LARGEST_BYTES = 256 << 20  # of a buffer, unless twice the L3 is more
SAME_FRACTION = 0.1  # two measurements of one peak that differ by less agree


@dataclass(frozen=True)
class Calibration:
    """`peak` in FLOP/s; `bandwidth` (read) and `copy_bandwidth` (read and written) in bytes/s by level, all
    of one core; `launch_seconds` to start as many threads as there are cores and wait for them."""

    machine_key: str
    peak: float
    bandwidth: Mapping[str, float]
    copy_bandwidth: Mapping[str, float]
    launch_seconds: float
    time: float  # seconds since 1970
    conditions: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A JSON value; `Calibration.from_json` is its inverse."""
        return {"format": FORMAT, **asdict(self)}

    @staticmethod
    def from_json(value: Any) -> Calibration:
        """The calibration that `to_json` wrote; ValueError for anything else."""
        names = [field.name for field in fields(Calibration)]
        if not isinstance(value, dict) or set(value) != {"format", *names} or value["format"] != FORMAT:
            raise ValueError("not a calibration of this format")
        rates = [value["bandwidth"], value["copy_bandwidth"]]
        if not all(isinstance(rate, dict) and set(rate) == set(LEVELS) for rate in rates):
            raise ValueError(f"bandwidths are not those of {', '.join(LEVELS)}")
        figures = [value["peak"], *rates[0].values(), *rates[1].values()]
        if not all(map(_is_number, [*figures, value["launch_seconds"], value["time"]])) or min(figures) <= 0:
            raise ValueError("a figure is not a positive number")
        conditions = value["conditions"]
        if not isinstance(conditions, list) or not all(isinstance(text, str) for text in conditions):
            raise ValueError("conditions are not a list of texts")
        arguments = {name: value[name] for name in names}
        return Calibration(**{**arguments, "conditions": tuple(conditions)})


def calibrate(seconds: float = 2.0) -> Calibration:
    """Measures this machine in about so many seconds, after some tenths to fill the buffers."""
    machine = host.machine()
    before = cpu_counters()
    work = stream_work(machine)
    work["peak"] = Work(*peak_call())
    found = rates(work, seconds)
    read = {level: found[f"read {level}"] for level in LEVELS}
    copy = {level: found[f"copy {level}"] for level in LEVELS}
    launch = launch_seconds(machine.cores)
    conditions = timing_conditions(before)
    return Calibration(machine_key(machine), found["peak"], read, copy, launch, now(), conditions)


def calibration(refresh: bool = False) -> Calibration:
    """This machine's calibration: the cached one, or measured now and cached. `refresh` measures anew."""
    key = machine_key(host.machine())
    file = _file(key)
    known = None if refresh else _read(file, key)
    if known is None:
        known = calibrate()
        _write(file, known)
    return known


def current_conditions(known: Calibration, seconds: float = 0.2) -> tuple[str, ...]:
    """What disturbs timing now: the conditions during a run of the FMA kernel, and its peak if it differs."""
    before = cpu_counters()
    peak = measure_peak(seconds)
    reasons = timing_conditions(before)
    if abs(peak - known.peak) <= SAME_FRACTION * known.peak:
        return reasons
    compared = f"{peak / 1e9:.0f} GFLOP/s, {peak / known.peak:.0%} of the calibrated"
    return (*reasons, f"the FMA peak is now {compared}: the frequency varies, or the calibration is old")


def working_sets(machine: Machine) -> dict[str, int]:
    """Bytes to stream through for each level."""
    l3 = max(machine.l3 // 4, min(2 * machine.l2, machine.l3 // 2))
    memory = min(4 * machine.l3, max(LARGEST_BYTES, 2 * machine.l3))
    return {"l1": machine.l1 // 2, "l2": machine.l2 // 2, "l3": l3, "dram": memory}


class Work(NamedTuple):
    """A call that does an amount of work, and one to make before it that is not timed."""

    call: Callable[[], object]
    amount: float
    prepare: Callable[[], object] | None = None


def stream_work(machine: Machine) -> dict[str, Work]:
    """Calls that read and copy each level's working set, and the bytes that each moves."""
    kernel, sizes = stream_kernel(machine), working_sets(machine)
    buffer = stream_buffer(max(sizes.values()))
    work: dict[str, Work] = {}
    for level, size in sizes.items():
        part = buffer[: size // 4]
        for name, run, moved in (
            ("read", partial(kernel.read, part), kernel.read_bytes(part)),
            ("copy", partial(kernel.copy, part), kernel.copy_bytes(part)),
        ):
            passes = count_for(run, PASS_SECONDS)
            fill = None if level == "dram" else partial(run, 1)
            work[f"{name} {level}"] = Work(partial(run, passes), float(passes * moved), fill)
    return work


def rates(work: Mapping[str, Work], seconds: float, clock: Clock = CLOCK) -> dict[str, float]:
    """How much of each work is done a second at best, timed in turn."""
    timings = interleave(
        {name: one.call for name, one in work.items()},
        repeats=1 << 20,
        min_seconds=0.0,
        budget=seconds,
        prepare={name: one.prepare for name, one in work.items() if one.prepare},
        clock=clock,
    )
    return {name: one.amount / timings[name].minimum for name, one in work.items()}


def launch_seconds(threads: int) -> float:
    """What it takes to hand nothing to the pool's threads and see it done; 0 for one thread."""
    if threads < 2:
        return 0.0
    tasks = [_nothing] * threads
    timing = interleave({"launch": partial(run_all, tasks)}, repeats=50, min_seconds=1e-3, budget=0.1)
    return timing["launch"].median  # a launch meets the delays there are, not the best


def _nothing() -> None:
    pass


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _file(key: str) -> Path | None:
    """The cache's file for a machine; None if there is no cache folder."""
    try:
        name = hashlib.sha256(key.encode()).hexdigest()[:16]
        return cache_folder() / "calibration" / f"{name}.json"
    except MachineError:
        return None


def _read(file: Path | None, key: str) -> Calibration | None:
    """The file's calibration, if it is whole and this machine's."""
    try:
        found = Calibration.from_json(json.loads(file.read_bytes())) if file else None
    except (OSError, ValueError, RecursionError):
        return None
    return found if found and found.machine_key == key else None


def _write(file: Path | None, value: Calibration) -> None:
    """A reader sees the old file or the whole new one; a disk that cannot be written is not an error."""
    if file is None:
        return
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent)
        try:
            with os.fdopen(handle, "w") as stream:
                stream.write(json.dumps(value.to_json(), indent=1) + "\n")
            os.replace(temporary, file)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
