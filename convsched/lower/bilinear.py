"""Convolution by bilinear algorithms along rows and columns: transforms, products over channels, a transform back.

    u[g, h, m, c] = sum_{r,s} A[g, r] A'[h, s] w[m, c, r, s]                        filter, when weights are bound
    v[p, q, n, c, T] = sum_{k,l} B[p, k] B'[q, l] x[n, c, K te + k - top, L tf + l - left]    input
    t[g, h, n, m, T] = sum_c u[g, h, m, c] v[g, h, n, c, T]                         product
    y[n, m, K te + i, L tf + j] = act(b[m] + sum_{p,q} C[i, p] C'[j, q] t[p, q, n, m, T])       output

A tile has K x L outputs; ``T = tf + te * (tiles in a row)`` counts tiles. Each transform goes along the columns
first, then along the rows, and applies its sparse factors one after the other, each a sum of its own: B = B2 B1 gives
``bx1 = B1 x`` and ``bx2 = B2 bx1``. The stages of a group share the names of their loops: ``n te tf d`` those of the
input (``d`` its channels), ``n t g h m c`` those of the products, ``n ye yf o`` those of the output (``o`` its
channels). ``k l`` run over the pixels a tile reads, ``p q`` over its products, ``i j`` over its outputs.

A group of channels is a convolution of its own, and so is each of the d x d phases of the pixels of a dilated one:
y[d i + phase] = sum_k w[k] x[d (i + k) + phase]. The loops ``group phase_e phase_f`` go over these planes, which the
axis ``z`` of tensors counts. Strides are in the matrices: tiles of K outputs lie K times the stride apart in the input.

Many taps along one axis fold into a plane of L columns: with the tap L r + s and the output L i + j,

    y[L i + j] = sum_{r,s} w[L r + s] x[L (i + r) + (j + s)]

is a convolution of the rows i, r and the columns j, s, whose columns overlap; ``tf`` counts lines along the other
axis. Source: Agarwal and Burrus, "Fast one-dimensional digital convolution by multidimensional techniques", 1974.
"""

from __future__ import annotations

