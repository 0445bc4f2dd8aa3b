"""What is asked for, and what was chosen: the values that the rest of the house hands on.

``Target`` is for what code is made; ``Plan`` is a problem, the algorithm and the schedule that compute it there;
``ProgramPlan`` is a program that was written by hand, and a schedule. Limits of
a single request, such as of memory, or to one algorithm, are not part of any of them: they narrow the choice, and
change nothing of what was chosen.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

from convsched.ir import Program
from convsched.lazy import cached_property
from convsched.machine import Machine
from convsched.options import Accuracy
from convsched.plan.families import Algorithm
from convsched.problem import Problem
from convsched.recipes.recipe import Recipe
from convsched.schedule import Schedule, apply


@dataclass(frozen=True)
class Target:
    """For what code is made: a machine, the layout of activations, the number of threads and the class of error that
    algorithms may have."""

    machine: Machine
    layout: str = "nchw"
    threads: int = 1
    accuracy: Accuracy = "normal"

    @property
    def text(self) -> str:
        """The layout, the threads and the accuracy, for people."""
        return f"{self.layout}, {self.threads} thread{'s' * (self.threads != 1)}, {self.accuracy}"


class _Planned:
    """What both kinds of plan share: a ``target``, and pickles that hold no program: it is made again where needed."""

    target: Target

    def on(self, machine: Machine) -> Self:
        """The same plan for another machine."""
        return replace(self, target=replace(self.target, machine=machine))  # type: ignore[type-var]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, each.name) for each in fields(self))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Plan(_Planned):
    """A problem, and how it is computed for a target. ``recipe`` made the schedule, if known; ``origin`` says where
    another schedule comes from. Both only explain: plans of the same problem, target, algorithm and steps are equal."""

    problem: Problem
    target: Target
    algorithm: Algorithm
    schedule: Schedule
    recipe: Recipe | None = field(default=None, compare=False)
    origin: str = field(default="", compare=False)

    @staticmethod
    def of(algorithm: Algorithm, target: Target, recipe: Recipe | None = None) -> Plan:
        """What a recipe makes; the algorithm's default, for which nothing was measured, unless one is given."""
        if recipe is None:
            recipe = algorithm.default(target.machine, target.layout, target.threads)
        problem = algorithm.problem
        return Plan(problem, target, algorithm, recipe.schedule(problem, target.layout), recipe)

    @cached_property
    def program(self) -> Program:
        """The scheduled program. Raises ScheduleError where the schedule does not fit."""
        return apply(self.algorithm.lower(self.target.layout), self.schedule)

    @property
    def object_key(self) -> tuple[str, ...]:
        """All of the plan that its machine code depends on."""
        target = self.target
        return (repr(self.problem), self.algorithm.name, self.schedule.text, target.layout, repr(target.machine))

    @property
    def text(self) -> str:
        """The plan in one line, for people."""
        return f"{self.problem.text} | {self.target.text} | {self.algorithm.name} | {self.schedule.text}"


@dataclass(frozen=True)
class ProgramPlan(_Planned):
    """A bare program, such as a nest written by hand, and how it is scheduled for a target. The layout is that of its
    tensors, and its errors those of its own sums: the target tells the machine and the threads."""

    source: Program
    target: Target
    schedule: Schedule

    @cached_property
    def program(self) -> Program:
        """The scheduled program. Raises ScheduleError where the schedule does not fit."""
        return apply(self.source, self.schedule)

    @property
    def object_key(self) -> tuple[str, ...]:
        """All of the plan that its machine code depends on."""
        return (repr(self.source), self.schedule.text, repr(self.target.machine))

    @property
    def text(self) -> str:
        """The plan in one line, for people."""
        return f"{self.source.name} | {self.target.text} | {self.schedule.text}"
