"""What a recipe is: parameters that make a schedule for a problem."""

from __future__ import annotations

from dataclasses import Field, dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from convsched.problem import Problem
from convsched.schedule import Peel, Schedule, Split, Step


class Recipe(Protocol):
    """A frozen dataclass of parameters that writes a schedule."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def name(self) -> str:
        """The same whatever the parameters."""

    def schedule(self, problem: Problem, layout: str = "nchw") -> Schedule:
        """The steps for a problem, with activations stored as ``layout`` says."""


@runtime_checkable
class BlockRecipe(Recipe, Protocol):
    """A recipe that takes a ``block`` of a layer through all stages at a time, with a register tile of ``vectors`` by
    ``pixels``, and ``unroll`` channels written out: it is searched around an algorithm's default."""

    @property
    def block(self) -> int:
        """Rows of pixels or of tiles, or pixels."""

    def blocks(self, problem: Problem) -> tuple[int, ...]:
        """The values of ``block`` worth trying for a problem."""


def divisors(count: int) -> tuple[int, ...]:
    """All of them, in ascending order."""
    return tuple(part for part in range(1, count + 1) if count % part == 0)


@dataclass(frozen=True)
class Axis:
    """A loop cut into parts: the parts' names from the outermost in, and the steps that cut it."""

    names: tuple[str, ...]
    steps: tuple[Step, ...]

    @staticmethod
    def cut(loop: str, extent: int, *factors: int) -> Axis:
        """Parts of ``factors`` iterations each, the greatest first: ``cut("m", 256, 32, 16)`` gives the
        loops m0 (of 32), m1 (of 16) and m2. A remainder is masked, and its last iteration peeled later."""
        names, steps, rest, size = [], [], loop, extent
        for level, factor in enumerate(factors):
            outer, last = f"{loop}{level}", level == len(factors) - 1
            inner = f"{loop}{level + 1}" if last else f"{loop}_{level + 1}"
            steps.append(Split(rest, factor, outer, inner, "mask" if size % factor else "none"))
            names.append(outer)
            rest, size = inner, factor
        return Axis((*names, rest), tuple(steps))

    def peels(self, extent: int, *factors: int) -> tuple[Step, ...]:
        """A peel of each part whose last iteration is ragged."""
        return tuple(Peel(self.names[level]) for level, factor in enumerate(factors) if extent % factor)
