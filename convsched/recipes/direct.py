"""The recipes of direct convolution: compositions of steps, with the parameters that the default and a search choose.

``channels``   vectors of output channels by a tile of pixels; each input element is broadcast. Dense layers.
``pixels``     vectors of neighbouring output pixels; each weight is broadcast. Depthwise and thin layers.
``depthwise``  vectors of channels, one filter a lane, for layouts that keep channels together.

A recipe is a frozen dataclass; ``recipe.schedule(problem, layout)`` writes its steps. Register accumulators
are ``stage t``, packing is ``stage x`` and ``layout w``; nothing here is known to the emitter. Any other module
may define a recipe: ``Recipe`` says what one has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from convsched.problem import Conv2d, Linear, Problem
from convsched.problem.problem import is_flat, taps
from convsched.recipes.recipe import Axis
from convsched.schedule import (
    Attach,
    Fuse,
    Layout,
    Parallel,
    Peel,
    Prefetch,
    Reorder,
    Schedule,
    Skip,
    Split,
    StageAt,
    Step,
    Unroll,
    Vectorize,
)


@dataclass(frozen=True)
class Channels:
    """Register tile of ``vectors`` vectors of output channels by ``rows`` x ``pixels`` output pixels.

    ``lanes`` of a vector; ``block`` tiles (rows of tiles, or tiles where pixels are flat) share a packed
    piece of the input; ``depth`` input channels are summed before the next filter tap; ``unroll`` of them
    are written out. Products with padding are left out along the axes to ``skip``; along "hw", the input
    needs no copy with a border.

    ``tail`` is what becomes of a remainder: "peel" gives it an own copy of the nest; "overlap" does so for
    channels, and moves the last tile of a row of pixels back, to be computed twice in part; "mask" runs all
    tiles in full and stores what is inside. In the copy of the input, rows of all channels ("nchw"), pixels
    ("nhwc"), planes ("nchw16c") or tiles ("packed") are a multiple of ``align`` elements apart, if it is not 0.
    Weights are fetched ``prefetch`` iterations of the loop over channels before they are used, if it is not 0.
    """

    lanes: int
    vectors: int
    rows: int
    pixels: int
    block: int
    depth: int
    unroll: int
    pack: Literal["none", "window", "packed"]
    parallel: Literal["pixels", "channels"] = "pixels"
    skip: Literal["", "h", "hw"] = ""
    tail: Literal["peel", "overlap", "mask"] = "peel"
    align: int = 0
    prefetch: int = 0
    name: ClassVar[str] = "channels"

    def schedule(self, problem: Problem, layout: str = "nchw") -> Schedule:
        """The steps for a problem."""
        return Schedule(tuple(_channels(self, problem, layout)))


def _channels(p: Channels, problem: Problem, layout: str) -> list[Step]:
    conv = problem if isinstance(problem, Conv2d) else None
    groups = conv.groups if conv else 1
    m_extent, c_extent = problem.M // groups, problem.C // groups
    flat = is_flat(problem)
    m = Axis.cut("m", m_extent, p.vectors * p.lanes, p.lanes)
    depth = min(p.depth, c_extent)
    c_factors = (depth, p.unroll) if depth < c_extent else (p.unroll,)
    c = Axis.cut("c", c_extent, *c_factors)
    head = [*(["n"] if conv else []), *(["g"] if groups > 1 else [])]
    factors: tuple[int, ...]
    row_peels: tuple[Step, ...] = ()
    if conv is None or flat:
        loop, extent = ("p", conv.E * conv.F) if conv else ("n", problem.N)
        wide = p.block * p.pixels
        wide = min(wide, extent) if p.tail == "overlap" else wide  # of a single block: then tiles alone are ragged
        column = Axis.cut(loop, extent, wide, p.pixels)
        row = Axis((), ())
        outer, tiles, inner = column.names[0], [column.names[1]], [column.names[2]]
        factors = wide, p.pixels
    else:
        row_factors = (p.block * p.rows, p.rows) if p.rows > 1 else (p.block,)
        row, column = Axis.cut("e", conv.E, *row_factors), Axis.cut("f", conv.F, p.pixels)
        outer, tiles, inner = row.names[0], [row.names[1], column.names[0]], [*row.names[2:], column.names[1]]
        factors, row_peels, extent = (p.pixels,), row.peels(conv.E, *row_factors), conv.F
    at, sums = tiles[-1], [*c.names[:-2], *taps(problem), *c.names[-2:]]
    skipped = _skip(problem, p.skip)
    cuts = [*([Fuse("e", "f", "p")] if flat else []), *m.steps, *row.steps, *column.steps, *c.steps]
    peels = [
        *([] if p.tail == "mask" else m.peels(m_extent, p.vectors * p.lanes)), *row_peels,
        *_pixel_tail(p, column, extent, *factors), *c.peels(c_extent, *c_factors)]
    return [
        *cuts, Reorder((*head, outer, m.names[0], *tiles, *sums, *inner, *m.names[1:])),
        Attach("init", at), Attach("epilogue", at), StageAt("t", at, "registers"),
        *skipped, *_pack_input(p, layout, outer, tiles, sums, inner),
        Layout("w", (*(["g"] if groups > 1 else []), m.names[0], *sums, *m.names[1:])),
        Unroll((c.names[-1], *inner, m.names[1])), Vectorize((m.names[2],)),
        Parallel(outer if p.parallel == "pixels" else m.names[0]), *peels,
        *([Peel(name, "guarded") for name in (at, *(["s"] if "s" in sums else []))]
          if any("w" in step.axes for step in skipped) else []),
        *([Prefetch("w_packed", c.names[-2], p.prefetch)] if p.prefetch else [])]


def _pixel_tail(p: Channels, column: Axis, extent: int, *factors: int) -> tuple[Step, ...]:
    """What becomes of the last, ragged tile of a row of pixels, and of a ragged block of tiles around it."""
    peels = column.peels(extent, *factors)
    if p.tail == "peel" or not extent % p.pixels:
        return peels
    return peels[:-1] if p.tail == "mask" else (*peels[:-1], Peel(column.names[len(factors) - 1], "overlap"))


def _skip(problem: Problem, axes: str) -> list[Skip]:
    """The step that leaves out products with padding along those of the axes that have any."""
    if isinstance(problem, Linear):
        return []
    top, left, bottom, right = problem.padding
    padded = [axis for axis, sides in (("h", (top, bottom)), ("w", (left, right))) if any(sides)]
    found = tuple(axis for axis in padded if axis in axes)
    return [Skip("x", found)] if found else []


BLOCK_CHANNELS = 16  # channels that the layout nchw16c keeps together
PADDED_AXES = {"nchw": "h", "nhwc": "w", "nchw16c": "c/16"}  # what ``align`` sets apart in a window


def copy_stride(p: Channels, problem: Conv2d, layout: str) -> int:
    """Elements between what ``align`` sets apart in the copy of the input; 0 where there is no copy."""
    channels = problem.C // problem.groups
    if p.pack == "packed":
        return channels * problem.R * problem.S * p.pixels
    if p.pack == "none" or layout == "nhwc":
        return channels if p.pack == "window" else 0
    wide = -(-problem.F // p.pixels) * p.pixels
    width = (wide - 1) * problem.stride[1] + (problem.S - 1) * problem.dilation[1] + 1
    height = (p.block * p.rows - 1) * problem.stride[0] + (problem.R - 1) * problem.dilation[0] + 1
    return channels * width if layout == "nchw" else height * width * 16


def _pack_input(p: Channels, layout: str, outer: str, tiles: list[str], sums: list[str],
                inner: list[str]) -> list[Step]:
    """The copy of the input that the tiles of one block share."""
    if p.pack == "packed":  # in the order of use: [tile][channel, tap][pixel]
        pixel, copied = f"x.{inner[-1]}", [f"x.{name}" for name in (*sums, *tiles, *inner[:-1])]
        align = ((tiles[-1], p.align),) if p.align else ()
        return [StageAt("x", outer, "packed", (*tiles, *sums, *inner), align), Reorder((*copied, pixel)),
                Split(pixel, p.lanes, f"{pixel}_0", f"{pixel}_1", "mask" if p.pixels % p.lanes else "none"),
                Unroll((f"{pixel}_0",)), Vectorize((f"{pixel}_1",))]
    return window(layout, outer, p.lanes, p.align) if p.pack == "window" else []


def window(layout: str, outer: str, lanes: int, align: int = 0) -> list[Step]:
    """A copy, in vectors, of the part of the input that one iteration of a loop reads, with its border as zeros."""
    padded = ((PADDED_AXES[layout], align),) if align else ()
    order = {"nchw": ("n", "h", "c", "w"), "nhwc": ("n", "h", "w", "c"),
             "nchw16c": ("n", "c/16", "h", "w", "c%16")}[layout]
    if layout == "nchw":
        return [StageAt("x", outer, "window", order, padded), Split("x.w", lanes, "x.w0", "x.w1", "mask"),
                Vectorize(("x.w1",))]
    return [StageAt("x", outer, "window", order, padded), Split("x.c", lanes, "x.c0", "x.c1", "mask"),
            Reorder(("x.c0", "x.h", "x.w", "x.c1") if layout == "nchw16c" else
                    ("x.h", "x.w", "x.c0", "x.c1")), Vectorize(("x.c1",))]


@dataclass(frozen=True)
class Pixels:
    """Tile of ``maps`` output channels by ``rows`` rows by ``vectors`` vectors along the row.

    The filter taps are written out, so that an input vector is loaded once for all rows that use it.
    Borders are masked loads; the first and last tile of rows, and the first of columns, have copies of their own
    where ``peel_borders``. ``order`` is what runs outside in the written-out code: all rows for each tap, or all taps
    for each row, which keeps fewer input vectors waiting. ``lanes`` may be half a register, for short rows.
    """

    lanes: int
    maps: int
    rows: int
    vectors: int
    unroll_taps: bool
    peel_borders: bool
    order: Literal["taps", "rows"] = "taps"
    name: ClassVar[str] = "pixels"

    def schedule(self, problem: Problem, layout: str = "nchw") -> Schedule:
        """The steps for a problem."""
        return Schedule(tuple(_pixels(self, problem)))


def _pixels(p: Pixels, problem: Problem) -> list[Step]:
    if isinstance(problem, Linear):
        return _pixels_linear(p, problem)
    m = Axis.cut("m", problem.M // problem.groups, p.maps)
    flat = is_flat(problem)
    steps: list[Step] = [Fuse("e", "f", "p")] if flat else []
    loop, extent = ("p", problem.E * problem.F) if flat else ("f", problem.F)
    column = Axis.cut(loop, extent, p.vectors * p.lanes, p.lanes)
    row = Axis((), ()) if flat else Axis.cut("e", problem.E, p.rows)
    head = ["n"] + (["g"] if problem.groups > 1 else [])
    row_tile, row_inner = list(row.names[:1]), list(row.names[1:])
    steps += [*m.steps, *row.steps, *column.steps]
    tile = [m.names[1], *row_inner]
    inner = [*taps(problem), *tile] if p.order == "taps" else [*tile, *taps(problem)]
    steps.append(Reorder((*head, m.names[0], *row_tile, column.names[0], "c", *inner, *column.names[1:])))
    at = column.names[0]
    steps += [Attach("init", at), Attach("epilogue", at), StageAt("t", at, "registers")]
    if p.peel_borders and p.unroll_taps:
        steps += _skip(problem, "h")
    unrolled = [m.names[1], *row_inner, column.names[1]]
    steps.append(Unroll((*(taps(problem) if p.unroll_taps else []), *unrolled)))
    steps.append(Vectorize((column.names[2],)))
    steps.append(Parallel("g" if problem.groups > 1 else m.names[0]))
    steps += m.peels(problem.M // problem.groups, p.maps)
    if not flat:
        if problem.E % p.rows:
            steps.append(Peel(row.names[0]))
        if p.peel_borders:
            steps.append(Peel(row.names[0], "guarded"))
    steps += column.peels(extent, p.vectors * p.lanes)
    if p.peel_borders and problem.padding[1] and extent > p.vectors * p.lanes:
        steps.append(Peel(at, "first"))
    return steps


def _pixels_linear(p: Pixels, problem: Linear) -> list[Step]:
    """A product with few outputs: vectors along the batch."""
    n = Axis.cut("n", problem.N, p.vectors * p.lanes, p.lanes)
    return [*n.steps, Reorder((n.names[0], "m", "c", *n.names[1:])), Attach("init", "m"),
            Attach("epilogue", "m"), StageAt("t", "m", "registers"), Unroll((n.names[1],)),
            Vectorize((n.names[2],)), Parallel("m"), *n.peels(problem.N, p.vectors * p.lanes)]


@dataclass(frozen=True)
class Depthwise:
    """Vectors of ``lanes`` channels, a tile of ``rows`` x ``pixels`` output pixels; one filter a channel."""

    lanes: int
    rows: int
    pixels: int
    unroll_taps: bool
    name: ClassVar[str] = "depthwise"

    def schedule(self, problem: Problem, layout: str = "nchw16c") -> Schedule:
        """The steps for a problem with as many groups as channels in and out."""
        assert isinstance(problem, Conv2d)
        # where a block of the layout has several vectors, each is a loop of its own: lanes lie side by side
        factors = (BLOCK_CHANNELS, self.lanes) if layout == "nchw16c" and self.lanes < BLOCK_CHANNELS else (self.lanes,)
        g = Axis.cut("g", problem.groups, *factors)
        row, column = Axis.cut("e", problem.E, self.rows), Axis.cut("f", problem.F, self.pixels)
        at = column.names[0]
        steps: list[Step] = [*g.steps, *row.steps, *column.steps]
        steps.append(Reorder(("n", *g.names[:-1], row.names[0], at, "m", "c", *taps(problem), row.names[1],
                              column.names[1], g.names[-1])))
        steps += [Attach("init", at), Attach("epilogue", at), StageAt("t", at, "registers")]
        steps.append(Layout("w", (*g.names[:-1], "m", "c", *taps(problem), g.names[-1])))
        steps.append(Unroll((*(taps(problem) if self.unroll_taps else ()), row.names[1], column.names[1])))
        steps += [Vectorize((g.names[-1],)), Parallel(g.names[0]), *g.peels(problem.groups, *factors)]
        if any(problem.padding):
            steps += [Peel(row.names[0], "first"), Peel(at, "first")]
        steps += [Peel(row.names[0]), Peel(at)]
        return Schedule(tuple(steps))
