"""What was measured, as data: a record a candidate, and the key it is looked up by.

A key holds everything that the choice of a schedule depends on, in words that a person can read. All have
a JSON form of one line, parsed strictly: ``Record.from_json(record.to_json()) == record``.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, TypeAlias, get_args

from convsched.errors import ConvschedError, MachineError
from convsched.machine import Machine, MachineKey, host, machine_key
from convsched.options import ACCURACIES
from convsched.plan.families import named
from convsched.plan.plan import Plan, Target
from convsched.problem import Problem, parse_problem
from convsched.problem.layout import LAYOUTS
from convsched.schedule import parse_schedule

FORMAT = 2  # of a record: its fields and what they mean
SCHEDULE_FORMAT = "schedule 1"  # the language of schedules and what its steps do

Status: TypeAlias = Literal["ok", "wrong", "crashed", "timed out", "failed"]
Regime: TypeAlias = Literal["hot", "cold"]
REGIMES: tuple[Regime, ...] = get_args(Regime)
TRIES = 2  # of a candidate that crashes or takes too long: it may be the machine's fault once
_MESSAGE_CHARACTERS = 300  # of a failure that are kept
_GREATEST_INTEGER = 2**63 - 1  # the greatest integer that SQLite stores


class CacheError(ConvschedError, ValueError):
    """A record, a key or a cache file that cannot be used as asked."""


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
    def of(problem: Problem, target: Target) -> Key:
        """What a problem's schedule for a target is looked up by."""
        return Key(problem=problem.text, layout=target.layout, threads=target.threads, accuracy=target.accuracy,
                   machine=machine_key(target.machine))  # fmt: skip

    def target(self, machine: Machine) -> Target:
        """What was asked for, on a machine. Raises CacheError for a layout or an accuracy that is not known."""
        if self.layout not in LAYOUTS:
            raise CacheError(f"layout {self.layout!r} is not known: use one of {', '.join(LAYOUTS)}")
        accuracy = next((known for known in ACCURACIES if known == self.accuracy), None)
        if accuracy is None:
            raise CacheError(f"accuracy {self.accuracy!r} is not known: use one of {', '.join(ACCURACIES)}")
        return Target(machine, self.layout, self.threads, accuracy)

    @property
    def key(self) -> Key:
        """What this is looked up by."""
        return Key(**{name: getattr(self, name) for name in KEY})

    @property
    def text(self) -> str:
        """The key in one line for people."""
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
        return f"{self.problem} | {self.layout} | {threads} | {self.accuracy} | {self.machine}"

    def check(self) -> None:
        """Raises CacheError where this convsched cannot use what the texts say, or would write others."""
        if (self.format, self.compiler) != (FORMAT, SCHEDULE_FORMAT):
            raise CacheError(other_version(self.format, self.compiler))
        try:
            MachineKey.parse(self.machine)
        except MachineError as error:
            raise CacheError(str(error)) from None
        self._check_text("problem", lambda text: parse_problem(text).text)
        self.target(host.machine())

    def _check_text(self, name: str, written: Callable[[str], str]) -> None:
        """`written`: how convsched writes what a text says; raises a ConvschedError for a text that says nothing."""
        text = getattr(self, name)
        try:
            canonical = written(text)
        except ConvschedError as error:
            raise CacheError(f"{name} {text!r} cannot be used: {error}") from None
        if canonical != text:
            raise CacheError(f"{name} {text!r} is not as convsched writes it: {canonical!r}")

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
    the timing doubtful, as `timing_flags` names it; `tries`: how often it was measured until it gave an
    answer; `time`: Unix seconds of the measurement. `message` keeps the first line of what it is given.
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
    tries: int = 1
    time: float

    @property
    def is_settled(self) -> bool:
        """Whether to measure it again would tell nothing new: a crash or a time-out is tried once more."""
        return self.status not in ("crashed", "timed out") or self.tries >= TRIES

    def plan(self, machine: Machine) -> Plan:
        """What was measured, as a plan for a machine. Raises CacheError for a record that says something else than
        this convsched would write."""
        self.check()
        problem = parse_problem(self.problem)
        return Plan(problem, self.target(machine), named(self.algorithm, problem), parse_schedule(self.schedule),
                    origin=f"from the schedule cache: {self.recipe or 'of no recipe'}")

    def check(self) -> None:
        """As `Key.check`, and of algorithm and schedule."""
        super().check()
        problem = parse_problem(self.problem)
        self._check_text("algorithm", lambda text: named(text, problem).name)
        self._check_text("schedule", lambda text: parse_schedule(text).text)


@dataclass(frozen=True, kw_only=True)
class Run(Key):
    """The latest tuning run of a key: whether it came to its end, within what `budget` (a text such as
    "10s"), how many candidates it tried, and the Unix seconds of its end."""

    complete: bool
    budget: str
    tried: int
    time: float


_KINDS: Mapping[type[Key], str] = {Key: "key", Record: "candidate", Run: "run"}


def other_version(format: object, compiler: object) -> str:
    """Why a record of another format or compiler is not used."""
    return f"made with format {format} and {compiler}; this convsched uses format {FORMAT} and {SCHEDULE_FORMAT}"


def parse_line(line: str) -> Record | Run:
    """The record or run of an exported line, which this convsched can use. Raises CacheError."""
    item = Run.from_json(line) if line.startswith('{"kind": "run"') else Record.from_json(line)
    item.check()
    return item


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
    return lines[0][:_MESSAGE_CHARACTERS].strip().encode("utf-8", "replace").decode()


def _schedule(value: Any) -> str:
    return _text(value) if value != "" else ""  # no steps: the nest as lowered


def _count(value: Any) -> int:
    if isinstance(value, bool | str) or not hasattr(value, "__index__"):
        raise ValueError("must be an integer")
    if not 0 <= (number := operator.index(value)) <= _GREATEST_INTEGER:
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
    "tries": _positive, "time": _moment, "complete": _boolean, "budget": _text, "tried": _count,
}  # fmt: skip


def _values(kind: str, names: tuple[str, ...], line: str) -> dict[str, Any]:
    """The values of exactly these names in a JSON object of this kind."""
    try:
        pairs = json.loads(line, object_pairs_hook=lambda pairs: pairs)
    except (ValueError, RecursionError, TypeError) as error:
        raise CacheError(f"is not JSON ({error})") from None
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise CacheError(f"is not a JSON object of a {kind}")
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
