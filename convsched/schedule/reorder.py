"""The schedule steps that change loops: pure functions from a program to a program.

Each applies to every loop of the name it is given, in all stages and in all copies that ``peel`` made. It
checks first and raises ``ScheduleError`` with the nest printed; the result is then legal by construction.
``fuse`` is in ``fusing.py``, ``inline`` in ``inlining.py``, ``peel`` in ``peeling.py``; steps that place data are in
``placement.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from convsched.ir import Body, Loop, Program, Statement, leaves
from convsched.ir.walk import extents_of
from convsched.schedule.checks import checked, fail, require_loop
from convsched.schedule.legality import carried
from convsched.schedule.step import _Checked


@dataclass(frozen=True)
class Reorder(_Checked):
    """Permute loops; see ``steps.reorder``."""

    loops: tuple[str, ...]

    def __str__(self) -> str:
        return f"reorder {' '.join(self.loops)}"


def reorder(program: Program, order: Sequence[str]) -> Program:
    """Permute loops: every chain of perfectly nested loops puts its loops of ``order`` in that order.

    >>> from convsched.ir.examples import nests, product
    >>> print(nests(reorder(product(8, 4), ("c", "m"))))
    conv:
      for c < 4: for m < 8:
        y[m] += x[c] * w[m, c]
    """
    step = f"reorder {' '.join(order)}"
    for name in order:
        require_loop(program, step, name)
    rank = {name: position for position, name in enumerate(order)}
    if len(rank) != len(order):
        twice = next(name for name in order if list(order).count(name) > 1)
        raise fail(program, step, f"{twice} is named twice", "name each loop once", twice)

    def permute(body: Body, outside: Mapping[str, int]) -> Body:
        return tuple(chain(s, outside) if isinstance(s, Loop) else s for s in body)

    def chain(top: Loop, outside: Mapping[str, int]) -> Statement:
        loops = [top]
        while len(loops[-1].body) == 1 and isinstance(loops[-1].body[0], Loop):
            loops.append(loops[-1].body[0])
        core = loops[-1].body
        slots = [i for i, loop in enumerate(loops) if loop.var in rank]
        chosen = sorted((loops[i] for i in slots), key=lambda loop: rank[loop.var])
        if [loops[i].var for i in slots] != [loop.var for loop in chosen]:
            extents = {**outside, **extents_of((top,))}
            commutes = len(core) == 1 and not isinstance(core[0], Loop)
            for loop in chosen:
                tensor = carried(loop.var, core, extents, commutative=commutes)
                if tensor is not None:
                    raise fail(program, step, f"iterations of {loop.var} depend on each other through "
                               f"{tensor}", "leave that loop where it is", loop.var)
        for slot, loop in zip(slots, chosen, strict=True):
            loops[slot] = loop
        body = permute(core, {**outside, **{loop.var: loop.extent for loop in loops}})
        for loop in reversed(loops):
            body = (replace(loop, body=body),)
        return body[0]

    done = program.with_body(lambda body: permute(body, {}))
    for stage in done.stages:
        for around, _ in leaves(stage.body):
            named = [loop.var for loop in around if loop.var in rank]
            for left, right in pairwise(named):
                if rank[left] > rank[right]:
                    raise fail(program, step, f"{left} and {right} are not perfectly nested",
                               "reorder before other statements come between them", left)
    return checked(program, step, done)
