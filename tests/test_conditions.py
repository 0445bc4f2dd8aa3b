"""What disturbs timing, as read from fake /proc and /sys trees, and on this host."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from convsched.machine import CpuCounters, affinity_cores, cpu_counters, governors, load_average, quota_cores
from convsched.machine.conditions import timing_conditions, timing_flags

STAT = "cpu  400 0 100 9000 700 0 0 {steal} 50 0\ncpu0 200 0 50 4500 350 0 0 1 0 0\n"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def governor(cpu: int, name: str) -> dict[str, str]:
    return {f"sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_governor": f"{name}\n"}


def throttled(times: int) -> dict[str, str]:
    """Version 2: the cgroup's own count, its parent's, and one that is not above it."""
    text = "nr_periods 90\nnr_throttled {}\nthrottled_usec 5\n"
    return {
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/b/cpu.stat": text.format(times),
        "sys/fs/cgroup/a/cpu.stat": text.format(1),
        "sys/fs/cgroup/c/cpu.stat": text.format(1000),
    }


@pytest.fixture(autouse=True)
def four_of_eight_cores(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "host" in request.node.name:
        return
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4, 5}, raising=False)


@pytest.mark.parametrize(
    ("files", "reasons"),
    [
        ({}, ()),
        ({**governor(0, "performance"), **governor(11, "performance")}, ()),
        (
            {**governor(0, "performance"), **governor(11, "powersave")},
            ("the CPU governor is powersave, not performance: the frequency varies",),
        ),
        ({"proc/loadavg": "4.40 9.00 9.00 1/99 7\n"}, ()),
        ({"proc/loadavg": "4.60 0.00 0.00 1/99 7\n"}, ("the load average is 4.6 on 4 available cores",)),
        ({"proc/loadavg": "heavy\n"}, ()),
        (
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"},
            ("the cgroup quota is 1.5 cores, the affinity mask has 4: threads may be stopped",),
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"}, ()),
        ({"proc/stat": STAT.format(steal=5)}, ()),  # 5 of 505: just below 1 %
        (
            {"proc/stat": STAT.format(steal=125)},
            ("other guests took 20.0% of the CPU time wanted (steal)",),
        ),
        ({"proc/stat": "cpu  1 2 3\n"}, ()),
        (throttled(1), ("the cgroup quota stopped this process 2 times",)),
        (throttled(0), ("the cgroup quota stopped this process 1 time",)),
    ],
    ids=str,
)
def test_reasons(tmp_path: Path, files: dict[str, str], reasons: tuple[str, ...]) -> None:
    assert timing_conditions(root=write(tmp_path, files)) == reasons


def test_flags_name_the_reasons(tmp_path: Path) -> None:
    assert timing_flags(root=tmp_path) == ()
    quiet = {**throttled(0), "sys/fs/cgroup/cpu.max": "150000 100000\n", "proc/stat": STAT.format(steal=0)}
    root = write(tmp_path, {**quiet, **governor(0, "powersave"), "proc/loadavg": "4.60 0.00 0.00 1/99 7\n"})
    assert timing_flags(root=root) == ("governor", "quota", "load", "throttled")
    before = cpu_counters(root)
    assert timing_flags(before, root) == ("governor", "quota", "load")
    busy = STAT.format(steal=50).replace("400", "900")
    write(root, {**throttled(1), "proc/stat": busy})
    assert timing_flags(before, root) == ("governor", "quota", "load", "others", "throttled", "steal")
    assert len(timing_conditions(before, root)) == 6


def test_counters_tell_only_about_the_time_in_which_they_move(tmp_path: Path) -> None:
    root = write(tmp_path, {**throttled(7), "proc/stat": STAT.format(steal=125)})
    before = cpu_counters(root)
    assert before == CpuCounters(throttled=8, total=10325, wanted=625, stolen=125)
    assert timing_conditions(before, root) == ()
    later = STAT.format(steal=127).replace("400", "448").replace("9000", "9900")
    write(root, {**throttled(9), "proc/stat": later})
    assert timing_conditions(before, root) == (
        "the cgroup quota stopped this process 2 times",
        "other guests took 4.0% of the CPU time wanted (steal)",
    )


@pytest.mark.parametrize(
    ("own", "reasons"),
    [
        (100, ("other processes used 50% of the machine's CPU time meanwhile",)),
        (182, ()),
        (178, ("other processes used 11% of the machine's CPU time meanwhile",)),
    ],
)
def test_others_are_those_who_use_the_rest(tmp_path: Path, own: int, reasons: tuple[str, ...]) -> None:
    process = "7 (a name) x) R 1 1 1 0 -1 0 0 0 0 0 {} 8 0 0 20 0"
    first = {"proc/stat": STAT.format(steal=0), "proc/self/stat": process.format(10)}
    root = write(tmp_path, first)
    before = cpu_counters(root)
    assert before.own == 18
    later = {
        "proc/stat": STAT.format(steal=0).replace("400", "600"),
        "proc/self/stat": process.format(10 + own),
    }
    assert timing_conditions(before, write(root, later)) == reasons


def test_counters_of_version_1(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/y\n",
        "sys/fs/cgroup/cpu/y/cpu.stat": "nr_periods 3\nnr_throttled 2\nthrottled_time 1\n",
        "sys/fs/cgroup/cpu/x/cpu.stat": "nr_throttled 9\n",
    }
    assert cpu_counters(write(tmp_path, files)).throttled == 2


def test_the_limits_of_cores_are_each_told(tmp_path: Path) -> None:
    assert affinity_cores() == 4
    assert quota_cores(tmp_path) == float("inf")
    write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"})
    assert quota_cores(tmp_path) == 2.5


def test_load_and_governors_that_cannot_be_read(tmp_path: Path) -> None:
    assert (load_average(tmp_path), governors(tmp_path)) == (0.0, ())


def test_the_host_is_read_without_error() -> None:
    before = cpu_counters()
    assert all(isinstance(reason, str) for reason in timing_conditions(before))
    assert cpu_counters().wanted >= before.wanted
