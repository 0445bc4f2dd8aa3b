"""Whether what is read of local tensors was stored before: a proof for all iterations at once.

A store of ``t[x]`` and a later read of ``t[y]`` have some loops in common, whose variables ``u`` are the same for both.
The store's other loops ``v`` are through by then. With ``x = a(u) + b(v)`` along an axis, and the terms of ``b`` close
enough together to give every number between its least and its greatest value, as digits do, what was stored is

    a(u) + min b  <=  x  <=  a(u) + max b        and  rest(u) + k (x - a(u)) < 0  for each guard  rest(u) + k b(v) < 0

A guard of another form is taken at the worst of its values. The read is proved if all its points ``y`` fulfil these
conditions of one store; or of several: those points where a condition does not hold must fulfil another store's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import takewhile
from math import gcd
from typing import NamedTuple

from convsched.ir.affine import Affine, Index
from convsched.ir.bounds import bounds_where
from convsched.ir.grammar import Block, Body, Leaf, Let, Path, Program, Reduce, Stage, Store

NEVER = Affine()  # which is not negative
CASES = 256
"""The most cases that a read is taken apart into, each proved by other stores."""


@dataclass(frozen=True)
class Unproved:
    """A read of a local tensor of which it is not known that all was stored before."""

    stage: Stage
    leaf: Leaf
    tensor: str
    index: Index


@dataclass(frozen=True)
class _Site:
    """A statement, the loops around it, and its place: the number of its stage, then its position at each level."""

    leaf: Leaf
    loops: Path
    place: tuple[int, ...]

    def shared(self, other: _Site) -> int:
        """How many loops are around both."""
        same = (a == b for a, b in zip(self.place, other.place, strict=False))
        return max(0, len(list(takewhile(bool, same))) - 1)


class _Digit(NamedTuple):
    """Some terms of a sum, which take every value between two, by steps; of these values, those ``v`` at which all
    guards ``factor v + rest < 0`` hold."""

    names: frozenset[str]
    step: int
    low: int
    high: int
    guards: tuple[tuple[int, Affine], ...] = ()

    @staticmethod
    def of(digits: Iterable[_Digit]) -> _Digit | None:
        """The sum of digits, if it leaves out no step."""
        digits = sorted(digits, key=lambda digit: digit.step)
        moving = [digit for digit in digits if digit.low < digit.high]
        step, reach = moving[0].step if moving else 1, 0
        for digit in moving:
            if digit.step % step or digit.step > reach + step:
                return None
            reach += digit.high - digit.low
        if len(digits) > 1 and any(digit.guards for digit in digits):
            return None
        names = frozenset[str]().union(*(digit.names for digit in digits))
        return _Digit(names, step, sum(d.low for d in digits), sum(d.high for d in digits), digits[0].guards)

    def under(self, part: Affine, guard: Affine) -> _Digit | None:
        """The digit where a guard holds; None if that is nowhere, or its terms are not those of the digit, times a
        number, and of shared loops."""
        (name, own), *others = [term for term in part.terms if term[0] in self.names]
        factor, own = guard.coefficient(name) * (1 if own > 0 else -1), abs(own)
        if any(guard.coefficient(other) * own != c * factor for other, c in others):
            return None
        rest = (guard - guard.part(self.names)) * own  # own * guard = factor * digit + rest
        if rest.terms:
            return self._replace(guards=(*self.guards, (factor, rest)))
        if factor > 0:
            end = (-rest.constant - 1) // factor
            found = self._replace(high=min(self.high, self.low + (end - self.low) // self.step * self.step))
        else:
            end = rest.constant // -factor + 1
            found = self._replace(low=max(self.low, self.high - (self.high - end) // self.step * self.step))
        return found if found.low <= found.high else None


class _Spread(NamedTuple):
    """The indices of a store along an axis: ``base`` and the digits, those of the greatest step first."""

    axis: int
    base: Affine
    digits: tuple[_Digit, ...]


class _Guard(NamedTuple):
    """``sum(factor * x[axis]) + rest < 0``, where ``rest`` depends on variables of shared loops."""

    factors: tuple[tuple[int, int], ...]
    rest: Affine


class _Residue(NamedTuple):
    """The cases ``variable = step q + 0``, ``variable = step q + 1``, ..."""

    variable: str
    step: int


class _Region(NamedTuple):
    """The indices ``x`` at which a store has stored; axes of which it stores all are left out."""

    spreads: tuple[_Spread, ...]
    guards: tuple[_Guard, ...]

    def conditions(self, read: _Read) -> list[Affine] | _Residue:
        """What must be negative for an index to be one of them, or by which residues to tell those in step."""
        index, values = read.index, read.values
        found: list[Affine] = []
        for axis, base, digits in self.spreads:
            left = index[axis] - base.substitute(values)
            for digit in digits:
                stray = [(name, c) for name, c in left.terms if c % digit.step]
                is_last = digit is digits[-1]
                apart = next((n for n, c in stray if is_last or abs(c) * (read.extents[n] - 1) >= digit.step), None)
                if apart is not None:
                    return _Residue(apart, digit.step)
                over = left.constant if is_last else left.constant - left.constant % digit.step
                part = Affine(tuple(term for term in left.terms if term not in stray), over)
                if part.constant % digit.step:
                    return [NEVER]
                found += [part - digit.high - 1, Affine.of(digit.low - 1) - part]
                found += [part * factor + rest.substitute(values) for factor, rest in digit.guards]
                left = left - part
        for factors, rest in self.guards:
            found.append(reduce(lambda total, one: total + index[one[0]] * one[1], factors, rest.substitute(values)))
        return found


def unproved(program: Program) -> Unproved | None:
    """The first read of a local or register tensor that no proof is found for."""
    own = {t.name: t for t in program.tensors if t.role in ("local", "register")}
    stores: dict[str, list[_Site]] = {name: [] for name in own}
    regions: dict[tuple[tuple[int, ...], int], _Region | None] = {}

    def region(store: _Site, shared: int) -> _Region | None:
        key = store.place, shared
        if key not in regions:
            regions[key] = _region(store, shared, own[store.leaf.tensor].shape)
        return regions[key]

    for number, stage in enumerate(program.stages):
        for site in _sites(stage.body, (), (number,)):
            for tensor, index in _reads(site.leaf):
                if tensor in own:
                    latest = (region(store, store.shared(site)) for store in reversed(stores[tensor]))
                    if not _is_proved(site, index, latest):
                        return Unproved(stage, site.leaf, tensor, index)
            if isinstance(site.leaf, Store) and site.leaf.tensor in own:
                stores[site.leaf.tensor].append(site)
    return None


def _is_proved(site: _Site, index: Index, regions: Iterable[_Region | None]) -> bool:
    """Whether a read has all its points in the regions; the first that has all of them is enough."""
    once = {loop.var: Affine() for loop in site.loops if loop.extent == 1}
    where = tuple(guard.substitute(once) for guard in site.leaf.where)
    given = (*where, *(tight for guard in where if (tight := _tightened(guard)) != guard))
    read = _Read(tuple(a.substitute(once) for a in index), given,
                 {loop.var: loop.extent for loop in site.loops}, {})
    seen: list[_Region] = []
    for region in regions:
        if region is not None:
            conditions = region.conditions(read)
            if isinstance(conditions, list) and not read.unknown(conditions):
                return True
            seen.append(region)
    return _Proof().of_all(read, seen) if seen else read.is_none()


def _tightened(guard: Affine) -> Affine:
    """What is as negative as it can be where a guard is: ``3 i - 2 < 0`` means ``3 i <= 0``."""
    step = gcd(*(c for _, c in guard.terms)) or 1
    return Affine(guard.terms, -((-guard.constant - 1) // step * step) - 1)


def _sites(body: Body, loops: Path, place: tuple[int, ...]) -> Iterator[_Site]:
    for position, statement in enumerate(body):
        if isinstance(statement, Block):
            yield from _sites(statement.body, (*loops, statement), (*place, position))
        else:
            yield _Site(statement, loops, (*place, position))


def _reads(leaf: Leaf) -> Iterator[tuple[str, Index]]:
    """What a statement reads: a sum, what it adds to."""
    if isinstance(leaf, Reduce):
        yield leaf.tensor, leaf.index
    yield from ((load.tensor, load.index) for load in leaf.loads)


def _region(store: _Site, shared: int, shape: tuple[int, ...]) -> _Region | None:
    """What a store has stored once its loops inside the shared ones are through; None where that has no such form."""
    inner = {loop.var: loop.extent for loop in store.loops[shared:] if loop.extent > 1}
    once = {loop.var for loop in store.loops[shared:] if isinstance(loop, Let)}
    fixed = {loop.var: Affine() for loop in store.loops if loop.extent == 1}
    index = [a.substitute(fixed) for a in store.leaf.index]
    guards = [guard.substitute(fixed) for guard in store.leaf.where]
    parts = [a.part(inner) for a in index]
    used = [name for part in parts for name, _ in part.terms]
    if len(set(used)) < len(used) or not once.isdisjoint(used):
        return None
    spreads = []
    for axis, (a, part) in enumerate(zip(index, parts, strict=True)):
        base, digits = a - part if part.terms else a, _digits(part, inner, guards)
        low, high = (base.constant + sum(ends) for ends in zip(*((d.low, d.high) for d in digits), strict=True))
        whole = len(digits) == digits[0].step == 1 and not digits[0].guards
        if base.terms or not whole or low > 0 or high < shape[axis] - 1:
            spreads.append(_Spread(axis, base, digits))
    return _Region(tuple(spreads), tuple(_guarded(guard, index, parts, inner, once) for guard in guards))


def _digits(part: Affine, extents: Mapping[str, int], guards: list[Affine]) -> tuple[_Digit, ...]:
    """A sum of terms as few digits, one at least. Guards on some of the terms alone are taken into account, and out of
    the list."""
    digits = [_Digit(frozenset((name,)), abs(c), min(0, c * (extents[name] - 1)), max(0, c * (extents[name] - 1)))
              for name, c in part.terms]
    for guard in sorted(guards, key=lambda guard: len(guard.terms)):
        names = guard.part(extents).variables
        inside = [digit for digit in digits if digit.names & names]
        if not inside or frozenset[str]().union(*(digit.names for digit in inside)) != names:
            continue
        whole = _Digit.of(inside)
        narrowed = whole.under(part, guard) if whole is not None else None
        if narrowed is not None:
            digits = [*(digit for digit in digits if not digit.names & names), narrowed]
            guards.remove(guard)
    merged = [_Digit(frozenset(), 1, 0, 0)]
    for digit in sorted(digits, key=lambda digit: digit.step):
        both = _Digit.of((merged[-1], digit))
        merged[-1:] = [merged[-1], digit] if both is None else [both]
    return tuple(reversed(merged))


def _factor(a: Affine, part: Affine) -> int:
    """The number by which the terms of ``part`` are multiplied in another expression; 0 where they are not."""
    if not part.terms:
        return 0
    name, coefficient = part.terms[0]
    factor = a.coefficient(name) // coefficient
    return factor if part * factor == a.part(part.variables) else 0


def _guarded(guard: Affine, index: Sequence[Affine], parts: Sequence[Affine], inner: Mapping[str, int],
             once: set[str]) -> _Guard:
    """A guard as a condition on the index, the variables of which ``inner`` loops range over."""
    rest, factors = guard, []
    for axis, (a, part) in enumerate(zip(index, parts, strict=True)):
        own, factor = guard.part(part.variables), _factor(guard, part)
        if factor:
            rest = rest - own - (a - part) * factor
            factors.append((axis, factor))
        else:
            rest = rest - own + own.bounds(inner)[1]
    left = rest.part(inner)  # of loops that the index does not depend on: the first iteration is one of them
    worst = left.part(once).bounds(inner)[1]
    return _Guard(tuple(factors), rest - left + worst)


@dataclass(frozen=True)
class _Read:
    """Points of loops, at which what is given is negative, and the index that is read; ``values`` have taken the place
    of variables."""

    index: Index
    given: tuple[Affine, ...]
    extents: Mapping[str, int]
    values: Mapping[str, Affine]

    def unknown(self, conditions: list[Affine]) -> list[Affine]:
        """The conditions that are not known to hold at all points."""
        return [a for a in conditions if a not in self.given and bounds_where(a, self.given, self.extents)[1] >= 0]

    def is_none(self) -> bool:
        """Whether there are no points, as one of what is given is not negative where the others are."""
        return any(bounds_where(a, [b for b in self.given if b is not a], self.extents)[0] >= 0 for a in self.given)

    def meets(self, conditions: list[Affine]) -> bool:
        """Whether each condition may hold at some point."""
        return all(bounds_where(a, self.given, self.extents)[0] < 0 for a in conditions)

    def where(self, *conditions: Affine) -> _Read:
        """The points at which these hold too."""
        return replace(self, given=(*self.given, *conditions))

    def residues(self, by: _Residue) -> Iterator[_Read]:
        """The points by a variable's residue, whose quotient takes its place."""
        for residue in range(min(by.step, self.extents[by.variable])):
            count = -(-(self.extents[by.variable] - residue) // by.step)
            value = {by.variable: Affine(((by.variable, by.step),) if count > 1 else (), residue)}
            values = {**value, **{name: a.substitute(value) for name, a in self.values.items()}}
            yield _Read(tuple(a.substitute(value) for a in self.index), tuple(a.substitute(value) for a in self.given),
                        {**self.extents, by.variable: count}, values)


class _Proof:
    """That all points of a read are in some regions, in a limited number of cases."""

    def __init__(self) -> None:
        self.cases = 0

    def of_all(self, read: _Read, regions: Sequence[_Region]) -> bool:
        """Whether all points are in one of the regions."""
        found = [region.conditions(read) for region in regions]
        by = next((one for one in found if isinstance(one, _Residue)), None)
        if by is not None:
            return self.cases < CASES and all(self.of_all(case, regions) for case in read.residues(by))
        return self.of_each(read, [one for one in found if isinstance(one, list)])

    def of_each(self, read: _Read, regions: Sequence[list[Affine]]) -> bool:
        """Whether all points are in one of the regions, given by what is negative in them."""
        self.cases += 1
        if self.cases > CASES:
            return False
        if read.is_none():
            return True
        met: list[tuple[int, list[Affine]]] = []
        for number, region in enumerate(regions):
            unknown = read.unknown(region)
            if not unknown:
                return True
            if read.meets(unknown):
                met.append((number, unknown))
        if not met:
            return False
        (_, unknown), *rest = met
        others = [regions[number] for number, _ in rest]
        return all(self.of_each(read.where(*unknown[:k], Affine() - condition - 1), others)
                   for k, condition in enumerate(unknown))  # where it does not hold, and those before it do
