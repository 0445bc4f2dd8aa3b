"""The recipe of Strassen's products: a block of pixels goes through all sums and products while it is in the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from convsched.lower.blocks import Blocks, blocks_of
from convsched.machine import Machine
from convsched.problem import Problem
from convsched.recipes import Axis
from convsched.schedule import (
    Attach,
    Layout,
    Parallel,
    Reorder,
    Schedule,
    Split,
    StageAt,
    Step,
    Unroll,
    Vectorize,
)
from convsched.steps import Tail

VECTORS = 2  # of a register tile: each broadcast is used twice
SHARERS = 8  # register tiles of a block: as many share the weights that stream from L3, and their sums stay near


@dataclass(frozen=True)
class StrassenBlocks:
    """``block`` pixels of each block of pixels go through all stages at a time.

    The products have a register tile of ``vectors`` vectors of ``lanes`` output channels by ``pixels`` pixels, and
    ``unroll`` input channels are written out. Sums work on vectors of channels, or of pixels for inputs whose pixels
    are neighbours in memory.
    """

    lanes: int
    levels: int
    block: int
    vectors: int
    pixels: int
    unroll: int
    name: ClassVar[str] = "strassen"

    def schedule(self, problem: Problem, layout: str = "nchw") -> Schedule:
        """The steps for a problem, as ``lower_strassen`` gives it."""
        return Schedule(tuple(_steps(self, blocks_of(problem, self.levels, layout))))


def _steps(p: StrassenBlocks, cut: Blocks) -> list[Step]:
    maps, channels, extent = cut.block
    wide, sizes, last = p.vectors * p.lanes, (p.block, p.pixels), cut.order[-1]
    steps = (p.unroll,) if last == "p" or p.lanes % p.unroll else (p.lanes, p.unroll)  # places in a vector of sums
    m, c, o = Axis.cut("m", maps, wide, p.lanes), Axis.cut("c", channels, *steps), Axis.cut("o", maps, p.lanes)
    pixel = Axis.cut("p", extent, *sizes)
    tail: Tail = "mask" if extent % p.block else "none"
    sums: tuple[str, ...]
    products: tuple[str, ...]
    block, tile, _ = pixel.names
    if last == "p":  # vectors of pixels in; tiles of pixels by channels, transposed, out
        run = max(1, p.lanes >> 2 * (p.levels - 1))  # pixels, 4^levels results each, written out as one
        q, d, r = Axis.cut("q1", p.block, p.lanes), Axis(("d",), ()), Axis.cut("r1", p.block, run)
        inputs, vector, outputs = ("d", "q10"), "q11", ("o0", *r.names)
        sums, products = ("k", "n", "c", "p"), ("k", "n", f"m/{p.lanes}", "p", f"m%{p.lanes}")
    else:
        q, d, r = Axis(("q1",), ()), Axis.cut("d", channels, p.lanes), Axis(("r1",), ())
        inputs, vector, outputs = ("q1", "d0"), "d1", ("r1", "o0")
        tiles = (f"p/{p.pixels}", f"p%{p.pixels}") if p.pixels > 1 else ("p",)
        sums = ("k", "n", tiles[0], f"c/{p.lanes}", *tiles[1:], f"c%{p.lanes}")
        products = ("k", "n", "p", "m")
    return [
        *m.steps, *c.steps, *o.steps, *pixel.steps,
        Split("q", p.block, block, "q1", tail), Split("r", p.block, block, "r1", tail), *q.steps, *d.steps, *r.steps,
        Reorder(("n", block, *inputs, "f", "j", "l", vector)),
        Reorder(("n", block, "k", m.names[0], tile, *c.names, *pixel.names[2:], *m.names[1:])),
        Reorder(("n", block, *outputs, "a", "e", "h", o.names[1])),
        Attach("vs.start", "f"), Attach("vs", "f"), StageAt("vs", "f", "registers"),
        Attach("ts.start", tile), Attach("t", tile), StageAt("ts", tile, "registers"),
        Attach("ys.start", "e"), Attach("ys", "e"), StageAt("ys", "e", "registers"),
        Attach("v", block), Attach("ts", block),
        StageAt("v", block, "buffer", sums), StageAt("t", block, "buffer", products),
        Layout("u", ("k", f"m/{wide}", "c", f"m%{wide}")),
        Unroll(("f", "j", "l", c.names[-1], pixel.names[2], m.names[1], *r.names[1:], "a", "e", "h")),
        Vectorize((vector, m.names[2], o.names[1])), Parallel(block),
        *m.peels(maps, wide), *pixel.peels(extent, *sizes), *c.peels(channels, *steps)]


def default_strassen(problem: Problem, levels: int, machine: Machine, layout: str = "nchw",
                     threads: int = 1) -> StrassenBlocks:
    """The recipe for a problem on a machine."""
    cut = blocks_of(problem, levels, layout)
    channels, pixels = cut.block[1:]
    most = (machine.registers - 1 - VECTORS) // VECTORS  # pixels, beside the tile's weights and a broadcast
    count = max(-(-pixels // (SHARERS * most)), min(threads, pixels))
    whole = machine.lanes if cut.order[-1] == "p" else 1
    block = min(pixels, -(-pixels // (count * whole)) * whole)
    tile = -(-block // -(-block // most))
    return StrassenBlocks(machine.lanes, levels, block, VECTORS, tile, unroll=4 if channels % 4 == 0 else 1)
