"""Schedules are data: a tuple of frozen steps with a text form, a JSON form and one interpreter.

The text form is one step after another, separated by ``;``:

    split m 32 -> m0 m1 tail=mask; reorder m0 e c m1; fuse e f -> p; unroll m1; vectorize m2; parallel m0
    stage x at e window h c w align=h:16; layout w m0 c r s m1; attach epilogue at e; peel m0 last
    prefetch w at c0 ahead=16; inline i

``parse_schedule(schedule.text) == schedule`` for every schedule: a step checks its fields when it is made,
so that no object can say what no text says.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal, assert_never, get_args

from convsched import fusing, inlining, peeling, placement, prefetching, skipping, steps
from convsched.checks import bounded, fail
from convsched.errors import ScheduleError
from convsched.ir import Program
from convsched.lazy import cached_property
from convsched.peeling import Which
from convsched.placement import Where
from convsched.steps import Tail
from convsched.verify import verify

MOST = 2**31 - 1  # the greatest number in a step: sizes of loops and strides made of it fit 64-bit addresses
STEPS = 1000  # the most steps of a schedule; those of the recipes have up to 50

_NAME = r"[A-Za-z_][A-Za-z0-9_.]*"
_NAMES = rf"{_NAME}(?: {_NAME})*"
_ENTRY = r"[A-Za-z0-9_./%]+"
_NUMBER = r"[0-9]{1,40}"


def _is_name(value: object, pattern: str = _NAME) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _is_number(value: object) -> bool:
    return type(value) is int and 0 <= value <= MOST


def _is_order(value: object) -> bool:
    return isinstance(value, tuple) and all(_is_name(entry, _ENTRY) for entry in value)


def _is_align(value: object) -> bool:
    return (isinstance(value, tuple)
            and all(isinstance(pair, tuple) and len(pair) == 2 and _is_name(pair[0], _ENTRY) and _is_number(pair[1])
                    for pair in value)
            and len({entry for entry, _ in value}) == len(value))


def _one_of(*words: str) -> _Rule:
    return (lambda value: isinstance(value, str) and value in words), f"one of {', '.join(words)}"


_Rule = tuple[Callable[[object], bool], str]  # whether a field may have a value, and what it may have
_A_NAME: _Rule = (_is_name, "a name such as 'm0', of letters, digits, _ and .")
_SEVERAL: _Rule = (lambda v: isinstance(v, tuple) and bool(v) and all(map(_is_name, v)),
                   "a tuple of names such as ('m0', 'c')")
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(("loop", "outer", "inner", "first", "second", "fused", "tensor", "at", "stage"), _A_NAME),
    **dict.fromkeys(("factor", "ahead"), (_is_number, f"an integer of at most {MOST}, not negative")),
    **dict.fromkeys(("loops", "axes"), _SEVERAL),
    "Layout.order": (lambda v: bool(v) and _is_order(v), "a tuple of names such as ('m0', 'c') or ('c/16', 'c%16')"),
    "StageAt.order": (_is_order, "a tuple of names such as ('h', 'c/16')"),
    "align": (_is_align, f"a tuple of pairs such as ('h', 16), each entry once, of integers of at most {MOST}"),
    "tail": _one_of(*get_args(Tail)),
    "where": _one_of(*get_args(Where)),
    "which": _one_of(*get_args(Which)),
}


class _Checked:
    """Raises ScheduleError where a step is made with a field that its text could not say."""

    __dataclass_fields__: ClassVar[dict[str, object]]

    def __post_init__(self) -> None:
        for field in self.__dataclass_fields__:
            own = f"{type(self).__name__}.{field}"
            is_allowed, allowed = _RULES[own if own in _RULES else field]
            value = getattr(self, field)
            if not is_allowed(value):
                raise ScheduleError(f"{type(self).__name__}({field}={_shown(value)})", "is no step",
                                    f"{field} is {allowed}")


def _shown(value: object) -> str:
    """A value, shortened; an integer of thousands of digits has no decimal form."""
    try:
        return reprlib.repr(value)
    except ValueError:
        return type(value).__name__


@dataclass(frozen=True)
class Split(_Checked):
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
class Reorder(_Checked):
    """Permute loops; see ``steps.reorder``."""

    loops: tuple[str, ...]

    def __str__(self) -> str:
        return f"reorder {' '.join(self.loops)}"


@dataclass(frozen=True)
class Fuse(_Checked):
    """One loop of two; see ``fusing.fuse``."""

    first: str
    second: str
    fused: str

    def __str__(self) -> str:
        return f"fuse {self.first} {self.second} -> {self.fused}"


@dataclass(frozen=True)
class Unroll(_Checked):
    """Write out the iterations of loops; see ``steps.set_kind``."""

    loops: tuple[str, ...]

    def __str__(self) -> str:
        return f"unroll {' '.join(self.loops)}"


@dataclass(frozen=True)
class Vectorize(_Checked):
    """Run loops as vector instructions; see ``steps.set_kind``."""

    loops: tuple[str, ...]

    def __str__(self) -> str:
        return f"vectorize {' '.join(self.loops)}"


@dataclass(frozen=True)
class Parallel(_Checked):
    """Divide a loop among the threads; see ``steps.set_kind``."""

    loop: str

    def __str__(self) -> str:
        return f"parallel {self.loop}"


@dataclass(frozen=True)
class StageAt(_Checked):
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
class Layout(_Checked):
    """A weight packed in the order of use; see ``placement.layout``."""

    tensor: str
    order: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(["layout", self.tensor, *self.order])


@dataclass(frozen=True)
class Attach(_Checked):
    """A stage computed inside a loop of its neighbour; see ``steps.attach``."""

    stage: str
    at: str

    def __str__(self) -> str:
        return f"attach {self.stage} at {self.at}"


@dataclass(frozen=True)
class Inline(_Checked):
    """Read what a stage copies into ``tensor`` where it lies; see ``inlining.inline``."""

    tensor: str

    def __str__(self) -> str:
        return f"inline {self.tensor}"


@dataclass(frozen=True)
class Peel(_Checked):
    """An own copy of the nest for the first or last iteration; see ``peeling.peel``."""

    loop: str
    which: Which = "last"

    def __str__(self) -> str:
        return f"peel {self.loop} {self.which}"


@dataclass(frozen=True)
class Skip(_Checked):
    """Leave out products with the border of ``tensor`` along ``axes``; see ``skipping.skip``."""

    tensor: str
    axes: tuple[str, ...]

    def __str__(self) -> str:
        return f"skip {self.tensor} {' '.join(self.axes)}"


@dataclass(frozen=True)
class Prefetch(_Checked):
    """Fetch what ``tensor`` gives ``ahead`` iterations later; see ``prefetching.prefetch``."""

    tensor: str
    at: str
    ahead: int

    def __str__(self) -> str:
        return f"prefetch {self.tensor} at {self.at} ahead={self.ahead}"


Step = (Split | Reorder | Fuse | Unroll | Vectorize | Parallel | StageAt | Layout | Attach | Inline | Peel | Skip
        | Prefetch)


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

    def __post_init__(self) -> None:
        if not isinstance(self.steps, tuple):
            raise ScheduleError(f"Schedule({_shown(self.steps)})", f"is a {type(self.steps).__name__}",
                                "give a tuple of steps; parse_schedule takes a text")
        for step in self.steps:
            if not isinstance(step, Step):
                raise ScheduleError(_shown(step), "is no step",
                                    f"use {', '.join(kind.__name__ for kind in get_args(Step))}")

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
        kinds: dict[str, Callable[..., Step]] = {kind.__name__: kind for kind in get_args(Step)}
        if not isinstance(value, list | tuple) or not all(isinstance(item, dict) for item in value):
            raise ScheduleError(_shown(value), "is no schedule", "give a list of objects, one a step")
        made: list[Step] = []
        for item in value:
            kind = item.get("step")
            fields = {str(k): _tuples(v) for k, v in item.items() if k != "step"}
            if not isinstance(kind, str) or kind not in kinds:
                raise ScheduleError(_shown(item), "is no step", f"use {', '.join(kinds)}")
            try:
                made.append(kinds[kind](**fields))
            except TypeError as error:
                raise ScheduleError(_shown(item), f"is no step ({error})", f"give the fields of {kind}") from None
        return Schedule(tuple(made))


def _tuples(value: object) -> object:
    """The lists of a field as tuples: those of ``align`` hold lists."""
    if not isinstance(value, list):
        return value
    return tuple(tuple(v) if isinstance(v, list) else v for v in value)


def apply(program: Program, schedule: Schedule) -> Program:
    """The scheduled program, verified. Raises ScheduleError at the first step that does not fit, or where the
    code would not end: see the limits in ``checks``."""
    if len(schedule.steps) > STEPS:
        raise fail(program, "schedule", f"has {len(schedule.steps)} steps", f"use at most {STEPS}")
    scheduled = program
    for step in schedule.steps:
        scheduled = apply_step(scheduled, step)
    scheduled = bounded(program, peeling.simplify(scheduled))
    verify(scheduled)
    return scheduled


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
        case Inline():
            return inlining.inline(program, step.tensor)
        case Skip():
            return skipping.skip(program, step.tensor, step.axes)
        case Prefetch():
            return prefetching.prefetch(program, step.tensor, step.at, step.ahead)
        case Peel():
            return peeling.peel(program, step.loop, step.which)
        case _:
            assert_never(step)


def _each(program: Program, loops: tuple[str, ...], kind: Literal["unroll", "vector"]) -> Program:
    for loop in loops:
        program = steps.set_kind(program, loop, kind)
    return program


_ENTRIES = rf"{_ENTRY}(?: {_ENTRY})*"
_FORMS: tuple[tuple[str, str, Callable[[dict[str, str]], Step]], ...] = (
    ("split LOOP FACTOR -> OUTER INNER [tail=mask|peel|overlap]",
     rf"split (?P<loop>{_NAME}) (?P<factor>{_NUMBER}) -> (?P<outer>{_NAME}) (?P<inner>{_NAME})"
     r"(?: tail=(?P<tail>mask|peel|overlap))?",
     lambda m: Split(m["loop"], int(m["factor"]), m["outer"], m["inner"], m["tail"] or "none")),  # type: ignore[arg-type]
    ("reorder LOOP ...", rf"reorder (?P<loops>{_NAMES})", lambda m: Reorder(tuple(m["loops"].split()))),
    ("fuse FIRST SECOND -> FUSED",
     rf"fuse (?P<first>{_NAME}) (?P<second>{_NAME}) -> (?P<fused>{_NAME})",
     lambda m: Fuse(m["first"], m["second"], m["fused"])),
    ("unroll LOOP ...", rf"unroll (?P<loops>{_NAMES})", lambda m: Unroll(tuple(m["loops"].split()))),
    ("vectorize LOOP ...", rf"vectorize (?P<loops>{_NAMES})", lambda m: Vectorize(tuple(m["loops"].split()))),
    ("parallel LOOP", rf"parallel (?P<loop>{_NAME})", lambda m: Parallel(m["loop"])),
    ("stage TENSOR at LOOP registers|buffer|window|packed [ORDER ...] [align=ENTRY:MULTIPLE,...]",
     rf"stage (?P<tensor>{_NAME}) at (?P<at>{_NAME}) (?P<where>registers|buffer|window|packed)"
     rf"(?: (?P<order>{_ENTRIES}))?(?: align=(?P<align>{_ENTRY}:{_NUMBER}(?:,{_ENTRY}:{_NUMBER})*))?",
     lambda m: StageAt(m["tensor"], m["at"], m["where"], tuple((m["order"] or "").split()),  # type: ignore[arg-type]
                       _parse_align(m["align"] or ""))),
    ("layout TENSOR LOOP ...", rf"layout (?P<tensor>{_NAME}) (?P<order>{_ENTRIES})",
     lambda m: Layout(m["tensor"], tuple(m["order"].split()))),
    ("attach STAGE at LOOP", rf"attach (?P<stage>{_NAME}) at (?P<at>{_NAME})",
     lambda m: Attach(m["stage"], m["at"])),
    ("inline TENSOR", rf"inline (?P<tensor>{_NAME})", lambda m: Inline(m["tensor"])),
    ("skip TENSOR AXIS ...", rf"skip (?P<tensor>{_NAME}) (?P<axes>{_NAMES})",
     lambda m: Skip(m["tensor"], tuple(m["axes"].split()))),
    ("prefetch TENSOR at LOOP ahead=ITERATIONS",
     rf"prefetch (?P<tensor>{_NAME}) at (?P<at>{_NAME}) ahead=(?P<ahead>{_NUMBER})",
     lambda m: Prefetch(m["tensor"], m["at"], int(m["ahead"]))),
    ("peel LOOP [first|last|guarded|overlap]", rf"peel (?P<loop>{_NAME})(?: (?P<which>first|last|guarded|overlap))?",
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
