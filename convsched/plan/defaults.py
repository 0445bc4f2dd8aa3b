"""The default schedule: parameters from the machine's description, nothing measured.

As in Low et al., "Analytical Modeling Is Enough for High-Performance BLIS" (ACM TOMS 43, 2016), adapted to
convolution: the register tile minimises the cycles that issue FMAs and loads, remainders included; the
packed piece of input is sized to a share of L2; sums run over as many channels as keep their rows in L1.
"""

from __future__ import annotations

from typing import Literal

from convsched.lower.plane import Plane, Shape
from convsched.lower.strassen import blocks_of
from convsched.machine import Machine
from convsched.model.blocking import best_blocking
from convsched.model.constants import CORE
from convsched.model.tiling import _register_tile, _Tiling
from convsched.problem import Conv2d, Linear, Problem
from convsched.problem.problem import is_flat, meets_input
from convsched.recipes.direct import BLOCK_CHANNELS, Channels, Depthwise, Pixels
from convsched.recipes.im2col import Toeplitz
from convsched.recipes.recipe import Recipe
from convsched.recipes.strassen import StrassenBlocks
from convsched.recipes.tiles import Tiles

STATEMENTS = 8192  # that are written out at most, with their tests: half of what ``checks`` allows
MOST_COPIES = 8  # of a nest, for tiles that reach over a border
MOST_TAPS = 5  # of a row; each that reaches over a border has a copy of the nest
PREFETCH_TILES = 128  # of a block, up to which its filter is fetched ahead
PREFETCH = 16  # iterations of the loop over channels
PREFETCH_TAPS = 4  # the same of the loop over taps, for weights that are larger than L2


