"""How much a search may spend, how far it is, and what it found."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from convsched.autotune.store.record import Key, Record, Run
from convsched.autotune.workers.candidate import Outcome
from convsched.errors import ConvschedError
from convsched.problem import Problem
from convsched.schedule import Schedule


class TuneError(ConvschedError):
    """Tuning that cannot go on: a wrong budget, or a default that does not run."""


@dataclass(frozen=True)
class Budget:
    """Seconds, candidates, or both; ``parse`` takes "10s", "2m", "1h" or "100 candidates"."""

    seconds: float = float("inf")
    candidates: float = float("inf")

    @staticmethod
    def parse(text: str) -> Budget:
        """The budget of a text; raises TuneError."""
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|m|h|candidates?)\s*", text)
        if match is None:
            raise TuneError(f"budget {text!r}: write a time such as 10s, 2m or 1h, or 100 candidates")
        amount, unit = float(match[1]), match[2]
        if unit.startswith("c"):
            return Budget(candidates=amount)
        return Budget(seconds=amount * {"s": 1, "m": 60, "h": 3600}[unit])

    @property
    def is_spent(self) -> bool:
        return self.seconds <= 0 or self.candidates <= 0

    def __str__(self) -> str:
        return f"{self.seconds:g}s" if self.candidates == float("inf") else f"{self.candidates:g} candidates"


class Records(Protocol):
    """What the tuner needs of the schedule cache: to know what was measured, and to keep what it measures."""

    def records(self, key: Key) -> Iterable[Record]: ...

    def put(self, record: Record) -> object: ...

    def mark_run(self, key: Key, complete: bool, budget: str, tried: int, time: float) -> object: ...

    def run_of(self, key: Key) -> Run | None: ...


@dataclass(frozen=True)
class Progress:
    """Where a search stands after a candidate: its outcome, the best speed-up over the default, candidates
    tried and failed (those of earlier runs too), and what is left of the whole budget."""

    problem: Problem
    outcome: Outcome
    speed: float
    tried: int
    failed: int
    left: Budget


@dataclass(frozen=True)
class Tuned:
    """What tuning found: the schedule that the cache now gives, and its speed-up over the default, as timed in
    turn with it at the end. ``tried`` counts the candidates measured now, ``failures`` those known, by reason.
    """

    problem: Problem
    schedule: Schedule
    recipe: str
    speed: float
    default_seconds: float
    tried: int
    failures: Mapping[str, int]
    complete: bool

    @property
    def seconds(self) -> float:
        """A call with the best schedule."""
        return self.default_seconds / self.speed
