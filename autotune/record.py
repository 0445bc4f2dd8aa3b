"""What was measured, as data: a record a candidate, the key it is looked up by, and the machine's part of it.

A key holds everything that the choice of a schedule depends on, in words that a person can read. All have
a JSON form of one line, parsed strictly: ``Record.from_json(record.to_json()) == record``.

Two machines are alike in tiers, the nearest first:

    exact                     CPU name, instruction set, caches and cores
    same microarchitecture    CPU name and instruction set
    same isa                  instruction set
    none
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, TypeAlias, get_args

from convsched.errors import ConvschedError
from convsched.machine import Isa, Machine
from convsched.problem import Problem, parse_problem
from convsched.schedule import parse_schedule

FORMAT = 1  # of a record: its fields and what they mean
SCHEDULE_FORMAT = "schedule 1"  # the language of schedules and what its steps do

Status: TypeAlias = Literal["ok", "wrong", "crashed", "timed out", "failed"]
Regime: TypeAlias = Literal["hot", "cold"]
Tier: TypeAlias = Literal["exact", "same microarchitecture", "same isa", "none"]
TIERS: tuple[Tier, ...] = get_args(Tier)
REGIMES: tuple[Regime, ...] = get_args(Regime)

TIE = 0.02  # times closer than this fraction are equal: the noise of a good measurement
_MESSAGE = 300  # characters of a failure that are kept
_INT = 2**63 - 1  # the greatest integer that SQLite stores


class CacheError(ConvschedError, ValueError):
    """A record, a key or a cache file that cannot be used as asked."""


class CacheWarning(UserWarning):
    """A schedule cache, or a part of it, that is not used; compilation goes on without."""


@dataclass(frozen=True)
class MachineKey:
    """A machine as the key of a measurement; caches in bytes.

    >>> print(MachineKey.of(Machine.example("avx512")))
    example [avx512 l1=48K l2=1024K l3=32768K line=64 cores=2]
    """

    name: str
    isa: Isa
    l1: int
    l2: int
    l3: int
    line: int
    cores: int

    @staticmethod
    def of(machine: Machine) -> MachineKey:
        """The key of a machine."""
        name = "".join(c if c.isprintable() else " " for c in machine.name)
        caches = (machine.l1, machine.l2, machine.l3, machine.line)
        return MachineKey(" ".join(name.split()), machine.isa, *caches, machine.cores)

    @staticmethod
    def parse(text: str) -> MachineKey:
        """The key of a text: parse(key.text) == key. Raises CacheError."""
        match = re.fullmatch(_MACHINE, text)
        if match and match["isa"] in get_args(Isa):
            sizes = [_bytes(match[size]) for size in ("l1", "l2", "l3")]
            counts = [int(match[count]) for count in ("line", "cores")]
            key = MachineKey(match["name"], match["isa"], *sizes, *counts)  # type: ignore[arg-type]
            if key.text == text:
                return key
        raise CacheError(f"machine {text!r} is none: write {MachineKey.of(Machine.example('avx2')).text!r}")

    @property
    def text(self) -> str:
        """The one-line text form."""
        l1, l2, l3 = (f"{size // 1024}K" if size % 1024 == 0 else str(size)
                      for size in (self.l1, self.l2, self.l3))  # fmt: skip
        return f"{self.name} [{self.isa} l1={l1} l2={l2} l3={l3} line={self.line} cores={self.cores}]"

    def __str__(self) -> str:
        return self.text

    def tier(self, other: MachineKey) -> Tier:
        """How much of another machine's measurements holds here."""
        if self == other:
            return "exact"
        if self.isa != other.isa:
            return "none"
        return "same microarchitecture" if self.name == other.name else "same isa"

    def distance(self, other: MachineKey) -> float:
        """How far apart caches and cores are: the sum of |log2| of their ratios."""
        pairs = ((self.l1, other.l1), (self.l2, other.l2), (self.l3, other.l3), (self.cores, other.cores))
        return sum(abs(math.log2(max(1, a) / max(1, b))) for a, b in pairs)


_MACHINE = (r"(?P<name>.*) \[(?P<isa>\w+) l1=(?P<l1>\d{1,15}K?) l2=(?P<l2>\d{1,15}K?) l3=(?P<l3>\d{1,15}K?)"
            r" line=(?P<line>\d{1,9}) cores=(?P<cores>\d{1,9})\]")  # fmt: skip


