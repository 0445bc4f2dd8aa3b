"""``fuse``: make one loop of two, by making one axis of two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from convsched.ir import (
    Affine,
    Body,
    Index,
    Leaf,
    Load,
    Loop,
    Program,
    Tensor,
    find_loops,
    leaves,
    map_leaves,
    map_loops,
    map_value,
    storage_of,
)
from convsched.ir.walk import indices
from convsched.schedule.checks import checked, fail, require_loop, require_new
from convsched.schedule.step import Step


@dataclass(frozen=True)
class Fuse(Step):
    """Make one loop of two perfectly nested ones that walk whole adjacent axes of every tensor they index.

    >>> from convsched.ir.examples import nests, scaled
    >>> print(nests(scaled(8, 7, 9)))
    conv:
      for m < 8: for e < 7: for f < 9:
        y[m, e, f] = x[e, f] * w[m]
    >>> print(nests(Fuse("e", "f", "p").apply(scaled(8, 7, 9))))
    conv:
      for m < 8: for p < 63:
        y[m, p] = x[p] * w[m]
    """

    GRAMMAR = "fuse FIRST SECOND -> FUSED"
    first: str
    second: str
    fused: str

    def apply(self, program: Program) -> Program:
        require_loop(program, self, self.first)
        require_loop(program, self, self.second)
        if self.first == self.second:
            raise fail(program, self, f"{self.first} is named twice", "name two loops", self.first)
        require_new(program, self, (self.fused,), self.first)
        merged = self._merged_axes(program)

        def change(found: Loop) -> Body:
            if len(found.body) != 1 or not isinstance(found.body[0], Loop) or found.body[0].var != self.second:
                raise fail(program, self, f"{self.second} is not directly inside {self.first}", "reorder first",
                           self.first)
            within = found.body[0]
            return (Loop(self.fused, found.extent * within.extent, within.body, found.kind),)

        changed = program.with_body(lambda body: map_leaves(
            map_loops(body, self.first, change), lambda leaf: _merge_leaf(leaf, merged, self.fused)))
        for name, axis in merged.items():
            if axis >= 0:
                changed = changed.with_tensor(self._merge_axes(program, program.tensor(name), axis))
        return checked(program, self, changed)

    def _merged_axes(self, program: Program) -> dict[str, int]:
        """The first of the two axes of each tensor, -1 where neither loop indexes it."""
        first, second = self.first, self.second
        outer, inner = Affine.of(first), Affine.of(second)
        merged: dict[str, int] = {}
        for stage in program.stages:
            for name in (first, second):
                if any(loop.kind != "serial" for loop in find_loops(stage.body, name)):
                    raise fail(program, self, f"{name} is not serial any more", "fuse first", name)
            for around, leaf in leaves(stage.body):
                extents = {loop.var: loop.extent for loop in around}
                if (first in extents) != (second in extents):
                    only, missing = (first, second) if first in extents else (second, first)
                    raise fail(program, self, f"stage {stage.name} has {only} without {missing}",
                               "fuse loops that are always together", only)
                if any(v in w.variables for w in leaf.where for v in (first, second)):
                    raise fail(program, self, "a guard depends on one of them", "fuse before splitting", first)
                for name, index in indices(leaf):
                    axis = _merging_axis(program.tensor(name), index, outer, inner, extents)
                    if axis == -2 or merged.setdefault(name, axis) != axis:
                        raise fail(program, self, f"{name} is not indexed by both over whole adjacent axes",
                                   "fuse only where the filter is 1x1, stride 1, without padding", first)
        return merged

    def _merge_axes(self, program: Program, tensor: Tensor, axis: int) -> Tensor:
        order = list(tensor.order)
        first, second = tensor.letters[axis], tensor.letters[axis + 1]
        if order.count(first) != 1 or order.count(second) != 1 or order.index(second) != order.index(first) + 1:
            raise fail(program, self, f"{tensor.name} is stored as {' '.join(order)}", "fuse adjacent axes",
                       self.first)
        order.remove(second)
        letters = tensor.letters[:axis + 1] + tensor.letters[axis + 2:]
        shape = (*tensor.shape[:axis], tensor.shape[axis] * tensor.shape[axis + 1], *tensor.shape[axis + 2:])
        border = tensor.border[:axis + 1] + tensor.border[axis + 2:]
        return replace(tensor, letters=letters, shape=shape, border=border,
                       storage=storage_of(letters, shape, tuple(order)))


def _merging_axis(tensor: Tensor, index: Index, outer: Affine, inner: Affine,
                  extents: Mapping[str, int]) -> int:
    """The axis that ``outer`` walks with ``inner`` on the next; -1 if neither is used, -2 if not so."""
    names = outer.variables | inner.variables
    index = tuple(a.substitute({v: Affine() for v in a.variables if extents[v] == 1 and v not in names})
                  for a in index)
    used = [axis for axis, a in enumerate(index) if a.variables & names]
    if not used:
        return -1
    if len(used) != 2 or used[1] != used[0] + 1 or index[used[0]] != outer or index[used[1]] != inner:
        return -2
    whole = all(tensor.shape[axis] == extents[next(iter(index[axis].variables))] for axis in used)
    return used[0] if whole and not any(tensor.frame(axis) != (0, 0) for axis in used) else -2


def _merge_leaf(leaf: Leaf, merged: Mapping[str, int], fused: str) -> Leaf:
    def index(name: str, old: Index) -> Index:
        axis = merged.get(name, -1)
        return old if axis < 0 else (*old[:axis], Affine.of(fused), *old[axis + 2:])
    return replace(leaf, index=index(leaf.tensor, leaf.index),
                   value=map_value(leaf.value, lambda a: Load(a.tensor, index(a.tensor, a.index))))
