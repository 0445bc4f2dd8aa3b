"""The rules of a problem's parameters: each is checked and normalised, or named in a ProblemError."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import SupportsIndex, TypeAlias

import numpy as np

from convsched.errors import ProblemError

Activation: TypeAlias = str | tuple[str, float] | tuple[str, float, float] | None
Pair: TypeAlias = SupportsIndex | Sequence[SupportsIndex]

# Each activation and the names of its parameters, in order.
ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "relu": (),
    "relu6": (),
    "sigmoid": (),
    "tanh": (),
    "silu": (),
    "hardswish": (),
    "hardsigmoid": (),
    "leaky_relu": ("alpha",),
    "elu": ("alpha",),
    "clip": ("lo", "hi"),
}

MAX_BYTES = 2**56
"""Of a tensor, its padding included: all that a process can address on a CPU of today (five-level page tables
leave it 56 bits). Blocks of 16 channels, at most 16 times as much, stay within 64-bit offsets."""

LARGEST_INTEGER = 2**63 - 1  # of a parameter; offsets have 64 bits

_FLOAT32_MAX = float(np.finfo(np.float32).max)


def by(pair: tuple[int, int]) -> str:
    """A pair of sides as a problem's text writes it: 3x3."""
    return f"{pair[0]}x{pair[1]}"


