"""Schedules are data: a tuple of frozen steps with a text form, a JSON form and one interpreter.

The text form is one step after another, separated by ``;``:

    split m 32 -> m0 m1 tail=mask; reorder m0 e c m1; fuse e f -> p; unroll m1; vectorize m2; parallel m0
    stage x at e window h c w align=h:16; layout w m0 c r s m1; attach epilogue at e; peel m0 last
    prefetch w at c0 ahead=16; inline i

``parse_schedule(schedule.text) == schedule`` for every schedule: a step checks its fields when it is made,
so that no object can say what no text says. Each step applies to every loop of the name it is given, in all stages and
in all copies that ``peel`` made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from convsched.errors import ScheduleError
from convsched.ir import Program
from convsched.ir.simplify import simplify
from convsched.ir.verify import verify
from convsched.lazy import cached_property
from convsched.schedule.attach import Attach
from convsched.schedule.checks import bounded, fail
from convsched.schedule.fuse import Fuse
from convsched.schedule.inline import Inline
from convsched.schedule.layout import Layout
from convsched.schedule.parallel import Parallel
from convsched.schedule.peel import Peel
from convsched.schedule.prefetch import Prefetch
from convsched.schedule.reorder import Reorder
from convsched.schedule.skip import Skip
from convsched.schedule.split import Split
from convsched.schedule.stage import StageAt
from convsched.schedule.step import Step, shown
from convsched.schedule.unroll import Unroll
from convsched.schedule.vectorize import Vectorize

STEPS = 1000  # the most steps of a schedule; those of the recipes have up to 50
STEP_KINDS: tuple[type[Step], ...] = (
    Split, Reorder, Fuse, Unroll, Vectorize, Parallel, StageAt, Layout, Attach, Inline, Peel, Skip, Prefetch)


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
            raise ScheduleError(f"Schedule({shown(self.steps)})", f"is a {type(self.steps).__name__}",
                                "give a tuple of steps; parse_schedule takes a text")
        for step in self.steps:
            if not isinstance(step, STEP_KINDS):
                raise ScheduleError(shown(step), "is not a step",
                                    f"use one of {', '.join(kind.__name__ for kind in STEP_KINDS)}")

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
        kinds: dict[str, Callable[..., Step]] = {kind.__name__: kind for kind in STEP_KINDS}
        if not isinstance(value, list | tuple) or not all(isinstance(item, dict) for item in value):
            raise ScheduleError(shown(value), "is not a schedule", "give a list of objects, one a step")
        made: list[Step] = []
        for item in value:
            kind = item.get("step")
            fields = {str(k): _tuples(v) for k, v in item.items() if k != "step"}
            if not isinstance(kind, str) or kind not in kinds:
                raise ScheduleError(shown(item), "is not a step", f"use one of {', '.join(kinds)}")
            try:
                made.append(kinds[kind](**fields))
            except TypeError as error:
                raise ScheduleError(shown(item), f"is not a step ({error})", f"give the fields of {kind}") from None
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
        scheduled = step.apply(scheduled)
    scheduled = bounded(program, simplify(scheduled))
    verify(scheduled)
    return scheduled
