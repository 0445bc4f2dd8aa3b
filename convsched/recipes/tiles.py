"""The recipe of bilinear algorithms: a block of tiles goes through all transforms while it is in the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from convsched.lower.plane import Plane, Shape
from convsched.problem import Conv2d, Problem
from convsched.recipes.recipe import Axis, divisors
from convsched.schedule import (
    Attach,
    Layout,
    Parallel,
    Peel,
    Prefetch,
    Reorder,
    Schedule,
    Split,
    StageAt,
    Step,
    Unroll,
    Vectorize,
)

LINE_ELEMENTS = 16  # elements of a cache line
TRANSFORMS = (("bx", "px", "k"), ("bxb", "q", "l"), ("ct", "iy", "pc"), ("ctc", "j", "qc"))
"""The name of each transform's sums, and of the loops over rows and columns of its factors."""


@dataclass(frozen=True)
class Tiles:
    """``block`` rows of tiles go through all stages at a time; it divides the number of rows.

    Transforms work on vectors of ``lanes`` channels. That of the input is written out for a whole tile, whose elements
    stay in registers between columns and rows; that of the output for one line of a tile, in a loop over its lines,
    whose elements wait in the cache. Where the layout keeps pixels together, a row of tiles is made in a buffer and
    stored transposed from there. ``by_lines``, for long tiles, the input is transformed in loops over its lines too,
    from a copy of what one tile reads. The products have a register tile of ``vectors`` vectors of output channels by
    ``pixels`` tiles, and ``unroll`` input channels are written out; the filter is fetched ``prefetch`` iterations of
    the loop over them before it is used, if it is not 0.
    """

    lanes: int
    shape: Shape
    block: int
    vectors: int
    pixels: int
    unroll: int
    by_lines: bool = False
    prefetch: int = 0
    name: ClassVar[str] = "tiles"

    def blocks(self, problem: Problem) -> tuple[int, ...]:
        """The values of ``block`` worth trying: those that divide the rows of tiles."""
        assert isinstance(problem, Conv2d)
        return divisors(Plane(problem, self.shape.outputs, self.shape.fold).tiles[0])

    def schedule(self, problem: Problem, layout: str = "nchw") -> Schedule:
        """The steps for a problem, as ``lower_bilinear`` gives it."""
        assert isinstance(problem, Conv2d)
        return Schedule(tuple(_tiles(self, problem, layout)))


