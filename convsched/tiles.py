"""The recipes of bilinear algorithms: a block of tiles goes through all transforms while it is in the cache.

``tiles``       short transforms, written out, with all elements of a tile in registers.
``long tiles``  long transforms, each half a product of matrices with a register tile of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from convsched.lower.bilinear import Fold, Plane
from convsched.problem import Conv2d, Problem
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


def tile_counts(problem: Conv2d, outputs: tuple[int, int]) -> tuple[int, int]:
    """How many tiles of ``outputs`` (rows, columns) cover the output, along its height and its width."""
    return Plane(problem, outputs).tiles


@dataclass(frozen=True)
class Register:
    """A register tile of ``rows`` of a constant matrix by ``columns`` vectors."""

    rows: int
    columns: int


@dataclass(frozen=True)
class LongTiles:
    """Tiles of ``outputs`` (rows, columns), by ``points`` products along both; ``block`` rows of them at a time.

    ``reads`` are the pixels of a row that a tile reads. Each half of a transform has a register tile: ``columns_in``
    and ``rows_in`` of the input's, ``columns_out`` and ``rows_out`` of the output's. Products are those of ``Tiles``:
    ``vectors`` of output channels by ``pixels`` tiles, and ``unroll`` input channels written out.
    """

    lanes: int
    outputs: tuple[int, int]
    points: tuple[int, int]
    reads: int
    fold: Fold
    block: int
    vectors: int
    pixels: int
    unroll: int
    columns_in: Register
    rows_in: Register
    columns_out: Register
    rows_out: Register
    name = "long tiles"

    def schedule(self, problem: Problem, layout: str = "nchw") -> Schedule:
        """The steps for a problem, as ``lower_bilinear`` gives it."""
        assert isinstance(problem, Conv2d)
        return Schedule(tuple(_long_tiles(self, problem)))


def _long_tiles(p: LongTiles, problem: Conv2d) -> list[Step]:
    count, wide = p.block * Plane(problem, p.outputs, p.fold).tiles[1], p.vectors * p.lanes
    d, o = Axis.cut("d", problem.C, p.lanes), Axis.cut("o", problem.M, p.lanes)
    m, c = Axis.cut("m", problem.M, wide, p.lanes), Axis.cut("c", problem.C, p.unroll)
    t = Axis.cut("t1", count, p.pixels)
    sizes = {"px": (p.points[0], p.columns_in.rows), "lx": (p.reads, p.columns_in.columns),
             "q": (p.points[1], p.rows_in.rows), "p": (p.points[0], p.rows_in.columns),
             "iy": (p.outputs[0], p.columns_out.rows), "qy": (p.points[1], p.columns_out.columns),
             "j": (p.outputs[1], p.rows_out.rows), "i": (p.outputs[0], p.rows_out.columns)}
    cut = {loop: Axis.cut(loop, extent, factor) for loop, (extent, factor) in sizes.items()}
    outer, inner = ({loop: axis.names[part] for loop, axis in cut.items()} for part in (0, 1))

    def product(head: tuple[str, ...], along: str, across: str, last: str, total: str) -> Reorder:
        return Reorder((*head, outer[along], outer[across], total, inner[along], inner[across], last))

    at_input, at_output = ("n", "e0", d.names[0], "te1", "tf"), ("n", "e0", o.names[0], "ye1", "yf")
    odd = {letter: p.lanes * (size | 1) for letter, size in (  # lines of neighbours fall in different sets of a cache
        ("h", p.reads), ("p", p.reads), ("i", p.points[1]), ("g", p.points[1]))}
    plane = (("g", odd["g"]), ("t", odd["g"] * (p.points[0] | 1)))
    return [
        Split("te", p.block, "e0", "te1"), Split("ye", p.block, "e0", "ye1"), Split("t", count, "e0", "t1"),
        *d.steps, *o.steps, *m.steps, *c.steps, *t.steps, *(step for axis in cut.values() for step in axis.steps),
        product(at_input, "lx", "px", d.names[1], "k"), product(at_input, "p", "q", d.names[1], "l"),
        Reorder(("n", "e0", "g", "h", m.names[0], t.names[0], *c.names, t.names[1], *m.names[1:])),
        product(at_output, "qy", "iy", o.names[1], "pc"), product(at_output, "i", "j", o.names[1], "qc"),
        *_computed(("bxb.start", "bxb"), outer["q"], ("bxb",)), *_computed(("bx.start", "bx"), outer["px"], ("bx",)),
        Attach("vx", "tf"), StageAt("vx", "tf", "buffer", ("n", "t", "p", "l", "c"), (("p", odd["p"]),)),
        *_computed(("s.start", "t"), t.names[0], ("s",)),
        *_computed(("ctc.start", "ctc"), outer["j"], ("ctc",)), *_computed(("ct.start", "ct"), outer["iy"], ("ct",)),
        Attach("yt", "yf"), StageAt("yt", "yf", "buffer", ("n", "t", "i", "q", "m"), (("i", odd["i"]),)),
        StageAt("x", "tf", "window", ("n", "h", "w", "c")),
        Attach("v", "e0"), Attach("s", "e0"),
        StageAt("v", "e0", "buffer", ("n", f"c/{p.lanes}", "t", "g", "h", f"c%{p.lanes}"), plane),
        StageAt("t", "e0", "buffer", ("n", f"m/{p.lanes}", "t", "g", "h", f"m%{p.lanes}"), plane),
        Layout("u", ("g", "h", f"m/{wide}", "c", f"m%{wide}")),
        Split("x.w", p.lanes, "x.w0", "x.w1", "mask"), Reorder(("x.n", "x.h", "x.w0", "x.w1", "x.c")),
        Unroll((*inner.values(), "x.w1", c.names[1], t.names[1], m.names[1])),
        Vectorize((d.names[1], m.names[2], o.names[1], "x.c")), Parallel("e0"),
        *m.peels(problem.M, wide), *c.peels(problem.C, p.unroll), *t.peels(count, p.pixels),
        *(step for loop, axis in cut.items() for step in axis.peels(*sizes[loop]))]


@dataclass(frozen=True)
class Tiles:
    """Tiles of ``outputs`` (rows, columns); ``block`` rows of them go through all stages at a time.

    Transforms work on vectors of ``lanes`` channels, in registers. The products have a register tile of
    ``vectors`` vectors of output channels by ``pixels`` tiles, and ``unroll`` input channels are written out.
    ``block`` divides the number of rows of tiles.
    """

    lanes: int
    outputs: tuple[int, int]
    block: int
    vectors: int
    pixels: int
    unroll: int
    name = "tiles"

    def schedule(self, problem: Problem, layout: str = "nchw") -> Schedule:
        """The steps for a problem, as ``lower_bilinear`` gives it."""
        assert isinstance(problem, Conv2d)
        return Schedule(tuple(_tiles(self, problem, layout)))


def _tiles(p: Tiles, problem: Conv2d, layout: str) -> list[Step]:
    width = tile_counts(problem, p.outputs)[1]
    count, wide = p.block * width, p.vectors * p.lanes
    d, o = Axis.cut("d", problem.C, p.lanes), Axis.cut("o", problem.M, p.lanes)
    m, c = Axis.cut("m", problem.M, wide, p.lanes), Axis.cut("c", problem.C, p.unroll)
    t = Axis.cut("t1", count, p.pixels)
    run = min(width, max(1, p.lanes // p.outputs[1]) if layout == "nchw" else 1)  # tiles whose rows are stored as one
    y = Axis.cut("yf", width, run)
    at_input, at_product, at_output = "tf", t.names[0], y.names[1]
    return [
        Split("te", p.block, "e0", "te1"), Split("ye", p.block, "e0", "ye1"), Split("t", count, "e0", "t1"),
        *d.steps, *o.steps, *m.steps, *c.steps, *t.steps, *y.steps,
        Reorder(("n", "e0", d.names[0], "te1", "tf", "lx", "px", "k", "p", "q", "l", d.names[1])),
        Reorder(("n", "e0", "g", "h", m.names[0], t.names[0], *c.names, t.names[1], *m.names[1:])),
        Reorder(("n", "e0", o.names[0], "ye1", *y.names, "qy", "iy", "pc", "i", "j", "qc", o.names[1])),
        *_computed(("bxb.start", "bxb"), "p", ("bxb",)), *_computed(("bx.start", "bx", "vx"), at_input, ("bx", "vx")),
        *_computed(("s.start", "t"), at_product, ("s",)),
        *_computed(("ctc.start", "ctc"), "i", ("ctc",)), *_computed(("ct.start", "ct", "yt"), at_output, ("ct", "yt")),
        StageAt("x", d.names[0], "window", ("n", "h", "w", "c")),
        Attach("v", "e0"), Attach("s", "e0"),
        StageAt("v", "e0", "buffer", ("n", "g", "h", f"c/{p.lanes}", "t", f"c%{p.lanes}")),
        StageAt("t", "e0", "buffer", ("n", "g", "h", f"m/{p.lanes}", "t", f"m%{p.lanes}")),
        Layout("u", ("g", "h", f"m/{wide}", "c", f"m%{wide}")),
        Split("x.w", p.lanes, "x.w0", "x.w1", "mask"), Reorder(("x.n", "x.h", "x.w0", "x.w1", "x.c")),
        Unroll(("lx", "px", "k", "p", "q", "l", "qy", "iy", "pc", "i", "j", "qc", "x.w1",
                c.names[1], t.names[1], m.names[1], y.names[1])),
        Vectorize((d.names[1], m.names[2], o.names[1], "x.c")), Parallel("e0"),
        *m.peels(problem.M, wide), *c.peels(problem.C, p.unroll), *t.peels(count, p.pixels), *y.peels(width, run)]


def _computed(stages: tuple[str, ...], at: str, tensors: tuple[str, ...]) -> list[Step]:
    """Stages beside each other computed at one loop, with what they hand on in registers."""
    return [*(Attach(stage, at) for stage in stages), *(StageAt(tensor, at, "registers") for tensor in tensors)]
