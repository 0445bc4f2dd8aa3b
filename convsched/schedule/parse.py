"""The text form of schedules, read."""

from __future__ import annotations

import re
from collections.abc import Callable

from convsched.errors import ScheduleError
from convsched.schedule.attach import Attach
from convsched.schedule.fuse import Fuse
from convsched.schedule.inline import Inline
from convsched.schedule.kinds import Parallel, Unroll, Vectorize
from convsched.schedule.layout import Layout
from convsched.schedule.peel import Peel
from convsched.schedule.prefetch import Prefetch
from convsched.schedule.reorder import Reorder
from convsched.schedule.schedule import Schedule, Step
from convsched.schedule.skip import Skip
from convsched.schedule.split import Split
from convsched.schedule.stage import StageAt
from convsched.schedule.step import _ENTRY, _NAME, _NAMES, _NUMBER

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