def _bytes(size: str) -> int:
    return int(size.removesuffix("K")) * (1024 if size.endswith("K") else 1)


@dataclass(frozen=True, kw_only=True)
class Key:
    """What a schedule is looked up by: `problem` and `machine` are texts, `machine` a MachineKey's.

    `format` and `compiler` say which records and schedules this is about; a key with others' exists only
    where such rows are shown. Raises CacheError for a field that breaks its rule.
    """

    problem: str
    layout: str
    threads: int
    accuracy: str
    machine: str
    format: int = FORMAT
    compiler: str = SCHEDULE_FORMAT

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            given = getattr(self, name)
            try:
                object.__setattr__(self, name, _RULES[name](given))
            except ValueError as why:
                raise CacheError(f"{type(self).__name__}({name}={given!r}): {why}") from None

    @staticmethod
    def of(problem: Problem, machine: Machine, *, layout: str = "nchw", threads: int = 1,
           accuracy: str = "normal") -> Key:  # fmt: skip
        """The key of a compilation."""
        return Key(problem=problem.text, layout=layout, threads=threads, accuracy=accuracy,
                   machine=MachineKey.of(machine).text)  # fmt: skip

    @property
    def key(self) -> Key:
        """What this is looked up by."""
        return Key(**{name: getattr(self, name) for name in KEY})

    @property
    def text(self) -> str:
        """The key in one line for people."""
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
        return f"{self.problem} | {self.layout} | {threads} | {self.accuracy} | {self.machine}"

    def to_json(self) -> str:
        """One line of JSON."""
        own = {name: "inf" if given == math.inf else given for name, given in vars(self).items()}
        return json.dumps({"kind": _KINDS[type(self)], **own}, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Self:
        """What a line of `to_json` says. Raises CacheError."""
        return cls(**_values(_KINDS[cls], tuple(cls.__dataclass_fields__), line))


KEY = tuple(field.name for field in fields(Key))


@dataclass(frozen=True, kw_only=True)
class Record(Key):
    """One measured candidate. A candidate of a key is its `algorithm` and `schedule`.

    `hot` and `cold`: the least seconds a call, None (nan is made None) where not measured; `spread` of the
    samples, a fraction; `error`: max |error| / rms of the output; `workspace` in bytes; `flags`: what made
    the timing doubtful, such as "throttled"; `time`: Unix seconds of the measurement. `message` keeps the
    first line of what it is given.
    """

    algorithm: str
    recipe: str = ""
    schedule: str
    status: Status
    message: str = ""
    hot: float | None = None
    cold: float | None = None
    spread: float | None = None
    error: float | None = None
    workspace: int = 0
    samples: int = 0
    flags: tuple[str, ...] = ()
    is_default: bool = False
    time: float

    def check(self) -> None:
        """Raises CacheError where this convsched cannot read the record's texts, or would write others."""
        if (self.format, self.compiler) != (FORMAT, SCHEDULE_FORMAT):
            made = f"format {self.format} and {self.compiler}"
            raise CacheError(f"made with {made}; this convsched uses format {FORMAT} and {SCHEDULE_FORMAT}")
        MachineKey.parse(self.machine)
        for name, parse in (("problem", parse_problem), ("schedule", parse_schedule)):
            text = getattr(self, name)
            try:
                canonical = parse(text).text
            except ConvschedError as error:
                raise CacheError(f"{name} {text!r} is none: {error}") from None
            if canonical != text:
                raise CacheError(f"{name} {text!r} is not as convsched writes it: {canonical!r}")


@dataclass(frozen=True, kw_only=True)
class Run(Key):
    """The latest tuning run of a key: whether it came to its end, within what `budget` (a text such as
    "10s"), how many candidates it tried, and the Unix seconds of its end."""

    complete: bool
    budget: str
    tried: int
    time: float


_KINDS: Mapping[type[Key], str] = {Key: "key", Record: "candidate", Run: "run"}


def parse_line(line: str) -> Record | Run:
    """The record or run of an exported line, which this convsched can use. Raises CacheError."""
    if line.startswith('{"kind": "run"'):
        return Run.from_json(line)
    record = Record.from_json(line)
    record.check()
    return record


def choose(candidates: Iterable[Record], regime: Regime = "hot") -> Record | None:
    """The best of a key's candidates, or None: right, least time, and no slower than the default.

    Of those within 2% of the least time the one with the least workspace, then the smaller text: the same
    measurements give the same choice in every process.
    """
    if regime not in REGIMES:
        raise CacheError(f"regime={regime!r}: use one of {', '.join(REGIMES)}")
    timed = [(seconds, candidate) for candidate in candidates
             if candidate.status == "ok" and (seconds := getattr(candidate, regime)) is not None]  # fmt: skip
    if not timed:
        return None
    defaults = [seconds for seconds, candidate in timed if candidate.is_default]
    limit = min([min(seconds for seconds, _ in timed) * (1 + TIE), *defaults])
    tied = (candidate for seconds, candidate in timed if seconds <= limit)
    return min(tied, key=lambda candidate: (candidate.workspace, candidate.schedule, candidate.algorithm))


def _any_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a text")
    return value


def _text(value: Any) -> str:
    if not _any_text(value).strip() or not value.isprintable():
        raise ValueError("must be one line of text, not empty")
    return str(value)


def _first_line(value: Any) -> str:
    lines = _any_text(value).strip().splitlines() or [""]
    return lines[0][:_MESSAGE].strip().encode("utf-8", "replace").decode()


def _schedule(value: Any) -> str:
    return _text(value) if value != "" else ""  # no steps: the nest as lowered


def _count(value: Any) -> int:
    if isinstance(value, bool | str) or not hasattr(value, "__index__"):
        raise ValueError("must be an integer")
    if not 0 <= (number := operator.index(value)) <= _INT:
        raise ValueError("must be an integer from 0")
    return number


def _positive(value: Any) -> int:
    if not (number := _count(value)):
        raise ValueError("must be an integer from 1")
    return number


def _number(value: Any) -> float | None:
    """A float, from 0 to infinity; None for nan."""
    if value is None:
        return None
    if isinstance(value, bool | str) or not hasattr(value, "__float__"):
        raise ValueError("must be a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if number < 0:
        raise ValueError("must not be negative")
    return None if math.isnan(number) else number + 0.0


def _error(value: Any) -> float | None:
    return math.inf if value == "inf" else _number(value)  # JSON has no infinity


def _finite(value: Any) -> float | None:
    if (number := _number(value)) == math.inf:
        raise ValueError("must be finite")
    return number


def _seconds(value: Any) -> float | None:
    if (number := _finite(value)) == 0:
        raise ValueError("must be above 0; None where not measured")
    return number


def _moment(value: Any) -> float:
    if (number := _finite(value)) is None:
        raise ValueError("must be Unix seconds")
    return number


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _words(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(word, str) for word in value):
        raise ValueError("must be a list of texts")
    return tuple(map(_text, value))


def _status(value: Any) -> str:
    if value not in get_args(Status):
        raise ValueError(f"must be one of {', '.join(get_args(Status))}")
    return str(value)


_RULES: Mapping[str, Callable[[Any], object]] = {
    "problem": _text, "layout": _text, "threads": _positive, "accuracy": _text, "machine": _text,
    "format": _count, "compiler": _text, "algorithm": _text, "recipe": _any_text, "schedule": _schedule,
    "status": _status, "message": _first_line, "hot": _seconds, "cold": _seconds, "spread": _finite,
    "error": _error, "workspace": _count, "samples": _count, "flags": _words, "is_default": _boolean,
    "time": _moment, "complete": _boolean, "budget": _text, "tried": _count,
}  # fmt: skip


def _values(kind: str, names: tuple[str, ...], line: str) -> dict[str, Any]:
    """The values of exactly these names in a JSON object of this kind."""
    try:
        pairs = json.loads(line, object_pairs_hook=lambda pairs: pairs)
    except (ValueError, RecursionError, TypeError) as error:
        raise CacheError(f"is no JSON ({error})") from None
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise CacheError(f"is no JSON object of a {kind}")
    values = dict(pairs)
    if values.pop("kind", None) != kind:
        raise CacheError(f'has no "kind": "{kind}"')
    if len(pairs) != len(values) + 1:
        raise CacheError("has a field twice")
    if "format" in values and values["format"] != FORMAT:
        raise CacheError(f"has format {values['format']!r}; this convsched uses {FORMAT}")
    if missing := [name for name in names if name not in values]:
        raise CacheError(f"has no {', '.join(missing)}")
    if unknown := [name for name in values if name not in names]:
        raise CacheError(f"has unknown fields {', '.join(unknown)}")
    return values
