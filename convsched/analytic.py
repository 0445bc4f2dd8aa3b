"""The default schedule: parameters from the machine's description, nothing measured.

As in Low et al., "Analytical Modeling Is Enough for High-Performance BLIS" (ACM TOMS 43, 2016), adapted to
convolution: the register tile minimises the cycles that issue FMAs and loads, remainders included; the
packed piece of input is sized to a share of L2; sums run over as many channels as keep their rows in L1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from convsched.lower.fft_layers import Fft
from convsched.machine import Machine
from convsched.problem import Conv2d, Linear, Problem
from convsched.recipes import Channels, Depthwise, Pixels, Recipe, is_flat
from convsched.tiles import LongTiles, Register, Tiles, tile_counts
from convsched.toeplitz import Toeplitz

LATENCY = 8  # FMAs in flight that keep two pipes of four cycles busy
STEP = 0.5  # cycles of FMAs lost to the loop over channels, for each channel and tap
VECTOR_LOAD = 0.15  # of a weight vector, which comes from L2, beside an FMA
BROADCAST = 0.03  # of an input element from L1
FULL_SQUARE = 150  # cycles to transpose and store 16 x 16 elements
PART_SQUARE = 240  # the same where rows are cut short: masked stores
MOST_TAPS = 5  # of a row; each that reaches over a border has a copy of the nest
COPY_PENALTY = 0.01  # of an own copy of the nest for a remainder: code to compile and to fetch


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


def _tiles(extent: int, size: int) -> list[tuple[int, int]]:
    """(how many, how large) of the full tiles and of the remainder."""
    full, rest = divmod(extent, size)
    return [(count, part) for count, part in ((full, size), (1, rest)) if count and part]


@dataclass(frozen=True)
class _Tiling:
    """What a register tile is chosen for. ``sums``: products an output element sums. ``transposed``: the
    output keeps pixels together, so a tile is transposed on its way out; ``packed``: the input is copied."""

    maps: int
    rows: int
    columns: int
    sums: int
    transposed: bool
    packed: bool

    def cycles(self, machine: Machine, vectors: int, height: int, width: int) -> float:
        """Cycles, in units of one FMA, of the whole layer, remainders included."""
        whole = -(-self.maps // machine.lanes)
        parts = [(a * b * c, v, h, w) for a, v in _tiles(whole, vectors)
                 for b, h in _tiles(self.rows, height) for c, w in _tiles(self.columns, width)]
        return sum(count * self._tile(machine, v, h, w, -(-whole // vectors)) for count, v, h, w in parts)

    def _tile(self, machine: Machine, vectors: int, height: int, width: int, sharers: int) -> float:
        pixels = height * width
        step = STEP + max(vectors * pixels, vectors + pixels, LATENCY)
        step += VECTOR_LOAD * vectors + BROADCAST * pixels
        full, part = divmod(width, machine.lanes)
        squares = height * vectors * (full * FULL_SQUARE + (part > 0) * PART_SQUARE)
        stores = squares * machine.lanes / 16 if self.transposed else vectors * pixels
        copied = 2 * height * -(-width // machine.lanes) * self.sums / sharers if self.packed else 0
        return self.sums * step + stores + copied


def _register_tile(tiling: _Tiling, machine: Machine, tallest: int) -> tuple[int, int, int]:
    """(vectors, rows, pixels) of the tile that takes the fewest cycles."""
    best: tuple[float, tuple[int, int, int]] | None = None
    whole = -(-tiling.maps // machine.lanes)
    for vectors in range(1, min(whole, 12) + 1):
        most = (machine.registers - 1 - vectors) // vectors
        for height in range(1, min(tiling.rows, tallest) + 1):
            for width in range(1, min(tiling.columns, most // height) + 1):
                if height > 1 and width < tiling.columns:
                    continue  # tall tiles only where they span the row
                copies = (whole % vectors > 0) + (tiling.rows % height > 0) + (tiling.columns % width > 0)
                cost = tiling.cycles(machine, vectors, height, width) * (1 + COPY_PENALTY * copies)
                if best is None or cost < best[0]:
                    best = (cost, (vectors, height, width))
    assert best is not None
    return best[1]


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


def _channels(problem: Problem, machine: Machine, layout: str, threads: int) -> Channels:
    flat = isinstance(problem, Linear) or is_flat(problem)
    maps, channels, taps = problem.M, problem.C, 1
    rows, columns = 1, problem.N
    if isinstance(problem, Conv2d):
        maps, channels, taps = maps // problem.groups, channels // problem.groups, problem.R * problem.S
        rows, columns = (1, problem.E * problem.F) if flat else (problem.E, problem.F)
    pack, skip = _input_copy(problem, machine, layout)
    tiling = _Tiling(maps, rows, columns, channels * taps, packed=pack == "packed",
                     transposed=layout == "nchw" and isinstance(problem, Conv2d) and rows * columns > 1)
    vectors, height, width = _register_tile(tiling, machine, tallest=1 if "h" in skip else 4)
    depth, unroll = _sum_blocks(channels, channels if flat else 64)
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
        collides = layout == "nchw" and plane % (machine.l1 // 8) == 0  # channels meet in one set of 8 ways
        if not meets_input(problem):
            return "window", ""
        return ("window", "h") if collides or problem.S > MOST_TAPS else ("none", "hw")
    small = plane < 8 * 64  # a plane of a few cache lines: tiles share them unevenly
    return ("packed" if layout == "nchw" and is_flat(problem) and small else "none"), ""


def meets_input(problem: Problem) -> bool:
    """Whether any product is with an element of the input, and not with padding."""
    if isinstance(problem, Linear):
        return True
    sides = zip(problem.output_shape[2:], (problem.R, problem.S), problem.stride, problem.dilation,
                problem.padding[:2], (problem.H, problem.W), strict=True)
    return all(any(0 <= e * stride + r * dilation - before < size for e in range(outputs) for r in range(taps))
               for outputs, taps, stride, dilation, before, size in sides)


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
    copies = min(3, -(-problem.E // rows))  # of the nest, with the first and last rows peeled
    return Pixels(lanes=lanes, maps=tile, rows=rows, vectors=vectors, unroll_taps=products <= 400,
                  peel_borders=products * copies <= 800 and meets_input(problem), order="rows" if many else "taps")


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
    return Depthwise(machine.lanes, rows, pixels, problem.R * problem.S * rows * pixels <= 400)


def default_tiles(problem: Conv2d, outputs: tuple[int, int], machine: Machine, layout: str = "nchw",
                  threads: int = 1) -> Tiles:
    """The recipe of a bilinear algorithm whose tiles have ``outputs`` rows and columns."""
    rows, columns = tile_counts(problem, outputs)
    points = (outputs[0] + problem.R - 1) * (outputs[1] + problem.S - 1)
    row_bytes = 4 * points * (problem.C + problem.M) * columns
    fits = [b for b in range(1, rows + 1) if rows % b == 0 and b * row_bytes <= 2 * machine.l2 and rows >= b * threads]
    block = max(fits, default=1)
    count = block * columns
    most = machine.registers - 7  # a vector of weights and broadcasts beside them
    pixels = -(-count // -(-count // most))
    return Tiles(machine.lanes, outputs, block, vectors=1, pixels=pixels, unroll=4 if problem.C % 4 == 0 else 1)


def default_long_tiles(fft: Fft, machine: Machine, layout: str = "nchw", threads: int = 1) -> LongTiles:
    """The recipe of FFT tiles: a block takes at most a third of L3, beside the filter that it streams."""
    p, plane = fft.problem, fft.plane
    (rows, columns), (high, wide), points = plane.tiles, plane.outputs, (fft.column.points, fft.row.points)
    row_bytes = 4 * points[0] * points[1] * (p.C + p.M) * columns
    fits = [b for b in range(1, rows + 1) if rows % b == 0 and b * row_bytes <= machine.l3 // 3 and rows >= b * threads]
    block = max(fits, default=1)
    vectors, _, pixels = _register_tile(_Tiling(p.M, 1, block * columns, p.C, transposed=False, packed=False),
                                        machine, tallest=1)
    narrow = 2 if layout == "nchw" else machine.registers  # rows of the output leave as transposed squares
    return LongTiles(
        machine.lanes, plane.outputs, points, fft.row.reads, fft.fold, block, vectors, pixels,
        unroll=4 if p.C % 4 == 0 else 1,
        columns_in=_matrix_tile(points[0], fft.row.reads, machine), rows_in=_matrix_tile(points[1], points[0], machine),
        columns_out=_matrix_tile(high, points[1], machine), rows_out=_matrix_tile(wide, high, machine, narrow))


def _matrix_tile(rows: int, columns: int, machine: Machine, widest: int = 32) -> Register:
    """The register tile of a product of matrices, rows by columns, that takes the fewest cycles."""
    def cycles(tile: Register) -> float:
        parts = [(a * b, r, c) for a, r in _tiles(rows, tile.rows) for b, c in _tiles(columns, tile.columns)]
        copies = (rows % tile.rows > 0) + (columns % tile.columns > 0)
        return (1 + 4 * COPY_PENALTY * copies) * sum(
            count * (STEP + max(r * c, r + c, LATENCY) + VECTOR_LOAD * c + BROADCAST * r) for count, r, c in parts)

    most = machine.registers - 4  # vectors and a broadcast beside them
    return min((Register(r, c) for c in range(1, min(columns, widest, most) + 1)
                for r in range(1, min(rows, most // c) + 1)), key=cycles)


def default_toeplitz(problem: Conv2d, machine: Machine, layout: str = "nchw", threads: int = 1) -> Toeplitz:
    """The recipe of im2col: the matrix of a block takes at most half of L2."""
    maps, sums = problem.M // problem.groups, problem.C // problem.groups * problem.R * problem.S
    row_bytes = 4 * problem.C * problem.R * problem.S * problem.F
    fits = [b for b in range(1, problem.E + 1) if problem.E % b == 0 and b * row_bytes <= machine.l2 // 2]
    block = max((b for b in fits if b * threads <= problem.E), default=1)
    tiling = _Tiling(maps, 1, block * problem.F, sums, transposed=layout == "nchw", packed=False)
    vectors, _, pixels = _register_tile(tiling, machine, tallest=1)
    channels = problem.C // problem.groups
    return Toeplitz(machine.lanes, vectors, pixels, block, _sum_blocks(channels, channels)[1])
