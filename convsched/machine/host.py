"""The machine that kernels are made for: instruction set, vector registers, caches and cores.

A vector register of B bytes holds B/4 float32 lanes, and a core with `registers` of them keeps a tile of
at most registers - (operands in flight) accumulators. The cores a process may use are

    min(affinity mask, floor(cgroup CPU quota / period), cores of the machine), and at least 1.

The variables of the environment:

    CONVSCHED_ISA      an instruction set below the host's: avx512, avx2, sse, neon or generic
    CONVSCHED_THREADS  the default number of threads (never more than the cores)
    CONVSCHED_CACHE    the folder of the object and schedule caches
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

from convsched.errors import MachineError, shortened
from convsched.machine.machine import _KIB, _MIB, _VECTORS, Isa, Machine

# Each instruction set and those a machine that has it can be told to stay within, itself first.
_WITHIN: dict[Isa, tuple[Isa, ...]] = {
    "avx512": ("avx512", "avx2", "sse", "generic"),
    "avx2": ("avx2", "sse", "generic"),
    "sse": ("sse", "generic"),
    "neon": ("neon", "generic"),
    "generic": ("generic",),
}

# The flags of /proc/cpuinfo that an instruction set needs, widest first. SSE2 is part of x86-64.
_FLAGS: tuple[tuple[Isa, frozenset[str]], ...] = (
    ("avx512", frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx2", "fma"})),
    ("avx2", frozenset({"avx2", "fma"})),
)

# A CPU's design and its stepping from the lines of /proc/cpuinfo, on x86 and on Arm.
_IDENTITY = (
    ("{vendor_id} family {cpu family} model {model}", "{stepping}"),
    ("implementer {CPU implementer} part {CPU part}", "{CPU variant}.{CPU revision}"),
)

SETTING_DIGITS = 9  # of a number in the environment
# (L1 data, L2, L3, line) in bytes where the system does not tell: the smallest that are common.
_CACHE_BYTES = (32 * _KIB, 512 * _KIB, 8 * _MIB, 64)


_KEY_PATTERN = (r"(.*) \[(?P<isa>\w+)(?: stepping=(\S+))? l1=(\d{1,15}K?) l2=(\d{1,15}K?) l3=(\d{1,15}K?)"
        r" line=(\d{1,9}) cores=(\d{1,9})\]")  # fmt: skip


@cache
def machine() -> Machine:
    """This machine, as found at the first call. Raises MachineError for a wrong CONVSCHED_ISA."""
    return detect(Path("/"), platform.machine(), os.environ)


def default_threads() -> int:
    """How many threads to run on: CONVSCHED_THREADS, if set, but never more than the available cores."""
    cores = available_cores(Path("/"))
    setting = os.environ.get("CONVSCHED_THREADS", "")
    if not setting:
        return cores
    if not setting.isascii() or not setting.isdigit() or not setting.strip("0"):
        raise MachineError(f"CONVSCHED_THREADS={shortened(setting)}: must be a positive integer")
    if len(setting) > SETTING_DIGITS:
        raise MachineError(f"CONVSCHED_THREADS={shortened(setting)}: must have at most {SETTING_DIGITS} digits")
    return min(int(setting), cores)


def cache_folder() -> Path:
    """The folder of the caches (it may not exist yet): CONVSCHED_CACHE, else the user's cache folder."""
    if setting := os.environ.get("CONVSCHED_CACHE", ""):
        return Path(setting).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the XDG specification has relative paths ignored
        return Path(base) / "convsched"
    try:
        return Path.home() / ".cache" / "convsched"
    except RuntimeError:
        raise MachineError("this user has no home folder; set CONVSCHED_CACHE to a folder") from None


def has_schedules() -> bool:
    """Whether anything was ever tuned: there is a schedule cache in the cache folder."""
    try:
        return (cache_folder() / "schedules.sqlite").exists()
    except (MachineError, OSError):
        return False


