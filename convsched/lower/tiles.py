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
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from convsched.algebra.bilinear import Bilinear, Transform
from convsched.errors import LoweringError
from convsched.ir import Affine, Index, Load, Program, Stage, Store, Tensor, Value, nested
from convsched.lazy import cached_property
from convsched.lower.epilogue import Epilogue
from convsched.lower.plane import Fold, Plane
from convsched.lower.stages import ZERO, at, copy, sum_of_products, tensor_of
from convsched.problem import Conv2d
from convsched.problem.layout import LAYOUTS


def lower_bilinear(problem: Conv2d, column: Bilinear, row: Bilinear, layout: str = "nchw",
                   fold: Fold = "") -> Program:
    """The unscheduled program of a problem by an algorithm along columns of pixels and one along rows.

    Each gives the ``output.rows`` outputs of R (or S) taps at the problem's stride; of a folded axis, L taps a row and
    L outputs. Raises LoweringError for algorithms that do not fit, and for a stride beside a dilation along one axis.
    Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016.
    """
    lowering = _Lowering(problem, column, row, layout, fold)
    lowering.require_fit()
    made = (lowering.filter(), lowering.input(), lowering.product(), lowering.output())
    return Program(problem.text, tuple(tensor for part in made for tensor in part.tensors),
                   tuple(stage for part in made for stage in part.stages))


class _Part(NamedTuple):
    """Some stages, and the tensors that they are the first to use."""

    tensors: list[Tensor]
    stages: list[Stage]


