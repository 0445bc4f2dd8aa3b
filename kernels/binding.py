"""What happens to weights once, when they are bound: copies in the order of use, and sums with constants.

``bindings(program)`` are the bind stages as plain data, which an object cache keeps beside the code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from convsched.errors import LoweringError
from convsched.interp import to_storage
from convsched.ir import Const, Index, Load, Op, Program, Reduce, Role, Stage, StorageAxis, Store, Tensor, leaves
from convsched.kernels.packing import Array, Copy, aligned_zeros, copy_of, flush_denormals


@dataclass(frozen=True)
class Contraction:
    """A tensor that sums products of weights, constants and earlier tensors, in float64.

    ``subscripts`` are those of ``numpy.einsum`` for the ``operands``; ``constants`` are (name, shape, values).
    ``folded`` operands are read by sums of loops: (name, extents of the loops of its subscripts, and for each axis
    its constant and the coefficient of each loop). What lies outside the array is zero.
    """

    target: Tensor
    operands: tuple[str, ...]
    subscripts: str
    constants: tuple[tuple[str, tuple[int, ...], tuple[float, ...]], ...]
    folded: tuple[tuple[str, tuple[int, ...], tuple[tuple[int, tuple[int, ...]], ...]], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A JSON value; ``Contraction.from_json`` is its inverse."""
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Contraction:
        """The contraction of a JSON value."""
        given = value["target"]
        role: Role = given["role"]
        target = Tensor(given["name"], tuple(given["letters"]), tuple(given["shape"]), role,
                        tuple(StorageAxis(**axis) for axis in given["storage"]))
        constants = tuple((name, tuple(shape), tuple(values)) for name, shape, values in value["constants"])
        folded = tuple((name, tuple(extents), tuple((constant, tuple(steps)) for constant, steps in axes))
                       for name, extents, axes in value["folded"])
        return Contraction(target, tuple(value["operands"]), value["subscripts"], constants, folded)

    def run(self, known: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.float64]:
        """The tensor's elements, of the arrays known by name."""
        given = {**known, **{name: np.array(values).reshape(shape) for name, shape, values in self.constants}}
        given.update({name: _unfolded(given[name], extents, axes) for name, extents, axes in self.folded})
        arrays = [given[name].astype(np.float64) for name in self.operands]
        found: npt.NDArray[np.float64] = np.einsum(self.subscripts, *arrays, optimize=True)
        return found


def _unfolded(array: npt.NDArray[Any], extents: tuple[int, ...],
              axes: tuple[tuple[int, tuple[int, ...]], ...]) -> npt.NDArray[Any]:
    """The elements at every point of the loops, zero outside the array."""
    loops = np.ogrid[tuple(slice(extent) for extent in extents)]
    places = [constant + sum(step * loop for step, loop in zip(steps, loops, strict=True)) for constant, steps in axes]
    inside = [(place >= 0) & (place < size) for place, size in zip(places, array.shape, strict=True)]
    found = array[tuple(np.clip(place, 0, size - 1) for place, size in zip(places, array.shape, strict=True))]
    return np.where(np.logical_and.reduce(np.broadcast_arrays(*inside)), found, 0)


Binding = Copy | Contraction


def bindings(program: Program) -> tuple[Binding, ...]:
    """The bind stages of a program, in order. Raises LoweringError for one that is neither kind."""
    stages = [stage for stage in program.stages if stage.when == "bind"]
    return tuple(made for stage in stages if (made := _binding(program, stage)) is not None)


def from_json(value: Mapping[str, Any]) -> Binding:
    """The binding of a JSON value."""
    return Contraction.from_json(value) if "operands" in value else Copy.from_json(value)


def run(found: Sequence[Binding], weights: Mapping[str, Array]) -> dict[str, Array]:
    """The tensors that bindings make, flat, in their storage, aligned, denormals flushed."""
    known: dict[str, npt.NDArray[Any]] = dict(weights)
    bound: dict[str, Array] = {}
    for binding in found:
        if isinstance(binding, Copy):
            bound[binding.target] = binding.run(weights[binding.source])
            continue
        target = binding.target
        known[target.name] = made = binding.run(known)
        bound[target.name] = stored = aligned_zeros(target.elements)
        stored[:] = to_storage(target, made.astype(np.float32))
        flush_denormals(stored)
    return bound


def _binding(program: Program, stage: Stage) -> Binding | None:
    """One stage; None for one that only sets a sum to zero."""
    _, statement = leaves(stage.body)[0]
    if isinstance(statement, Store) and isinstance(statement.value, Const) and statement.value.number == 0:
        return None
    if isinstance(statement, Store):
        return copy_of(program, stage)
    value = statement.value
    factors = value.values if isinstance(value, Op) and value.name == "mul" else ()
    operands = [factor for factor in factors if isinstance(factor, Load)]
    if not isinstance(statement, Reduce) or len(operands) != 2 or len(list(leaves(stage.body))) != 1:
        raise LoweringError(f"stage {stage.name!r} runs when weights are bound; leave it a single sum of products")
    used = [load.tensor for load in operands]
    constants = tuple((t.name, t.shape, t.values) for t in program.tensors
                      if t.role == "constant" and t.name in used)
    extents = {loop.var: loop.extent for around, _ in leaves(stage.body) for loop in around}
    folded = tuple((load.tensor, *_fold(load.index, extents)) for load in operands if not _is_plain(load.index))
    if not _is_plain(statement.index):
        raise LoweringError(f"stage {stage.name!r} runs when weights are bound; leave its loops as they are")
    subscripts = [_subscripts(list(extents), load.index) for load in operands]
    return Contraction(program.tensor(statement.tensor), tuple(used),
                       f"{','.join(subscripts)}->{_subscripts(list(extents), statement.index)}", constants, folded)


def _is_plain(index: Index) -> bool:
    """Whether an index is one loop an axis."""
    return all(len(a.terms) == 1 and a.terms[0][1] == 1 and a.constant == 0 for a in index)


def _subscripts(loops: Sequence[str], index: Index) -> str:
    """A letter for each loop of an index: in the order of its axes, or of the loops where it is not plain."""
    used = [a.terms[0][0] for a in index] if _is_plain(index) else _loops_of(loops, index)
    return "".join(chr(ord("a") + loops.index(name)) for name in used)


def _loops_of(loops: Sequence[str], index: Index) -> list[str]:
    return [name for name in loops if any(name in a.variables for a in index)]


def _fold(index: Index, extents: Mapping[str, int]) -> tuple[tuple[int, ...], tuple[tuple[int, tuple[int, ...]], ...]]:
    """The extents of an index's loops, and the constant and coefficients of each axis."""
    loops = _loops_of(list(extents), index)
    return (tuple(extents[name] for name in loops),
            tuple((a.constant, tuple(a.coefficient(name) for name in loops)) for a in index))


def targets(found: Sequence[Binding]) -> set[str]:
    """The names of the tensors that bindings make."""
    return {b.target if isinstance(b, Copy) else b.target.name for b in found}
