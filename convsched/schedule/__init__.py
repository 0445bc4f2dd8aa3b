"""Schedules as data: steps, their text form, and their one interpreter."""

from convsched.schedule.attach import Attach
from convsched.schedule.fuse import Fuse
from convsched.schedule.inline import Inline
from convsched.schedule.layout import Layout
from convsched.schedule.parallel import Parallel
from convsched.schedule.parse import parse_schedule
from convsched.schedule.peel import Peel
from convsched.schedule.prefetch import Prefetch
from convsched.schedule.reorder import Reorder
from convsched.schedule.schedule import STEP_KINDS, STEPS, Schedule, apply
from convsched.schedule.skip import Skip
from convsched.schedule.split import Split, Tail
from convsched.schedule.stage import StageAt
from convsched.schedule.step import GREATEST_NUMBER, Step
from convsched.schedule.unroll import Unroll
from convsched.schedule.vectorize import Vectorize

__all__ = [
    "Attach", "Fuse", "GREATEST_NUMBER", "Inline", "Layout", "Parallel", "Peel", "Prefetch", "Reorder", "STEPS",
    "STEP_KINDS", "Schedule", "Skip", "Split", "StageAt", "Step", "Tail", "Unroll", "Vectorize", "apply",
    "parse_schedule",
]
