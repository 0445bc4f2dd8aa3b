"""Which layer: convolutions and fully connected layers, their sizes and texts."""

from convsched.problem.conv2d import Conv2d, FLOAT32_BYTES
from convsched.problem.linear import Linear
from convsched.problem.parse import parse_problem
from convsched.problem.problem import Problem

__all__ = [
    "Conv2d", "FLOAT32_BYTES", "Linear", "Problem", "parse_problem",
]
