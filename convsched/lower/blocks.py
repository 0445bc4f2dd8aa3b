"""Products of matrices by Strassen's algorithm: 1x1 convolutions and fully connected layers in blocks.

    u[k, m, c] = sum_{i,j} A[k, i, j] w[i M' + m, j C' + c]                      weight sums, when weights are bound
    v[k, n, c, p] = sum_{j,l} B[k, j, l] x[n, j C' + c, l P' + p]                input sums
    t[k, n, m, p] = sum_c u[k, m, c] v[k, n, c, p]                               products
    y[n, i M' + m, l P' + p] = act(b[i M' + m] + sum_k C[i, l, k] t[k, n, m, p])   output sums

Output channels, input channels and pixels are cut into 2^levels blocks of M', C' and P', the last padded with zeros;
7^levels products of blocks take the place of 8^levels. Where channels are neighbours in memory, all images are one
row of pixels; else ``n`` counts them. The stages name their loops apart, so that each can have an order of its own:
``q d f`` are the pixels, channels and products of the input sums, ``p m k c`` those of the products, ``r o`` the
pixels and channels of the output sums; ``j l``, ``a e`` and ``h`` run over blocks in, blocks out and products.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

from convsched.bilinear import Transform
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
from convsched.lower.direct import tensor_of
from convsched.lower.epilogue import activation
from convsched.lower.strassen import strassen
from convsched.names import LAYOUTS
from convsched.problem import Conv2d, Linear, Problem


@dataclass(frozen=True)
class Blocks:
    """The product of matrices that a layer is, for ``images``: ``sizes`` are (output channels, input channels, pixels)
    of the whole, ``block`` those of a block. ``order`` is how activations with axes n, c and p are stored."""

    images: int
    sizes: tuple[int, ...]
    block: tuple[int, ...]
    order: tuple[str, ...]


def blocks_of(problem: Problem, levels: int = 1, layout: str = "nchw") -> Blocks:
    """How a layer is cut into blocks. Raises LoweringError where it is no product of matrices, or too small."""
    if isinstance(problem, Conv2d) and not (problem.is_pointwise and problem.stride == (1, 1) and problem.groups == 1
                                            and not any(problem.padding)):
        raise LoweringError(f"strassen: {problem.text} is no product of matrices: it has taps, strides, padding or "
                            "groups; use direct")
    if isinstance(problem, Linear):
        images, pixels = 1, problem.N
        order: tuple[str, ...] = ("n", "p", "c")
    else:
        images, pixels = problem.N, problem.E * problem.F
        order = tuple("p" if letter == "h" else letter for letter in LAYOUTS[layout] if letter != "w")
    if order[-1] == "c":
        images, pixels = 1, images * pixels
    parts, sizes = 2**levels, (problem.M, problem.C, pixels)
    if min(sizes) < parts:
        raise LoweringError(f"strassen: {problem.text} has {sizes[0]} output channels, {sizes[1]} input channels and "
                            f"{sizes[2]} pixels; each must be at least {parts}; use direct")
    whole = 16 if order[-1] == "c%16" else 1  # blocks of channels begin where stored ones do
    block = tuple(-(-size // (parts * unit)) * unit for size, unit in zip(sizes, (whole, whole, 1), strict=True))
    return Blocks(images, sizes, block, order)


def lower_strassen(problem: Problem, levels: int = 1, layout: str = "nchw") -> Program:
    """The unscheduled program of a problem.

    Raises LoweringError where the layer is no product of matrices, or smaller than the blocks. Source: Huang et al.,
    "Strassen's Algorithm Reloaded", 2016 (sums fused with packing and with the output).
    """
    cut, triple, parts = blocks_of(problem, levels, layout), strassen(levels), 2**levels
    n, rank = cut.images, triple.rank
    (M, C, P), (m, c, p) = cut.sizes, cut.block
    over = [(0, parts * block - size) for block, size in zip(cut.block, cut.sizes, strict=True)]
    place = (Affine.of("iw") * m + "mw", Affine.of("jw") * c + "cw", *_at(0, 0))[:len(problem.weight_shape)]
    tensors = [
        tensor_of("x", "ncp", (n, C, P), "input", cut.order, _border((0, 0), over[1], over[2])),
        tensor_of("w", "mcrs"[:len(place)], problem.weight_shape, "weight",
                  border=_border(over[0], over[1], *[(0, 0)] * (len(place) - 2))),
        tensor_of("y", "ncp", (n, M, P), "output", cut.order),
        _constant("A", "kij", triple.filter), _constant("B", "kjl", triple.input),
        _constant("C", "kil", triple.output.transposed),
        tensor_of("u", "kmc", (rank, m, c), "local"),
        *(tensor_of(name, "kncp", (rank, n, c, p), "local") for name in ("vs", "v")),
        *(tensor_of(name, "knmp", (rank, n, m, p), "local") for name in ("ts", "t")),
        tensor_of("ys", "ilnmp", (parts, parts, n, m, p), "local"),
    ]
    if problem.bias:
        tensors.append(tensor_of("b", "m", (M,), "weight"))
    if problem.residual:
        tensors.append(tensor_of("z", "ncp", (n, M, P), "input", cut.order))
    inputs, outputs = {"n": n, "q": p, "d": c, "f": rank}, {"n": n, "r": p, "o": m, "a": parts, "e": parts}
    products, bound = {"n": n, "p": p, "k": rank, "m": m}, {"kw": rank, "mw": m, "cw": c}
    blocks = {"iw": parts, "jw": parts}
    return Program(problem.text, tuple(tensors), (
        *_sum("u", _at("kw", "mw", "cw"), bound, blocks, ("A", _at("kw", "iw", "jw")), ("w", place), when="bind"),
        *_sum("vs", _at("f", "n", "d", "q"), inputs, {"j": parts, "l": parts}, ("B", _at("f", "j", "l")),
              ("x", (Affine.of("n"), Affine.of("j") * c + "d", Affine.of("l") * p + "q"))),
        _copy("v", _at("f", "n", "d", "q"), "vs", inputs),
        *_sum("ts", _at("k", "n", "m", "p"), products, {"c": c}, ("v", _at("k", "n", "c", "p")),
              ("u", _at("k", "m", "c"))),
        _copy("t", _at("k", "n", "m", "p"), "ts", products),
        *_sum("ys", _at("a", "e", "n", "o", "r"), outputs, {"h": rank}, ("C", _at("h", "a", "e")),
              ("t", _at("h", "n", "o", "r"))),
        _output(problem, cut, parts, outputs)))


def _output(problem: Problem, cut: Blocks, parts: int, outputs: dict[str, int]) -> Stage:
    """Bias, residual and activation, at the place of each block; what is past the end is left out."""
    maps, pixel = Affine.of("a") * cut.block[0] + "o", Affine.of("e") * cut.block[2] + "r"
    place = (Affine.of("n"), maps, pixel)
    value: Value = Load("ys", _at("a", "e", "n", "o", "r"))
    if problem.bias:
        value = Op("add", (value, Load("b", (maps,))))
    if problem.residual:
        value = Op("add", (value, Load("z", place)))
    where = tuple(at - cut.sizes[axis] for at, axis in ((maps, 0), (pixel, 2))
                  if parts * cut.block[axis] > cut.sizes[axis])
    return Stage("y", nested(outputs, Store("y", place, activation(problem.activation, value), where)))


def _border(*sides: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """A tensor's border, which is left out where there is none."""
    return sides if any(map(any, sides)) else ()