def default_recipe(problem: Problem, machine: Machine, layout: str = "nchw", threads: int = 1) -> Recipe:
    """The recipe and parameters for a problem on a machine, in microseconds and without measuring."""
    if isinstance(problem, Linear):
        return _channels(problem, machine, layout, threads)
    channels, maps = problem.C // problem.groups, problem.M // problem.groups
    if problem.groups > 1 and channels == maps == 1 and layout != "nchw":
        return _depthwise(problem, machine)
    if maps >= machine.lanes or (maps >= machine.lanes // 2 and problem.groups == 1):
        return _channels(problem, machine, layout, threads)
    return _pixels(problem, machine)


def _near_divisor(extent: int, limit: int) -> int:
    """The greatest divisor of ``extent`` up to ``limit`` if it is not below half of it; else even parts."""
    limit = max(1, min(limit, extent))
    divisor = max(d for d in range(1, limit + 1) if extent % d == 0)
    return divisor if 2 * divisor >= limit else -(-extent // -(-extent // limit))


def _sum_blocks(channels: int, most: int) -> tuple[int, int]:
    """(depth, unroll): channels summed before the next tap, and how many are written out."""
    unroll = next((u for u in (4, 3, 2, 5, 7) if channels % u == 0), 4 if channels >= 16 else channels)
    if channels <= most:
        return channels, unroll
    depths = [d for d in range(most, most // 4, -1) if channels % d == 0 and d % unroll == 0]
    return (depths[0] if depths else most // unroll * unroll), unroll


def direct_time(problem: Problem, machine: Machine, layout: str = "nchw") -> float:
    """The estimated time of direct convolution by its default recipe on one core, in vector FMAs: of the products
    alone with 32 registers, where it was measured at 0.98 of the peak, and of its tiles with 16."""
    if machine.registers >= 32 or not isinstance(default_recipe(problem, machine, layout), Channels):
        return problem.macs / problem.M * problem.groups * -(-problem.M // problem.groups // machine.lanes)
    tiling = _tiling_of(problem, machine, layout)
    images = problem.N * problem.groups if isinstance(problem, Conv2d) else 1
    return images * tiling.cycles(machine, *_register_tile(tiling, machine, _tallest(problem, machine, layout)))


def _tiling_of(problem: Problem, machine: Machine, layout: str) -> _Tiling:
    """What the register tile of direct convolution is chosen for: one group of one image."""
    if isinstance(problem, Linear):
        return _Tiling(problem.M, 1, problem.N, problem.C, transposed=False, packed=False)
    rows, columns = (1, problem.E * problem.F) if is_flat(problem) else (problem.E, problem.F)
    pack, _ = _input_copy(problem, machine, layout)
    return _Tiling(problem.M // problem.groups, rows, columns, problem.C // problem.groups * problem.R * problem.S,
                   transposed=layout == "nchw" and rows * columns > 1, packed=pack == "packed",
                   collides=4 * problem.E * problem.F % (machine.l1 // CORE.ways) == 0)


def _tallest(problem: Problem, machine: Machine, layout: str) -> int:
    """The most rows of a register tile: one where rows of products are left out."""
    return 1 if "h" in _input_copy(problem, machine, layout)[1] else 4


def _channels(problem: Problem, machine: Machine, layout: str, threads: int) -> Channels:
    flat = isinstance(problem, Linear) or is_flat(problem)
    channels = problem.C // problem.groups
    pack, skip = _input_copy(problem, machine, layout)
    tiling = _tiling_of(problem, machine, layout)
    rows, columns = tiling.rows, tiling.columns
    vectors, height, width = _register_tile(tiling, machine, _tallest(problem, machine, layout))
    depth, unroll = _sum_blocks(channels, channels if flat else 64)
    if "w" in skip and isinstance(problem, Conv2d):
        copies = (1 + _edge_tiles(problem, 1, width)) * problem.S
        ragged = (1 + (columns % width > 0)) * (1 + (rows % height > 0))
        if copies * ragged * vectors * height * width * unroll > STATEMENTS:
            pack, skip = "window", "h"  # a copy with a border: all tiles of a row are alike
    if flat:
        stays = 4 * problem.weights <= machine.l2 // 2  # the weights, beside a small block of input
        fit = machine.l2 // (8 if stays and pack == "none" else 2) // (4 * channels * width)
        tiles = -(-columns // width)
    else:
        assert isinstance(problem, Conv2d)
        row_bytes = 4 * channels * (problem.W + problem.padding[1] + problem.padding[3])
        lines = machine.l2 // 2 // row_bytes - (problem.R - 1) * problem.dilation[0]
        fit = max(lines, 4) // (problem.stride[0] * height)
        tiles = -(-rows // height)
    block = _near_divisor(tiles, fit)
    split_channels = -(-tiles // block) < threads or 4 * problem.weights > problem.bytes // 2
    return Channels(
        lanes=machine.lanes, vectors=vectors, rows=height, pixels=width, block=block, depth=depth,
        unroll=unroll, pack=pack, parallel="channels" if split_channels else "pixels", skip=skip)


def _input_copy(problem: Problem, machine: Machine, layout: str,
                ) -> tuple[Literal["none", "window", "packed"], Literal["", "h", "hw"]]:
    """How the input is read, and where products with padding are left out: it is read in place wherever its
    rows lie well for the caches and need no border, or few taps reach over it."""
    if isinstance(problem, Linear):
        return "none", ""
    plane = 4 * problem.H * problem.W
    if any(problem.padding):
        collides = layout == "nchw" and plane % (machine.l1 // CORE.ways) == 0  # channels meet in one set
        if not meets_input(problem):
            return "window", ""
        alone = problem.dilation[1] >= problem.W  # an output meets the input at one tap of a row: others are padding
        return ("window", "h") if (collides or problem.S > MOST_TAPS) and not alone else ("none", "hw")
    small = plane < 8 * 64  # a plane of a few cache lines: tiles share them unevenly
    collides = plane % (machine.l1 // CORE.ways // 4) == 0  # channels meet in four groups of sets
    return ("packed" if layout == "nchw" and is_flat(problem) and (small or collides) else "none"), ""


def _edge_tiles(problem: Conv2d, axis: int, size: int) -> int:
    """How many tiles of so many outputs along the rows (axis 0) or the columns (1) have a tap in the padding; 0 where
    all have, as ``peel guarded`` leaves them alone then."""
    outputs, taps, extent = problem.output_shape[2 + axis], (problem.R, problem.S)[axis], (problem.H, problem.W)[axis]
    stride, before = problem.stride[axis], problem.padding[axis]
    low = -(-before // stride)
    high = (extent - 1 + before - (taps - 1) * problem.dilation[axis]) // stride
    tiles = [(start, min(start + size, outputs) - 1) for start in range(0, outputs, size)]
    inside = sum(low <= first and last <= high for first, last in tiles)
    return len(tiles) - inside if inside else 0


def _pixels(problem: Conv2d, machine: Machine) -> Pixels:
    maps = problem.M // problem.groups
    columns = problem.E * problem.F if is_flat(problem) else problem.F
    half = machine.lanes // 2
    lanes = half if half >= 4 and columns <= half else machine.lanes  # short rows leave most of a register idle
    whole = -(-columns // lanes)
    accumulators = 20 if machine.registers >= 32 else 8
    many = False
    if maps == 1 and not is_flat(problem):
        tile, (vectors, rows, many) = 1, _depthwise_tile(problem, machine, whole)
    else:
        vectors = whole if whole <= accumulators else _near_divisor(whole, accumulators // 2)
        tile = min(maps, 4, max(1, accumulators // vectors))
        rows = 1 if is_flat(problem) else min(max(2, 8 // (vectors * tile)), 7, problem.E)
    products = problem.R * problem.S * tile * rows * vectors  # vector FMAs of a tile and input channel
    edges = 0 if is_flat(problem) else _edge_tiles(problem, 0, rows)
    copies = max(min(3, -(-problem.E // rows)), 1 + edges)  # of the nest, with the first and last rows peeled
    peels = products * copies <= 800 and edges <= MOST_COPIES and meets_input(problem)
    return Pixels(lanes=lanes, maps=tile, rows=rows, vectors=vectors, unroll_taps=products <= 400,
                  peel_borders=peels, order="rows" if many else "taps")


def _depthwise_tile(problem: Conv2d, machine: Machine, whole: int) -> tuple[int, int, bool]:
    """(vectors, rows) of a tile, and whether taps run inside rows. A stride has loads that are shuffled, so that
    few rows keep the registers busy; so do many taps."""
    large, strided = problem.R * problem.S > 9, problem.stride[1] > 1
    most = 16 >> (large + (machine.registers < 32))
    vectors = min(whole, 2 if strided else 4)
    if strided:
        rows = min(problem.E, (8 if vectors == 1 else 3) // (2 if large else 1))
    elif problem.E * vectors <= most:
        rows = problem.E
    else:
        rows = min(problem.E, 8 if vectors == 1 else 4, most // vectors)
    return vectors, rows, vectors * rows > 8 or (strided and not large)


def _depthwise(problem: Conv2d, machine: Machine) -> Depthwise:
    accumulators = 16 if machine.registers >= 32 else 6
    pixels = _near_divisor(problem.F, min(accumulators, 8))
    rows = max(1, min(problem.E, accumulators // pixels, 2))
    products = problem.R * problem.S * rows * pixels
    wide = sum(edges > 2 for edges in (_edge_tiles(problem, 0, rows), _edge_tiles(problem, 1, pixels)))
    channels = 1 + (problem.groups % machine.lanes > 0) + (problem.groups % BLOCK_CHANNELS > 0)
    written = products * channels * 9 * (1 + 2 * wide)  # tiles that are peeled at both ends, and tests in between
    return Depthwise(machine.lanes, rows, pixels, products <= 400 and written <= 2 * STATEMENTS)


def default_tiles(problem: Conv2d, shape: Shape, machine: Machine, layout: str = "nchw", threads: int = 1,
                  by_lines: bool = False) -> Tiles:
    """The recipe of a bilinear algorithm, by lines where that is asked for or a tile is too large to be written out."""
    (high, wide), (down, across) = shape.outputs, shape.points
    side_by_side = max(1, machine.lanes // wide) if layout == "nchw" else 1  # tiles whose rows are stored as one
    tests = 1 + (problem.M // problem.groups % machine.lanes > 0)
    sums = high * across * (down + wide)  # of the way out; the way in has up to three times as many
    by_lines = by_lines or sums * (side_by_side + 3) * tests > STATEMENTS
    plane = Plane(problem, shape.outputs, shape.fold)
    best = best_blocking(plane, shape.points, machine, threads, by_lines)
    most = 4 if machine.vector_bytes >= 64 else 8  # short code for long vectors
    unroll = next(u for u in (most, 4, 1) if problem.C // problem.groups % u == 0)
    filters = 4 * shape.points[0] * shape.points[1] * problem.weights // (problem.R * problem.S)
    tiles = best.block * plane.tiles[1]
    few = filters > 8 * machine.l2 and tiles <= PREFETCH_TILES  # too little work for the caches to bring it in time
    return Tiles(machine.lanes, shape, best.block, best.vectors, best.pixels, unroll, by_lines, PREFETCH if few else 0)


def default_toeplitz(problem: Conv2d, machine: Machine, layout: str = "nchw", threads: int = 1) -> Toeplitz:
    """The recipe of im2col: indirect where a matrix would repeat elements; the matrix of a block, or the rows of input
    that it moves on by, take at most L2."""
    maps, sums = problem.M // problem.groups, problem.C // problem.groups * problem.R * problem.S
    indirect = problem.R * problem.S > 1
    row_bytes = 4 * problem.C * (problem.stride[0] * problem.W if indirect else problem.F)
    fits = [b for b in range(1, problem.E + 1) if problem.E % b == 0 and b * row_bytes <= machine.l2]
    block = max((b for b in fits if b * threads <= problem.E), default=1)
    tiling = _Tiling(maps, 1, block * problem.F, sums, transposed=layout == "nchw", packed=False)
    vectors, _, pixels = _register_tile(tiling, machine, 1)
    channels = problem.C // problem.groups
    large = indirect and 4 * problem.weights > machine.l2
    return Toeplitz(machine.lanes, vectors, pixels, block, _sum_blocks(channels, channels)[1], indirect=indirect,
                    prefetch=PREFETCH_TAPS if large else 0)


VECTORS = 2  # of a register tile: each broadcast is used twice
SHARERS = 8  # register tiles of a block, at least: as many share the weights that stream from L3


def default_strassen(problem: Problem, levels: int, machine: Machine, layout: str = "nchw",
                     threads: int = 1) -> StrassenBlocks:
    """The recipe for a problem on a machine.

    A block of P pixels moves 4 (C' R + M') P bytes of sums of a product, twice, and 4 C' M' R S of weights: P grows
    until these are the less, while the sums of a product, 4 C' R P bytes, stay in three quarters of L2.
    """
    cut = blocks_of(problem, levels, layout)
    maps, channels, extent = cut.block
    most = (machine.registers - 1 - VECTORS) // VECTORS  # pixels, beside the tile's weights and a broadcast
    width, read = cut.columns.count if cut.columns else 1, channels * problem.R
    few = min(read * maps * problem.S // (2 * (read + maps)), machine.l2 * 3 // 4 // (4 * read))
    count = max(-(-extent * width // max(SHARERS * most, few)), min(threads, extent))
    whole = machine.lanes if cut.order[-1] == "h" else 1
    block = min(extent, max(1, -(-extent // (count * whole)) * whole))
    tile = -(-width // -(-width // most)) if cut.columns else -(-block // -(-block // most))
    return StrassenBlocks(machine.lanes, levels, block, VECTORS, tile, unroll=4 if channels % 4 == 0 else 1)
