"""The blocking of a bilinear algorithm's products, and the estimated time of a call."""

from __future__ import annotations

from dataclasses import dataclass

from convsched.lower.fft_tiles import Fft, Side
from convsched.lower.plane import Plane
from convsched.machine import Machine
from convsched.model.constants import CORE
from convsched.model.tiling import _load, _register_tile, _tiles, _Tiling


@dataclass(frozen=True)
class Blocking:
    """How the products of a bilinear algorithm are blocked: rows of tiles in a ``block``, a register tile of
    ``vectors`` by ``pixels``, and the estimated ``time`` of a call, in vector FMAs of one core."""

    block: int
    vectors: int
    pixels: int
    time: float


def best_blocking(plane: Plane, points: tuple[int, int], machine: Machine, threads: int = 1, by_lines: bool = False,
                  ) -> Blocking:
    """The blocking that takes the least estimated time: small blocks stay in L2, large ones stream the filters less
    often. Blocks are shared among the threads."""
    rows = plane.tiles[0]
    blocks = [b for b in range(1, rows + 1) if rows % b == 0 and (rows >= b * threads or b == 1)]
    return min((_blocking(plane, points, block, machine, threads, by_lines) for block in blocks),
               key=lambda made: made.time)


def _blocking(plane: Plane, points: tuple[int, int], block: int, machine: Machine, threads: int,
              by_lines: bool) -> Blocking:
    """A block and its estimated time: products at full rate, or at that of loads or of the latency of FMAs where a
    register tile is small; transforms by the vector; filters that do not stay in L2, and blocks that do not, by the
    bytes that each block moves."""
    problem, (rows, columns), rank = plane.problem, plane.tiles, points[0] * points[1]
    channels, maps = (count // problem.groups for count in (problem.C, problem.M))
    tiles = block * columns
    if machine.broadcasts and not by_lines:  # FMAs broadcast as they load: one vector of weights is enough
        most = machine.registers - 7  # a vector of weights and broadcasts beside them
        vectors, pixels, load = 1, -(-tiles // -(-tiles // most)), 0.0
    else:
        tiling = _Tiling(maps, 1, tiles, channels, transposed=False, packed=False)
        vectors, _, pixels = _register_tile(tiling, machine, 1)
        load = _load(machine)
    whole, deep = -(-maps // machine.lanes), -(-channels // machine.lanes)
    steps = sum(a * b * (max(v * t, (v + t) * load, CORE.in_flight) + CORE.product_step)
                for a, v in _tiles(whole, vectors) for b, t in _tiles(tiles, pixels))
    filters, transformed = 4 * rank * channels * maps, 4 * rank * tiles * (channels + maps)
    l3, memory = machine.vector_bytes / CORE.l3_vector, machine.vector_bytes / CORE.memory_vector
    moved = 0 if 2 * filters <= machine.l2 else filters / l3 if 2 * filters <= machine.l3 else filters / memory
    if transformed > 2 * machine.l2:  # written, for which it is fetched, and read
        moved += 3 * transformed / (l3 if transformed + filters <= machine.l3 else memory)
    time = rank * (channels * steps + CORE.transform * tiles * (deep + whole)) + moved
    planes = problem.N * problem.groups * problem.dilation[0] * problem.dilation[1]
    return Blocking(block, vectors, pixels, planes * -(-rows // block // threads) * time)


def fft_products(tiles: Fft) -> float:
    """The time of FFT tiles, in products of one channel with another: those, and transforms in their measure."""
    p, plane = tiles.problem, tiles.plane
    P, Q = tiles.column.points, tiles.row.points
    down, across = _transform(tiles.column), _transform(tiles.row)
    inputs = tiles.row.reads * down + P * across
    outputs = Q * down + plane.outputs[0] * across
    count = p.N * plane.tiles[0] * plane.tiles[1]
    return count * (p.C * inputs + p.M * outputs + P * Q * p.C * p.M) + CORE.fft_weight * P * Q * p.C * p.M


def _transform(side: Side) -> float:
    """Instructions of a transform, those that load and store what does not stay in registers included."""
    return CORE.fft_factor * side.n * side.n.bit_length() * (1 + side.n / CORE.fft_spill)
