"""The text form of schedules, read."""

from __future__ import annotations

import re

from convsched.errors import ScheduleError
from convsched.schedule.schedule import STEP_KINDS, Schedule
from convsched.schedule.step import Step, verb_of

_BY_VERB = {verb_of(kind): kind for kind in STEP_KINDS}


def parse_schedule(text: str) -> Schedule:
    """The schedule of a text form; steps are separated by ``;`` or line ends. Raises ScheduleError."""
    lines = (" ".join(line.split()) for line in re.split(r"[;\n]", text))
    return Schedule(tuple(_parse_step(words) for words in lines if words))


def _parse_step(words: str) -> Step:
    kind = _BY_VERB.get(words.split()[0])
    if kind is None:
        raise ScheduleError(words, "is not a step", f"use one of {', '.join(_BY_VERB)}")
    return kind.parse(words)
