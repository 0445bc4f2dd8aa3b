"""The state of the machine while something is timed: throttling, stolen time, load, governors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from convsched.machine.host import _cgroup_folders, _read


@dataclass(frozen=True)
class CpuCounters:
    """Counts since the start of the machine or cgroup: how often the quota stopped this process's cgroups,
    and ticks of all CPUs: `total`, `wanted` (not idle), `stolen` by other guests, `own` of this process."""

    throttled: int = 0
    total: int = 0
    wanted: int = 0
    stolen: int = 0
    own: int = 0


def cpu_counters(root: Path = Path("/")) -> CpuCounters:
    """The counters now; zero where the system does not tell."""
    throttled = 0
    for folder, _ in _cgroup_folders(root):
        for line in _read(folder / "cpu.stat").splitlines():
            name, _, count = line.partition(" ")
            throttled += int(count) if name == "nr_throttled" and count.isdigit() else 0
    # user nice system idle iowait irq softirq steal: the first line sums over the CPUs.
    words = _read(root / "proc/stat").partition("\n")[0].split()[1:9]
    # A process's name, in brackets, may have spaces; its user and system time are 11 words after it.
    mine = _read(root / "proc/self/stat").rpartition(")")[2].split()[11:13]
    if len(words) < 8 or not all(map(str.isdigit, [*words, *mine])):
        return CpuCounters(throttled)
    ticks = [int(word) for word in words]
    total = sum(ticks)
    return CpuCounters(throttled, total, total - ticks[3] - ticks[4], ticks[7], sum(map(int, mine)))


def governors(root: Path = Path("/")) -> tuple[str, ...]:
    """The frequency governors of the CPUs, each once; empty where there are none to read."""
    files = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
    return tuple(sorted({_read(file).strip() for file in files} - {""}))


def load_average(root: Path = Path("/")) -> float:
    """Tasks that ran or waited to run, averaged over a minute; 0 where the system does not tell."""
    try:
        return float(_read(root / "proc/loadavg").split()[0])
    except (IndexError, ValueError):
        return 0.0
