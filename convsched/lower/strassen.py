"""Dense layers by Strassen's algorithm: the product of matrices that a layer is (im2col), in blocks.

    u[k, m, c, r, s] = sum_{i,j} A[k, i, j] w[i M' + m, j C' + c, r, s]              weight sums, when weights are bound
    v[k, n, c, r, e, w] = sum_{j,l} B[k, j, l] x[n, j C' + c, sh (l E' + e) + dh r - top, gw w - left]      input sums
    t[k, n, m, e, f] = sum_{c,r,s} u[k, m, c, r, s] v[k, n, c, r, e, (sw f + dw s) / gw]                    products
    y[n, i M' + m, l E' + e, f] = act(b[i M' + m] + sum_k C[i, l, k] t[k, n, m, e, f])                   output sums

Output channels, input channels and rows of output pixels are cut into 2^levels blocks of M', C' and E', the last
padded with zeros; 7^levels products of blocks take the place of 8^levels. A block of the input is the Toeplitz matrix
of im2col, of which rows are written once for each tap r, and columns once for all taps s: gw is the greatest common
divisor of what they are apart, sw and dw (sw alone, where there is one tap). Where pixels have no taps, strides and
padding, ``e`` counts all of an image, or of all images where channels are neighbours in memory, and f and w are not
axes.

Sums of inputs and of outputs go level by level, each a stage for each factor of one level's B or C, so that they share
what they have in common: of the blocks j and l, level 0 makes the low digit of k, and so on; C in the same order.
Loops are named after the axes above, with the letter of the tensor and the level: ``kx0 jx0 lx0 cx rx ex wx`` are
those of the input sums, ``iy0 ly0 ky0 my ey fy`` those of the output sums; ``gx1 gx2 gy1 gy2`` count what is between
factors, and loops in ``_`` are digits that other levels see to.

Sources: Strassen's algorithm on what im2col gives: Cong and Xiao, "Minimizing Computation in Convolutional Neural
Networks", 2014. Sums fused with packing and with the output: Huang et al., "Strassen's Algorithm Reloaded", 2016.
A matrix that expands rows only: Cho and Brand, "MEC: Memory-efficient Convolution for Deep Neural Network", 2017.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, isqrt

from convsched.algebra.bilinear import Matrix
from convsched.algebra.strassen import strassen
from convsched.errors import LoweringError
from convsched.ir import Affine, Index, Load, Program, Stage, Store, Tensor, nested
from convsched.lower.epilogue import Epilogue
from convsched.lower.stages import at, copy, sum_of_products, tensor_of
from convsched.problem import Conv2d, Linear, Problem
from convsched.problem.layout import LAYOUTS
from convsched.problem.problem import is_flat, taps


@dataclass(frozen=True)
class Columns:
    """Columns of a block: ``count`` of pixels out, ``reads`` of sums in; pixel f and tap s meet at ``stride f +
    dilation s`` of these, which are ``step`` columns of the input apart, the first ``left`` of it."""

    count: int
    reads: int
    stride: int
    dilation: int
    step: int
    left: int


@dataclass(frozen=True)
class Blocks:
    """The product of matrices that a layer is, for ``images``: ``sizes`` are (output channels, input channels, rows of
    output pixels) of the whole, ``block`` those of a block. ``order`` is how activations are stored, with axes n, c, h
    and w; ``columns`` is None where pixels are one row, and w no axis."""

    images: int
    sizes: tuple[int, ...]
    block: tuple[int, ...]
    order: tuple[str, ...]
    columns: Columns | None


def blocks_of(problem: Problem, levels: int = 1, layout: str = "nchw") -> Blocks:
    """How a layer is cut into blocks, 2^levels each way. Raises LoweringError where it has groups, or is too small."""
    if levels not in (1, 2):
        raise LoweringError(f"strassen({levels}): errors grow with each level, and gains shrink; use one or two")
    if problem.groups != 1:
        raise LoweringError(f"strassen({levels}): {problem.text} has {problem.groups} groups, each a small "
                            "product of matrices; use direct")
    if isinstance(problem, Conv2d) and not is_flat(problem):
        images, rows, columns = problem.N, problem.E, _columns(problem)
        order = LAYOUTS[layout]
    else:
        images, rows, columns = problem.N, problem.E * problem.F, None
        order = tuple(letter for letter in LAYOUTS["nhwc" if isinstance(problem, Linear) else layout] if letter != "w")
        if order[-1] == "c":
            images, rows = 1, images * rows
    parts, sizes = 2**levels, (problem.M, problem.C, rows)
    if min(sizes) < parts:
        raise LoweringError(
            f"strassen({levels}): {problem.text} would be cut in {parts} along its output channels ({sizes[0]}), its "
            f"input channels ({sizes[1]}) and its {'rows of output pixels' if columns else 'output pixels'} ({rows}), "
            f"each of which must be at least {parts}; use direct")
    whole = 16 if order[-1] == "c%16" else 1  # blocks of channels begin where stored ones do
    block = tuple(-(-size // (parts * unit)) * unit for size, unit in zip(sizes, (whole, whole, 1), strict=True))
    return Blocks(images, sizes, block, order, columns)


def _columns(p: Conv2d) -> Columns:
    stride, dilation = p.stride[1], p.dilation[1] if p.S > 1 else 0
    step = gcd(stride, dilation)
    reads = ((p.F - 1) * stride + (p.S - 1) * dilation) // step + 1
    return Columns(p.F, reads, stride // step, dilation // step, step, p.padding[1])


BASES = {"i": 2, "j": 2, "l": 2, "k": 7}  # of blocks and of products, each level a digit
SUMMED_AXES, MADE_AXES = {"x": "jl", "y": "k"}, {"x": "k", "y": "il"}  # blocks and products that sums take, and make


@dataclass(frozen=True)
class Level:
    """One level of sums: the loops that it leaves alone, over what it makes, over the values between factors, the last
    first, and over what it sums. ``sums`` is the tensor that the last factor makes, ``result`` what it is copied to
    for the next level, or the products; ``source`` is what the level before hands on."""

    rest: tuple[str, ...]
    made: tuple[str, ...]
    between: tuple[str, ...]
    summed: tuple[str, ...]
    sums: str
    result: str
    source: str


def levels_of(levels: int, letter: str) -> tuple[Level, ...]:
    """The levels, one or two, of the sums of inputs, "x", or of outputs, "y", in the order in which they are made.

    >>> [(level.rest, level.made, level.summed) for level in levels_of(2, "x")]
    [(('jx1_', 'lx1_'), ('kx0',), ('jx0', 'lx0')), (('kx0_',), ('kx1',), ('jx1', 'lx1'))]
    """
    between = tuple(f"g{letter}{number}" for number in range(len(_factors(letter)) - 1, 0, -1))
    names = ["v0", "v"] if letter == "x" else ["y0", ""]
    found = []
    for level, result in enumerate(names[-levels:]):
        rest = [*(f"{name}{letter}1_" for name in SUMMED_AXES[letter] if level < levels - 1),
                *(f"{name}{letter}0_" for name in MADE_AXES[letter] if level > 0)]
        made, summed = (tuple(f"{name}{letter}{level}" for name in names[letter]) for names in (MADE_AXES, SUMMED_AXES))
        found.append(Level(tuple(rest), made, between, summed, f"{result or 'y'}s", result, names[0] if level else ""))
    return tuple(found)


def _factors(letter: str) -> tuple[Matrix, ...]:
    """Those of the sums of one level."""
    return (strassen().input if letter == "x" else strassen().output).factors


def lower_strassen(problem: Problem, levels: int = 1, layout: str = "nchw") -> Program:
    """The unscheduled program of a problem.

    Raises LoweringError where the layer has groups or fewer channels or pixels than blocks, or for other levels than
    one or two.
    """
    cut, triple, parts, tap = blocks_of(problem, levels, layout), strassen(levels), 2**levels, taps(problem)
    n, k, (m, c, e) = cut.images, triple.rank, cut.block
    columns, row_taps = cut.columns, {"r": problem.R} if "r" in tap else {}
    pixels_in = {**row_taps, "e": e, **({"w": columns.reads} if columns else {})}
    pixels_out = {"e": e, **({"f": columns.count} if columns else {})}
    sums_in = _Sums("B", "x", levels, {"n": n, "cx": c, **{f"{name}x": size for name, size in pixels_in.items()}})
    sums_out = _Sums("C", "y", levels, {"n": n, "my": m, **{f"{name}y": size for name, size in pixels_out.items()}})
    products, weights = {"n": n, "k": k, "m": m, **pixels_out}, {"m": m, "c": c, **tap}
    bound = {"kw": k, **{f"{name}w": size for name, size in weights.items()}}
    filters = tuple(Affine.of(f"{name}w") if name in tap else Affine() for name in "rs")
    read = () if columns is None else (
        Affine.of("f") * columns.stride + (Affine.of("s") * columns.dilation if "s" in tap else 0),)
    place = at("k", "n", "m", *pixels_out)
    tensors = [
        *_arrays(problem, cut, parts), _constant("A", "k", "ij", triple.filter.matrix),
        *sums_in.tensors, *sums_out.tensors,
        _local("u", {"k": k, **weights}), _local("v", {"k": k, "n": n, "c": c, **pixels_in}),
        *(_local(name, {"k": k, "n": n, "m": m, **pixels_out}) for name in ("ts", "t")),
    ]
    return Program(problem.text, tuple(tensors), (
        *sum_of_products("u", at(*bound), bound, {"iw": parts, "jw": parts}, ("A", at("kw", "iw", "jw")),
              ("w", (Affine.of("iw") * m + "mw", Affine.of("jw") * c + "cw", *filters)[:len(problem.weight_shape)]),
              when="bind"),
        *sums_in.stages(("x", _input_index(problem, cut, *sums_in.digits(0, 0).values()))),
        *sum_of_products("ts", place, products, {"c": c, **tap},
              ("v", (*at("k", "n", "c", *row_taps, "e"), *read)), ("u", at("k", *weights))),
        copy("t", place, "ts", place, products),
        *sums_out.stages(("t", (*sums_out.digits(0, 0).values(), *at(*sums_out.outer)))),
        _output(problem, cut, parts, sums_out)))


def _arrays(problem: Problem, cut: Blocks, parts: int) -> list[Tensor]:
    """What a caller gives and gets, with borders of zeros as wide as the blocks and taps reach."""
    maps, channels, rows = ((0, parts * block - size) for block, size in zip(cut.block, cut.sizes, strict=True))
    (M, C, E), n, columns, letters = cut.sizes, cut.images, cut.columns, "nchw" if cut.columns else "nch"
    shape: tuple[int, ...] = n, C, E
    width: tuple[int, ...] = ()
    border = [(0, 0), channels, rows]
    if columns is not None:
        assert isinstance(problem, Conv2d)
        shape, width = problem.input_shape, (columns.count,)
        high = (parts * cut.block[2] - 1) * problem.stride[0] + (problem.R - 1) * problem.dilation[0] + 1
        reach = (columns.reads - 1) * columns.step + 1
        border[2:] = [(before, max(0, size - before - extent)) for before, size, extent
                      in zip(problem.padding, (high, reach), problem.input_shape[2:], strict=False)]
    filters = len(problem.weight_shape)
    y = tensor_of("y", letters, (n, M, E, *width), "output", cut.order)
    return [
        tensor_of("x", letters, shape, "input", cut.order, tuple(border)),
        tensor_of("w", "mcrs"[:filters], problem.weight_shape, "weight",
                  border=(maps, channels, *[(0, 0)] * (filters - 2))),
        y, *Epilogue(problem).tensors(y),
    ]


def _input_index(problem: Problem, cut: Blocks, j: Affine, l: Affine) -> Index:
    """The element of the input that is in block (j, l) at channel cx, tap rx, row ex and column wx."""
    channel, row = j * cut.block[1] + "cx", l * cut.block[2] + "ex"
    if cut.columns is None:
        return (Affine.of("n"), channel, row)
    assert isinstance(problem, Conv2d)
    row = row * problem.stride[0] + (Affine.of("rx") * problem.dilation[0] if problem.R > 1 else 0)
    return (Affine.of("n"), channel, row - problem.padding[0], Affine.of("wx") * cut.columns.step - cut.columns.left)


def _output(problem: Problem, cut: Blocks, parts: int, sums: _Sums) -> Stage:
    """Bias, residual and activation, at the place of each block; what is past the end is left out."""
    level = levels_of(sums.levels, "y")[-1]
    block = sums.digits(sums.levels - 1, sums.levels)
    maps, row = block["i"] * cut.block[0] + "my", block["l"] * cut.block[2] + "ey"
    place = (Affine.of("n"), maps, row, *(at("fy") if cut.columns else ()))
    epilogue = Epilogue(problem)
    value = epilogue.finish(epilogue.biased(Load(level.sums, (*block.values(), *at(*sums.outer))), maps), place)
    where = tuple(position - cut.sizes[axis] for position, axis in ((maps, 0), (row, 2))
                  if parts * cut.block[axis] > cut.sizes[axis])
    return Stage("y", nested(sums.loops(level, *level.made), Store("y", place, value, where)))


@dataclass(frozen=True)
class _Sums:
    """The sums of inputs, "x", by the matrix B, or of outputs, "y", by C: at each point of the loops ``outer``."""

    symbol: str
    letter: str
    levels: int
    outer: dict[str, int]

    @property
    def factors(self) -> tuple[Matrix, ...]:
        """Those of one level."""
        return _factors(self.letter)

    def digits(self, level: int, done: int) -> dict[str, Affine]:
        """The blocks and products that are left when so many levels are done, as the loops of a level count them."""
        def count(axis: str, digits: range) -> Affine:
            return Affine.total(((f"{axis}{self.letter}{digit}{'_' * (digit != level)}", BASES[axis]**place)
                                 for place, digit in enumerate(digits)), 0)

        summed = SUMMED_AXES[self.letter] if done < self.levels else ""
        made = MADE_AXES[self.letter] if done else ""
        return {**{axis: count(axis, range(done, self.levels)) for axis in summed},
                **{axis: count(axis, range(done)) for axis in made}}

    def loops(self, level: Level, *inner: str) -> dict[str, int]:
        """The loops of a level outside of its sums, with those of the blocks or products named."""
        return {**self.outer, **{name: BASES[name[0]] for name in (*level.rest, *inner)}}

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The constants, and what the stages make."""
        between = ["gh"[number % 2] for number in range(len(self.factors) - 1)]
        place = {name[0]: size for name, size in self.outer.items()}
        rows, columns = [*between, MADE_AXES[self.letter]], [SUMMED_AXES[self.letter], *between]
        tensors = [_constant(f"{self.symbol}{number}", row, column, factor) for number, (row, column, factor)
                   in enumerate(zip(rows, columns, self.factors, strict=True), 1)]
        for done, level in enumerate(levels_of(self.levels, self.letter), 1):
            rest = {name[0]: BASES[name[0]] for name in level.rest}
            tensors += [_local(f"{level.sums}{number}", {letter: len(factor.rows), **rest, **place})
                        for number, (letter, factor) in enumerate(zip(between, self.factors, strict=False), 1)]
            made = {axis: BASES[axis]**(done if axis in MADE_AXES[self.letter] else self.levels - done)
                    for axis in self.digits(done - 1, done)}
            names = (level.sums, level.result) if done < self.levels else (level.sums,)
            tensors += [_local(name, {**made, **place}) for name in names]
        return tuple(tensors)

    def stages(self, source: tuple[str, Index]) -> tuple[Stage, ...]:
        """Two stages a factor, and one that hands on what a level makes; the last of outputs is left to others."""
        stages: list[Stage] = []
        outer, last = at(*self.outer), len(self.factors)
        for number, level in enumerate(levels_of(self.levels, self.letter)):
            if number:
                source = (level.source, (*self.digits(number, number).values(), *outer))
            target = (*self.digits(number, number + 1).values(), *outer)
            given = {name: BASES[name[0]] for name in level.summed}
            for place, factor in enumerate(self.factors, 1):
                made = {name: BASES[name[0]] for name in level.made} if place == last else {
                    f"g{self.letter}{place}": len(factor.rows)}
                name = level.sums if place == last else f"{level.sums}{place}"
                index = target if place == last else (*at(*made, *level.rest), *outer)
                stages += sum_of_products(name, index, {**self.loops(level), **made}, given,
                               (f"{self.symbol}{place}", at(*made, *given)), source)
                source, given = (name, index), made
            if level.result:
                stages.append(copy(level.result, target, level.sums, target, self.loops(level, *level.made)))
        return tuple(stages)


def _local(name: str, sizes: dict[str, int]) -> Tensor:
    return tensor_of(name, "".join(sizes), tuple(sizes.values()), "local")


def _constant(name: str, rows: str, columns: str, matrix: Matrix) -> Tensor:
    """A matrix; two letters for rows or columns are those of the blocks of a matrix, of as many each way."""
    def order(letters: str, count: int) -> tuple[tuple[int, ...], list[int]]:
        if len(letters) == 1:
            return (count,), list(range(count))
        size = isqrt(count)
        return (size, size), [_nested_index(i, j) for i in range(size) for j in range(size)]

    (high, down), (wide, across) = order(rows, len(matrix.rows)), order(columns, matrix.columns)
    return tensor_of(name, rows + columns, (*high, *wide), "constant",
                     values=tuple(float(matrix.dense[row][column]) for row in down for column in across))


def _nested_index(i: int, j: int) -> int:
    """The number of block (i, j) in a nested triple: the bits of both in turn, those of ``i`` first.

    >>> [_nested_index(1, 0), _nested_index(0, 1), _nested_index(2, 3)]
    [2, 1, 13]
    """
    return 2 * (i & 1) + (j & 1) + (4 * _nested_index(i >> 1, j >> 1) if i > 1 or j > 1 else 0)
