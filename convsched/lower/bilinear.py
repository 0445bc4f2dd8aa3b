"""Convolution by bilinear algorithms along rows and columns: transforms, products over channels, a transform back.

    u[g, h, m, c] = sum_{r,s} A[g, r] A'[h, s] w[m, c, r, s]                        filter, when weights are bound
    v[p, q, n, c, T] = sum_{k,l} B[p, k] B'[q, l] x[n, c, K te + k - top, L tf + l - left]    input
    t[g, h, n, m, T] = sum_c u[g, h, m, c] v[g, h, n, c, T]                         product
    y[n, m, K te + i, L tf + j] = act(b[m] + sum_{p,q} C[i, p] C'[j, q] t[p, q, n, m, T])       output

A tile has K x L outputs; ``T = tf + te * (tiles in a row)`` counts tiles. Each transform goes along the columns
first, then along the rows, as a sum of its own. The stages of a group share the names of their loops: ``n te tf d``
those of the input (``d`` its channels), ``n t g h m c`` those of the products, ``n ye yf o`` those of the output
(``o`` its channels); ``k l`` run over the pixels a tile reads, ``p q`` over its products, ``i j`` over its outputs.

Many taps along one axis fold into a plane of L columns: with the tap L r + s and the output L i + j,

    y[L i + j] = sum_{r,s} w[L r + s] x[L (i + r) + (j + s)]

is a convolution of the rows i, r and the columns j, s, whose columns overlap; ``tf`` counts lines along the other
axis. Source: Agarwal and Burrus, "Fast one-dimensional digital convolution by multidimensional techniques", 1974.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from convsched.bilinear import Bilinear, Transform
from convsched.errors import LoweringError
from convsched.ir import (
    Affine,
    Const,
    Index,
    Load,
    Op,
    Program,
    Reduce,
    Stage,
    Store,
    Tensor,
    Value,
    When,
    nested,
    storage_of,
)
from convsched.lower.epilogue import activation
from convsched.names import LAYOUTS
from convsched.problem import Conv2d

Fold = Literal["", "h", "w"]


@dataclass(frozen=True)
class Plane:
    """How tiles of ``outputs`` (rows K, columns L) cover the output of a problem, one axis folded or none."""

    problem: Conv2d
    outputs: tuple[int, int]
    fold: Fold = ""

    @property
    def tiles(self) -> tuple[int, int]:
        """How many tiles there are along the rows and along the columns."""
        high, wide = self.outputs
        if not self.fold:
            return -(-self.problem.E // high), -(-self.problem.F // wide)
        along, lines = (self.problem.E, self.problem.F) if self.fold == "h" else (self.problem.F, self.problem.E)
        return -(-along // (high * wide)), lines

    def place(self, te: Affine | str | int, tf: Affine | str | int, i: str, j: str) -> tuple[Affine, Affine]:
        """The row and the column of the image where element (i, j) of tile (te, tf) lies, borders not counted."""
        high, wide = self.outputs
        row, column = Affine.of(te) * high + i, Affine.of(tf) * wide + j
        if not self.fold:
            return row, column
        along, line = row * wide + j, Affine.of(tf)
        return (along, line) if self.fold == "h" else (line, along)


def lower_bilinear(problem: Conv2d, column: Bilinear, row: Bilinear, layout: str = "nchw",
                   fold: Fold = "") -> Program:
    """The unscheduled program of a problem by an algorithm along columns of pixels and one along rows.

    Each gives the ``output.rows`` outputs of R (or S) taps; of a folded axis, L taps a row and L outputs. Raises
    LoweringError for a problem with strides, dilations or groups. Source: Lavin and Gray, "Fast Algorithms for
    Convolutional Neural Networks", 2016.
    """
    p = problem
    if p.stride != (1, 1) or p.dilation != (1, 1) or p.groups != 1:
        raise LoweringError(f"{column.name}: {p.text} has a stride, a dilation or groups; use direct")
    sizes = (column.output.rows, row.output.rows)
    plane = Plane(p, sizes, fold)
    tiles = plane.tiles
    points = (column.rank, row.rank)
    taps = (column.filter.columns, row.filter.columns)
    reads = (column.input.columns, row.input.columns)
    top, left = p.padding[:2]
    inputs = {"n": p.N, "te": tiles[0], "tf": tiles[1], "d": p.C}
    high, wide = plane.place("te", "tf", "k", "lx")
    last = {**inputs, "k": reads[0], "lx": reads[1]}
    past = [position.bounds(last)[1] - before - extent + 1 for position, before, extent
            in zip((high, wide), (top, left), (p.H, p.W), strict=True)]
    border = ((0, 0), (0, 0), (top, max(past[0], p.padding[2])), (left, max(past[1], p.padding[3])))
    tap = plane.place(0, 0, "r", "s")
    spare = tuple((0, at.bounds({"r": taps[0], "s": taps[1]})[1] + 1 - size)
                  for at, size in zip(tap, (p.R, p.S), strict=True))
    count = tiles[0] * tiles[1]

    tensors = [
        _tensor("x", "nchw", p.input_shape, "input", LAYOUTS[layout], border),
        _tensor("w", "mcrs", p.weight_shape, "weight", border=((0, 0), (0, 0), *spare)),
        _tensor("y", "nchw", p.output_shape, "output", LAYOUTS[layout]),
        _constant("A", "gr", column.filter), _constant("A'", "hs", row.filter),
        _constant("B", "pk", column.input), _constant("B'", "ql", row.input),
        _constant("C", "ip", column.output), _constant("C'", "jq", row.output),
        _tensor("a", "gsmc", (points[0], taps[1], p.M, p.C), "local"),
        _tensor("u", "ghmc", (*points, p.M, p.C), "local"),
        _tensor("bx", "plnct", (points[0], reads[1], p.N, p.C, count), "local"),
        _tensor("vx", "plnct", (points[0], reads[1], p.N, p.C, count), "local"),
        _tensor("bxb", "pqnct", (*points, p.N, p.C, count), "local"),
        _tensor("v", "ghnct", (*points, p.N, p.C, count), "local"),
        _tensor("s", "ghnmt", (*points, p.N, p.M, count), "local"),
        _tensor("t", "ghnmt", (*points, p.N, p.M, count), "local"),
        _tensor("ct", "iqnmt", (sizes[0], points[1], p.N, p.M, count), "local"),
        _tensor("yt", "iqnmt", (sizes[0], points[1], p.N, p.M, count), "local"),
        _tensor("ctc", "ijnmt", (*sizes, p.N, p.M, count), "local"),
    ]
    if p.bias:
        tensors.append(_tensor("b", "m", (p.M,), "weight"))
    if p.residual:
        tensors.append(_tensor("z", "nchw", p.output_shape, "input", LAYOUTS[layout]))

    tile = Affine.of("te") * tiles[1] + "tf"
    place = _at("n", "d", tile)
    pixel = _at("n", "d", high - top, wide - left)
    products = {"n": p.N, "t": count, "g": points[0], "h": points[1], "m": p.M}
    point = _at("g", "h", "n", "m", "t")
    outputs = {"n": p.N, "ye": tiles[0], "yf": tiles[1], "o": p.M}
    tile_out = _at("n", "o", Affine.of("ye") * tiles[1] + "yf")
    e, f = plane.place("ye", "yf", "i", "j")
    last = {**outputs, "i": sizes[0], "j": sizes[1]}
    inside = tuple(at - size for at, size in ((e, p.E), (f, p.F)) if at.bounds(last)[1] >= size)
    result: Value = Load("ctc", (*_at("i", "j"), *tile_out))
    if p.residual:
        result = Op("add", (result, Load("z", _at("n", "o", e, f))))
    stages = [
        *_sum("a", _at("g", "s", "mw", "cw"), {"g": points[0], "s": taps[1], "mw": p.M, "cw": p.C},
              {"r": taps[0]}, ("A", _at("g", "r")), ("w", _at("mw", "cw", *tap)), when="bind"),
        *_sum("u", _at("g", "h", "mw", "cw"), {"g": points[0], "h": points[1], "mw": p.M, "cw": p.C},
              {"s": taps[1]}, ("A'", _at("h", "s")), ("a", _at("g", "s", "mw", "cw")), when="bind"),
        *_sum("bx", (*_at("px", "lx"), *place),
              {**inputs, "lx": reads[1], "px": points[0]}, {"k": reads[0]}, ("B", _at("px", "k")), ("x", pixel)),
        _stage({**inputs, "lx": reads[1], "px": points[0]}, "vx", (*_at("px", "lx"), *place),
               Load("bx", (*_at("px", "lx"), *place))),
        *_sum("bxb", (*_at("p", "q"), *place), {**inputs, "p": points[0], "q": points[1]},
              {"l": reads[1]}, ("B'", _at("q", "l")), ("vx", (*_at("p", "l"), *place))),
        _stage({**inputs, "p": points[0], "q": points[1]}, "v", (*_at("p", "q"), *place),
               Load("bxb", (*_at("p", "q"), *place))),
        *_sum("s", point, products, {"c": p.C},
              ("v", _at("g", "h", "n", "c", "t")), ("u", _at("g", "h", "m", "c"))),
        _stage(products, "t", point, Load("s", point)),
        *_sum("ct", (*_at("iy", "qy"), *tile_out), {**outputs, "qy": points[1], "iy": sizes[0]},
              {"pc": points[0]}, ("C", _at("iy", "pc")), ("t", (*_at("pc", "qy"), *tile_out))),
        _stage({**outputs, "qy": points[1], "iy": sizes[0]}, "yt", (*_at("iy", "qy"), *tile_out),
               Load("ct", (*_at("iy", "qy"), *tile_out))),
        *_sum("ctc", (*_at("i", "j"), *tile_out), {**outputs, "i": sizes[0], "j": sizes[1]},
              {"qc": points[1]}, ("C'", _at("j", "qc")), ("yt", (*_at("i", "qc"), *tile_out)),
              start=Load("b", _at("o")) if p.bias else Const(0.0)),
        _stage({**outputs, "i": sizes[0], "j": sizes[1]}, "y", _at("n", "o", e, f),
               activation(p.activation, result), inside),
    ]
    return Program(p.text, tuple(tensors), tuple(stages))


def _at(*parts: Affine | str) -> Index:
    return tuple(map(Affine.of, parts))


def _tensor(name: str, letters: str, shape: tuple[int, ...], role: str, order: tuple[str, ...] | None = None,
            border: tuple[tuple[int, int], ...] = ()) -> Tensor:
    framed = border if any(map(any, border)) else ()
    return Tensor(name, tuple(letters), shape, role, storage_of(tuple(letters), shape, order), framed)  # type: ignore[arg-type]


def dense_array(transform: Transform) -> NDArray[np.float64]:
    """The product of a transform's factors; each is rounded to float64, and so is their product."""
    first, *rest = (factor.array() for factor in transform.factors)
    return reduce(lambda done, factor: factor @ done, rest, first)


def _constant(name: str, letters: str, transform: Transform) -> Tensor:
    matrix = dense_array(transform)
    return Tensor(name, tuple(letters), matrix.shape, "constant", storage_of(tuple(letters), matrix.shape),
                  values=tuple(map(float, np.ravel(matrix))))


def _stage(loops: dict[str, int], target: str, index: Index, value: Value,
           where: tuple[Affine, ...] = (), when: When = "run") -> Stage:
    return Stage(target, nested(loops, Store(target, index, value, where)), when)


def _sum(target: str, index: Index, loops: dict[str, int], inner: dict[str, int],
         factor: tuple[str, Index], other: tuple[str, Index], start: Value = Const(0.0),  # noqa: B008
         when: When = "run") -> tuple[Stage, Stage]:
    """``target = start + sum over the inner loops of factor * other``, as two stages."""
    product = Op("mul", (Load(*factor), Load(*other)))
    return (replace(_stage(loops, target, index, start, when=when), name=f"{target}.start"),
            Stage(target, nested({**loops, **inner}, Reduce(target, index, product)), when))
