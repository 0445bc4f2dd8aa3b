"""``inline``: read data where a stage would copy it from, so that the copy is not made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from convsched.ir import (
    Affine,
    Block,
    Body,
    Index,
    Leaf,
    Let,
    Load,
    Program,
    Stage,
    Statement,
    Store,
    Value,
    leaves,
    loop_names,
    map_value,
)
from convsched.ir.address import floor_divide, modulo
from convsched.schedule.checks import checked, fail
from convsched.schedule.step import Step


@dataclass(frozen=True)
class Inline(Step):
    """Leave a stage out, and put what it stores in place of what is read of its tensor.

    >>> from convsched.ir.examples import nests, unfolded
    >>> print(nests(unfolded(2, 3)))
    i:
      for e < 2: for f < 3:
        i[3 e + f] = x[2 e, f]
    conv:
      for p < 6:
        y[p] = i[p] * w
    >>> print(nests(Inline("i").apply(unfolded(2, 3))))
    conv:
      for p < 6: with e < 2 = p / 3: with f < 3 = p:
        y[p] = x[2 e, f] * w

    Where an index is not a sum of the loops around it, its digits get names of their own: ``with
    f < 3 = p`` is ``f = p % 3``. Source: the ``compute_inline`` of Ragan-Kelley et al., "Halide", 2013.
    """

    GRAMMAR = "inline TENSOR"
    tensor: str

    def apply(self, program: Program) -> Program:
        stage, axes, value = _producer(program, self)
        others = [other for other in program.stages if other is not stage]
        readers = [other for other in others
                   if self.tensor in other.facts.tensors]
        if not readers or program.stages.index(readers[0]) < program.stages.index(stage):
            raise fail(program, self, f"no stage after {stage.name} reads {self.tensor}, or one before it does",
                       "inline a tensor that is filled before it is read")
        stages = tuple(replace(other, body=_Inliner(program, self, axes, value, set(loop_names(other.body)))
                               .body(other.body)) for other in others)
        kept = tuple(found for found in program.tensors if found.name != self.tensor)
        return checked(program, self, replace(program, tensors=kept, stages=stages))


@dataclass(frozen=True)
class _Place:
    """One loop of the stage: ``index[axis] // step % extent``."""

    var: str
    axis: int
    step: int
    extent: int


def _producer(program: Program, step: Inline) -> tuple[Stage, tuple[_Place, ...], Value]:
    """The stage that fills a tensor, its loops by the index they store to, and what it stores."""
    tensor = step.tensor
    stages = [stage for stage in program.stages if any(leaf.tensor == tensor for leaf in stage.leaves)]
    if tensor not in program.by_name:
        names = ", ".join(found.name for found in program.tensors if found.role == "local")
        raise fail(program, step, f"there is no tensor {tensor}", f"use one that a single stage fills, of {names}")
    role = program.tensor(tensor).role
    if role != "local" or len(stages) != 1:
        raise fail(program, step, f"{tensor} is a tensor of role {role}, and {len(stages)} stages fill it",
                   "name a local tensor that a single stage fills")
    (loops, leaf), *more = leaves(stages[0].body)
    if more or not isinstance(leaf, Store) or leaf.where or stages[0].when == "bind":
        raise fail(program, step, f"stage {stages[0].name} does more than store each element of {tensor} once",
                   "inline before its loops are cut, and other stages attached")
    for load in leaf.loads:
        if program.tensor(load.tensor).role not in ("input", "weight", "constant"):
            raise fail(program, step, f"stage {stages[0].name} reads {load.tensor}, which the program writes",
                       "inline what reads inputs only")
    extents = {loop.var: loop.extent for loop in loops}
    places = [place for axis, a in enumerate(leaf.index) for place in _places(a, axis, extents)]
    once = sorted(place.var for place in places) == sorted(name for name, extent in extents.items() if extent > 1)
    reach = dict.fromkeys(range(len(leaf.index)), 1)
    for place in sorted(places, key=lambda found: found.step):
        if place.step != reach[place.axis]:
            break
        reach[place.axis] *= place.extent
    whole = tuple(reach.values()) == program.tensor(tensor).shape
    if not once or not whole or any(a.constant for a in leaf.index):
        raise fail(program, step, f"the loops of stage {stages[0].name} are not the digits of the index of {tensor}",
                   "inline a stage that walks whole axes")
    single = {loop.var: Affine() for loop in loops if loop.extent == 1}
    return stages[0], tuple(places), map_value(leaf.value, lambda load: _substituted(load, single))


def _substituted(load: Load, values: Mapping[str, Affine]) -> Load:
    return replace(load, index=tuple(a.substitute(values) for a in load.index))


def _places(a: Affine, axis: int, extents: Mapping[str, int]) -> Iterator[_Place]:
    for name, coefficient in a.terms:
        if extents[name] > 1:
            yield _Place(name, axis, coefficient, extents[name])


@dataclass(frozen=True)
class _Inliner:
    """Rewrites one stage that reads the tensor."""

    program: Program
    step: Inline
    places: tuple[_Place, ...]
    value: Value
    taken: set[str]

    def body(self, body: Body) -> Body:
        """The body, with loops for digits as far inside as the loops they depend on."""
        inside, pending = self._body(body, {})
        assert not pending
        return inside

    def _body(self, body: Body, extents: Mapping[str, int]) -> tuple[Body, list[Let]]:
        """The statements, and the digits that loops further out are to give."""
        out: list[Statement] = []
        pending: list[Let] = []
        for statement in body:
            if not isinstance(statement, Block):
                out.append(self._leaf(statement, extents, pending))
                continue
            within, found = self._body(statement.body, {**extents, statement.var: statement.extent})
            own = [digit for digit in found if statement.var in digit.of.variables]
            if own and statement.kind == "vector":
                raise fail(self.program, self.step, f"lanes of {statement.var} would not be a fixed distance apart",
                           "vectorize another loop", statement.var)
            for digit in reversed(own):
                within = (replace(digit, body=within),)
            out.append(replace(statement, body=within))
            pending += [digit for digit in found if digit not in own and digit not in pending]
        return tuple(out), pending

    def _leaf(self, leaf: Leaf, extents: Mapping[str, int], pending: list[Let]) -> Leaf:
        def change(load: Load) -> Value:
            if load.tensor != self.step.tensor:
                return load
            values = {place.var: self._digit(place, load.index, extents, pending) for place in self.places}
            return map_value(self.value, lambda read: _substituted(read, values))

        return replace(leaf, value=map_value(leaf.value, change))

    def _digit(self, place: _Place, index: Index, extents: Mapping[str, int], pending: list[Let]) -> Affine:
        """A loop of the stage as a sum of the loops here, or as a new one."""
        single = {name: Affine() for name, extent in extents.items() if extent == 1}
        a = index[place.axis].substitute(single)  # the same in all copies of a nest
        quotient = floor_divide(a, place.step, extents)
        if quotient is not None:
            low, high = quotient.bounds(extents)
            digit = quotient if low >= 0 and high < place.extent else modulo(quotient, place.extent, extents)
            if digit is not None:
                return digit
        for known in pending:
            if (known.of, known.step, known.extent) == (a, place.step, place.extent):
                return Affine.of(known.var)
        name = next(name for name in (place.var, *(f"{place.var}_{i}" for i in range(1, 2 + len(self.taken))))
                    if name not in self.taken)
        self.taken.add(name)
        pending.append(Let(name, place.extent, (), a, place.step))
        return Affine.of(name)
