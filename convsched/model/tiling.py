"""The cycles of a register tile, and the tile that takes the fewest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from convsched.machine import Machine

LATENCY = 8  # FMAs in flight that keep two pipes of four cycles busy
STEP = 0.5  # cycles of FMAs lost to the loop over channels, for each channel and tap
VECTOR_LOAD = 0.15  # of a weight vector, which comes from L2, beside an FMA
LOAD, OWN_LOAD = 1.0, 1.3  # of a load, where FMAs broadcast as they load, and where broadcasts are loads of their own
BROADCAST = 0.03  # of an input element from L1
FULL_SQUARE = 150  # cycles to transpose and store 16 x 16 elements
PART_SQUARE = 240  # the same where rows are cut short: masked stores
WAYS, EVICTED = 8, 2  # lines that a set of L1 holds, and the time of stores to more, whose lines leave half written
COPY_PENALTY = 0.01  # of an own copy of the nest for a remainder: code to compile and to fetch


def _tiles(extent: int, size: int) -> list[tuple[int, int]]:
    """(how many, how large) of the full tiles and of the remainder."""
    full, rest = divmod(extent, size)
    tiles = [(full, size)] if full else []
    return [*tiles, (1, rest)] if rest else tiles


@dataclass(frozen=True)
class _Tiling:
    """What a register tile is chosen for. ``sums``: products an output element sums. ``transposed``: the
    output keeps pixels together, so a tile is transposed on its way out; ``packed``: the input is copied;
    ``collides``: the same pixel of all output channels falls into one set of L1."""

    maps: int
    rows: int
    columns: int
    sums: int
    transposed: bool
    packed: bool
    collides: bool = False

    def cycles(self, machine: Machine, vectors: int, height: int, width: int) -> float:
        """Cycles, in units of one FMA, of the whole layer, remainders included."""
        lanes, load = machine.lanes, _load(machine)
        whole = -(-self.maps // lanes)
        rows, columns = _tiles(self.rows, height), _tiles(self.columns, width)
        return sum(a * b * c * self._tile(lanes, load, v, h, w, -(-whole // vectors))
                   for a, v in _tiles(whole, vectors) for b, h in rows for c, w in columns)

    def _tile(self, lanes: int, load: float, vectors: int, height: int, width: int, sharers: int) -> float:
        pixels = height * width
        step = STEP + max(vectors * pixels, load * (vectors + pixels), LATENCY)
        step += VECTOR_LOAD * vectors + BROADCAST * pixels
        stores: float = vectors * pixels
        if self.transposed:
            full, part = divmod(width, lanes)
            stores = height * vectors * (full * FULL_SQUARE + (part > 0) * PART_SQUARE) * lanes / 16
        if self.collides and lanes <= WAYS < vectors * lanes:
            stores *= EVICTED
        copied = 2 * height * -(-width // lanes) * self.sums / sharers if self.packed else 0
        return self.sums * step + stores + copied


def _load(machine: Machine) -> float:
    return LOAD if machine.broadcasts else OWN_LOAD


@lru_cache(512)
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
