"""The recipe of im2col: a product of matrices whose second factor is made of the input, block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from convsched.lower.direct import taps
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


@dataclass(frozen=True)
class Toeplitz:
    """Register tile of ``vectors`` vectors of output channels by ``pixels`` output pixels.

    The Toeplitz matrix of ``block`` rows of output pixels exists at a time: of all of them, it is the explicit
    im2col buffer. ``block`` divides the rows. ``unroll`` input channels are written out.
    """

    lanes: int
    vectors: int
    pixels: int
    block: int
    unroll: int
    parallel: Literal["pixels", "channels"] = "pixels"
    name = "toeplitz"

    def schedule(self, problem: Problem, layout: str = "nchw") -> Schedule:
        """The steps for a problem, as ``lower_im2col`` gives it."""
        assert isinstance(problem, Conv2d)
        return Schedule(tuple(_toeplitz(self, problem)))


def _toeplitz(p: Toeplitz, problem: Conv2d) -> list[Step]:
    group = ["g"] if problem.groups > 1 else []
    maps, channels, count = problem.M // problem.groups, problem.C // problem.groups, p.block * problem.F
    m, c = Axis.cut("m", maps, p.vectors * p.lanes, p.lanes), Axis.cut("c", channels, p.unroll)
    pixel, column = Axis.cut("p1", count, p.pixels), Axis.cut("f", problem.F, p.lanes)
    sums = [c.names[0], *taps(problem), c.names[1]]
    at = pixel.names[0]
    return [
        Split("p", count, "e0", "p1"), Split("e", p.block, "e0", "e1"),
        *m.steps, *c.steps, *pixel.steps, *column.steps,
        Reorder(("n", "e0", *group, m.names[0], at, *sums, pixel.names[1], *m.names[1:])),
        Reorder(("n", "e0", *group, *sums, "e1", *column.names)),
        Attach("init", at), Attach("epilogue", at), StageAt("t", at, "registers"),
        Attach("i", "e0"), StageAt("i", "e0", "buffer", ("n", "c", "r", "s", "p")),
        Layout("w", (*group, m.names[0], *sums, *m.names[1:])),
        Unroll((c.names[1], pixel.names[1], m.names[1])), Vectorize((m.names[2], column.names[1])),
        Parallel("e0" if p.parallel == "pixels" else m.names[0]),
        *m.peels(maps, p.vectors * p.lanes), *pixel.peels(count, p.pixels), *c.peels(channels, p.unroll)]
