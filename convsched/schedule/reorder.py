"""``reorder``: permute loops."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from convsched.ir import Block, Body, Let, Loop, Program, Statement, holding, leaves_of, rebuilt
from convsched.ir.grammar import extents_of
from convsched.schedule.checks import checked, fail, require_loop
from convsched.schedule.legality import carried
from convsched.schedule.step import Step


@dataclass(frozen=True)
class Reorder(Step):
    """Permute loops: every chain of perfectly nested loops puts its loops of ``loops`` in that order.

    >>> from convsched.ir.examples import nests, product
    >>> print(nests(Reorder(("c", "m")).apply(product(8, 4))))
    conv:
      for c < 4: for m < 8:
        y[m] += x[c] * w[m, c]
    """

    GRAMMAR = "reorder LOOP ..."
    loops: tuple[str, ...]

    def apply(self, program: Program) -> Program:
        for name in self.loops:
            require_loop(program, self, name)
        rank = {name: position for position, name in enumerate(self.loops)}
        if len(rank) != len(self.loops):
            twice = next(name for name in self.loops if self.loops.count(name) > 1)
            raise fail(program, self, f"{twice} is named twice", "name each loop once", twice)
        done = program.with_body(lambda body: self._permuted(program, rank, body, {}))
        for stage in done.stages:
            for left, right in _nested_pairs(stage.body, rank):
                if rank[left] > rank[right]:
                    raise fail(program, self, f"{left} and {right} are not perfectly nested",
                               "reorder before other statements come between them", left)
        return checked(program, self, done)

    def _permuted(self, program: Program, rank: Mapping[str, int], body: Body, outside: Mapping[str, int]) -> Body:
        return rebuilt(body, [s if not isinstance(s, Block) or s.facts.names.isdisjoint(rank)
                              else self._chain(program, rank, s, outside) for s in body])

    def _chain(self, program: Program, rank: Mapping[str, int], top: Loop | Let,
               outside: Mapping[str, int]) -> Statement:
        """A loop and those perfectly nested in it, in their order."""
        loops = [top]
        while len(core := loops[-1].body) == 1 and isinstance(core[0], Block):
            loops.append(core[0])
        slots = [i for i, loop in enumerate(loops) if loop.var in rank]
        chosen = sorted((loops[i] for i in slots), key=lambda loop: rank[loop.var])
        if [loops[i].var for i in slots] != [loop.var for loop in chosen]:
            extents = {**outside, **extents_of((top,))}
            commutes = len(core) == 1 and not isinstance(core[0], Block)
            found = carried([loop.var for loop in chosen], leaves_of(core), extents, commutative=commutes)
            if found is not None:
                var, tensor = found
                raise fail(program, self, f"iterations of {var} depend on each other through {tensor}",
                           "leave that loop where it is", var)
        for slot, loop in zip(slots, chosen, strict=True):
            loops[slot] = loop
        body = self._permuted(program, rank, core, {**outside, **{loop.var: loop.extent for loop in loops}})
        for loop in reversed(loops):
            body = rebuilt(loop.body, [*body])
            body = (holding(loop, body),)
        return body[0]


def _nested_pairs(body: Body, names: Collection[str], outer: str | None = None) -> Iterator[tuple[str, str]]:
    """Loops of some names, each with the next one around it."""
    for block in body:
        if isinstance(block, Block) and not block.facts.names.isdisjoint(names):
            is_named = block.var in names
            if is_named and outer is not None:
                yield outer, block.var
            yield from _nested_pairs(block.body, names, block.var if is_named else outer)
