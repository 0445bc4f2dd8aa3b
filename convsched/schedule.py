"""Schedules are data: a tuple of frozen steps with a text form, a JSON form and one interpreter.

The text form is one step after another, separated by ``;``:

    split m 32 -> m0 m1 tail=mask; reorder m0 e c m1; fuse e f -> p; unroll m1; vectorize m2; parallel m0
    stage x at e window h c w align=h:16; layout w m0 c r s m1; attach epilogue at e; peel m0 last

``parse_schedule(schedule.text) == schedule`` for every schedule.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal, assert_never

from convsched import fusing, peeling, placement, steps
from convsched.errors import ScheduleError
from convsched.ir import Program
from convsched.peeling import Which
from convsched.placement import Where
from convsched.steps import Tail
from convsched.verify import verify


@dataclass(frozen=True)
class Split:
    """``loop = factor * outer + inner``; see ``steps.split``."""

    loop: str
    factor: int
    outer: str
    inner: str
    tail: Tail = "none"

    def __str__(self) -> str:
        tail = "" if self.tail == "none" else f" tail={self.tail}"
        return f"split {self.loop} {self.factor} -> {self.outer} {self.inner}{tail}"


@dataclass(frozen=True)
class Reorder:
    """Permute loops; see ``steps.reorder``."""

    loops: tuple[str, ...]

    def __str__(self) -> str:
        return f"reorder {' '.join(self.loops)}"


@dataclass(frozen=True)
class Fuse:
    """One loop of two; see ``fusing.fuse``."""

    first: str
    second: str
    fused: str

    def __str__(self) -> str:
        return f"fuse {self.first} {self.second} -> {self.fused}"


@dataclass(frozen=True)
class Unroll:
    """Write out the iterations of loops; see ``steps.set_kind``."""

    loops: tuple[str, ...]

    def __str__(self) -> str:
        return f"unroll {' '.join(self.loops)}"


@dataclass(frozen=True)
class Vectorize:
    """Run loops as vector instructions; see ``steps.set_kind``."""

    loops: tuple[str, ...]

    def __str__(self) -> str:
        return f"vectorize {' '.join(self.loops)}"


@dataclass(frozen=True)
class Parallel:
    """Divide a loop among the threads; see ``steps.set_kind``."""

    loop: str

    def __str__(self) -> str:
        return f"parallel {self.loop}"


@dataclass(frozen=True)
class StageAt:
    """A buffer for part of a tensor; see ``placement.stage``."""

    tensor: str
    at: str
    where: Where
    order: tuple[str, ...] = ()
    align: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        align = " align=" + ",".join(f"{k}:{v}" for k, v in self.align) if self.align else ""
        return " ".join(["stage", self.tensor, "at", self.at, self.where, *self.order]) + align


@dataclass(frozen=True)
class Layout:
    """A weight packed in the order of use; see ``placement.layout``."""

    tensor: str
    order: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(["layout", self.tensor, *self.order])


@dataclass(frozen=True)
class Attach:
    """A stage computed inside a loop of its neighbour; see ``steps.attach``."""

    stage: str
    at: str

    def __str__(self) -> str:
        return f"attach {self.stage} at {self.at}"


@dataclass(frozen=True)
class Peel:
    """An own copy of the nest for the first or last iteration; see ``peeling.peel``."""

    loop: str
    which: Which = "last"

    def __str__(self) -> str:
        return f"peel {self.loop} {self.which}"


Step = Split | Reorder | Fuse | Unroll | Vectorize | Parallel | StageAt | Layout | Attach | Peel


@dataclass(frozen=True)
class Schedule:
    """Steps in the order they are applied.

    >>> schedule = parse_schedule("split m 32 -> m0 m1; vectorize m1")
    >>> schedule.steps[0]
    Split(loop='m', factor=32, outer='m0', inner='m1', tail='none')
    >>> parse_schedule(schedule.text) == schedule == Schedule.from_json(schedule.to_json())
    True
    """

    steps: tuple[Step, ...] = ()

    @cached_property
    def text(self) -> str:
        """The one-line text form."""
        return "; ".join(str(step) for step in self.steps)

    def __str__(self) -> str:
        return self.text

    def to_json(self) -> list[dict[str, object]]:
        """A JSON value: one object a step, the step's name under "step"."""
        return [{"step": type(step).__name__, **asdict(step)} for step in self.steps]

    @staticmethod
    def from_json(value: Sequence[dict[str, object]]) -> Schedule:
        """The schedule of a JSON value; raises ScheduleError where it is none."""
        kinds: dict[str, Callable[..., Step]] = {kind.__name__: kind for kind in Step.__args__}
        if not isinstance(value, list | tuple) or not all(isinstance(item, dict) for item in value):
            raise ScheduleError(str(value), "is no schedule", "give a list of objects, one a step")
        made: list[Step] = []
        for item in value:
            fields = {str(k): _tuples(v) for k, v in item.items() if k != "step"}
            try:
                step = kinds[str(item.get("step"))](**fields)
                is_step = parse_schedule(str(step)).steps == (step,)
            except (KeyError, TypeError, ValueError) as error:
                raise ScheduleError(str(item), f"is no step ({error})", f"use {', '.join(kinds)}") from None
            if not is_step:
                raise ScheduleError(str(item), "is no step: its text would be another's", "check its fields")
            made.append(step)
        return Schedule(tuple(made))