@dataclass(frozen=True)
class _Lowering:
    """What the stages have in common."""

    problem: Conv2d
    column: Bilinear
    row: Bilinear
    layout: str
    fold: Fold

    @property
    def sizes(self) -> tuple[int, int]:
        """Outputs of a tile along columns and rows."""
        return self.column.output.rows, self.row.output.rows

    @property
    def points(self) -> tuple[int, int]:
        """Products of a tile."""
        return self.column.rank, self.row.rank

    @property
    def taps(self) -> tuple[int, int]:
        return self.column.filter.columns, self.row.filter.columns

    @property
    def reads(self) -> tuple[int, int]:
        """Pixels that a tile reads."""
        return self.column.input.columns, self.row.input.columns

    @cached_property
    def plane(self) -> Plane:
        return Plane(self.problem, self.sizes, self.fold)

    @property
    def tiles(self) -> int:
        """Tiles of a plane."""
        return self.plane.tiles[0] * self.plane.tiles[1]

    @property
    def channels(self) -> int:
        """Input channels of a group."""
        return self.problem.C // self.problem.groups

    @property
    def maps(self) -> int:
        """Output channels of a group."""
        return self.problem.M // self.problem.groups

    def deep(self, channels: int) -> tuple[int, ...]:
        """The axes n, z, channels and t of a tensor of transformed data."""
        planes = self.plane.number.bounds(self.plane.loops)[1] + 1
        return self.problem.N, planes, channels, self.tiles

    def tile(self, channel: str, te: str, tf: str) -> Index:
        """The place of a tile along these axes."""
        tile = Affine.of(te) * self.plane.tiles[1] + tf
        return (*at("n"), self.plane.number, *at(channel, tile))

    def loops(self, **inner: int) -> dict[str, int]:
        """The loops of stages: over images and planes, then the given ones."""
        return {"n": self.problem.N, **self.plane.loops, **inner}

    def require_fit(self) -> None:
        """Raise LoweringError unless the algorithms compute the problem."""
        p = self.problem
        if any(s > 1 and d > 1 for s, d in zip(p.stride, p.dilation, strict=True)):
            raise LoweringError(f"{p.text} has a stride and a dilation along one axis; use direct")
        if self.fold and (p.stride != (1, 1) or p.dilation != (1, 1)):
            raise LoweringError(f"{p.text} has a stride or a dilation, and cannot be folded to a plane; use direct")
        needed = tuple((k - 1) * s + r for k, s, r in zip(self.sizes, p.stride, self.taps, strict=True))
        if self.reads != needed or (not self.fold and self.taps != (p.R, p.S)):
            raise LoweringError(f"an algorithm of {self.taps} taps that reads {self.reads} pixels for {self.sizes} "
                                f"outputs does not compute {p.text}: give one of {(p.R, p.S)} taps that reads {needed}")

    def filter(self) -> _Part:
        """``u`` of ``w``, when weights are bound."""
        p = self.problem
        tap = Plane(replace(p, dilation=(1, 1)), self.sizes, self.fold).place(0, 0, "r", "s")
        spare = tuple((0, position.bounds({"r": self.taps[0], "s": self.taps[1]})[1] + 1 - size)
                      for position, size in zip(tap, (p.R, p.S), strict=True))
        channels = {"zw": p.groups, "mw": self.maps, "cw": self.channels}
        weight = (Affine.of("zw") * channels["mw"] + "mw", Affine.of("cw"), *tap)
        (g, h), s = self.points, self.taps[1]
        tensors = [
            tensor_of("w", "mcrs", p.weight_shape, "weight", border=((0, 0), (0, 0), *spare)),
            _constant("A", "gr", dense_array(self.column.filter)), _constant("A'", "hs", dense_array(self.row.filter)),
            tensor_of("a", "gszmc", (g, s, *channels.values()), "local"),
            tensor_of("u", "ghzmc", (g, h, *channels.values()), "local"),
        ]
        stages = [
            *sum_of_products("a", at("g", "s", *channels), {"g": g, "s": s, **channels}, {"r": self.taps[0]},
                  ("A", at("g", "r")), ("w", weight), when="bind"),
            *sum_of_products("u", at("g", "h", *channels), {"g": g, "h": h, **channels}, {"s": s},
                  ("A'", at("h", "s")), ("a", at("g", "s", *channels)), when="bind"),
        ]
        return _Part(tensors, stages)

    def input(self) -> _Part:
        """``v`` of ``x``, by way of ``vx``, whose columns are transformed."""
        p, (top, left) = self.problem, self.problem.padding[:2]
        loops = self.loops(te=self.plane.tiles[0], tf=self.plane.tiles[1], d=self.channels)
        place, deep = self.tile("d", "te", "tf"), self.deep(self.channels)
        high, wide = self.plane.place("te", "tf", "k1", "lx", p.stride)
        columns, rows, count = {**loops, "lx": self.reads[1]}, {**loops, "p": self.points[0]}, self.reads[1]
        last = {**columns, "k1": self.reads[0]}
        past = [position.bounds(last)[1] - before - extent + 1 for position, before, extent
                in zip((high, wide), (top, left), (p.H, p.W), strict=True)]
        border = ((0, 0), (0, 0), (top, max(past[0], p.padding[2])), (left, max(past[1], p.padding[3])))
        channel = self.plane.channel("d", self.channels)
        pixel = (*at("n"), channel, high - top, wide - left)
        bx = _factors("bx", "B", self.column.input, columns, ("px", "k"), lambda row: (*at(row, "lx"), *place),
                      ("x", pixel), "plnzct", (count, *deep))
        bxb = _factors("bxb", "B'", self.row.input, rows, ("q", "l"), lambda row: (*at(row, "p"), *place),
                       ("vx", (*at("p", "l1"), *place)), "qpnzct", (self.points[0], *deep))
        return _Part([
            tensor_of("x", "nchw", p.input_shape, "input", LAYOUTS[self.layout], border), *bx.tensors, *bxb.tensors,
            tensor_of("vx", "plnzct", (self.points[0], count, *deep), "local"),
            tensor_of("v", "ghnzct", (*self.points, *deep), "local"),
        ], [
            *bx.stages, copy("vx", (*at("px", "lx"), *place), bx.tensors[-1].name, (*at("px", "lx"), *place),
                              {**columns, "px": self.points[0]}),
            *bxb.stages, copy("v", (*at("p", "q"), *place), bxb.tensors[-1].name, (*at("q", "p"), *place),
                               {**rows, "q": self.points[1]}),
        ])

    def product(self) -> _Part:
        """``t`` of ``u`` and ``v``."""
        g, h = self.points
        loops = self.loops(t=self.tiles, g=g, h=h, m=self.maps)
        point = (*at("g", "h", "n"), self.plane.number, *at("m", "t"))
        group = "group" if self.problem.groups > 1 else 0
        shape = (g, h, *self.deep(self.maps))
        return _Part([tensor_of("s", "ghnzmt", shape, "local"), tensor_of("t", "ghnzmt", shape, "local")], [
            *sum_of_products("s", point, loops, {"c": self.channels},
                  ("v", (*at("g", "h", "n"), self.plane.number, *at("c", "t"))),
                  ("u", at("g", "h", group, "m", "c"))),
            copy("t", point, "s", point, loops),
        ])

    def output(self) -> _Part:
        """``y`` of ``t``, by way of ``yt``, whose columns are transformed."""
        p, (high, wide) = self.problem, self.sizes
        loops = self.loops(ye=self.plane.tiles[0], yf=self.plane.tiles[1], o=self.maps)
        place, deep = self.tile("o", "ye", "yf"), self.deep(self.maps)
        channel = self.plane.channel("o", self.maps)
        e, f = self.plane.place("ye", "yf", "i", "j")
        epilogue, y = Epilogue(p), tensor_of("y", "nchw", p.output_shape, "output", LAYOUTS[self.layout])
        columns, rows = {**loops, "qy": self.points[1]}, {**loops, "i": high}
        ct = _factors("ct", "C", self.column.output, columns, ("iy", "pc"), lambda row: (*at(row, "qy"), *place),
                      ("t", (*at("pc1", "qy"), *place)), "iqnzmt", (self.points[1], *deep))
        ctc = _factors("ctc", "C'", self.row.output, rows, ("j", "qc"), lambda row: (*at(row, "i"), *place),
                       ("yt", (*at("i", "qc1"), *place)), "jinzmt", (high, *deep),
                       start=epilogue.start(channel))
        tensors = [*ct.tensors, *ctc.tensors, tensor_of("yt", "iqnzmt", (high, self.points[1], *deep), "local"),
                   y, *epilogue.tensors(y)]
        point, last = (*at("n"), channel, e, f), {**rows, "j": wide}
        result = epilogue.finish(Load(ctc.tensors[-1].name, (*at("j", "i"), *place)), point)
        inside = tuple(position - size for position, size in ((e, p.E), (f, p.F)) if position.bounds(last)[1] >= size)
        return _Part(tensors, [
            *ct.stages, copy("yt", (*at("iy", "qy"), *place), ct.tensors[-1].name, (*at("iy", "qy"), *place),
                              {**columns, "iy": high}),
            *ctc.stages, Stage("y", nested(last, Store("y", point, result, inside))),
        ])


