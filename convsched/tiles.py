"""The recipe of bilinear algorithms: a block of tiles goes through all transforms while it is in the cache."""

from __future__ import annotations

from dataclasses import dataclass

from convsched.problem import Conv2d, Problem
from convsched.recipes import Axis
from convsched.schedule import (
    Attach,
    Layout,
    Parallel,
    Peel,
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
    return -(-problem.E // outputs[0]), -(-problem.F // outputs[1])


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
        Reorder(("n", "e0", o.names[0], "ye1", *y.names, "qy", "iy", "p", "i", "j", "q", o.names[1])),
        *_computed(("bxb.start", "bxb"), "p", ("bxb",)), *_computed(("bx.start", "bx"), at_input, ("bx",)),
        *_computed(("s.start", "t"), at_product, ("s",)),
        *_computed(("ctc.start", "ctc"), "i", ("ctc",)), *_computed(("ct.start", "ct"), at_output, ("ct",)),
        StageAt("x", d.names[0], "window", ("n", "h", "w", "c")),
        Attach("v", "e0"), Attach("s", "e0"),
        StageAt("v", "e0", "buffer", ("n", "g", "h", f"c/{p.lanes}", "t", f"c%{p.lanes}")),
        StageAt("t", "e0", "buffer", ("n", "g", "h", f"m/{p.lanes}", "t", f"m%{p.lanes}")),
        Layout("u", ("g", "h", f"m/{wide}", "c", f"m%{wide}")),
        Split("x.w", p.lanes, "x.w0", "x.w1", "mask"), Reorder(("x.n", "x.h", "x.w0", "x.w1", "x.c")),
        Unroll(("lx", "px", "k", "p", "q", "l", "qy", "iy", "i", "j", "x.w1", c.names[1], t.names[1], m.names[1], y.names[1])),
        Vectorize((d.names[1], m.names[2], o.names[1], "x.c")), Parallel("e0"),
        *m.peels(problem.M, wide), *c.peels(problem.C, p.unroll), *t.peels(count, p.pixels), *y.peels(width, run)]


def _computed(stages: tuple[str, ...], at: str, tensors: tuple[str, ...]) -> list[Step]:
    """Stages beside each other computed at one loop, with what they hand on in registers."""
    return [*(Attach(stage, at) for stage in stages), *(StageAt(tensor, at, "registers") for tensor in tensors)]
