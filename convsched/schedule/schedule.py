"""Schedules are data: a tuple of frozen steps with a text form, a JSON form and one interpreter.

The text form is one step after another, separated by ``;``:

    split m 32 -> m0 m1 tail=mask; reorder m0 e c m1; fuse e f -> p; unroll m1; vectorize m2; parallel m0
    stage x at e window h c w align=h:16; layout w m0 c r s m1; attach epilogue at e; peel m0 last
    prefetch w at c0 ahead=16; inline i

``parse_schedule(schedule.text) == schedule`` for every schedule: a step checks its fields when it is made,
so that no object can say what no text says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import assert_never, get_args

from convsched.errors import ScheduleError
from convsched.ir import Program
from convsched.ir.simplify import simplify
from convsched.ir.verify import verify
from convsched.lazy import cached_property
from convsched.schedule.attach import Attach, attach
from convsched.schedule.checks import bounded, fail
from convsched.schedule.fuse import Fuse, fuse
from convsched.schedule.inline import Inline, inline
from convsched.schedule.kinds import Parallel, Unroll, Vectorize, _each, set_kind
from convsched.schedule.layout import Layout, layout
from convsched.schedule.peel import Peel, peel
from convsched.schedule.prefetch import Prefetch, prefetch
from convsched.schedule.reorder import Reorder, reorder
from convsched.schedule.skip import Skip, skip
from convsched.schedule.split import Split, split
from convsched.schedule.stage import StageAt, stage
from convsched.schedule.step import _shown

STEPS = 1000  # the most steps of a schedule; those of the recipes have up to 50


Step = (Split | Reorder | Fuse | Unroll | Vectorize | Parallel | StageAt | Layout | Attach | Inline | Peel | Skip
        | Prefetch)


@dataclass(frozen=True)
class Schedule:
    """Steps in the order they are applied.

    >>> from convsched.schedule.parse import parse_schedule
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
    scheduled = bounded(program, simplify(scheduled))
    verify(scheduled)
    return scheduled


def apply_step(program: Program, step: Step) -> Program:
    """The program after one step; not yet simplified."""
    match step:
        case Split():
            return split(program, step.loop, step.factor, step.outer, step.inner, step.tail)
        case Reorder():
            return reorder(program, step.loops)
        case Fuse():
            return fuse(program, step.first, step.second, step.fused)
        case Unroll():
            return _each(program, step.loops, "unroll")
        case Vectorize():
            return _each(program, step.loops, "vector")
        case Parallel():
            return set_kind(program, step.loop, "parallel")
        case StageAt():
            return stage(program, step.tensor, step.at, step.where, step.order, dict(step.align))
        case Layout():
            return layout(program, step.tensor, step.order)
        case Attach():
            return attach(program, step.stage, step.at)
        case Inline():
            return inline(program, step.tensor)
        case Skip():
            return skip(program, step.tensor, step.axes)
        case Prefetch():
            return prefetch(program, step.tensor, step.at, step.ahead)
        case Peel():
            return peel(program, step.loop, step.which)
        case _:
            assert_never(step)
