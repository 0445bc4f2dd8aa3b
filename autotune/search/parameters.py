"""What the recipes' parameters may be for a problem: a domain for each recipe of direct convolution, and one around
the default of each member of the other algorithms.

Members that do not apply to a problem, or whose predicted error is beyond the class of accuracy, have none; nor have
those that are far from winning on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from convsched.autotune.search.domain import Domain
from convsched.errors import LoweringError
from convsched.plan.choice import members
from convsched.plan.families import Algorithm, named
from convsched.plan.plan import Target
from convsched.problem import Conv2d, Linear, Problem
from convsched.problem.problem import is_flat, meets_input
from convsched.recipes.direct import Channels, Depthwise, Pixels, copy_stride
from convsched.recipes.recipe import BlockRecipe, Recipe

PREFETCH = (0, 4, 16, 32)
VECTORS, UNROLL = (1, 2, 3, 4), (1, 2, 4, 8)
PIXELS = (3, 4, 5, 6, 7, 8, 9, 12, 13, 14, 16, 18, 20, 24, 25, 28)


def algorithms(problem: Problem, target: Target) -> Iterator[Domain]:
    """A domain for each member that applies and fits."""
    for name in members(problem, target.accuracy):
        try:
            algorithm = named(name, problem)
        except LoweringError:
            continue
        default = algorithm.default(target.machine, target.layout, target.threads)
        if isinstance(default, BlockRecipe) and algorithm.fits(target.accuracy):  # others have domains of their own
            yield _around(problem, target, algorithm, default)


def _around(problem: Problem, target: Target, algorithm: Algorithm, default: BlockRecipe) -> Domain:
    """The default recipe with other values of what it shares with the others: blocks and the register tile."""
    values: dict[str, tuple[Any, ...]] = {}
    for name, options in (("vectors", VECTORS), ("pixels", PIXELS), ("unroll", UNROLL),
                          ("block", default.blocks(problem)), ("parallel", ("pixels", "channels")),
                          ("indirect", (False, True))):
        if hasattr(default, name):
            values[name] = tuple(dict.fromkeys(sorted([*options, getattr(default, name)])))
    registers = target.machine.registers

    def fits(recipe: Any) -> bool:
        tile = recipe.vectors * recipe.pixels
        return bool(tile >= 8 and tile + recipe.vectors < registers)

    make: Callable[..., Recipe] = partial(replace, default)
    finer = {"prefetch": PREFETCH} if hasattr(default, "prefetch") else {}
    return Domain(make, values, fits, finer, algorithm=algorithm, seed=default)


PAGE_ELEMENTS = 1024  # elements (4096 bytes): rows so far apart share the sets of L1
ALIGN_ELEMENTS = 1040  # elements (65 cache lines): no multiple up to 63 of them is one of a page


def _per_group(problem: Problem) -> tuple[int, int, int, int]:
    """(output channels, input channels, rows, columns) that a group's tiles cover."""
    if isinstance(problem, Linear):
        return problem.M, problem.C, 1, problem.N
    rows, columns = (1, problem.E * problem.F) if is_flat(problem) else (problem.E, problem.F)
    return problem.M // problem.groups, problem.C // problem.groups, rows, columns


def _sizes(extent: int, options: tuple[int, ...]) -> tuple[int, ...]:
    """The options below an extent, and the extent itself where it is no larger than the greatest."""
    found = {o for o in options if o < extent} | ({extent} if extent <= max(options) else set())
    return tuple(sorted(found))