def _tiles(p: Tiles, problem: Conv2d, layout: str) -> list[Step]:
    shape, plane = p.shape, Plane(problem, p.shape.outputs, p.shape.fold)
    width, head = plane.tiles[1], ("n", *plane.loops, "e0")
    channels, maps = (count // problem.groups for count in (problem.C, problem.M))
    count, wide = p.block * width, p.vectors * p.lanes
    inner = (p.lanes, p.unroll) if p.lanes % p.unroll == 0 and p.unroll < p.lanes else (p.unroll,)
    d, o = Axis.cut("d", channels, p.lanes), Axis.cut("o", maps, p.lanes)
    m, c = Axis.cut("m", maps, wide, p.lanes), Axis.cut("c", channels, *inner)
    t = Axis.cut("t1", count, p.pixels)
    at_input, at_product, at_output = "tf", t.names[0], "yf"
    sums = {name: _Sums(name, to, over, count)
            for (name, to, over), count in zip(TRANSFORMS, shape.factors, strict=True)}
    lines = () if p.by_lines else ("lx", "p")
    rows = _Rows.of(p, problem, layout, width * shape.outputs[1])
    cuts = [
        Split("te", p.block, "e0", "te1"), Split("ye", p.block, "e0", "ye1"), Split("t", count, "e0", "t1"),
        *d.steps, *o.steps, *m.steps, *c.steps, *t.steps]
    orders = [
        Reorder((*head, d.names[0], "te1", "tf", "lx", *sums["bx"].loops, "px", "p", *sums["bxb"].loops, "q",
                 d.names[1])),
        Reorder((*head, "g", "h", m.names[0], t.names[0], *c.names, t.names[1], *m.names[1:])),
        Reorder((*head, o.names[0], "ye1", at_output, "qy", *sums["ct"].loops, "iy", "i", *sums["ctc"].loops, "j",
                 o.names[1]))]
    stages = [
        *sums["bxb"].computed("p"), *sums["bx"].computed("lx"), Attach("vx", at_input), _between(p, "vx", at_input),
        Attach("s.start", at_product), Attach("t", at_product), StageAt("s", at_product, "registers"),
        *sums["ctc"].computed("i"), *sums["ct"].computed("qy"), Attach("yt", at_output), _between(p, "yt", at_output),
        StageAt("x", at_input if p.by_lines else d.names[0], "window", ("n", "h", "w", "c")),
        Attach("v", "e0"), Attach("s", "e0"),
        _planes(p, "v", "c", channels * count), _planes(p, "t", "m", maps * count),
        Layout("u", ("z", "g", "h", f"m/{wide}", "c", f"m%{wide}")),
        *rows.made]
    return [
        *cuts, *orders, *stages,
        Split("x.w", p.lanes, "x.w0", "x.w1", "mask"), Reorder(("x.n", "x.h", "x.w0", "x.w1", "x.c")),
        Unroll((*lines, *(loop for each in sums.values() for loop in each.loops), "px", "q", "iy", "j", "x.w1",
                c.names[-1], t.names[1], m.names[1], *rows.unrolled)),
        Vectorize((d.names[1], m.names[2], o.names[1], "x.c", *rows.vectors)), Parallel("e0"),
        *m.peels(maps, wide), *c.peels(channels, *inner), *t.peels(count, p.pixels), *rows.peels,
        *([] if p.by_lines else [Peel("x.w0", "first"), Peel("x.w0")]),
        *([Prefetch("u", c.names[-2], p.prefetch)] if p.prefetch and channels > p.unroll else [])]


@dataclass(frozen=True)
class _Sums:
    """The stages of a transform, one for each factor: stage ``name1`` has the loops ``to1`` and ``over1``."""

    name: str
    to: str
    over: str
    count: int

    @property
    def loops(self) -> tuple[str, ...]:
        """The loops over rows and columns of the factors."""
        return tuple(f"{loop}{number}" for number in range(1, self.count + 1) for loop in (self.to, self.over))

    def computed(self, at: str) -> list[Step]:
        """The stages computed at one loop, with what they hand on in registers."""
        names = [f"{self.name}{number}" for number in range(1, self.count + 1)]
        return [*(Attach(stage, at) for name in names for stage in (f"{name}.start", name)),
                *(StageAt(name, at, "registers") for name in names)]


@dataclass(frozen=True)
class _Rows:
    """How a row of tiles is stored, of which the rows of pixels lie in memory and the channels are vectors."""

    made: tuple[Step, ...] = ()
    unrolled: tuple[str, ...] = ()
    vectors: tuple[str, ...] = ()
    peels: tuple[Step, ...] = ()

    @staticmethod
    def of(p: Tiles, problem: Conv2d, layout: str, pixels: int) -> _Rows:
        """Those of a row of so many pixels; none where channels lie together, or the pixels of a tile apart."""
        if p.by_lines or layout != "nchw" or problem.dilation != (1, 1):
            return _Rows()
        made = (StageAt("y", "ye1", "window", ("n", "h", "w", "c")), Split("y.w", p.lanes, "y.w0", "y.w1", "mask"))
        is_ragged = pixels > p.lanes and (pixels % p.lanes > 0 or problem.F % p.lanes > 0)
        return _Rows(made, ("y.w1",), ("y.c",), (Peel("y.w0"),) if is_ragged else ())


def _between(p: Tiles, tensor: str, at: str) -> StageAt:
    """Where the elements of a tile wait between the passes along columns and rows."""
    if tensor == "vx" and not p.by_lines:
        return StageAt(tensor, at, "registers")
    order, line, count = {"vx": (("n", "z", "t", "p", "l", "c"), "p", p.shape.reads),
                          "yt": (("n", "z", "t", "i", "q", "m"), "i", p.shape.points[1])}[tensor]
    return StageAt(tensor, at, "buffer", order, ((line, p.lanes * (count | 1)),) if p.by_lines else ())


def _planes(p: Tiles, tensor: str, channel: str, elements: int) -> StageAt:
    """The transformed block in memory, ``elements`` a point: vectors of channels, and what is summed over close
    together. Points of long tiles are an odd number of cache lines apart, so that those of a line of a tile, which are
    written one after the other, fall in different sets of a cache."""
    apart = (("h", LINE_ELEMENTS * (-(-elements // LINE_ELEMENTS) | 1)),) if p.by_lines else ()
    order = ("n", "z", "g", "h", f"{channel}/{p.lanes}", "t", f"{channel}%{p.lanes}")
    return StageAt(tensor, "e0", "buffer", order, apart)
