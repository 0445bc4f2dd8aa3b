"""Runs a program on NumPy arrays, slowly and plainly: the meaning of the IR.

Statements run in order. A chain of perfectly nested loops around one statement is evaluated at all its
points at once where that is the same: if the value does not read the tensor that is stored (or reads just
the stored element, and no element twice). Everything else is a Python loop. Locals are NaN until they are stored.

``interpret`` works on logical arrays and ignores storage. ``evaluate_bind`` runs the bind stages into
physical storage: a stage that only copies is one strided NumPy assignment.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeAlias, assert_never

import numpy as np
import numpy.typing as npt

from convsched.errors import ArrayError
from convsched.ir.address import Offset, offset
from convsched.ir.affine import Affine, Index
from convsched.ir.grammar import (
    Block,
    Body,
    Const,
    Leaf,
    Let,
    Load,
    Loop,
    Op,
    Path,
    Program,
    Reduce,
    Statement,
    Store,
    Tensor,
    Value,
    leaves,
    storage_of,
)

Array: TypeAlias = npt.NDArray[np.floating[Any]]
Point: TypeAlias = Mapping[str, "int | npt.NDArray[np.intp]"]

GRID_POINTS = 1 << 20
"""The most points evaluated at once; 1 Mi of them take 8 MiB an array of addresses."""


def interpret(program: Program, arrays: Mapping[str, npt.NDArray[Any]], dtype: npt.DTypeLike = np.float32,
              keep: Iterable[str] = ()) -> dict[str, Array]:
    """The outputs of a program, and the tensors named in ``keep``, as arrays of ``tensor.shape``.

    ``arrays`` has the inputs and weights by name. Raises ArrayError if one is missing or of another shape.
    """
    views = {t.name: _logical_view(t, arrays, dtype) for t in program.tensors}
    run = _Run(views, np.dtype(dtype))
    for stage in program.stages:
        run.body(stage.body, {}, {})
    wanted = set(keep)
    return {t.name: views[t.name].logical(t) for t in program.tensors
            if t.role == "output" or t.name in wanted}


def evaluate_bind(program: Program,
                  arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[np.float32]]:
    """The tensors that bind stages store, flat, in their physical storage.

    ``arrays`` has the weights by name. What is computed, rather than copied, is computed in float64 and
    rounded once.
    """
    stages = [stage for stage in program.stages if stage.when == "bind"]
    statements = [leaf for stage in stages for _, leaf in leaves(stage.body)]
    views: dict[str, _View] = {}
    for leaf in statements:
        for load in leaf.loads:
            tensor = program.tensor(load.tensor)
            if tensor.role == "weight" and load.tensor not in views:
                views[load.tensor] = _logical_view(tensor, arrays, np.float32)
            if tensor.role == "constant":
                views[load.tensor] = _logical_view(tensor, arrays, np.float64)
    computed = {leaf.tensor for leaf in statements if not _is_copy(leaf)}
    bound = list(dict.fromkeys(leaf.tensor for leaf in statements))
    for name in bound:
        tensor = program.tensor(name)
        zeros: Array = np.zeros(tensor.elements, np.float64 if name in computed else np.float32)
        views[name] = _View(tensor, (0,) * len(tensor.shape), zeros)
    run = _Run(views, np.dtype(np.float64))
    for stage in stages:
        run.body(stage.body, {}, {})
    return {name: views[name].flat.astype(np.float32, copy=False) for name in bound}


def to_storage(tensor: Tensor, logical: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A logical array in a tensor's physical storage, flat; tails and gaps are zero.

    >>> c = Tensor("x", ("c", "w"), (3, 2), "input", storage_of(("c", "w"), (3, 2), ("c/2", "w", "c%2")))
    >>> to_storage(c, np.arange(1, 7).reshape(3, 2)).tolist()
    [1, 3, 2, 4, 5, 0, 6, 0]
    """
    if logical.shape != tensor.shape:
        raise ArrayError(f"{tensor.name}: the shape is {logical.shape}; give an array of shape {tensor.shape}")
    flat = np.zeros(tensor.elements, logical.dtype)
    view, padded = _split_view(tensor, flat)
    if padded != tensor.shape:
        logical = np.pad(logical, [(0, full - size) for full, size in zip(padded, tensor.shape, strict=True)])
    view[...] = logical.reshape(view.shape)
    return flat


