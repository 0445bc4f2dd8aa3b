"""The machine that kernels are made for: instruction set, vector registers, caches and cores.

A vector register of B bytes holds B/4 float32 lanes, and a core with `registers` of them keeps a tile of
at most registers - (operands in flight) accumulators. The cores a process may use are

    min(affinity mask, floor(cgroup CPU quota / period), cores of the machine), and at least 1.

This is the only module that reads the CPU's description, its state and the environment. The variables:

    CONVSCHED_ISA      an instruction set below the host's: avx512, avx2, sse, neon or generic
    CONVSCHED_THREADS  the default number of threads (never more than the cores)
    CONVSCHED_CACHE    the folder of the object and schedule caches
"""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from convsched.errors import MachineError, shortened

Isa: TypeAlias = Literal["avx512", "avx2", "sse", "neon", "generic"]
Tier: TypeAlias = Literal["exact", "same microarchitecture", "same isa", "none"]

# Bytes of a vector register, and how many registers there are.
_VECTORS: dict[Isa, tuple[int, int]] = {
    "avx512": (64, 32),
    "avx2": (32, 16),
    "sse": (16, 16),
    "neon": (16, 32),
    "generic": (16, 16),
}

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

_KIB = 1024
_MIB = 1024 * _KIB
# (L1 data, L2, L3, line) in bytes where the system does not tell: the smallest that are common.
_CACHES = (32 * _KIB, 512 * _KIB, 8 * _MIB, 64)


@dataclass(frozen=True)
class Machine:
    """A CPU as schedules see it.

    `vector_bytes` of a register, `registers` of vectors; `l1` (data), `l2`, `l3` caches and their `line` in
    bytes (`l3` equals `l2` where there is none); `cores` that this process may use. `design` tells the CPU's
    vendor, family and model (its `name` may not: a hypervisor may give several generations one), "" where
    the system does not.
    """

    name: str
    isa: Isa
    vector_bytes: int
    registers: int
    l1: int
    l2: int
    l3: int
    line: int
    cores: int
    design: str = ""
    stepping: str = ""

    @property
    def lanes(self) -> int:
        """float32 numbers in a vector register."""
        return self.vector_bytes // 4

    @property
    def text(self) -> str:
        """One line for people.

        >>> Machine.example("avx2").text
        'example avx2: 16 registers of 32 B, L1 32 KiB, L2 256 KiB, L3 8192 KiB, line 64 B, 4 cores'
        """
        l1, l2, l3 = (f"{size // _KIB} KiB" for size in (self.l1, self.l2, self.l3))
        vectors = f"{self.registers} registers of {self.vector_bytes} B"
        caches = f"L1 {l1}, L2 {l2}, L3 {l3}, line {self.line} B"
        return f"{self.name} {self.isa}: {vectors}, {caches}, {self.cores} cores"

    def __str__(self) -> str:
        return self.text

    @staticmethod
    @cache
    def host() -> Machine:
        """This machine, as found at the first call. Raises MachineError for a wrong CONVSCHED_ISA."""
        return detect(Path("/"), platform.machine(), os.environ)

    @staticmethod
    def example(isa: Isa) -> Machine:
        """A fixed machine with an instruction set, for tests and for schedules made elsewhere."""
        if isa not in _EXAMPLES:
            raise MachineError(f"Machine.example({isa!r}): use one of {', '.join(_EXAMPLES)}")
        return Machine("example", isa, *_VECTORS[isa], *_EXAMPLES[isa])


@dataclass(frozen=True)
class MachineKey:
    """What measurements on a machine belong to; caches in bytes.

    Two machines are alike in tiers, the nearest first: "exact"; "same microarchitecture", which is the same
    design and instruction set; "same isa"; "none".

    >>> print(MachineKey("AuthenticAMD family 26 model 2", "avx512", "1", 49152, 1048576, 33554432, 64, 2))
    AuthenticAMD family 26 model 2 [avx512 stepping=1 l1=48K l2=1024K l3=32768K line=64 cores=2]
    """

    design: str
    isa: Isa
    stepping: str
    l1: int
    l2: int
    l3: int
    line: int
    cores: int

    @staticmethod
    def of(machine: Machine) -> MachineKey:
        """The key of a machine; its name stands for a design that the system does not tell."""
        design = "".join(c if c.isprintable() else " " for c in machine.design or machine.name)
        caches = (machine.l1, machine.l2, machine.l3, machine.line)
        return MachineKey(" ".join(design.split()), machine.isa, machine.stepping, *caches, machine.cores)

    @staticmethod
    def parse(text: str) -> MachineKey:
        """The key of a text: parse(key.text) == key. Raises MachineError."""
        match = re.fullmatch(_KEY, text)
        if match and match["isa"] in get_args(Isa):
            design, isa, stepping, l1, l2, l3, line, cores = match.groups("")
            key = MachineKey(design, isa, stepping, _bytes(l1), _bytes(l2), _bytes(l3),  # type: ignore[arg-type]
                             int(line), int(cores))  # fmt: skip
            if key.text == text:
                return key
        raise MachineError(f"machine {text!r} is none: write {MachineKey.of(Machine.example('avx2')).text!r}")

    @property
    def text(self) -> str:
        """The one-line text form."""
        l1, l2, l3 = (f"{size // _KIB}K" if size % _KIB == 0 else str(size) for size in (self.l1, self.l2, self.l3))
        stepping = f" stepping={self.stepping}" if self.stepping else ""
        return f"{self.design} [{self.isa}{stepping} l1={l1} l2={l2} l3={l3} line={self.line} cores={self.cores}]"

    def __str__(self) -> str:
        return self.text

    def tier(self, other: MachineKey) -> Tier:
        """How much of another machine's measurements holds here."""
        if self == other:
            return "exact"
        if self.isa != other.isa:
            return "none"
        return "same microarchitecture" if self.design == other.design else "same isa"

    def distance(self, other: MachineKey) -> float:
        """How far apart caches and cores are: the sum of |log2| of their ratios."""
        pairs = ((self.l1, other.l1), (self.l2, other.l2), (self.l3, other.l3), (self.cores, other.cores))
        return sum(abs(math.log2(max(1, a) / max(1, b))) for a, b in pairs)


_KEY = (r"(.*) \[(?P<isa>\w+)(?: stepping=(\S+))? l1=(\d{1,15}K?) l2=(\d{1,15}K?) l3=(\d{1,15}K?)"
        r" line=(\d{1,9}) cores=(\d{1,9})\]")  # fmt: skip

# (l1, l2, l3, line, cores): AMD Zen 5, Intel Haswell, Intel Nehalem, ARM Neoverse N1.
_EXAMPLES: dict[Isa, tuple[int, int, int, int, int]] = {
    "avx512": (48 * _KIB, 1 * _MIB, 32 * _MIB, 64, 2),
    "avx2": (32 * _KIB, 256 * _KIB, 8 * _MIB, 64, 4),
    "sse": (32 * _KIB, 256 * _KIB, 8 * _MIB, 64, 4),
    "neon": (64 * _KIB, 1 * _MIB, 32 * _MIB, 64, 4),
}


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


def machine_key(machine: Machine) -> str:
    """What measurements on a machine belong to, as one line of text."""
    return MachineKey.of(machine).text


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
    l1, l2, l3, usual_line = _CACHES
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