def _tuples(value: object) -> object:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def apply(program: Program, schedule: Schedule) -> Program:
    """The scheduled program, verified. Raises ScheduleError at the first step that does not fit."""
    for step in schedule.steps:
        program = apply_step(program, step)
    program = peeling.simplify(program)
    verify(program)
    return program


def apply_step(program: Program, step: Step) -> Program:
    """The program after one step; not yet simplified."""
    match step:
        case Split():
            return steps.split(program, step.loop, step.factor, step.outer, step.inner, step.tail)
        case Reorder():
            return steps.reorder(program, step.loops)
        case Fuse():
            return fusing.fuse(program, step.first, step.second, step.fused)
        case Unroll():
            return _each(program, step.loops, "unroll")
        case Vectorize():
            return _each(program, step.loops, "vector")
        case Parallel():
            return steps.set_kind(program, step.loop, "parallel")
        case StageAt():
            return placement.stage(program, step.tensor, step.at, step.where, step.order, dict(step.align))
        case Layout():
            return placement.layout(program, step.tensor, step.order)
        case Attach():
            return steps.attach(program, step.stage, step.at)
        case Peel():
            return peeling.peel(program, step.loop, step.which)
        case _:
            assert_never(step)


def _each(program: Program, loops: tuple[str, ...], kind: Literal["unroll", "vector"]) -> Program:
    for loop in loops:
        program = steps.set_kind(program, loop, kind)
    return program


_NAME = r"[A-Za-z_][\w.]*"
_NAMES = rf"{_NAME}(?: {_NAME})*"
_ENTRIES = r"[\w./%]+(?: [\w./%]+)*"
_FORMS: tuple[tuple[str, str, Callable[[dict[str, str]], Step]], ...] = (
    ("split LOOP FACTOR -> OUTER INNER [tail=mask|peel|overlap]",
     rf"split (?P<loop>{_NAME}) (?P<factor>\d+) -> (?P<outer>{_NAME}) (?P<inner>{_NAME})"
     r"(?: tail=(?P<tail>mask|peel|overlap))?",
     lambda m: Split(m["loop"], int(m["factor"]), m["outer"], m["inner"], m["tail"] or "none")),  # type: ignore[arg-type]
    ("reorder LOOP ...", rf"reorder (?P<loops>{_NAMES})", lambda m: Reorder(tuple(m["loops"].split()))),
    ("fuse FIRST SECOND -> FUSED",
     rf"fuse (?P<first>{_NAME}) (?P<second>{_NAME}) -> (?P<fused>{_NAME})",
     lambda m: Fuse(m["first"], m["second"], m["fused"])),
    ("unroll LOOP ...", rf"unroll (?P<loops>{_NAMES})", lambda m: Unroll(tuple(m["loops"].split()))),
    ("vectorize LOOP ...", rf"vectorize (?P<loops>{_NAMES})", lambda m: Vectorize(tuple(m["loops"].split()))),
    ("parallel LOOP", rf"parallel (?P<loop>{_NAME})", lambda m: Parallel(m["loop"])),
    ("stage TENSOR at LOOP registers|window|packed [ORDER ...] [align=ENTRY:MULTIPLE,...]",
     rf"stage (?P<tensor>{_NAME}) at (?P<at>{_NAME}) (?P<where>registers|window|packed)"
     rf"(?: (?P<order>{_ENTRIES}))?(?: align=(?P<align>\S+:\d+(?:,\S+:\d+)*))?",
     lambda m: StageAt(m["tensor"], m["at"], m["where"], tuple((m["order"] or "").split()),  # type: ignore[arg-type]
                       _parse_align(m["align"] or ""))),
    ("layout TENSOR LOOP ...", rf"layout (?P<tensor>{_NAME}) (?P<order>{_NAMES})",
     lambda m: Layout(m["tensor"], tuple(m["order"].split()))),
    ("attach STAGE at LOOP", rf"attach (?P<stage>{_NAME}) at (?P<at>{_NAME})",
     lambda m: Attach(m["stage"], m["at"])),
    ("peel LOOP [first|last|overlap]", rf"peel (?P<loop>{_NAME})(?: (?P<which>first|last|overlap))?",
     lambda m: Peel(m["loop"], m["which"] or "last")),  # type: ignore[arg-type]
)


def _parse_align(text: str) -> tuple[tuple[str, int], ...]:
    pairs = [part.rsplit(":", 1) for part in text.split(",") if part]
    return tuple((entry, int(multiple)) for entry, multiple in pairs)


def parse_schedule(text: str) -> Schedule:
    """The schedule of a text form; steps are separated by ``;`` or line ends. Raises ScheduleError."""
    made = []
    for line in re.split(r"[;\n]", text):
        words = " ".join(line.split())
        if words:
            made.append(_parse_step(words))
    return Schedule(tuple(made))


def _parse_step(words: str) -> Step:
    for _, pattern, make in _FORMS:
        if match := re.fullmatch(pattern, words):
            return make(match.groupdict())
    verb = words.split()[0]
    usage = [form for form, _, _ in _FORMS if form.split()[0] == verb]
    fix = f"write {usage[0]}" if usage else f"use one of {', '.join(f.split()[0] for f, _, _ in _FORMS)}"
    raise ScheduleError(words, "is no step", fix)
