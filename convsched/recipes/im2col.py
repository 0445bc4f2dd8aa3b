"""The recipe of im2col: a product of matrices whose second factor is the input, copied block by block or read in place.

Against direct convolution it has tiles of pixels that go on in the next row, which matters for short rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from convsched.problem import Conv2d, Problem
from convsched.problem.problem import taps
from convsched.recipes.direct import window
from convsched.recipes.recipe import Axis, divisors
from convsched.schedule import (
    Attach,
    Inline,
    Layout,
    Parallel,
    Prefetch,
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
    im2col buffer. ``indirect``, there is none, and each pixel of a tile is read where it lies in the input, or in a
    copy of the rows of a block with their border (Dukhan, "The Indirect Convolution Algorithm", 2019). ``block``
    divides the rows. ``unroll`` input channels are written out. Weights are fetched ``prefetch`` iterations of the
    innermost loop before they are used, if it is not 0.
    """

    lanes: int
    vectors: int
    pixels: int
    block: int
    unroll: int
    parallel: Literal["pixels", "channels"] = "pixels"
    indirect: bool = False
    prefetch: int = 0
    name: ClassVar[str] = "toeplitz"

    def blocks(self, problem: Problem) -> tuple[int, ...]:
        """The values of ``block`` worth trying: those that divide the rows of pixels."""
        return divisors(problem.E)

    def schedule(self, problem: Problem, layout: str = "nchw") -> Schedule:
        """The steps for a problem, as ``lower_im2col`` gives it."""
        assert isinstance(problem, Conv2d)
        return Schedule(tuple(_toeplitz(self, problem, layout)))


def _toeplitz(p: Toeplitz, problem: Conv2d, layout: str) -> list[Step]:
    """Pixels are peeled before ``i`` is put in place, so that blocks are sums of loops; channels, which stage ``i`` has
    too, are cut after it."""
    group = ["g"] if problem.groups > 1 else []
    maps, channels, count = problem.M // problem.groups, problem.C // problem.groups, p.block * problem.F
    m, c = Axis.cut("m", maps, p.vectors * p.lanes, p.lanes), Axis.cut("c", channels, p.unroll)
    pixel = Axis.cut("p1", count, p.pixels)
    at = pixel.names[0]
    return [
        Split("p", count, "e0", "p1"), Split("e", p.block, "e0", "e1"), *m.steps, *pixel.steps,
        Reorder(("n", "e0", *group, m.names[0], at, "c", *taps(problem), pixel.names[1], *m.names[1:])),
        Attach("init", at), Attach("epilogue", at), StageAt("t", at, "registers"),
        Parallel("e0" if p.parallel == "pixels" else m.names[0]),
        *([] if p.indirect else _stored(p, problem)),
        *pixel.peels(count, p.pixels), *([Inline("i")] if p.indirect else []),
        *c.steps, Reorder((c.names[0], *taps(problem), c.names[1])),
        Layout("w", (*group, m.names[0], c.names[0], *taps(problem), c.names[1], *m.names[1:])),
        Unroll((c.names[1], pixel.names[1], m.names[1])), Vectorize((m.names[2],)),
        *m.peels(maps, p.vectors * p.lanes), *c.peels(channels, p.unroll),
        *(window(layout, "e0", p.lanes) if p.indirect and any(problem.padding) else []),
        *([Prefetch("w_packed", [c.names[0], *taps(problem)][-1], p.prefetch)] if p.prefetch else [])]


def _stored(p: Toeplitz, problem: Conv2d) -> list[Step]:
    """The matrix of a block, made a row of pixels after the other; what a tile reads lies together."""
    column, tile = Axis.cut("f", problem.F, p.lanes), (f"p/{p.pixels}", f"p%{p.pixels}")
    order = ("n", tile[0], "c", "r", "s", tile[1]) if p.pixels > 1 else ("n", "p", "c", "r", "s")
    return [*column.steps, Attach("i", "e0"), StageAt("i", "e0", "buffer", order), Vectorize((column.names[1],))]
