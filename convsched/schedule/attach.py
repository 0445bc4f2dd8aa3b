"""``attach``: compute a stage inside a loop of its neighbour."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace

from convsched.ir import Block, Body, Let, Loop, Program, Stage, find_loops, holding
from convsched.schedule.checks import checked, fail, require_loop
from convsched.schedule.legality import accesses, separated
from convsched.schedule.step import Step


@dataclass(frozen=True)
class Attach(Step):
    """Compute a stage inside a loop of the stage beside it, iteration by iteration.

    >>> from convsched.ir.examples import filtered, nests
    >>> print(nests(filtered(8, 3)))
    init:
      for f < 8:
        t[f] = 0
    conv:
      for f < 8: for s < 3:
        t[f] += x[f + s] * w[s]
    epilogue:
      for f < 8:
        y[f] = max(0, t[f])
    >>> print(nests(Attach("epilogue", "f").apply(Attach("init", "f").apply(filtered(8, 3)))))
    conv:
      for f < 8:
        t[f] = 0
        for s < 3:
          t[f] += x[f + s] * w[s]
        y[f] = max(0, t[f])

    The stage joins the next one if that has the loop, else the one before; both have the same loops from
    the outermost down to ``at``.
    """

    GRAMMAR = "attach STAGE at LOOP"
    stage: str
    at: str

    def apply(self, program: Program) -> Program:
        require_loop(program, self, self.at)
        first = self._first_of_two(program)
        before, after = program.stages[first], program.stages[first + 1]
        if before.when != after.when:
            raise fail(program, self, f"{before.name} and {after.name} run at different times", "leave the step out",
                           self.at)
        host = after.name if before.name == self.stage else before.name
        body = self._merged(program, (before, after), before.body, after.body, _apart(before, after))
        joined = Stage(host, body, before.when)
        return checked(program, self, replace(
            program, stages=(*program.stages[:first], joined, *program.stages[first + 2:])))

    def _first_of_two(self, program: Program) -> int:
        """The place of the stage or of its neighbour, whichever comes first."""
        names = [found.name for found in program.stages]
        if self.stage not in names:
            raise fail(program, self, f"there is no stage {self.stage}", f"use one of {', '.join(names)}", self.at)
        place = names.index(self.stage)
        if not find_loops(program.stages[place].body, self.at):
            raise fail(program, self, f"stage {self.stage} has no loop {self.at}",
                       "choose an outer loop that both have", self.at)
        for other in (place + 1, place - 1):
            if 0 <= other < len(names) and find_loops(program.stages[other].body, self.at):
                return min(place, other)
        raise fail(program, self, f"no stage beside {self.stage} has the loop {self.at}", "choose another loop",
                   self.at)

    def _merged(self, program: Program, stages: tuple[Stage, Stage], a: Body, b: Body,
                apart: Mapping[str, Set[str]]) -> Body:
        """The loops of both bodies as one, down to ``at``."""
        if len(a) != 1 or len(b) != 1 or not isinstance(a[0], Block) or not isinstance(b[0], Block):
            raise fail(program, self, f"the loops above {self.at} are not perfectly nested", "attach earlier",
                       self.at)
        x, y = a[0], b[0]
        if _header(x) != _header(y):
            raise fail(program, self, f"{stages[0].name} has {x.kind} {x.var} < {x.extent} where {stages[1].name} "
                       f"has {y.kind} {y.var} < {y.extent}", "give both the same outer loops", self.at)
        tensor = next((name for name, variables in apart.items() if x.iterations > 1 and x.var not in variables), None)
        if tensor is not None:
            raise fail(program, self, f"iterations of {x.var} depend on each other through {tensor}",
                       "attach outside the loops that sum", self.at)
        body = x.body + y.body if x.var == self.at else self._merged(program, stages, x.body, y.body, apart)
        return (holding(x, body),)


def _header(block: Loop | Let) -> tuple[object, ...]:
    """All of a loop or value but what is inside and the hints."""
    of = (block.of, block.step) if isinstance(block, Let) else ()
    return block.var, block.extent, block.kind, *of


def _apart(first: Stage, second: Stage) -> dict[str, Set[str]]:
    """The tensors that one stage writes and the other uses, with the loops in whose iterations they use elements of
    their own."""
    written_a, written_b = ({leaf.tensor for leaf in stage.leaves} for stage in (first, second))
    both = (first.facts.tensors & written_b) | (written_a & second.facts.tensors)
    reads, writes, _ = accesses(leaf for stage in (first, second) for leaf in stage.leaves
                                if not both.isdisjoint(leaf.facts.tensors))
    extents = {**second.extents, **first.extents}
    shared = first.facts.names & second.facts.names
    return {name: separated(shared, writes.get(name, []) + reads.get(name, []), extents) for name in sorted(both)}
