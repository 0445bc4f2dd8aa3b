"""The candidates of the algorithms beside direct convolution: a domain around the default of each member.

Members that do not apply to a problem, or whose predicted error is beyond the class of accuracy, have none; nor have
those that are far from winning on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from convsched.algorithms import Algorithm, members, named
from convsched.autotune.space import Domain, Target, register
from convsched.errors import LoweringError
from convsched.lower.plane import Plane
from convsched.problem import Conv2d
from convsched.recipes import Recipe
from convsched.tiles import Tiles
from convsched.toeplitz import Toeplitz

PREFETCH = (0, 4, 16, 32)
VECTORS, UNROLL = (1, 2, 3, 4), (1, 2, 4, 8)
PIXELS = (3, 4, 5, 6, 7, 8, 9, 12, 13, 14, 16, 18, 20, 24, 25, 28)


@register
def algorithms(target: Target) -> Iterator[Domain]:
    """A domain for each member that applies and fits."""
    for name in members(target.problem, target.accuracy):
        if name == "direct":  # its recipes are domains of their own
            continue
        try:
            algorithm = named(name, target.problem)
        except LoweringError:
            continue
        if algorithm.fits(target.accuracy):
            yield _around(target, algorithm)


def _around(target: Target, algorithm: Algorithm) -> Domain:
    """The default recipe with other values of what it shares with the others: blocks and the register tile."""
    default: Any = algorithm.default(target.machine, target.layout, target.threads)
    values: dict[str, tuple[Any, ...]] = {}
    for name, options in (("vectors", VECTORS), ("pixels", PIXELS), ("unroll", UNROLL),
                          ("block", _blocks(target, default)), ("parallel", ("pixels", "channels")),
                          ("indirect", (False, True))):
        if hasattr(default, name):
            values[name] = tuple(dict.fromkeys(sorted([*options, getattr(default, name)])))
    registers = target.machine.registers

    def fits(recipe: Any) -> bool:
        tile = recipe.vectors * recipe.pixels
        return bool(tile >= 8 and tile + recipe.vectors < registers)

    make: Callable[..., Recipe] = partial(replace, default)
    finer = {"prefetch": PREFETCH} if hasattr(default, "prefetch") else {}
    return Domain(make, values, fits, finer, algorithm=algorithm.name, seed=default)


def _blocks(target: Target, default: Any) -> tuple[int, ...]:
    """The sizes of a block: those that divide the rows of tiles or pixels, or multiples where any will do."""
    match default:
        case Tiles() | Toeplitz():
            problem = target.problem
            assert isinstance(problem, Conv2d)
            rows = (Plane(problem, default.shape.outputs, default.shape.fold).tiles[0] if isinstance(default, Tiles)
                    else problem.E)
            return tuple(block for block in range(1, rows + 1) if rows % block == 0)
        case _:
            block = default.block
            return tuple(sorted({max(1, block // 4), max(1, block // 2), block, 2 * block, 3 * block, 4 * block}))