def _constant(name: str, letters: str, transform: Transform) -> Tensor:
    """The matrix of a transform into products, with an axis for each index of a block."""
    matrix, size = transform.matrix, isqrt(transform.columns)
    order = [_nested_index(i, j) for i in range(size) for j in range(size)]
    shape = (len(matrix.rows), size, size)
    return Tensor(name, tuple(letters), shape, "constant", storage_of(tuple(letters), shape),
                  values=tuple(float(row[place]) for row in matrix.dense for place in order))


def _nested_index(i: int, j: int) -> int:
    """The number of block (i, j) in a nested triple: the bits of both in turn, those of ``i`` first.

    >>> [_nested_index(1, 0), _nested_index(0, 1), _nested_index(2, 3)]
    [2, 1, 13]
    """
    return 2 * (i & 1) + (j & 1) + (4 * _nested_index(i >> 1, j >> 1) if i > 1 or j > 1 else 0)


def _at(*parts: Affine | str | int) -> Index:
    return tuple(map(Affine.of, parts))


def _copy(target: str, index: Index, source: str, loops: dict[str, int]) -> Stage:
    return Stage(target, nested(loops, Store(target, index, Load(source, index))))


def _sum(target: str, index: Index, loops: dict[str, int], inner: dict[str, int], factor: tuple[str, Index],
         other: tuple[str, Index], when: When = "run") -> tuple[Stage, Stage]:
    """``target = sum over the inner loops of factor * other``, as two stages."""
    product = Op("mul", (Load(*factor), Load(*other)))
    return (Stage(f"{target}.start", nested(loops, Store(target, index, Const(0.0))), when),
            Stage(target, nested({**loops, **inner}, Reduce(target, index, product)), when))
