"""What is asked for: a problem, for a machine, in a layout, on a number of threads."""

from __future__ import annotations

from dataclasses import dataclass

from convsched.machine import Machine
from convsched.options import Accuracy
from convsched.problem import Problem


@dataclass(frozen=True)
class Target:
    """What is compiled: a problem, for a machine, in a layout, on a number of threads, by algorithms that fit a
    class of accuracy, or by one ``algorithm``."""

    problem: Problem
    machine: Machine
    layout: str = "nchw"
    threads: int = 1
    accuracy: Accuracy = "normal"
    algorithm: str | None = None