@dataclass(frozen=True)
class Check:
    """The rules of the parameters; every method returns the normalised value, if any, or raises ProblemError."""

    problem: str

    def fail(self, parameter: str, value: object, rule: str) -> ProblemError:
        """The error of a parameter's value that breaks a rule."""
        return ProblemError(self.problem, parameter, value, rule)

    def integer(self, parameter: str, value: object, whole: object, least: int) -> int:
        """An int of at least `least`; `whole` is the parameter as the user gave it, for the message."""
        try:
            if isinstance(value, bool | np.bool_):
                raise TypeError
            number = operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            kind = type(value).__name__
            raise self.fail(parameter, whole, f"must be an integer, not {kind}") from None
        if number < least:
            raise self.fail(parameter, whole, f"must be at least {least}")
        if number > LARGEST_INTEGER:
            raise self.fail(parameter, whole, f"must be at most {LARGEST_INTEGER}")
        return number

    def positive(self, parameter: str, value: object) -> int:
        """An int of at least 1."""
        return self.integer(parameter, value, value, 1)

    def sides(self, parameter: str, value: object, least: int, lengths: tuple[int, ...]) -> tuple[int, ...]:
        """A tuple of ints from a sequence of one of the lengths."""
        listed = isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)
        if not listed or len(value) not in lengths:  # type: ignore[arg-type]
            allowed = "(height, width)" + " or (top, left, bottom, right)" * (4 in lengths)
            raise self.fail(parameter, value, f"must be an integer or {allowed}")
        return tuple(self.integer(parameter, side, value, least) for side in value)  # type: ignore[attr-defined]

    def pair(self, parameter: str, value: object) -> tuple[int, int]:
        """(height, width), each at least 1; one number stands for both."""
        if _is_number(value):
            side = self.positive(parameter, value)
            return (side, side)
        height, width = self.sides(parameter, value, 1, (2,))
        return (height, width)

    def padding(
        self, value: object, size: tuple[int, int], extent: tuple[int, int], stride: tuple[int, int]
    ) -> tuple[int, int, int, int]:
        """(top, left, bottom, right); `extent` is the size of the dilated filter."""
        if value == "valid" and isinstance(value, str):
            return (0, 0, 0, 0)
        if value == "same" and isinstance(value, str):
            top, bottom = _same(size[0], extent[0], stride[0])
            left, right = _same(size[1], extent[1], stride[1])
            return (top, left, bottom, right)
        if isinstance(value, str):
            raise self.fail("padding", value, 'a string must be "same" or "valid"')
        if _is_number(value):
            side = self.integer("padding", value, value, 0)
            return (side, side, side, side)
        sides = self.sides("padding", value, 0, (2, 4))
        top, left, bottom, right = sides * 2 if len(sides) == 2 else sides
        return (top, left, bottom, right)

    def flag(self, parameter: str, value: object) -> bool:
        """A bool; nothing else is taken for one."""
        if not isinstance(value, bool | np.bool_):
            raise self.fail(parameter, value, "must be True or False")
        return bool(value)

    def activation(self, value: object) -> Activation:
        """None, the name of an activation, or its name and parameters."""
        if value is None:
            return None
        listed = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
        words: list[object] = list(value) if listed else [value]  # type: ignore[call-overload]
        name, parameters = words[0], words[1:]
        if not isinstance(name, str) or name not in ACTIVATIONS:
            raise self.fail("activation", value, f"must be None or one of {', '.join(ACTIVATIONS)}")
        names = ACTIVATIONS[name]
        if len(parameters) != len(names):
            usage = f'("{name}", {", ".join(names)})' if names else f'"{name}"'
            raise self.fail("activation", value, f"must be given as {usage}")
        numbers = [self.real(value, parameter, infinite=name == "clip") for parameter in parameters]
        if not numbers:
            return name
        if len(numbers) == 1:
            return (name, numbers[0])
        lo, hi = numbers
        if lo > hi or lo == math.inf or hi == -math.inf:
            raise self.fail("activation", value, "must have lo <= hi, lo below inf and hi above -inf")
        return (name, lo, hi)

    def real(self, whole: object, value: object, infinite: bool) -> float:
        """A float that float32 can hold; -0.0 becomes 0.0, so that equal problems print alike."""
        if isinstance(value, bool | np.bool_ | str):
            raise self.fail("activation", whole, "its parameters must be numbers")
        try:
            number = float(value) + 0.0  # type: ignore[arg-type]
        except OverflowError:  # an int beyond float64
            number = math.nan
        except (TypeError, ValueError):
            raise self.fail("activation", whole, "its parameters must be numbers") from None
        if not (abs(number) <= _FLOAT32_MAX or (infinite and abs(number) == math.inf)):
            raise self.fail("activation", whole, "its parameters must be in the range of float32, not NaN")
        return number

    def groups(self, groups: int, in_channels: int, out_channels: int) -> None:
        """Both numbers of channels must be multiples of the groups."""
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                legal = _list(_divisors(math.gcd(in_channels, out_channels)))
                rule = f"{name}={channels} is not a multiple of groups; use one of {legal}"
                raise self.fail("groups", groups, rule)

    def output(
        self, size: tuple[int, int], padding: tuple[int, int, int, int], extent: tuple[int, int]
    ) -> None:
        """The padded input must hold the dilated filter, of size ``extent``."""
        padded = (size[0] + padding[0] + padding[2], size[1] + padding[1] + padding[3])
        if padded[0] < extent[0] or padded[1] < extent[1]:
            sizes = f"the padded input {by(padded)} is smaller than the dilated filter {by(extent)}"
            fix = "pad more, or use a smaller filter"
            raise self.fail("input_size", size, f"{sizes}, so the output is empty; {fix}")

    def tensors(self, **shapes: tuple[int, ...]) -> None:
        """Each tensor of float32, given by its name and its shape with padding, must fit in memory."""
        for name, shape in shapes.items():
            size = 4 * math.prod(shape)
            if size > MAX_BYTES:
                rule = f"a tensor of {size} bytes, more than any CPU can address ({MAX_BYTES})"
                raise self.fail(name, shape, f"{rule}; use smaller sizes")


def _is_number(value: object) -> bool:
    """Whether a value is meant as one number, of whatever type, rather than as a sequence."""
    return value.ndim == 0 if isinstance(value, np.ndarray) else not hasattr(value, "__len__")


def _same(size: int, extent: int, stride: int) -> tuple[int, int]:
    """The zeros before and after one axis for which the output has ceil(size / stride) elements."""
    total = max(0, (-(-size // stride) - 1) * stride + extent - size)
    return (total // 2, total - total // 2)


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def _list(numbers: list[int], most: int = 8) -> str:
    return ", ".join(map(str, numbers[:most])) + (", ..." if len(numbers) > most else "")


def _side(pair: tuple[int, int]) -> str:
    """A pair of sides, equal ones once."""
    return str(pair[0]) if pair[0] == pair[1] else by(pair)


def common_words(batch: int, bias: bool, activation: Activation, residual: bool) -> list[str]:
    """The words that both kinds share."""
    words = [] if batch == 1 else [f"n={batch}"]
    if bias: words.append("bias")
    match activation:
        case None:
            pass
        case str(name):
            words.append(f"act={name}")
        case (name, *parameters):
            words.append(f"act={name}({','.join(map(repr, parameters))})")
    if residual: words.append("residual")
    return words
