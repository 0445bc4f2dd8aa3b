"""Which of several records is best: ties go to less workspace, then to the simpler schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from convsched.autotune.store.record import REGIMES, CacheError, Record, Regime

TIE_FRACTION = 0.02  # times closer than this fraction are equal: the noise of a good measurement


class Contender(NamedTuple):
    """What the choice between candidates depends on: seconds a call, bytes of workspace, schedule text."""

    seconds: float
    workspace: int
    schedule: str


def winner(contenders: Sequence[Contender], default: float = math.inf) -> int:
    """Which of the contenders, at least one, is the best: its index. `default`: the default's seconds.

    Times within 2% of the least are equal; a time above the default's never is. Of the equal ones the one
    with the least workspace wins, then the simplest schedule: the shortest text, the first in the alphabet.
    So the same measurements give the same choice in every process.
    """
    least = min(contender.seconds for contender in contenders)
    limit = max(least, min(least * (1 + TIE_FRACTION), default))
    tied = (i for i, contender in enumerate(contenders) if contender.seconds <= limit)
    return min(tied, key=lambda i: (contenders[i].workspace, len(contenders[i].schedule), contenders[i].schedule))


def choose(candidates: Iterable[Record], regime: Regime = "hot") -> Record | None:
    """The best of a key's candidates that gave the right answer, as `winner` has it; None without any."""
    if regime not in REGIMES:
        raise CacheError(f"regime={regime!r}: use one of {', '.join(REGIMES)}")
    timed = [(seconds, candidate) for candidate in candidates
             if candidate.status == "ok" and (seconds := getattr(candidate, regime)) is not None]  # fmt: skip
    if not timed:
        return None
    timed.sort(key=lambda pair: pair[1].algorithm)  # of two that are equal in all else, in whatever order they came
    defaults = [seconds for seconds, candidate in timed if candidate.is_default]
    contenders = [Contender(seconds, one.workspace, one.schedule) for seconds, one in timed]
    return timed[winner(contenders, min(defaults, default=math.inf))][1]