from collections.abc import Callable
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
        """How many tiles there are along the rows and along the columns of a plane."""
        high, wide = self.outputs
        if not self.fold:
            (down, across), (E, F) = self.problem.dilation, (self.problem.E, self.problem.F)
            return -(-E // (down * high)), -(-F // (across * wide))
        along, lines = (self.problem.E, self.problem.F) if self.fold == "h" else (self.problem.F, self.problem.E)
        return -(-along // (high * wide)), lines

    @property
    def loops(self) -> dict[str, int]:
        """The loops over planes, those of more than one iteration."""
        extents = dict(zip(("group", "phase_e", "phase_f"), (self.problem.groups, *self.problem.dilation), strict=True))
        return {loop: extent for loop, extent in extents.items() if extent > 1}

    @property
    def number(self) -> Affine:
        """The number of a plane."""
        total = Affine.of(0)
        for loop, extent in self.loops.items():
            total = total * extent + loop
        return total

    def channel(self, name: str, count: int) -> Affine:
        """A channel of the plane's group, which has ``count``."""
        return Affine.of("group") * count + name if "group" in self.loops else Affine.of(name)

    def place(self, te: Affine | str | int, tf: Affine | str | int, i: str, j: str,
              steps: tuple[int, int] = (1, 1)) -> tuple[Affine, Affine]:
        """The row and the column of the image where element (i, j) of tile (te, tf) lies, borders not counted; tiles
        are ``steps`` times their outputs apart."""
        high, wide = self.outputs
        row, column = Affine.of(te) * (high * steps[0]) + i, Affine.of(tf) * (wide * steps[1]) + j
        if not self.fold:
            down, across = self.problem.dilation
            return (row * down + ("phase_e" if down > 1 else 0), column * across + ("phase_f" if across > 1 else 0))
        along, line = row * wide + j, Affine.of(tf)
        return (along, line) if self.fold == "h" else (line, along)


@dataclass(frozen=True)
class Shape:
    """What a schedule needs to know of an algorithm along columns and rows: a tile's ``outputs`` along both, its
    products (``points``), the pixels of a row that it ``reads``, and how many sparse factors each transform has:
    those of columns and rows of the input, then of the output."""

    outputs: tuple[int, int]
    points: tuple[int, int]
    reads: int
    factors: tuple[int, int, int, int]
    fold: Fold = ""

    @staticmethod
    def of(column: Bilinear, row: Bilinear, fold: Fold = "") -> Shape:
        """The shape of two algorithms."""
        transforms = (column.input, row.input, column.output, row.output)
        counts: tuple[int, int, int, int] = tuple(len(of.factors) for of in transforms)  # type: ignore[assignment]
        return Shape((column.output.rows, row.output.rows), (column.rank, row.rank), row.input.columns, counts, fold)


def lower_bilinear(problem: Conv2d, column: Bilinear, row: Bilinear, layout: str = "nchw",
                   fold: Fold = "") -> Program:
    """The unscheduled program of a problem by an algorithm along columns of pixels and one along rows.

    Each gives the ``output.rows`` outputs of R (or S) taps at the problem's stride; of a folded axis, L taps a row and
    L outputs. Raises LoweringError for algorithms that do not fit, and a stride beside a dilation along one axis.
    Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016.
    """
    p = problem
    sizes = (column.output.rows, row.output.rows)
    plane = Plane(p, sizes, fold)
    tiles, outer = plane.tiles, plane.loops
    points = (column.rank, row.rank)
    taps = (column.filter.columns, row.filter.columns)
    reads = (column.input.columns, row.input.columns)
    _require_fit(p, sizes, taps, reads, fold)
    channels, maps, planes = p.C // p.groups, p.M // p.groups, plane.number.bounds(outer)[1] + 1
    top, left = p.padding[:2]
    inputs = {"n": p.N, **outer, "te": tiles[0], "tf": tiles[1], "d": channels}
    high, wide = plane.place("te", "tf", "k1", "lx", p.stride)
    last = {**inputs, "k1": reads[0], "lx": reads[1]}
    past = [position.bounds(last)[1] - before - extent + 1 for position, before, extent
            in zip((high, wide), (top, left), (p.H, p.W), strict=True)]
    border = ((0, 0), (0, 0), (top, max(past[0], p.padding[2])), (left, max(past[1], p.padding[3])))
    tap = Plane(replace(p, dilation=(1, 1)), sizes, fold).place(0, 0, "r", "s")
    spare = tuple((0, at.bounds({"r": taps[0], "s": taps[1]})[1] + 1 - size)
                  for at, size in zip(tap, (p.R, p.S), strict=True))
    count = tiles[0] * tiles[1]

    tile = Affine.of("te") * tiles[1] + "tf"
    place = (*_at("n"), plane.number, *_at("d", tile))
    pixel = (*_at("n"), plane.channel("d", channels), high - top, wide - left)
    products = {"n": p.N, **outer, "t": count, "g": points[0], "h": points[1], "m": maps}
    point = (*_at("g", "h", "n"), plane.number, *_at("m", "t"))
    outputs = {"n": p.N, **outer, "ye": tiles[0], "yf": tiles[1], "o": maps}
    tile_out = (*_at("n"), plane.number, *_at("o", Affine.of("ye") * tiles[1] + "yf"))
    map_out, group = plane.channel("o", maps), _at("group" if p.groups > 1 else 0)
    e, f = plane.place("ye", "yf", "i", "j")
    last = {**outputs, "i": sizes[0], "j": sizes[1]}
    inside = tuple(at - size for at, size in ((e, p.E), (f, p.F)) if at.bounds(last)[1] >= size)
    deep, deep_out = (p.N, planes, channels, count), (p.N, planes, maps, count)
    bind = {"zw": p.groups, "mw": maps, "cw": channels}
    weight = (Affine.of("zw") * maps + "mw", Affine.of("cw"), *tap)

    tensors = [
        _tensor("x", "nchw", p.input_shape, "input", LAYOUTS[layout], border),
        _tensor("w", "mcrs", p.weight_shape, "weight", border=((0, 0), (0, 0), *spare)),
        _tensor("y", "nchw", p.output_shape, "output", LAYOUTS[layout]),
        _constant("A", "gr", dense_array(column.filter)), _constant("A'", "hs", dense_array(row.filter)),
        _tensor("a", "gszmc", (points[0], taps[1], p.groups, maps, channels), "local"),
        _tensor("u", "ghzmc", (*points, p.groups, maps, channels), "local"),
        _tensor("vx", "plnzct", (points[0], reads[1], *deep), "local"),
        _tensor("v", "ghnzct", (*points, *deep), "local"),
        _tensor("s", "ghnzmt", (*points, *deep_out), "local"),
        _tensor("t", "ghnzmt", (*points, *deep_out), "local"),
        _tensor("yt", "iqnzmt", (sizes[0], points[1], *deep_out), "local"),
    ]
    if p.bias:
        tensors.append(_tensor("b", "m", (p.M,), "weight"))
    if p.residual:
        tensors.append(_tensor("z", "nchw", p.output_shape, "input", LAYOUTS[layout]))

    def transform(name: str, constant: str, of: Transform, loops: dict[str, int], names: tuple[str, str],
                  index: Callable[[str], Index], source: tuple[str, Index], letters: str, shape: tuple[int, ...],
                  start: Value = Const(0.0)) -> list[Stage]:  # noqa: B008
        """A sum for each factor: name1 = constant1 source, name2 = constant2 name1, ..."""
        stages: list[Stage] = []
        for number, factor in enumerate(of.factors, 1):
            result, (to, over) = f"{name}{number}", (f"{names[0]}{number}", f"{names[1]}{number}")
            rows = len(factor.rows)
            tensors.append(_constant(f"{constant}{number}", letters[0] + names[1][0], factor.array()))
            tensors.append(_tensor(result, letters, (rows, *shape), "local"))
            read = source if number == 1 else (f"{name}{number - 1}", index(over))
            stages += _sum(result, index(to), {**loops, to: rows}, {over: factor.columns},
                           (f"{constant}{number}", _at(to, over)), read,
                           start if number == len(of.factors) else Const(0.0))
        return stages

    bx, bxb, ct, ctc = (f"{name}{len(of.factors)}" for name, of in (
        ("bx", column.input), ("bxb", row.input), ("ct", column.output), ("ctc", row.output)))
    result: Value = Load(ctc, (*_at("j", "i"), *tile_out))
    if p.residual:
        result = Op("add", (result, Load("z", (*_at("n"), map_out, e, f))))
    stages = [
        *_sum("a", _at("g", "s", *bind), {"g": points[0], "s": taps[1], **bind}, {"r": taps[0]},
              ("A", _at("g", "r")), ("w", weight), when="bind"),
        *_sum("u", _at("g", "h", *bind), {"g": points[0], "h": points[1], **bind}, {"s": taps[1]},
              ("A'", _at("h", "s")), ("a", _at("g", "s", *bind)), when="bind"),
        *transform("bx", "B", column.input, {**inputs, "lx": reads[1]}, ("px", "k"),
                   lambda at: (*_at(at, "lx"), *place), ("x", pixel), "plnzct", (reads[1], *deep)),
        _stage({**inputs, "lx": reads[1], "px": points[0]}, "vx", (*_at("px", "lx"), *place),
               Load(bx, (*_at("px", "lx"), *place))),
        *transform("bxb", "B'", row.input, {**inputs, "p": points[0]}, ("q", "l"),
                   lambda at: (*_at(at, "p"), *place), ("vx", (*_at("p", "l1"), *place)), "qpnzct", (points[0], *deep)),
        _stage({**inputs, "p": points[0], "q": points[1]}, "v", (*_at("p", "q"), *place),
               Load(bxb, (*_at("q", "p"), *place))),
        *_sum("s", point, products, {"c": channels},
              ("v", (*_at("g", "h", "n"), plane.number, *_at("c", "t"))),
              ("u", (*_at("g", "h"), *group, *_at("m", "c")))),
        _stage(products, "t", point, Load("s", point)),
        *transform("ct", "C", column.output, {**outputs, "qy": points[1]}, ("iy", "pc"),
                   lambda at: (*_at(at, "qy"), *tile_out), ("t", (*_at("pc1", "qy"), *tile_out)), "iqnzmt",
                   (points[1], *deep_out)),
        _stage({**outputs, "qy": points[1], "iy": sizes[0]}, "yt", (*_at("iy", "qy"), *tile_out),
               Load(ct, (*_at("iy", "qy"), *tile_out))),
        *transform("ctc", "C'", row.output, {**outputs, "i": sizes[0]}, ("j", "qc"),
                   lambda at: (*_at(at, "i"), *tile_out), ("yt", (*_at("i", "qc1"), *tile_out)), "jinzmt",
                   (sizes[0], *deep_out), start=Load("b", (map_out,)) if p.bias else Const(0.0)),
        _stage({**outputs, "i": sizes[0], "j": sizes[1]}, "y", (*_at("n"), map_out, e, f),
               activation(p.activation, result), inside),
    ]
    return Program(p.text, tuple(tensors), tuple(stages))


def _require_fit(p: Conv2d, outputs: tuple[int, int], taps: tuple[int, int], reads: tuple[int, int],
                 fold: Fold) -> None:
    """Raise LoweringError unless tiles of such sizes compute the problem."""
    if any(s > 1 and d > 1 for s, d in zip(p.stride, p.dilation, strict=True)):
        raise LoweringError(f"{p.text} has a stride and a dilation along one axis; use direct")
    if fold and (p.stride != (1, 1) or p.dilation != (1, 1)):
        raise LoweringError(f"{p.text} has a stride or a dilation, and folds to no plane; use direct")
    needed = tuple((k - 1) * s + r for k, s, r in zip(outputs, p.stride, taps, strict=True))
    if reads != needed or (not fold and taps != (p.R, p.S)):
        raise LoweringError(f"an algorithm of {taps} taps that reads {reads} pixels for {outputs} outputs does not "
                            f"compute {p.text}: give one of {(p.R, p.S)} taps that reads {needed}")


def _at(*parts: Affine | str | int) -> Index:
    return tuple(map(Affine.of, parts))


def _tensor(name: str, letters: str, shape: tuple[int, ...], role: str, order: tuple[str, ...] | None = None,
            border: tuple[tuple[int, int], ...] = ()) -> Tensor:
    framed = border if any(map(any, border)) else ()
    return Tensor(name, tuple(letters), shape, role, storage_of(tuple(letters), shape, order), framed)  # type: ignore[arg-type]


def dense_array(transform: Transform) -> NDArray[np.float64]:
    """The product of a transform's factors; each is rounded to float64, and so is their product."""
    first, *rest = (factor.array() for factor in transform.factors)
    return reduce(lambda done, factor: factor @ done, rest, first)


def _constant(name: str, letters: str, matrix: NDArray[np.float64]) -> Tensor:
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