def _factors(name: str, constant: str, of: Transform, loops: dict[str, int], names: tuple[str, str],
             index: Callable[[str], Index], source: tuple[str, Index], letters: str, shape: tuple[int, ...],
             start: Value = ZERO) -> _Part:
    """A sum for each factor, name1 = constant1 source, name2 = constant2 name1, ...; the last tensor is the result.

    ``names`` are those of the loops over a factor's rows and columns; ``index`` places a row in the result.
    """
    tensors: list[Tensor] = []
    stages: list[Stage] = []
    for number, factor in enumerate(of.factors, 1):
        result, (to, over) = f"{name}{number}", (f"{names[0]}{number}", f"{names[1]}{number}")
        rows = len(factor.rows)
        tensors += [_constant(f"{constant}{number}", letters[0] + names[1][0], factor.array()),
                    tensor_of(result, letters, (rows, *shape), "local")]
        stages += sum_of_products(result, index(to), {**loops, to: rows}, {over: factor.columns},
                       (f"{constant}{number}", at(to, over)), source,
                       start if number == len(of.factors) else ZERO)
        source = (result, index(f"{names[1]}{number + 1}"))
    return _Part(tensors, stages)


def dense_array(transform: Transform) -> NDArray[np.float64]:
    """The product of a transform's factors; each is rounded to float64, and so is their product."""
    first, *rest = (factor.array() for factor in transform.factors)
    return reduce(lambda done, factor: factor @ done, rest, first)


def _constant(name: str, letters: str, matrix: NDArray[np.float64]) -> Tensor:
    return tensor_of(name, letters, matrix.shape, "constant", values=tuple(map(float, np.ravel(matrix))))
