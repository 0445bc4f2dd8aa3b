"""What all problems share, and what lowerings and recipes ask of them."""

from __future__ import annotations

from typing import TypeAlias

from convsched.problem.conv2d import Conv2d
from convsched.problem.linear import Linear

Problem: TypeAlias = Conv2d | Linear


def is_flat(problem: Problem) -> bool:
    """Whether output pixels can be walked as one row: 1x1, stride 1, no padding."""
    return (isinstance(problem, Conv2d) and problem.is_pointwise and problem.stride == (1, 1)
            and not any(problem.padding))


def taps(problem: Problem) -> dict[str, int]:
    """The loops over filter taps and their extents; a side of one tap has no loop."""
    sides = {"r": problem.R, "s": problem.S} if isinstance(problem, Conv2d) else {}
    return {name: extent for name, extent in sides.items() if extent > 1}


def meets_input(problem: Problem) -> bool:
    """Whether any product is with an element of the input, and not with padding."""
    if isinstance(problem, Linear):
        return True
    sides = zip(problem.output_shape[2:], (problem.R, problem.S), problem.stride, problem.dilation,
                problem.padding[:2], (problem.H, problem.W), strict=True)
    return all(any(0 <= e * stride + r * dilation - before < size for e in range(outputs) for r in range(taps))
               for outputs, taps, stride, dilation, before, size in sides)
