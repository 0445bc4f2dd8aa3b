"""``skip``: leave out products with padding."""

from __future__ import annotations

from dataclasses import dataclass, replace

from convsched.ir import Affine, Leaf, Load, Op, Program, Reduce, map_leaves
from convsched.ir.simplify import simplify
from convsched.schedule.checks import fail
from convsched.schedule.step import Step


@dataclass(frozen=True)
class Skip(Step):
    """Sum only the products whose element of a tensor lies inside of it along some axes: others are zero.

    >>> from convsched.ir.examples import filtered, nests
    >>> print(nests(Skip("x", ("w",)).apply(filtered(4, 3, pad=1))))
    init:
      for f < 4:
        t[f] = 0
    conv:
      for f < 4: for s < 3:
        if f + s > 0 and f + s < 5: t[f] += x[f + s - 1] * w[s]
    epilogue:
      for f < 4:
        y[f] = max(0, t[f])

    A product of padding with a weight that is not finite is left out too, and adds no NaN.
    """

    GRAMMAR = "skip TENSOR AXIS ..."
    tensor: str
    axes: tuple[str, ...]

    def apply(self, program: Program) -> Program:
        tensor = self.tensor
        found = program.by_name.get(tensor)
        if found is None:
            raise fail(program, self, f"there is no tensor {tensor}", f"use one of {', '.join(program.by_name)}")
        for axis in self.axes:
            if axis not in found.letters:
                raise fail(program, self, f"{tensor} has no axis {axis}", f"use some of {' '.join(found.letters)}")
        positions = [found.letters.index(axis) for axis in self.axes]
        if not any(any(found.frame(position)) for position in positions):
            raise fail(program, self, f"{tensor} has no border along {' '.join(self.axes)}", "leave the step out")

        def change(leaf: Leaf) -> Leaf:
            factor = _factor(leaf, tensor)
            if factor is None:
                return leaf
            inside = [guard for position in positions
                      for guard in (Affine() - factor.index[position] - 1,
                                    factor.index[position] - found.shape[position])]
            return replace(leaf, where=(*leaf.where, *inside))

        if not _has_product(program, tensor):
            raise fail(program, self, f"no sum has products with {tensor}", "skip before the tensor is staged")
        after = program.with_body(lambda body: map_leaves(body, change))
        if not _has_product(simplify(after), tensor):
            raise fail(program, self, f"all products with {tensor} are with padding", "leave the step out")
        return after


def _has_product(program: Program, tensor: str) -> bool:
    """Whether a sum has products with a tensor."""
    return any(_factor(leaf, tensor) for stage in program.stages for leaf in stage.leaves)


def _factor(leaf: Leaf, tensor: str) -> Load | None:
    """The load of a tensor that a statement multiplies before it adds."""
    value = leaf.value
    if not (isinstance(leaf, Reduce) and isinstance(value, Op) and value.name == "mul"):
        return None
    return next((load for load in leaf.loads if load.tensor == tensor and load in value.values), None)
