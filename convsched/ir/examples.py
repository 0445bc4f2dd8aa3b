"""Tiny programs and a short print, for the doctests of the schedule steps."""

from __future__ import annotations

from convsched.ir.affine import Affine, Index
from convsched.ir.grammar import (
    Body,
    Const,
    Leaf,
    Load,
    Loop,
    Op,
    Program,
    Reduce,
    Role,
    Stage,
    Store,
    Tensor,
    storage_of,
)
from convsched.ir.text import print_nest


def nests(program: Program) -> str:
    """The printed stages, without the list of tensors.

    >>> print(nests(product(8, 4)))
    conv:
      for m < 8: for c < 4:
        y[m] += x[c] * w[m, c]
    """
    return "\n".join(print_nest(program).split("\n\n")[1:])


def product(m: int, c: int) -> Program:
    """A matrix by a vector."""
    body = nest({"m": m, "c": c}, Reduce("y", at("m"), _times(at("c"), at("m", "c"))))
    tensors = (tensor("x", "c", (c,), "input"), tensor("w", "mc", (m, c), "weight"),
               tensor("y", "m", (m,), "output"))
    return Program("product", tensors, (Stage("conv", body),))


def scaled(m: int, e: int, f: int) -> Program:
    """A 1x1 filter for each of ``m`` maps over an ``e`` x ``f`` image."""
    body = nest({"m": m, "e": e, "f": f}, Store("y", at("m", "e", "f"), _times(at("e", "f"), at("m"))))
    tensors = (tensor("x", "hw", (e, f), "input"), tensor("w", "m", (m,), "weight"),
               tensor("y", "mhw", (m, e, f), "output"))
    return Program("scaled", tensors, (Stage("conv", body),))


def filtered(f: int, s: int, pad: int = 0) -> Program:
    """A row of ``f`` outputs by a filter of ``s`` taps, then ReLU; ``t`` is the sum. ``pad`` zeros a side."""
    outputs, read = at("f"), (Affine.of("f") + "s" - pad,)
    border = ((pad, pad),) if pad else ()
    tensors = (tensor("x", "w", (f + s - 1 - 2 * pad,), "input", border), tensor("w", "s", (s,), "weight"),
               tensor("y", "w", (f,), "output"), tensor("t", "w", (f,), "local"))
    stages = (Stage("init", nest({"f": f}, Store("t", outputs, Const(0.0)))),
              Stage("conv", nest({"f": f, "s": s}, Reduce("t", outputs, _times(read, at("s"))))),
              Stage("epilogue", nest({"f": f}, Store("y", outputs, Op("max", (Const(0.0),
                                                                             Load("t", outputs)))))))
    return Program("filtered", tensors, stages)


def unfolded(e: int, f: int) -> Program:
    """Every other row of an image, by way of a copy ``i``, times a number."""
    read = (Affine.of("e") * 2, Affine.of("f"))
    tensors = (tensor("x", "hw", (2 * e, f), "input"), tensor("w", "", (), "weight"),
               tensor("i", "p", (e * f,), "local"), tensor("y", "p", (e * f,), "output"))
    stages = (Stage("i", nest({"e": e, "f": f}, Store("i", (Affine.of("e") * f + "f",), Load("x", read)))),
              Stage("conv", nest({"p": e * f}, Store("y", at("p"), Op("mul", (Load("i", at("p")), Load("w", ())))))))
    return Program("unfolded", tensors, stages)


def tensor(name: str, letters: str, shape: tuple[int, ...], role: Role,
           border: tuple[tuple[int, int], ...] = ()) -> Tensor:
    """A densely stored tensor with one-letter axes."""
    return Tensor(name, tuple(letters), shape, role, storage_of(tuple(letters), shape), border)


def nest(extents: dict[str, int], leaf: Leaf) -> Body:
    """Perfectly nested loops around a statement."""
    body: Body = (leaf,)
    for var, extent in reversed(extents.items()):
        body = (Loop(var, extent, body),)
    return body


def at(*names: str) -> Index:
    """The index of loop variables."""
    return tuple(Affine.of(name) for name in names)


def _times(x: Index, w: Index) -> Op:
    return Op("mul", (Load("x", x), Load("w", w)))