def from_storage(tensor: Tensor, flat: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The logical array of shape ``tensor.shape`` that a flat physical array holds (a copy).

    >>> c = Tensor("x", ("c", "w"), (3, 2), "input", storage_of(("c", "w"), (3, 2), ("c/2", "w", "c%2")))
    >>> from_storage(c, np.array([1, 3, 2, 4, 5, 0, 6, 0])).tolist()
    [[1, 2], [3, 4], [5, 6]]
    """
    if flat.size < tensor.elements:
        raise ArrayError(f"{tensor.name}: it has {flat.size} elements; give an array of {tensor.elements}")
    view, padded = _split_view(tensor, flat.reshape(-1))
    return view.reshape(padded)[tuple(slice(size) for size in tensor.shape)].copy()


def _split_view(tensor: Tensor, flat: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], tuple[int, ...]]:
    """Storage with its axes in logical order, outermost part of each first, and the padded logical shape."""
    parts = sorted(tensor.storage, key=lambda s: (s.axis, -s.step))
    strides = tuple(part.stride * flat.itemsize for part in parts)
    view = np.lib.stride_tricks.as_strided(flat, tuple(part.size for part in parts), strides)
    padded = tuple(math.prod(part.size for part in parts if part.axis == axis)
                   for axis in range(len(tensor.shape)))
    return view, padded


@dataclass(frozen=True)
class _View:
    """A tensor's memory: flat, addressed by ``tensor.storage`` at ``index + origin``."""

    tensor: Tensor
    origin: tuple[int, ...]
    flat: Array

    def address(self, index: Index, extents: Mapping[str, int]) -> Offset:
        shifted = tuple(a + o if o else a for a, o in zip(index, self.origin, strict=True))
        return offset(self.tensor, shifted, extents)

    def logical(self, tensor: Tensor) -> Array:
        inside = tuple(slice(o, o + size) for o, size in zip(self.origin, tensor.shape, strict=True))
        return self.flat.reshape(self.tensor.shape)[inside]


def _logical_view(tensor: Tensor, arrays: Mapping[str, npt.NDArray[Any]], dtype: npt.DTypeLike) -> _View:
    """A tensor stored plainly with its border as real zeros, filled from ``arrays`` if it is an argument."""
    frames = [tensor.frame(axis) for axis in range(len(tensor.shape))]
    shape = tuple(size + before + after for size, (before, after) in zip(tensor.shape, frames, strict=True))
    framed = replace(tensor, shape=shape, border=(), storage=storage_of(tensor.letters, shape))
    view = _View(framed, tuple(before for before, _ in frames), np.empty(0))
    if tensor.role == "constant":
        return replace(view, flat=np.array(tensor.values, dtype))
    if tensor.role not in ("input", "weight"):
        unset = np.nan if tensor.role in ("local", "register") else 0.0
        return replace(view, flat=np.full(math.prod(shape), unset, dtype))
    if tensor.name not in arrays:
        raise ArrayError(f"{tensor.name}: it is missing; give an array of shape {tensor.shape} by that name")
    given = np.asarray(arrays[tensor.name])
    if given.shape != tensor.shape:
        raise ArrayError(f"{tensor.name}: the shape is {given.shape}; give an array of shape {tensor.shape}")
    values = np.ascontiguousarray(given, dtype)
    return replace(view, flat=(np.pad(values, frames) if tensor.border else values).reshape(-1))


def _is_copy(leaf: Leaf) -> bool:
    return isinstance(leaf, Store) and isinstance(leaf.value, Load | Const)


def _chain(statement: Statement) -> tuple[Path, Leaf | None]:
    """The perfectly nested loops from a statement on, and the one statement inside, if that is all."""
    loops: list[Loop | Let] = []
    while isinstance(statement, Block) and len(statement.body) == 1:
        loops.append(statement)
        statement = statement.body[0]
    return (tuple(loops), None) if isinstance(statement, Block) else (tuple(loops), statement)


@lru_cache(maxsize=1024)
def _axis(extent: int, axis: int, rank: int) -> npt.NDArray[np.intp]:
    return np.arange(extent).reshape([-1 if i == axis else 1 for i in range(rank)])


def _evaluate(a: Affine, point: Point) -> int | npt.NDArray[np.intp]:
    total: int | npt.NDArray[np.intp] = a.constant
    for name, coefficient in a.terms:
        total = total + coefficient * point[name]
    return total


def _addresses(place: Offset, point: Point) -> int | npt.NDArray[np.intp]:
    total = _evaluate(place.affine, point)
    for digit in place.rest:
        total = total + _evaluate(digit.value, point) // digit.step % digit.size * digit.stride
    return total


class _Run:
    """Runs statements on views; values are computed in ``dtype``."""

    def __init__(self, views: Mapping[str, _View], dtype: np.dtype[Any]) -> None:
        self.views = views
        self.dtype = dtype
        self.places: dict[tuple[object, ...], Offset] = {}

    def body(self, body: Body, extents: Mapping[str, int], outer: Mapping[str, int]) -> None:
        """Run statements inside loops of ``extents`` whose variables stand at ``outer``."""
        for statement in body:
            loops, leaf = _chain(statement)
            if leaf is not None:
                self.nest(loops, leaf, {**extents, **{lp.var: lp.extent for lp in loops}}, outer)
                continue
            assert isinstance(statement, Block)
            inside = {**extents, statement.var: statement.extent}
            for value in _values(statement, outer):
                self.body(statement.body, inside, {**outer, statement.var: value})

    def nest(self, loops: Sequence[Loop | Let], leaf: Leaf, extents: Mapping[str, int],
             outer: Mapping[str, int]) -> None:
        """One statement inside perfectly nested loops."""
        if self.copy(loops, leaf, extents, outer):
            return
        points = math.prod(loop.iterations for loop in loops)
        if loops and (points > GRID_POINTS or not self.is_simultaneous(loops, leaf, extents, outer)):
            for value in _values(loops[0], outer):
                self.nest(loops[1:], leaf, extents, {**outer, loops[0].var: value})
            return
        with np.errstate(all="ignore"):
            self.grid(loops, leaf, extents, outer)

    def grid(self, loops: Sequence[Loop | Let], leaf: Leaf, extents: Mapping[str, int],
             outer: Mapping[str, int]) -> None:
        """Run a statement at all points of the loops at once, without those that a condition excludes."""
        shape = tuple(loop.iterations for loop in loops)
        point = _grid_point(loops, outer)
        mask = _mask(leaf, point, shape)
        if mask is not None:
            if not mask.any():
                return
            places = np.nonzero(mask)
            point = _with_digits(loops, {**outer, **{
                loop.var: place for loop, place in zip(loops, places, strict=True)}})
            shape = (len(places[0]),)
        value = np.broadcast_to(self.value(leaf.value, point, extents), shape)
        address = _addresses(self.place(leaf.tensor, leaf.index, extents), point)
        flat = self.views[leaf.tensor].flat
        if isinstance(leaf, Store):
            flat[np.broadcast_to(address, shape)] = value
            return
        if mask is None:  # sum over the loops that the index does not depend on
            used = {name for a in leaf.index for name in a.variables}
            for loop in reversed(loops):
                if isinstance(loop, Let) and loop.var in used:
                    used |= loop.of.variables
            summed = tuple(axis for axis, loop in enumerate(loops) if loop.var not in used)
            value = value.sum(axis=summed, keepdims=True)
        np.add.at(flat, np.broadcast_to(address, value.shape).ravel(), value.ravel())

    def place(self, tensor: str, index: Index, extents: Mapping[str, int]) -> Offset:
        """The address of an access, remembered: a nest inside a Python loop runs many times."""
        key = (tensor, index, *(extents[name] for a in index for name, _ in a.terms))
        if key not in self.places:
            self.places[key] = self.views[tensor].address(index, extents)
        return self.places[key]

    def is_simultaneous(self, loops: Sequence[Loop | Let], leaf: Leaf, extents: Mapping[str, int],
                        outer: Mapping[str, int]) -> bool:
        """Whether all points can be evaluated before any is stored."""
        own = [load.index for load in leaf.loads if load.tensor == leaf.tensor]
        if not own:
            return True
        if isinstance(leaf, Reduce) or any(index != leaf.index for index in own):
            return False
        shape = tuple(loop.iterations for loop in loops)
        place = self.place(leaf.tensor, leaf.index, extents)
        address = np.broadcast_to(_addresses(place, _grid_point(loops, outer)), shape)
        return len(np.unique(address)) == address.size

    def copy(self, loops: Sequence[Loop | Let], leaf: Leaf, extents: Mapping[str, int],
             outer: Mapping[str, int]) -> bool:
        """Run a copy from one tensor to another as a strided assignment; False if it is not of that form."""
        if not loops or isinstance(leaf, Reduce) or not isinstance(leaf.value, Load):
            return False
        if leaf.value.tensor == leaf.tensor or any(isinstance(loop, Let) for loop in loops):
            return False
        target = self.place(leaf.tensor, leaf.index, extents)
        source = self.place(leaf.value.tensor, leaf.value.index, extents)
        if target.rest or source.rest:
            return False
        written = _strided(self.views[leaf.tensor].flat, target.affine, loops, outer, widen=False)
        if written is None or not _is_injective(target.affine, loops):
            return False
        read = _strided(self.views[leaf.value.tensor].flat, source.affine, loops, outer, widen=not outer)
        if read is None:
            return False
        mask = _mask(leaf, _grid_point(loops, outer), written.shape)
        np.copyto(written, read, casting="same_kind", where=True if mask is None else mask)
        return True

    def value(self, value: Value, point: Point, extents: Mapping[str, int]) -> Array:
        match value:
            case Const(number):
                return np.asarray(number, self.dtype)
            case Load(tensor, index):
                address = _addresses(self.place(tensor, index, extents), point)
                return np.asarray(self.views[tensor].flat[address]).astype(self.dtype, copy=False)
            case Op(name, operands):
                return _operation(name, [self.value(operand, point, extents) for operand in operands])
            case _:
                assert_never(value)


def _grid_point(loops: Sequence[Loop | Let], outer: Mapping[str, int]) -> Point:
    return _with_digits(loops, {**outer, **{
        lp.var: _axis(lp.iterations, axis, len(loops)) for axis, lp in enumerate(loops)}})


def _with_digits(loops: Sequence[Loop | Let], point: dict[str, int | npt.NDArray[np.intp]]) -> Point:
    """A point of the loops with the values of those that run once."""
    for loop in loops:
        if isinstance(loop, Let):
            point[loop.var] = _digit(loop, point)
    return point


def _digit(loop: Let, point: Point) -> int | npt.NDArray[np.intp]:
    return _evaluate(loop.of, point) // loop.step % loop.extent


def _values(loop: Loop | Let, outer: Mapping[str, int]) -> Iterable[int]:
    """The values that a loop's variable takes."""
    return [int(_digit(loop, outer))] if isinstance(loop, Let) else range(loop.extent)


def _mask(leaf: Leaf, point: Point, shape: tuple[int, ...]) -> npt.NDArray[np.bool_] | None:
    """Where all conditions of a statement hold, or None where that is everywhere."""
    mask = np.asarray(True)
    for condition in leaf.where:
        mask = mask & np.asarray(_evaluate(condition, point) < 0)
    return None if mask.all() else np.broadcast_to(mask, shape)


def _strided(flat: Array, address: Affine, loops: Sequence[Loop | Let], outer: Mapping[str, int],
             widen: bool) -> Array | None:
    """The elements at an address over all points of the loops, as a view; None if some lie outside.

    ``widen`` adds zeros at the ends (in a copy) if these are not more than the array itself: what lies
    outside is not used, because a condition excludes it.
    """
    inner = {loop.var: loop.extent for loop in loops}
    start = address.constant + sum(c * outer[name] for name, c in address.terms if name not in inner)
    low, high = (address.part(inner) + start).bounds(inner)
    before, after = max(0, -low), max(0, high - flat.size + 1)
    if before or after:
        if not widen or before + after > flat.size:
            return None
        flat = np.pad(flat, (before, after))
    strides = tuple(address.coefficient(loop.var) * flat.itemsize for loop in loops)
    return np.lib.stride_tricks.as_strided(flat[start + before:], tuple(inner.values()), strides)


def _is_injective(address: Affine, loops: Sequence[Loop | Let]) -> bool:
    """Whether each point has an address of its own, as each stride passes what smaller strides reach."""
    reach = 0
    for stride, extent in sorted((abs(address.coefficient(loop.var)), loop.extent) for loop in loops):
        if extent > 1 and stride <= reach:
            return False
        reach += stride * (extent - 1)
    return True


def _operation(name: str, operands: list[Array]) -> Array:
    """An operation of ``OPS``. ``max`` and ``min`` give the second operand if one is NaN."""
    match name, operands:
        case "add", [a, b]:
            return np.asarray(a + b)
        case "sub", [a, b]:
            return np.asarray(a - b)
        case "mul", [a, b]:
            return np.asarray(a * b)
        case "div", [a, b]:
            return np.asarray(a / b)
        case "max", [a, b]:
            return np.where(a > b, a, b)
        case "min", [a, b]:
            return np.where(a < b, a, b)
        case "exp", [a]:
            return np.asarray(np.exp(a))
        case "neg", [a]:
            return np.asarray(-a)
        case "select_positive", [a, b, c]:
            return np.where(a > 0, b, c)
    raise AssertionError(f"{name} with {len(operands)} operands passed the verifier")
