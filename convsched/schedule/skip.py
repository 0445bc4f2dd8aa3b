"""The step that leaves out products with padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from convsched.ir import Affine, Leaf, Load, Op, Program, Reduce, leaves, loads, map_leaves
from convsched.ir.simplify import simplify
from convsched.schedule.checks import fail
from convsched.schedule.step import _Checked


@dataclass(frozen=True)
class Skip(_Checked):
    """Leave out products with the border of ``tensor`` along ``axes``; see ``skipping.skip``."""

    tensor: str
    axes: tuple[str, ...]

    def __str__(self) -> str:
        return f"skip {self.tensor} {' '.join(self.axes)}"


def skip(program: Program, tensor: str, axes: Sequence[str]) -> Program:
    """Sum only the products whose element of a tensor lies inside of it along some axes: others are zero.

    >>> from convsched.ir.examples import filtered, nests
    >>> print(nests(skip(filtered(4, 3, pad=1), "x", ["w"])))
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
    step = f"skip {tensor} {' '.join(axes)}"
    found = program.by_name.get(tensor)
    if found is None:
        raise fail(program, step, f"there is no tensor {tensor}", f"use one of {', '.join(program.by_name)}")
    for axis in axes:
        if axis not in found.letters:
            raise fail(program, step, f"{tensor} has no axis {axis}", f"use some of {' '.join(found.letters)}")
    positions = [found.letters.index(axis) for axis in axes]
    if not any(any(found.frame(position)) for position in positions):
        raise fail(program, step, f"{tensor} has no border along {' '.join(axes)}", "leave the step out")

    def change(leaf: Leaf) -> Leaf:
        factor = _factor(leaf, tensor)
        if factor is None:
            return leaf
        inside = [guard for position in positions
                  for guard in (Affine() - factor.index[position] - 1,
                                factor.index[position] - found.shape[position])]
        return replace(leaf, where=(*leaf.where, *inside))

    if not any(_factor(leaf, tensor) for stage in program.stages for _, leaf in leaves(stage.body)):
        raise fail(program, step, f"no sum has products with {tensor}", "skip before the tensor is staged")
    after = program.with_body(lambda body: map_leaves(body, change))
    if not any(_factor(leaf, tensor) for stage in simplify(after).stages for _, leaf in leaves(stage.body)):
        raise fail(program, step, f"all products with {tensor} are with padding", "leave the step out")
    return after


def _factor(leaf: Leaf, tensor: str) -> Load | None:
    """The load of a tensor that a statement multiplies before it adds."""
    value = leaf.value
    if not (isinstance(leaf, Reduce) and isinstance(value, Op) and value.name == "mul"):
        return None
    return next((load for load in loads(value) if load.tensor == tensor and load in value.values), None)
