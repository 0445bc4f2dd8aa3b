"""A constant matrix as a straight-line program: common sums computed once.

    t = a u + b v

The greedy choice of Paar, for any coefficients: again and again the pair of values that occurs with the same
ratio of coefficients in the most rows becomes one new value. Points of opposite sign make rows that are equal
but for the signs of every second coefficient; there the choice finds the even and the odd half of each pair,
and half of the work.

Source: Paar, "Optimized Arithmetic for Reed-Solomon Encoders", 1997; Lavin and Gray, "Fast Algorithms for
Convolutional Neural Networks", 2016 (the work of transforms).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any, TypeAlias

import numpy as np

from convsched.algebra.bilinear import ONE, Matrix, Number, Transform
from convsched.errors import LoweringError


@dataclass(frozen=True)
class Sum:
    """The value a u + b v; ``u`` and ``v`` number the inputs first, then the sums. With b = 0 it is a u."""

    a: Number
    u: int
    b: Number
    v: int

    @property
    def operations(self) -> int:
        """Instructions, with fused multiply-add: one, and a second where neither factor is 1 or -1."""
        return 1 if not self.b or _unit(self.a) or _unit(self.b) else 2


@dataclass(frozen=True)
class SumProgram:
    """``sums`` in order; row i of the matrix is the value ``outputs[i]``."""

    inputs: int
    sums: tuple[Sum, ...]
    outputs: tuple[int, ...]

    @property
    def additions(self) -> int:
        """Sums of two values."""
        return len([s for s in self.sums if s.b])

    @property
    def operations(self) -> int:
        """Instructions, with fused multiply-add."""
        return sum(s.operations for s in self.sums)

    def run(self, values: Sequence[Any]) -> list[Any]:
        """The rows, of exact numbers or of arrays of them."""
        known = list(values)
        for s in self.sums:
            known.append(s.a * known[s.u] + s.b * known[s.v] if s.b else s.a * known[s.u])
        return [known[i] for i in self.outputs]


Terms: TypeAlias = dict[int, Number]
Pair: TypeAlias = tuple[int, int, Number, Number]
"""The value a u + b v with u < v, up to a factor: (u, v, a, b)."""


def shared_sums(matrix: Matrix) -> SumProgram:
    """A program of few sums for the matrix, proved to be the matrix.

    >>> program = shared_sums(Matrix.of([[2, 1, 3, 1], [-2, 1, -3, 1]]))
    >>> [(str(s.a), s.u, str(s.b), s.v) for s in program.sums], program.outputs
    ([('1', 1, '1', 3), ('1', 0, '3/2', 2), ('1', 4, '2', 5), ('1', 4, '-2', 5)], (6, 7))
    """
    sums: list[Sum] = []
    outputs = [0] * len(matrix.rows)
    for rows, columns in _blocks(matrix):
        place = {j: local for local, j in enumerate(columns)}
        block = tuple(tuple((place[j], a) for j, a in matrix.rows[i]) for i in rows)
        program = _greedy(Matrix(block, len(columns)))
        names = [*columns, *range(matrix.columns + len(sums), matrix.columns + len(sums) + len(program.sums))]
        sums += [Sum(s.a, names[s.u], s.b, names[s.v]) for s in program.sums]
        for i, value in zip(rows, program.outputs, strict=True):
            outputs[i] = names[value]
    return SumProgram(matrix.columns, tuple(sums), tuple(outputs))


def shared_factors(matrix: Matrix) -> Transform:
    """The matrix as sparse factors that compute common sums once: a value that is used once is part of its user.

    >>> [[[str(a) for a in row] for row in factor.dense] for factor in
    ...  shared_factors(Matrix.of([[2, 1, 3, 1], [-2, 1, -3, 1]])).factors]
    [[['0', '1', '0', '1'], ['1', '0', '3/2', '0']], [['1', '2'], ['1', '-2']]]
    """
    program = shared_sums(matrix)
    first = program.inputs
    used = Counter(v for s in program.sums for v in ((s.u, s.v) if s.b else (s.u,)))
    used.update(program.outputs)
    kept = {v for v in range(first + len(program.sums)) if v < first or used[v] > 1 or v in program.outputs}
    terms: dict[int, Terms] = {}  # of each sum, over the values that are kept
    levels = dict.fromkeys(range(first), 0)
    for number, s in enumerate(program.sums, first):
        row: Terms = {}
        for factor, value in ((s.a, s.u), (s.b, s.v)) if s.b else ((s.a, s.u),):
            for j, a in ({value: ONE} if value in kept else terms[value]).items():
                row[j] = row[j] + factor * a if j in row else factor * a
        terms[number] = row
        levels[number] = 1 + max(levels[j] for j in row)
    depth = max((levels[v] for v in program.outputs), default=0)
    known, factors = list(range(first)), []
    for level in range(1, max(depth, 1) + 1):
        later = {j for v in kept if levels[v] > level for j in terms[v]} | set(program.outputs)
        following = ([*program.outputs] if level >= depth else
                     [v for v in sorted(kept) if levels[v] <= level and v in later])
        place = {v: i for i, v in enumerate(known)}
        rows = [terms[v] if levels[v] == level else {v: ONE} for v in following]
        factors.append(Matrix(tuple(tuple(sorted((place[j], a) for j, a in row.items() if a)) for row in rows),
                              len(known)))
        known = following
    return Transform(tuple(factors))


def _blocks(matrix: Matrix) -> list[tuple[list[int], list[int]]]:
    """The (rows, columns) that share nothing with the others: a transform's many small blocks are one problem."""
    blocks: list[tuple[list[int], list[int]]] = []
    for i, row in enumerate(matrix.rows):
        rows, columns = [i], {j for j, _ in row} or {0}
        apart = []
        for block in blocks:
            if columns.isdisjoint(block[1]):
                apart.append(block)
            else:
                rows += block[0]
                columns |= set(block[1])
        blocks = [*apart, (sorted(rows), sorted(columns))]
    return blocks


