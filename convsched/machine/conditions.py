"""What makes run times unreliable now, in words: the tuner shows and records it, and refuses nothing.

A counter tells only about the time in which it has moved. So whoever measures takes `cpu_counters()` before
and gives them here after:

    before = cpu_counters()
    ...
    reasons = timing_conditions(before)

in the process that does the work: what all others use meanwhile is one of the reasons. `timing_flags` names
the same reasons by a word each, for a record of what was measured:

    governor  quota  load  others  throttled  steal
"""

from __future__ import annotations

from pathlib import Path

from convsched.machine.counters import CpuCounters, cpu_counters, governors, load_average
from convsched.machine.host import affinity_cores, available_cores, quota_cores

STEAL_SHARE = 0.01  # of the CPU time wanted: less is hidden by the minimum over rounds
OTHERS_SHARE = 0.1  # of all CPUs' time: the system's own services stay below it
LOAD_MARGIN = 0.5  # tasks: the measuring process itself is one, background services are fractions of one


def timing_conditions(since: CpuCounters | None = None, root: Path = Path("/")) -> tuple[str, ...]:
    """The reasons, a sentence each, why times taken now would drift; none if nothing is known to disturb.

    Stops by the cgroup's quota and stolen time are those after `since`, or since the machine started; other
    processes count only after `since`.
    """
    return tuple(_reasons(since, root).values())


def timing_flags(since: CpuCounters | None = None, root: Path = Path("/")) -> tuple[str, ...]:
    """The names of the reasons that `timing_conditions` gives."""
    return tuple(_reasons(since, root))


def _reasons(since: CpuCounters | None, root: Path) -> dict[str, str]:
    """What disturbs timing, by its flag."""
    now = cpu_counters(root)
    before = since or CpuCounters()
    reasons = {
        "governor": _governor(root), "quota": _quota(root), "load": _load(root),
        "others": _others(since, now) if since else "",
        "throttled": _throttled(now.throttled - before.throttled),
        "steal": _steal(now.stolen - before.stolen, now.wanted - before.wanted),
    }  # fmt: skip
    return {flag: reason for flag, reason in reasons.items() if reason}


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


def _others(since: CpuCounters, now: CpuCounters) -> str:
    """The load average takes a minute to tell; the CPU time of others tells at once."""
    total = now.total - since.total
    used = (now.wanted - now.stolen - now.own) - (since.wanted - since.stolen - since.own)
    if used <= OTHERS_SHARE * total or total <= 0:
        return ""
    return f"other processes used {used / total:.0%} of the machine's CPU time meanwhile"


def _throttled(stops: int) -> str:
    return f"the cgroup quota stopped this process {stops} time{'s' if stops > 1 else ''}" if stops > 0 else ""


def _steal(stolen: int, wanted: int) -> str:
    share = stolen / max(1, wanted)
    return f"other guests took {share:.1%} of the CPU time wanted (steal)" if share > STEAL_SHARE else ""
