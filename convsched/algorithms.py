"""What may compute a problem: each algorithm's lowering and default recipe, and where it does not apply.

``algorithm=`` takes the name of a family, such as "winograd", which stands for its usual member, or a member's
full name, such as "winograd(4,3)". A new lowering joins by an entry in ``FAMILIES``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from convsched.analytic import default_recipe, default_tiles, default_toeplitz
from convsched.errors import LoweringError
from convsched.ir import Program
from convsched.lower.bilinear import lower_bilinear
from convsched.lower.direct import lower_direct
from convsched.lower.im2col import lower_im2col
from convsched.lower.winograd import winograd
from convsched.machine import Machine
from convsched.problem import Conv2d, Linear, Problem
from convsched.recipes import Recipe, is_flat

OUTPUTS = {2: 4, 3: 4}  # of a Winograd tile along a side of so many taps; 2 for other sides


@dataclass(frozen=True)
class Algorithm:
    """A way to compute one problem: ``lower(layout)`` is the unscheduled program, ``default(machine, layout,
    threads)`` the recipe that nothing was measured for."""

    name: str
    lower: Callable[[str], Program]
    default: Callable[[Machine, str, int], Recipe]


def named(name: str, problem: Problem) -> Algorithm:
    """The algorithm of a name for a problem; raises LoweringError where there is none, or it does not apply."""
    match = re.fullmatch(r"([a-z0-9]+)((?:x?\(\d{1,2},\d{1,2}\)){0,2})", name) if isinstance(name, str) else None
    if match is None or match[1] not in FAMILIES:
        raise LoweringError(f"algorithm={name!r}: use one of {', '.join(FAMILIES)}, or a member such as winograd(4,3)")
    sizes = tuple((int(m), int(r)) for m, r in re.findall(r"\((\d+),(\d+)\)", match[2]))
    return FAMILIES[match[1]](problem, sizes)


def _direct(problem: Problem, sizes: tuple[tuple[int, int], ...]) -> Algorithm:
    if sizes:
        raise LoweringError("algorithm='direct' has no sizes: leave the brackets out")
    return Algorithm("direct", partial(lower_direct, problem),
                     lambda machine, layout, threads: default_recipe(problem, machine, layout, threads))


def _im2col(problem: Problem, sizes: tuple[tuple[int, int], ...]) -> Algorithm:
    if sizes:
        raise LoweringError("algorithm='im2col' has no sizes: leave the brackets out")
    if isinstance(problem, Linear) or is_flat(problem):
        raise LoweringError(f"im2col: {problem.text} is a product of matrices as it stands; use direct")
    return Algorithm("im2col", partial(lower_im2col, problem), partial(default_toeplitz, problem))


def _winograd(problem: Problem, sizes: tuple[tuple[int, int], ...]) -> Algorithm:
    """F(m, r) along each side of more than one tap; (m, r) once for both, or for the height and the width."""
    conv = _stride_one("winograd", problem)
    taps = [r for r in (conv.R, conv.S) if r > 1]
    if not taps:
        raise LoweringError(f"winograd: {problem.text} has one tap; use direct")
    sizes = sizes or tuple((OUTPUTS.get(r, 2), r) for r in taps)
    if len(sizes) == 1:
        sizes = sizes * len(taps)
    if [r for _, r in sizes] != taps or any(m < 2 for m, _ in sizes):
        raise LoweringError(f"winograd{'x'.join(f'({m},{r})' for m, r in sizes)}: {problem.text} has "
                            f"{' and '.join(map(str, taps))} taps; write (m,r) with r={taps[0]} and m of at least 2, "
                            "once for both sides, or (m,r)x(m,r)")
    along = iter(sizes)
    column, row = (next(along) if r > 1 else (1, 1) for r in (conv.R, conv.S))
    name = "winograd" + "x".join(f"({m},{r})" for m, r in dict.fromkeys(sizes))
    return Algorithm(name, lambda layout: lower_bilinear(conv, winograd(*column), winograd(*row), layout),
                     partial(default_tiles, conv, (column[0], row[0])))


def _stride_one(name: str, problem: Problem) -> Conv2d:
    if isinstance(problem, Linear):
        raise LoweringError(f"{name}: {problem.text} is a fully connected layer; use direct")
    if problem.stride != (1, 1) or problem.dilation != (1, 1) or problem.groups != 1:
        raise LoweringError(f"{name}: {problem.text} has a stride, a dilation or groups; use direct")
    return problem


FAMILIES: dict[str, Callable[[Problem, tuple[tuple[int, int], ...]], Algorithm]] = {
    "direct": _direct,
    "im2col": _im2col,
    "winograd": _winograd,
}
"""The families by name: each gives the member of some sizes for a problem, or raises LoweringError."""


def applicable(problem: Problem) -> Iterator[Algorithm]:
    """The usual member of each family that applies to a problem."""
    for name in FAMILIES:
        try:
            yield named(name, problem)
        except LoweringError:
            continue
