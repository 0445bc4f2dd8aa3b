"""The recipe of Strassen's products: a block of pixels goes through all sums and products while it is in the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from convsched.lower.strassen import Blocks, blocks_of, levels_of
from convsched.problem import Problem
from convsched.problem.problem import taps
from convsched.recipes.recipe import Axis
from convsched.schedule import (
    Attach,
    Layout,
    Parallel,
    Reorder,
    Schedule,
    Split,
    StageAt,
    Step,
    Tail,
    Unroll,
    Vectorize,
)

RUN_PIXELS = 8  # pixels of a row at most, whose sums of two levels are written out


@dataclass(frozen=True)
class StrassenBlocks:
    """``block`` rows of each block of rows, or pixels where these are not rows, go through all stages at a time.

    The products have a register tile of ``vectors`` vectors of ``lanes`` output channels by ``pixels`` pixels of a
    row; ``unroll`` input channels are written out, within the loops over taps. Sums work on vectors of channels, or
    of pixels for inputs whose pixels are neighbours in memory.
    """

    lanes: int
    levels: int
    block: int
    vectors: int
    pixels: int
    unroll: int
    name: ClassVar[str] = "strassen"

    def blocks(self, problem: Problem) -> tuple[int, ...]:
        """The values of ``block`` worth trying, any of which will do."""
        return tuple(sorted({max(1, self.block // 4), max(1, self.block // 2), self.block, 2 * self.block,
                             3 * self.block, 4 * self.block}))

    def schedule(self, problem: Problem, layout: str = "nchw") -> Schedule:
        """The steps for a problem, as ``lower_strassen`` gives it."""
        cut = blocks_of(problem, self.levels, layout)
        return Schedule(tuple(_steps(self, cut, tuple(taps(problem)))))


@dataclass(frozen=True)
class _Sums:
    """How sums are made: the loops around those of inputs, and their vector loop; the loops around those of outputs,
    and those to unroll; the steps that cut and peel them; how sums of inputs and products are stored."""

    inputs: tuple[str, ...]
    vector: str
    outputs: tuple[str, ...]
    unrolled: tuple[str, ...]
    cuts: tuple[Step, ...]
    peels: tuple[Step, ...]
    stored: tuple[str, ...]
    products: tuple[str, ...]


def _steps(p: StrassenBlocks, cut: Blocks, tap: tuple[str, ...]) -> list[Step]:
    (maps, channels, extent), wide = cut.block, p.vectors * p.lanes
    along = cut.order[-1] in "hw"  # pixels are neighbours
    steps = (p.unroll,) if along or p.lanes % p.unroll else (p.lanes, p.unroll)  # places in a vector of sums
    m, c, o = Axis.cut("m", maps, wide, p.lanes), Axis.cut("c", channels, *steps), _channels("my", cut, p.lanes)
    if cut.columns is None:
        pixel, column = Axis.cut("e", extent, p.block, p.pixels), Axis((), ())
        (block, at, inner), tiles = pixel.names, pixel.names[1:2]
        peels = pixel.peels(extent, p.block, p.pixels)
    else:
        pixel, column = Axis.cut("e", extent, p.block), Axis.cut("f", cut.columns.count, p.pixels)
        block, (at, inner), tiles = pixel.names[0], column.names, (pixel.names[1], column.names[0])
        peels = (*pixel.peels(extent, p.block), *column.peels(cut.columns.count, p.pixels))
    weights = (f"c/{steps[0]}", *tap, f"c%{steps[0]}") if tap and steps[0] > 1 else ("c", *tap)
    sums = (_along_pixels if along else _along_channels)(p, cut, tap, o)
    tail: Tail = "mask" if extent % p.block else "none"
    cuts = [
        *m.steps, *c.steps, *o.steps, *pixel.steps, *column.steps,
        Split("ex", p.block, block, "ex1", tail), Split("ey", p.block, block, "ey1", tail), *sums.cuts]
    orders = [
        *(Reorder(("n", block, *sums.inputs, *level.rest, *level.made, *level.between, *level.summed, sums.vector))
          for level in levels_of(p.levels, "x")),
        Reorder(("n", block, "k", m.names[0], *tiles, c.names[0], *tap, *c.names[1:], inner, *m.names[1:])),
        *(Reorder(("n", block, *sums.outputs, *level.rest, *sums.unrolled, *level.made, *level.between, *level.summed,
                   o.names[-1])) for level in levels_of(p.levels, "y"))]
    stages = [
        *_summed(cut, p.levels, "x", sums.inputs[-1]),
        Attach("ts.start", at), Attach("t", at), StageAt("ts", at, "registers"),
        *_summed(cut, p.levels, "y", sums.outputs[-1], *sums.unrolled),
        Attach("v", block), Attach("ts", block),
        StageAt("v", block, "buffer", sums.stored),
        StageAt("t", block, "buffer", sums.products)]
    return [
        *cuts, *orders, *stages, Layout("u", ("k", f"m/{wide}", *weights, f"m%{wide}")),
        Unroll((*_unrolled(p.levels, "x"), c.names[-1], inner, m.names[1], *sums.unrolled, *_unrolled(p.levels, "y"))),
        Vectorize((sums.vector, m.names[2], o.names[-1])), Parallel(block),
        *m.peels(maps, wide), *peels, *c.peels(channels, *steps), *sums.peels]


def _along_pixels(p: StrassenBlocks, cut: Blocks, tap: tuple[str, ...], maps: Axis) -> _Sums:
    """Vectors of pixels in; tiles of pixels by channels, transposed, out."""
    vectors, lanes, row = f"m/{p.lanes}", f"m%{p.lanes}", tap[:tap.count("r")]
    run = p.lanes if p.levels == 1 else min(p.lanes, RUN_PIXELS)
    if cut.columns is None:
        q, r = Axis.cut("ex1", p.block, p.lanes), Axis.cut("ey1", p.block, run)
        return _Sums(
            inputs=("cx", q.names[0]), vector=q.names[1], outputs=(maps.names[0], r.names[0]), unrolled=r.names[1:],
            cuts=(*q.steps, *r.steps), peels=(), stored=("k", "n", "c", "e"), products=("k", "n", vectors, "e", lanes))
    q, r = Axis.cut("wx", cut.columns.reads, p.lanes), Axis.cut("fy", cut.columns.count, run)
    return _Sums(
        inputs=("ex1", "cx", *(f"{name}x" for name in row), q.names[0]), vector=q.names[1],
        outputs=(maps.names[0], "ey1", r.names[0]), unrolled=r.names[1:], cuts=(*q.steps, *r.steps),
        peels=(*q.peels(cut.columns.reads, p.lanes), *r.peels(cut.columns.count, run)),
        stored=("k", "n", "e", "c", *row, "w"), products=("k", "n", vectors, "e", "f", lanes))


def _along_channels(p: StrassenBlocks, cut: Blocks, tap: tuple[str, ...], maps: Axis) -> _Sums:
    """Vectors of channels in and out."""
    channels = _channels("cx", cut, p.lanes)
    (*outer, vector), steps = channels.names, channels.steps
    vectors, lanes, row = f"c/{p.lanes}", f"c%{p.lanes}", tap[:tap.count("r")]
    if cut.columns is None:
        tiles = (f"e/{p.pixels}", vectors, f"e%{p.pixels}") if p.pixels > 1 else ("e", vectors)
        return _Sums(inputs=("ex1", *outer), vector=vector, outputs=("ey1", *maps.names[:-1]), unrolled=(), cuts=steps,
                     peels=(), stored=("k", "n", *tiles, lanes), products=("k", "n", "e", "m"))
    return _Sums(
        inputs=("ex1", *(f"{name}x" for name in row), "wx", *outer), vector=vector,
        outputs=("ey1", "fy", *maps.names[:-1]), unrolled=(), cuts=steps, peels=(),
        stored=("k", "n", "e", vectors, *row, "w", lanes), products=("k", "n", "e", "f", "m"))


def _channels(loop: str, cut: Blocks, lanes: int) -> Axis:
    """A loop over channels of activations cut into vectors, within the blocks that these are stored in."""
    blocks = (16,) if cut.order[-1] == "c%16" and lanes < 16 else ()
    return Axis.cut(loop, cut.block[1 if loop == "cx" else 0], *blocks, lanes)


def _summed(cut: Blocks, levels: int, letter: str, at: str, *unrolled: str) -> list[Step]:
    """Sums made in registers: those of the last factor for each value made, those before it for all; what one level
    hands on to the next stays in L1."""
    steps: list[Step] = []
    for level in levels_of(levels, letter):
        outer, inner = [at, *level.rest, *unrolled][-1], level.made[-1]
        between = [f"{level.sums}{number}" for number in range(1, len(level.between) + 1)]
        names = [(level.sums, inner), *((name, outer) for name in between)]
        steps += [*(Attach(stage, place) for name, place in names for stage in (f"{name}.start", name)),
                  *(StageAt(name, place, "registers") for name, place in names)]
        if level.source:
            order = ("k", "i", "l", "n", "e", *(["f"] if cut.columns else []), "m") if letter == "y" else ()
            steps += [Attach(level.source, at), StageAt(level.source, at, "buffer", order)]
    return steps


def _unrolled(levels: int, letter: str) -> list[str]:
    """The loops over values, each once."""
    found = [name for level in levels_of(levels, letter) for name in (*level.made, *level.between, *level.summed)]
    return list(dict.fromkeys(found))
