"""Dropping what never runs: guards that always hold, statements that never run, iterations that do nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from convsched.ir.grammar import Block, Body, Program, Statement, leaves
from convsched.ir.walk import holding, rebuilt


def simplify(program: Program) -> Program:
    """Drop guards that always hold, statements that never run, and iterations that do nothing.

    >>> from convsched.ir.examples import nests, product
    >>> from convsched.schedule import Split
    >>> padded = Split("m", 8, "m0", "m1", tail="mask").apply(product(6, 2))
    >>> print(nests(padded))
    conv:
      for m0 < 1: for m1 < 8: for c < 2:
        if 8 m0 + m1 < 6: y[8 m0 + m1] += x[c] * w[8 m0 + m1, c]
    >>> print(nests(simplify(padded)))
    conv:
      for m0 < 1: for m1 < 6: for c < 2:
        y[8 m0 + m1] += x[c] * w[8 m0 + m1, c]
    """
    return program.with_body(lambda body: prune(body, {}))


def prune(body: Body, extents: Mapping[str, int]) -> Body:
    """``simplify`` for a body inside loops of the given extents."""
    out: list[Statement] = []
    for statement in body:
        if isinstance(statement, Block):
            if statement.facts.is_plain:
                out.append(statement)
                continue
            extent = statement.extent
            if statement.kind in ("serial", "unroll") and statement.var in statement.facts.guards:
                extent = _needed(statement, extents)  # lanes, shares of threads and values stay
            inside = prune(statement.body, {**extents, statement.var: extent})
            if inside:
                same = extent == statement.extent
                out.append(holding(statement, inside) if same else replace(statement, extent=extent, body=inside))
            continue
        if not statement.where:
            out.append(statement)
            continue
        bounds = [(w, w.bounds(extents)) for w in statement.where]
        if any(low >= 0 for _, (low, _) in bounds):
            continue
        where = tuple(dict.fromkeys(w for w, (_, high) in bounds if high >= 0))
        out.append(statement if where == statement.where else replace(statement, where=where))
    return rebuilt(body, out)


def _needed(loop: Block, extents: Mapping[str, int]) -> int:
    """How many iterations of a loop there are up to the last in which a statement runs; at least one.

    A guard ``k v + rest < 0`` with ``rest >= low`` may hold up to ``v = (-low - 1) // k``, or from
    ``v = low // -k + 1`` where ``k < 0``.
    """
    if not all(leaf.where for leaf in loop.leaves):
        return loop.extent
    last = 0
    for around, leaf in leaves(loop.body):
        inside = {**extents, **{found.var: found.extent for found in around}}
        start, end = 0, loop.extent - 1
        for guard in leaf.where:
            k = guard.coefficient(loop.var)
            low = guard.without((loop.var,)).bounds(inside)[0]
            if k > 0:
                end = min(end, (-low - 1) // k)
            elif k < 0:
                start = max(start, low // -k + 1)
            elif low >= 0:
                end = -1
        if start <= end:
            last = max(last, end)
    return last + 1
