"""The candidates of the algorithms beside direct convolution: a domain around the default of each member.

Members that do not apply to a problem, or whose predicted error is beyond the class of accuracy, have none; nor have
those that are far from winning on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from convsched.algorithms import Algorithm, named
from convsched.autotune.space import Domain, Target, register
from convsched.errors import LoweringError
from convsched.problem import Conv2d, Problem
from convsched.recipes import Recipe

OUTPUTS = {3: (2, 4, 6), 5: (2, 4)}  # of Winograd tiles along a side of so many taps; 2 for other sides
LEAST_TAPS = 7  # of a side, for FFT
LEAST_CHANNELS = 512  # in and out, for Strassen
VECTORS, UNROLL = (1, 2, 3, 4), (1, 2, 4, 8)
PIXELS = (4, 6, 7, 8, 9, 12, 13, 14, 16, 18, 20, 24, 25, 28)


def members(problem: Problem) -> Iterator[str]:
    """The names that may be worth trying for a problem."""
    if isinstance(problem, Conv2d) and problem.R * problem.S > 1:
        yield "im2col"
        taps = {r for r in (problem.R, problem.S) if r > 1}
        if len(taps) == 1:
            r, = taps
            yield from (f"winograd({m},{r})" for m in OUTPUTS.get(r, (2,)))
        else:
            yield "winograd"
        if max(taps) >= LEAST_TAPS:
            yield "fft"
    if min(problem.M, problem.C) >= LEAST_CHANNELS:
        yield from ("strassen(1)", "strassen(2)")


@register
def algorithms(target: Target) -> Iterator[Domain]:
    """A domain for each member that applies and fits."""
    for name in members(target.problem):
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
                          ("block", _blocks(default.block)), ("parallel", ("pixels", "channels"))):
        if hasattr(default, name):
            values[name] = tuple(dict.fromkeys(sorted([*options, getattr(default, name)])))
    registers = target.machine.registers

    def fits(recipe: Any) -> bool:
        tile = recipe.vectors * recipe.pixels
        return bool(tile >= 8 and tile + recipe.vectors < registers)

    make: Callable[..., Recipe] = partial(replace, default)
    return Domain(make, values, fits, algorithm=algorithm.name, seed=default)


def _blocks(block: int) -> tuple[int, ...]:
    """A block divided and multiplied; one that does not divide the rows makes no schedule and is not tried."""
    return tuple(sorted({max(1, block // 4), max(1, block // 2), block, 2 * block, 3 * block, 4 * block, 7 * block}))
