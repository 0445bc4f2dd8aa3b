"""``attach``: compute a stage inside a loop of its neighbour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from convsched.ir import Body, Loop, Program, Stage, find_loops, leaves
from convsched.ir.walk import extents_of, indices
from convsched.schedule.checks import checked, fail, require_loop
from convsched.schedule.legality import accesses, is_separated, touching
from convsched.schedule.step import _Checked


@dataclass(frozen=True)
class Attach(_Checked):
    """A stage computed inside a loop of its neighbour; see ``steps.attach``."""

    stage: str
    at: str

    def __str__(self) -> str:
        return f"attach {self.stage} at {self.at}"


def attach(program: Program, stage: str, at: str) -> Program:
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
    >>> print(nests(attach(attach(filtered(8, 3), "init", "f"), "epilogue", "f")))
    conv:
      for f < 8:
        t[f] = 0
        for s < 3:
          t[f] += x[f + s] * w[s]
        y[f] = max(0, t[f])

    The stage joins the next one if that has the loop, else the one before; both have the same loops from
    the outermost down to ``at``.
    """
    step = f"attach {stage} at {at}"
    require_loop(program, step, at)
    names = [s.name for s in program.stages]
    if stage not in names:
        raise fail(program, step, f"there is no stage {stage}", f"use one of {', '.join(names)}", at)
    place = names.index(stage)
    if not find_loops(program.stages[place].body, at):
        raise fail(program, step, f"stage {stage} has no loop {at}", "choose an outer loop that both have",
                   at)
    for other in (place + 1, place - 1):
        if 0 <= other < len(names) and find_loops(program.stages[other].body, at):
            break
    else:
        raise fail(program, step, f"no stage beside {stage} has the loop {at}", "choose another loop", at)
    first, second = sorted((place, other))
    before, after = program.stages[first], program.stages[second]
    if before.when != after.when:
        raise fail(program, step, f"{before.name} and {after.name} run at different times", "leave it", at)

    def merge(a: Body, b: Body, above: Mapping[str, int]) -> Body:
        if len(a) != 1 or len(b) != 1 or not isinstance(a[0], Loop) or not isinstance(b[0], Loop):
            raise fail(program, step, f"the loops above {at} are not perfectly nested", "attach earlier", at)
        x, y = a[0], b[0]
        if (x.var, x.extent, x.kind, x.of, x.step) != (y.var, y.extent, y.kind, y.of, y.step):
            raise fail(program, step, f"{before.name} has {x.kind} {x.var} < {x.extent} where {after.name} "
                       f"has {y.kind} {y.var} < {y.extent}", "give both the same outer loops", at)
        extents = {**above, **extents_of(b), **extents_of(a)}
        tensor = _meeting(x.var, x.body, y.body, extents) if x.iterations > 1 else None
        if tensor is not None:
            raise fail(program, step, f"iterations of {x.var} depend on each other through {tensor}",
                       "attach outside the loops that sum", at)
        body = x.body + y.body if x.var == at else merge(x.body, y.body, {**above, x.var: x.extent})
        return (replace(x, body=body),)

    host = after.name if before.name == stage else before.name
    joined = Stage(host, merge(before.body, after.body, {}), before.when)
    return checked(program, step, replace(
        program, stages=(*program.stages[:first], joined, *program.stages[second + 1:])))


def _meeting(var: str, a: Body, b: Body, extents: Mapping[str, int]) -> str | None:
    """A tensor that one side writes and the other uses, in different iterations of ``var``."""
    def touched(body: Body) -> tuple[set[str], set[str]]:
        every = {name for _, leaf in leaves(body) for name, _ in indices(leaf)}
        return every, {leaf.tensor for _, leaf in leaves(body)}
    used_a, written_a = touched(a)
    used_b, written_b = touched(b)
    both = (used_a & written_b) | (written_a & used_b)
    reads, writes, _ = accesses(touching(a, both) + touching(b, both))
    return next((tensor for tensor in sorted(both) if not is_separated(
        var, writes.get(tensor, []) + reads.get(tensor, []), extents)), None)
