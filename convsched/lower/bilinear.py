"""Convolution by bilinear algorithms along rows and columns: transforms, products over channels, a transform back.

    u[g, h, m, c] = sum_{r,s} A[g, r] A'[h, s] w[m, c, r, s]                        filter, when weights are bound
    v[p, q, n, c, T] = sum_{k,l} B[p, k] B'[q, l] x[n, c, K te + k - top, L tf + l - left]    input
    t[g, h, n, m, T] = sum_c u[g, h, m, c] v[g, h, n, c, T]                         product
    y[n, m, K te + i, L tf + j] = act(b[m] + sum_{p,q} C[i, p] C'[j, q] t[p, q, n, m, T])       output

A tile has K x L outputs; ``T = tf + te * (tiles in a row)`` counts tiles. Each transform goes along the columns
first, then along the rows, as a sum of its own. The stages of a group share the names of their loops: ``n te tf d``
those of the input (``d`` its channels), ``n t g h m c`` those of the products, ``n ye yf o`` those of the output
(``o`` its channels); ``k l`` run over the pixels a tile reads, ``p q`` over its products, ``i j`` over its outputs.
"""

from __future__ import annotations

from dataclasses import replace

from convsched.bilinear import Bilinear, Matrix
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


def lower_bilinear(problem: Conv2d, column: Bilinear, row: Bilinear, layout: str = "nchw") -> Program:
    """The unscheduled program of a problem by an algorithm along columns of pixels and one along rows.

    Each gives the ``output.rows`` outputs of R (or S) taps. Raises LoweringError for a problem with strides,
    dilations or groups. Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016.
    """
    p = problem
    if p.stride != (1, 1) or p.dilation != (1, 1) or p.groups != 1:
        raise LoweringError(f"{column.name}: {p.text} has a stride, a dilation or groups; use direct")
    sizes = (column.output.rows, row.output.rows)
    tiles = (-(-p.E // sizes[0]), -(-p.F // sizes[1]))
    points = (column.rank, row.rank)
    top, left = p.padding[:2]
    past = [tile * size + taps - 1 - before - extent for tile, size, taps, before, extent
            in zip(tiles, sizes, (p.R, p.S), (top, left), (p.H, p.W), strict=True)]
    border = ((0, 0), (0, 0), (top, max(past[0], p.padding[2])), (left, max(past[1], p.padding[3])))
    count = tiles[0] * tiles[1]

    tensors = [
        _tensor("x", "nchw", p.input_shape, "input", LAYOUTS[layout], border),
        _tensor("w", "mcrs", p.weight_shape, "weight"),
        _tensor("y", "nchw", p.output_shape, "output", LAYOUTS[layout]),
        _constant("A", "gr", column.filter.matrix), _constant("A'", "hs", row.filter.matrix),
        _constant("B", "pk", column.input.matrix), _constant("B'", "ql", row.input.matrix),
        _constant("C", "ip", column.output.matrix), _constant("C'", "jq", row.output.matrix),
        _tensor("a", "gsmc", (points[0], p.S, p.M, p.C), "local"),
        _tensor("u", "ghmc", (*points, p.M, p.C), "local"),
        _tensor("bx", "plnct", (points[0], row.input.columns, p.N, p.C, count), "local"),
        _tensor("bxb", "pqnct", (*points, p.N, p.C, count), "local"),
        _tensor("v", "ghnct", (*points, p.N, p.C, count), "local"),
        _tensor("s", "ghnmt", (*points, p.N, p.M, count), "local"),
        _tensor("t", "ghnmt", (*points, p.N, p.M, count), "local"),
        _tensor("ct", "iqnmt", (sizes[0], points[1], p.N, p.M, count), "local"),
        _tensor("ctc", "ijnmt", (*sizes, p.N, p.M, count), "local"),
    ]
    if p.bias:
        tensors.append(_tensor("b", "m", (p.M,), "weight"))
    if p.residual:
        tensors.append(_tensor("z", "nchw", p.output_shape, "input", LAYOUTS[layout]))

    inputs = {"n": p.N, "te": tiles[0], "tf": tiles[1], "d": p.C}
    tile = Affine.of("te") * tiles[1] + "tf"
    place = _at("n", "d", tile)
    pixel = _at("n", "d", Affine.of("te") * sizes[0] + "k" - top, Affine.of("tf") * sizes[1] + "lx" - left)
    products = {"n": p.N, "t": count, "g": points[0], "h": points[1], "m": p.M}
    point = _at("g", "h", "n", "m", "t")
    outputs = {"n": p.N, "ye": tiles[0], "yf": tiles[1], "o": p.M}
    tile_out = _at("n", "o", Affine.of("ye") * tiles[1] + "yf")
    e, f = Affine.of("ye") * sizes[0] + "i", Affine.of("yf") * sizes[1] + "j"
    inside = tuple(limit for limit, ragged in ((e - p.E, p.E % sizes[0]), (f - p.F, p.F % sizes[1])) if ragged)
    result: Value = Load("ctc", (*_at("i", "j"), *tile_out))
    if p.residual:
        result = Op("add", (result, Load("z", _at("n", "o", e, f))))
    stages = [
        *_sum("a", _at("g", "s", "mw", "cw"), {"g": points[0], "s": p.S, "mw": p.M, "cw": p.C},
              {"r": p.R}, ("A", _at("g", "r")), ("w", _at("mw", "cw", "r", "s")), when="bind"),
        *_sum("u", _at("g", "h", "mw", "cw"), {"g": points[0], "h": points[1], "mw": p.M, "cw": p.C},
              {"s": p.S}, ("A'", _at("h", "s")), ("a", _at("g", "s", "mw", "cw")), when="bind"),
        *_sum("bx", (*_at("px", "lx"), *place),
              {**inputs, "lx": row.input.columns, "px": points[0]}, {"k": column.input.columns},
              ("B", _at("px", "k")), ("x", pixel)),
        *_sum("bxb", (*_at("p", "q"), *place), {**inputs, "p": points[0], "q": points[1]},
              {"l": row.input.columns}, ("B'", _at("q", "l")), ("bx", (*_at("p", "l"), *place))),
        _stage({**inputs, "p": points[0], "q": points[1]}, "v", (*_at("p", "q"), *place),
               Load("bxb", (*_at("p", "q"), *place))),
        *_sum("s", point, products, {"c": p.C},
              ("v", _at("g", "h", "n", "c", "t")), ("u", _at("g", "h", "m", "c"))),
        _stage(products, "t", point, Load("s", point)),
        *_sum("ct", (*_at("iy", "qy"), *tile_out), {**outputs, "qy": points[1], "iy": sizes[0]},
              {"p": points[0]}, ("C", _at("iy", "p")), ("t", (*_at("p", "qy"), *tile_out))),
        *_sum("ctc", (*_at("i", "j"), *tile_out), {**outputs, "i": sizes[0], "j": sizes[1]},
              {"q": points[1]}, ("C'", _at("j", "q")), ("ct", (*_at("i", "q"), *tile_out)),
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


def _constant(name: str, letters: str, matrix: Matrix) -> Tensor:
    shape = (len(matrix.rows), matrix.columns)
    return Tensor(name, tuple(letters), shape, "constant", storage_of(tuple(letters), shape),
                  values=tuple(float(a) for row in matrix.dense for a in row))


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