@cache
def _greedy(matrix: Matrix) -> SumProgram:
    rows: list[Terms] = [dict(row) for row in matrix.rows]
    sums: list[Sum] = []
    while any(len(row) > 1 for row in rows):
        pair = _best(rows)
        users = [(row, factor) for row in rows if (factor := _factor(row, pair)) is not None]
        for row, _ in users:
            del row[pair[0]], row[pair[1]]
        new, scale = matrix.columns + len(sums), _scale(users, pair)
        sums.append(Sum(pair[2] * scale, pair[0], pair[3] * scale, pair[1]))
        for row, factor in users:
            row[new] = factor / scale
    outputs = tuple(_alone(row, matrix.columns, sums) for row in rows)
    return _proved(SumProgram(matrix.columns, tuple(sums), outputs), matrix)


def _unit(number: Number) -> bool:
    return isinstance(number, Fraction) and number.denominator == 1 and number.numerator in (1, -1)


def _exact(number: Number) -> bool:
    """Whether float32 holds the number as it is."""
    return number == Fraction(float(np.float32(float(number))))


def _proportion(a: Number, b: Number) -> tuple[Number, Number, Fraction]:
    """(a', b', factor): the same for all pairs with (a, b) = factor (a', b'); irrational ones share but a sign."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return ONE, b / a, a
    sign = ONE if float(a) > 0 else -ONE
    return a * sign, b * sign, sign


def _best(rows: list[Terms]) -> Pair:
    """The pair in the most rows; among equals one that needs no factors, then the first."""
    counts: Counter[Pair] = Counter()
    units: Counter[Pair] = Counter()
    for row in rows:
        names = sorted(row)
        for i, u in enumerate(names):
            for v in names[i + 1:]:
                a, b, _ = _proportion(row[u], row[v])
                counts[u, v, a, b] += 1
                units[u, v, a, b] += _unit(row[u]) or _unit(row[v])
    return max(counts, key=lambda p: (counts[p], _unit(p[2]) and _unit(p[3]), units[p], -p[1], -p[0]))


def _factor(row: Terms, pair: Pair) -> Fraction | None:
    """What the pair is multiplied by in the row; None where it does not occur."""
    u, v, *wanted = pair
    if u not in row or v not in row:
        return None
    *found, factor = _proportion(row[u], row[v])
    return factor if found == wanted else None


def _scale(users: list[tuple[Terms, Fraction]], pair: Pair) -> Fraction:
    """The factor of the new value that costs the fewest inexact constants, then instructions, then factors.

    A row of k terms costs k - 1 instructions if some factor in it is 1 or -1, and k otherwise; a single term is
    free if its factor is 1.
    """
    *_, a, b = pair
    choices = [ONE, -ONE, *(factor for _, factor in users), *([1 / b] if isinstance(b, Fraction) else [])]

    def cost(scale: Fraction) -> tuple[int, int, int]:
        left = [(row, factor / scale) for row, factor in users]
        extra = sum(not (any(map(_unit, [factor, *row.values()])) if row else factor == 1) for row, factor in left)
        used = [a * scale, b * scale, *(factor for _, factor in left)]
        return (sum(not _exact(f) for f in used), Sum(used[0], 0, used[1], 1).operations + extra,
                sum(not _unit(f) for f in used))

    return min(choices, key=cost)


def _alone(row: Terms, inputs: int, sums: list[Sum]) -> int:
    """The number of the value that a row of at most one term is."""
    (value, factor), = row.items() or [(0, Fraction(0))]
    if factor == 1:
        return value
    last = Sum(factor, value, Fraction(0), value)
    if last not in sums:
        sums.append(last)
    return inputs + sums.index(last)


def _proved(program: SumProgram, matrix: Matrix) -> SumProgram:
    """The program, if every unit vector gives its column of the matrix."""
    for j in range(matrix.columns):
        unit = [Fraction(i == j) for i in range(matrix.columns)]
        if program.run(unit) != [row[j] for row in matrix.dense]:
            raise LoweringError(f"shared_sums: column {j} of the program is not that of the matrix; this is a bug, "
                                "please report it with the matrix")
    return program
