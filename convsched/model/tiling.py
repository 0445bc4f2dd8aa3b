"""The cycles of a register tile, and the tile that takes the fewest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from convsched.machine import Machine
from convsched.model.constants import CORE


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
        step = CORE.tile_step + max(vectors * pixels, load * (vectors + pixels), CORE.in_flight)
        step += CORE.weight_vector * vectors + CORE.input_element * pixels
        stores: float = vectors * pixels
        if self.transposed:
            full, part = divmod(width, lanes)
            stores = height * vectors * (full * CORE.square + (part > 0) * CORE.cut_square) * lanes / 16
        if self.collides and lanes <= CORE.ways < vectors * lanes:
            stores *= CORE.evicted
        copied = 2 * height * -(-width // lanes) * self.sums / sharers if self.packed else 0
        return self.sums * step + stores + copied


def _load(machine: Machine) -> float:
    return CORE.load if machine.broadcasts else CORE.own_load


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
                cost = tiling.cycles(machine, vectors, height, width) * (1 + CORE.copy * copies)
                if best is None or cost < best[0]:
                    best = (cost, (vectors, height, width))
    assert best is not None
    return best[1]