def detect(root: Path, architecture: str, environment: Mapping[str, str]) -> Machine:
    """The machine whose /proc and /sys are below `root`. Raises MachineError for a wrong CONVSCHED_ISA."""
    fields = _cpu_fields(root)
    isa = _isa(architecture.lower(), frozenset(fields.get("flags", "").split()))
    if wanted := environment.get("CONVSCHED_ISA", ""):
        within = [known for known in _WITHIN[isa] if known == wanted]
        if not within:
            rule = f"this CPU ({isa}) can run one of {', '.join(_WITHIN[isa])}"
            raise MachineError(f"CONVSCHED_ISA={shortened(wanted)}: {rule}")
        isa = within[0]
    name = fields.get("model name", "") or architecture or "unknown"
    return Machine(name, isa, *_VECTORS[isa], *_caches(root), available_cores(root), *_identity(fields))


def available_cores(root: Path) -> int:
    """Cores this process may use now: the least of affinity, cgroup quota and the machine's own."""
    return max(1, int(min(affinity_cores(), quota_cores(root))))


def machine_cores() -> int:
    """Cores of the machine, as the system counts them."""
    return os.cpu_count() or 1


def affinity_cores() -> int:
    """Cores of the machine on which the affinity mask lets this process run."""
    cores = machine_cores()
    return min(cores, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else cores


def quota_cores(root: Path) -> float:
    """Cores' worth of time that the cgroups grant, such as 1.5; infinity without a quota."""
    return min(_quotas(root), default=math.inf)


def _isa(architecture: str, flags: frozenset[str]) -> Isa:
    if architecture in ("x86_64", "amd64"):
        return next((isa for isa, needed in _FLAGS if needed <= flags), "sse")
    return "neon" if architecture in ("aarch64", "arm64") else "generic"


def _cpu_fields(root: Path) -> dict[str, str]:
    """The first CPU's lines of /proc/cpuinfo."""
    fields: dict[str, str] = {}
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields


def _identity(fields: Mapping[str, str]) -> tuple[str, str]:
    """A CPU's design and its stepping (one word), empty where /proc/cpuinfo does not tell."""
    for design, stepping in _IDENTITY:
        with suppress(KeyError):
            return design.format_map(fields), stepping.format_map(fields).replace(" ", "")
    return "", ""


def _caches(root: Path) -> tuple[int, int, int, int]:
    """(L1 data, L2, L3, line) in bytes of the first CPU."""
    sizes: dict[int, int] = {}
    line = 0
    for index in sorted((root / "sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, size = _read(index / "level").strip(), _bytes(_read(index / "size").strip())
        if _read(index / "type").strip() not in ("Data", "Unified") or not level.isdigit() or not size:
            continue
        sizes[int(level)] = size
        line = line or _bytes(_read(index / "coherency_line_size").strip())
    l1, l2, l3, usual_line = _CACHE_BYTES
    if 1 not in sizes:
        return (l1, l2, l3, line or usual_line)
    l2 = sizes.get(2, max(l2, sizes[1]))
    return (sizes[1], l2, sizes.get(3, l2), line or usual_line)


def _bytes(size: str) -> int:
    """Bytes of a size as sysfs writes it, such as 48K; 0 if it is none."""
    unit = {"K": _KIB, "M": _MIB, "G": 1024 * _MIB}.get(size[-1:], 1)
    digits = size.rstrip("KMG")
    return int(digits) * unit if digits.isdigit() else 0


def _quotas(root: Path) -> Iterator[float]:
    """The CPU quotas, in cores, of this process's cgroups (version 1 or 2) and all those above them."""
    for folder, version in _cgroup_folders(root):
        if version == 2:
            limit = _read(folder / "cpu.max").split()
        else:
            limit = [_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        if len(limit) == 2 and all(map(str.isdigit, limit)) and int(limit[1]):
            yield int(limit[0]) / int(limit[1])


def _cgroup_folders(root: Path) -> Iterator[tuple[Path, int]]:
    """The folders of this process's CPU cgroups and of those above them, and the version, 1 or 2."""
    for entry in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*entry.split(":", 2), "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        top, version = (root / "sys/fs/cgroup/cpu", 1) if controllers else (root / "sys/fs/cgroup", 2)
        # Inside a container, the path may be the host's and lie outside the mount: only its top exists.
        inside = Path(path.lstrip("/"))
        for folder in (inside, *inside.parents):
            yield top / folder, version


def _read(path: Path) -> str:
    """A file's text, empty if there is none that can be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
