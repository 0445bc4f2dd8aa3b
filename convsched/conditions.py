"""What makes run times unreliable now, in words: the tuner shows and records it, and refuses nothing.

A counter tells only about the time in which it has moved. So whoever measures takes `cpu_counters()` before
and gives them here after:

    before = cpu_counters()
    ...
    reasons = timing_conditions(before)
"""

from __future__ import annotations

from pathlib import Path

from convsched.machine import (
    CpuCounters,
    affinity_cores,
    available_cores,
    cpu_counters,
    governors,
    load_average,
    quota_cores,
)

STEAL_SHARE = 0.01  # of the CPU time wanted: less is hidden by the minimum over rounds
LOAD_MARGIN = 0.5  # tasks: the measuring process itself is one, background services are fractions of one


def timing_conditions(since: CpuCounters | None = None, root: Path = Path("/")) -> tuple[str, ...]:
    """The reasons, a sentence each, why times taken now would drift; none if nothing is known to disturb.

    Stops by the cgroup's quota and stolen time are those after `since`; without it, since the machine started.
    """
    reasons = (_governor(root), _quota(root), _load(root), *_counters(since or CpuCounters(), root))
    return tuple(reason for reason in reasons if reason)


def _governor(root: Path) -> str:
    slow = [name for name in governors(root) if name != "performance"]
    return f"the CPU governor is {', '.join(slow)}, not performance: the frequency varies" if slow else ""


def _quota(root: Path) -> str:
    quota, affinity = quota_cores(root), affinity_cores()
    if quota >= affinity:
        return ""
    return f"the cgroup quota is {quota:g} cores, the affinity mask has {affinity}: threads may be stopped"


def _load(root: Path) -> str:
    load, cores = load_average(root), available_cores(root)
    if load <= cores + LOAD_MARGIN:
        return ""
    return f"the load average is {load:.1f} on {cores} available core{'s' if cores > 1 else ''}"


def _counters(since: CpuCounters, root: Path) -> tuple[str, str]:
    now = cpu_counters(root)
    stops, stolen = now.throttled - since.throttled, now.stolen - since.stolen
    share = stolen / max(1, now.wanted - since.wanted)
    return (
        f"the cgroup quota stopped this process {stops} time{'s' if stops > 1 else ''}" if stops > 0 else "",
        f"other guests took {share:.1%} of the CPU time wanted (steal)" if share > STEAL_SHARE else "",
    )
