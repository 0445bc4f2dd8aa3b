"""Schedules as data: steps, their text form, and their one interpreter."""

from convsched.schedule.attach import Attach
from convsched.schedule.fuse import Fuse
from convsched.schedule.inline import Inline
from convsched.schedule.kinds import Parallel, Unroll, Vectorize
from convsched.schedule.layout import Layout
from convsched.schedule.parse import parse_schedule
from convsched.schedule.peel import Peel
from convsched.schedule.prefetch import Prefetch
from convsched.schedule.reorder import Reorder
from convsched.schedule.schedule import STEPS, Schedule, Step, apply, apply_step
from convsched.schedule.skip import Skip
from convsched.schedule.split import Split
from convsched.schedule.stage import StageAt
from convsched.schedule.step import MOST

__all__ = [
    "Attach", "Fuse", "Inline", "Layout", "MOST", "Parallel", "Peel", "Prefetch", "Reorder", "STEPS",
    "Schedule", "Skip", "Split", "StageAt", "Step", "Unroll", "Vectorize", "apply", "apply_step", "parse_schedule",
]
