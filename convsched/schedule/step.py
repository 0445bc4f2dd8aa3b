"""What every step is: frozen fields and one grammar, by which it is printed, read, and its fields are checked.

    split LOOP FACTOR -> OUTER INNER [tail=mask|peel|overlap]

A grammar is a line of words, of which the first is the step's verb. Words in capitals or with ``|`` are the step's
fields, in their order; all others stand for themselves:

    LOOP             a name                      FACTOR, ITERATIONS, MULTIPLE   a number
    LOOP ...         one or more names           ENTRY                          a name, or part of an axis as c/16
    mask|peel        one of these words          ENTRY:MULTIPLE,...             pairs
    tail=mask|peel   the same behind a key       [...]                          left out where the field's default
                                                                                has no text of this form
"""

from __future__ import annotations

import re
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Any, ClassVar, NamedTuple, Self

from convsched.errors import ScheduleError
from convsched.ir import Program

GREATEST_NUMBER = 2**31 - 1  # the greatest number in a step: sizes of loops and strides made of it fit 64-bit addresses


@dataclass(frozen=True)
class Step(ABC):
    """One rewrite of a program. Raises ScheduleError where it is made with a field that its text could not say."""

    GRAMMAR: ClassVar[str]

    def __post_init__(self) -> None:
        for part in _form(type(self)).parts:
            value = getattr(self, part.field)
            if not part.may_be(value):
                raise ScheduleError(f"{type(self).__name__}({part.field}={shown(value)})", "is not a step",
                                    f"{part.field} is {part.allowed}")

    @abstractmethod
    def apply(self, program: Program) -> Program:
        """The program after the step; not yet simplified. It checks first, and raises ScheduleError with the nest
        printed and the loop marked; what it gives is then legal by construction."""

    @classmethod
    def parse(cls, words: str) -> Self:
        """The step of a text with single spaces; raises ScheduleError with the grammar."""
        form = _form(cls)
        match = form.pattern.fullmatch(words)
        if match is None:
            raise ScheduleError(words, "is not a step", f"write {cls.GRAMMAR}")
        texts = match.groupdict()
        return cls(**{part.field: part.value.read(texts[part.field]) for part in form.parts
                      if texts[part.field] is not None})

    def __str__(self) -> str:
        words = [word if isinstance(word, str) else word.text(getattr(self, word.field))
                 for word in _form(type(self)).words]
        return " ".join(word for word in words if word)


def verb_of(kind: type[Step]) -> str:
    """The first word of a step's text."""
    return kind.GRAMMAR.split()[0]


def shown(value: object) -> str:
    """A value, shortened; an integer of thousands of digits has no decimal form."""
    try:
        return reprlib.repr(value)
    except ValueError:
        return type(value).__name__


class _Value(NamedTuple):
    """What a field may hold, and its text."""

    pattern: str
    holds: Callable[[Any], bool]
    allowed: str
    text: Callable[[Any], str] = str
    read: Callable[[str], Any] = str


class _Part(NamedTuple):
    """A field in a grammar."""

    field: str
    key: str  # "tail=", or nothing
    value: _Value
    default: Any  # of a part that may be left out, else MISSING

    @property
    def has_silent_default(self) -> bool:
        """Whether the default is what has no text."""
        return self.default is not MISSING and not self.value.holds(self.default)

    def may_be(self, value: Any) -> bool:
        """Whether the field may have a value."""
        silent = self.has_silent_default and type(value) is type(self.default) and value == self.default
        return silent or self.value.holds(value)

    @property
    def allowed(self) -> str:
        """What the field may have."""
        return f"{self.value.allowed}, or {self.default!r}" if self.has_silent_default else self.value.allowed

    def text(self, value: Any) -> str:
        """The field with its key; nothing where it is left out."""
        return self.key + self.value.text(value) if self.value.holds(value) else ""

    @property
    def pattern(self) -> str:
        """Of its text, with the space before it."""
        found = rf" {re.escape(self.key)}(?P<{self.field}>{self.value.pattern})"
        return found if self.default is MISSING else f"(?:{found})?"


class _Form(NamedTuple):
    """A grammar, read."""

    words: tuple[str | _Part, ...]
    parts: tuple[_Part, ...]
    pattern: re.Pattern[str]


@cache
def _form(kind: type[Step]) -> _Form:
    """The grammar of a kind of step, with its fields in their order."""
    names = iter(fields(kind))
    words: list[str | _Part] = []
    for word in re.findall(r"\[[^]]*\]|\S+(?: \.\.\.)?", kind.GRAMMAR):
        if "|" not in word and not re.search("[A-Z]", word):
            words.append(word)
            continue
        field = next(names)
        key, _, value = word.strip("[]").rpartition("=")
        words.append(_Part(field.name, f"{key}=" if key else "", _value(value),
                           field.default if word.startswith("[") else MISSING))
    pattern = "".join(f" {re.escape(word)}" if isinstance(word, str) else word.pattern for word in words)
    parts = tuple(word for word in words if not isinstance(word, str))
    return _Form(tuple(words), parts, re.compile(pattern.removeprefix(" ").removeprefix(r"\ ")))


def _value(form: str) -> _Value:
    """What a word of a grammar holds."""
    if "|" in form:
        words = form.split("|")
        return _Value(form, lambda value: isinstance(value, str) and value in words, f"one of {', '.join(words)}")
    if form.endswith(" ..."):
        return _several(_value(form.removesuffix(" ...")))
    if form.endswith(",..."):
        return _pairs(*map(_value, form.removesuffix(",...").split(":")))
    return {"FACTOR": _NUMBER, "ITERATIONS": _NUMBER, "MULTIPLE": _NUMBER, "ENTRY": _ENTRY}.get(form, _NAME)


def _matching(pattern: str, allowed: str) -> _Value:
    return _Value(pattern, lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None, allowed)


_NAME = _matching(r"[A-Za-z_][A-Za-z0-9_.]*", "a name such as 'm0', of letters, digits, _ and .")
_ENTRY = _matching(r"[A-Za-z0-9_./%]+", "a name such as 'h' or 'c/16'")
_NUMBER = _Value(r"[0-9]{1,40}", lambda value: type(value) is int and 0 <= value <= GREATEST_NUMBER,
                 f"an integer of at most {GREATEST_NUMBER}, not negative", str, int)


def _several(one: _Value) -> _Value:
    """A tuple of some."""
    example = ("m0", "c") if one is _NAME else ("h", "c/16")
    return _Value(rf"{one.pattern}(?: {one.pattern})*",
                  lambda value: isinstance(value, tuple) and bool(value) and all(map(one.holds, value)),
                  f"a tuple of names such as {example}", " ".join, lambda text: tuple(text.split()))


def _pairs(entry: _Value, number: _Value) -> _Value:
    """A tuple of pairs, each entry once."""
    def holds(value: object) -> bool:
        return (isinstance(value, tuple) and bool(value)
                and all(isinstance(pair, tuple) and len(pair) == 2 and entry.holds(pair[0]) and number.holds(pair[1])
                        for pair in value)
                and len({pair[0] for pair in value}) == len(value))

    def read(text: str) -> tuple[tuple[str, int], ...]:
        return tuple((name, int(multiple)) for name, multiple in (pair.rsplit(":", 1) for pair in text.split(",")))

    one = f"{entry.pattern}:{number.pattern}"
    return _Value(f"{one}(?:,{one})*", holds,
                  f"a tuple of pairs such as ('h', 16), each entry once, of integers of at most {GREATEST_NUMBER}",
                  lambda value: ",".join(f"{name}:{multiple}" for name, multiple in value), read)