def channels(problem: Problem, target: Target) -> Domain | None:
    """Blocked schedules with vectors of output channels."""
    machine = target.machine
    maps, inputs, rows, columns = _per_group(problem)
    if isinstance(problem, Conv2d) and maps < machine.lanes // 4:
        return None
    flat = isinstance(problem, Linear) or is_flat(problem)
    copies = _copies(problem, target.layout)
    spare = 0 if machine.broadcasts else 1  # registers for a broadcast, where FMAs cannot load and broadcast

    def fits(recipe: Channels) -> bool:
        tile = recipe.vectors * recipe.rows * recipe.pixels
        return ((tile >= 8 or recipe.pixels == columns) and tile + recipe.vectors + spare <= machine.registers
                and recipe.unroll <= recipe.depth and (recipe.rows == 1 or recipe.pixels == columns)
                and (recipe.pack, recipe.skip) in copies and (recipe.rows == 1 or not recipe.skip)
                and _has_tail(recipe, problem, columns) and _is_apart(recipe, problem, target.layout))

    values = {
        "lanes": (machine.lanes,),
        "vectors": _sizes(-(-maps // machine.lanes), (1, 2, 3, 4, 5, 6, 8, 12)),
        "rows": (1,) if flat else _sizes(rows, (1, 2, 3, 4)),
        "pixels": _sizes(columns, (1, 4, 6, 7, 8, 9, 12, 13, 14, 16, 24, 28)),
        "block": _sizes(columns if flat else rows, (1, 2, 4, 7, 14, 28, 56, 112)),
        "depth": (inputs,) if flat else _sizes(inputs, (16, 32, 64, 128, 256)),
        "unroll": _sizes(inputs, (1, 2, 3, 4, 8)),
        "pack": tuple(dict.fromkeys(pack for pack, _ in copies)),
        "skip": tuple(dict.fromkeys(skip for _, skip in copies)),
        "parallel": ("pixels", "channels") if target.threads > 1 else ("pixels",),
    }
    finer = {
        "tail": ("peel", "overlap", "mask"),
        "align": (0, ALIGN_ELEMENTS),
        "prefetch": (0, 8, 16) if 4 * problem.weights > machine.l2 else (0,),
    }
    return Domain(Channels, values, fits, finer, algorithm=named("direct", problem))


def _copies(problem: Problem, layout: str) -> tuple[tuple[str, str], ...]:
    """How the input may be read, (pack, skip): a border is copied, or what would read it is left out."""
    if isinstance(problem, Linear):
        return (("none", ""),)
    if is_flat(problem):
        return (("none", ""), ("packed", "")) if layout == "nchw" else (("none", ""),)
    if not any(problem.padding):
        return ("none", ""), ("window", "")
    if not meets_input(problem):
        return (("window", ""),)
    rows = (("window", "h"),) if problem.padding[0] or problem.padding[2] else ()
    return ("none", "hw"), ("window", ""), *rows


def _has_tail(recipe: Channels, problem: Problem, columns: int) -> bool:
    """Whether a ragged tile can be treated as the recipe says; "peel" is all there is to say where none is."""
    if recipe.tail == "peel":
        return True
    flat = isinstance(problem, Linear) or is_flat(problem)
    last = columns % (recipe.block * recipe.pixels) if flat else columns  # pixels of the last block
    if columns % recipe.pixels == 0 or last < recipe.pixels:
        return False
    residual = isinstance(problem, Conv2d) and problem.residual  # it may share memory with what is written
    return recipe.tail == "mask" or (recipe.skip != "hw" and recipe.pack != "packed" and not residual)


def _is_apart(recipe: Channels, problem: Problem, layout: str) -> bool:
    """Whether strides are padded only where they would be multiples of a page."""
    if not recipe.align:
        return True
    stride = copy_stride(recipe, problem, layout) if isinstance(problem, Conv2d) else 0
    return stride > 0 and stride % PAGE_ELEMENTS == 0


def pixels(problem: Problem, target: Target) -> Domain | None:
    """Schedules with vectors of neighbouring pixels, for depthwise and thin layers; in layouts that keep
    channels together, where nothing else applies."""
    machine = target.machine
    maps, inputs, rows, columns = _per_group(problem)
    if isinstance(problem, Linear) or maps * inputs > 256:
        return None
    if target.layout != "nchw" and (channels(problem, target) or depthwise(problem, target)):
        return None
    taps = problem.R * problem.S

    half = machine.lanes // 2

    def fits(recipe: Pixels) -> bool:
        tile = recipe.maps * recipe.rows * recipe.vectors
        return (tile <= machine.registers - 4 and (not recipe.unroll_taps or taps * tile <= 600)
                and (recipe.vectors - 1) * recipe.lanes < columns
                and (recipe.order == "taps" or (recipe.unroll_taps and recipe.rows > 1)))

    return Domain(Pixels, {
        "lanes": (half, machine.lanes) if half >= 4 else (machine.lanes,),
        "maps": _sizes(maps, (1, 2, 4, 8)),
        "rows": (1,) if is_flat(problem) else _sizes(rows, (1, 2, 3, 4, 5, 6, 7, 8, 14)),
        "vectors": _sizes(-(-columns // half), (1, 2, 3, 4, 7, 8, 14)),
        "unroll_taps": (True, False) if taps > 1 else (False,),
        "peel_borders": (True, False),
        "order": ("taps", "rows"),
    }, fits, algorithm=named("direct", problem))


def depthwise(problem: Problem, target: Target) -> Domain | None:
    """Schedules with a channel a lane, for layouts that keep channels together."""
    machine = target.machine
    if target.layout == "nchw" or isinstance(problem, Linear) or problem.groups == 1:
        return None
    if not problem.groups == problem.C == problem.M:
        return None
    taps = problem.R * problem.S

    def fits(recipe: Depthwise) -> bool:
        tile = recipe.rows * recipe.pixels
        if not recipe.unroll_taps:
            return tile <= machine.registers - 4
        return tile <= machine.registers // 2 and taps * tile <= 600  # inputs wait in registers for the next tap

    return Domain(Depthwise, {
        "lanes": (machine.lanes,),
        "rows": _sizes(problem.E, (1, 2, 3, 4)),
        "pixels": _sizes(problem.F, (1, 2, 4, 6, 7, 8, 14)),
        "unroll_taps": (True, False),
    }, fits, algorithm=named("direct", problem))
