"""What every step is: frozen fields, checked when it is made, so that no object can say what no text says."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable
from typing import ClassVar, Literal, get_args

from convsched.errors import ScheduleError

Tail = Literal["none", "mask", "peel", "overlap"]

Where = Literal["registers", "buffer", "window", "packed"]

Which = Literal["first", "last", "guarded", "overlap"]

MOST = 2**31 - 1  # the greatest number in a step: sizes of loops and strides made of it fit 64-bit addresses

_NAME = r"[A-Za-z_][A-Za-z0-9_.]*"
_NAMES = rf"{_NAME}(?: {_NAME})*"
_ENTRY = r"[A-Za-z0-9_./%]+"
_NUMBER = r"[0-9]{1,40}"


def _is_name(value: object, pattern: str = _NAME) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _is_number(value: object) -> bool:
    return type(value) is int and 0 <= value <= MOST


def _is_order(value: object) -> bool:
    return isinstance(value, tuple) and all(_is_name(entry, _ENTRY) for entry in value)


def _is_align(value: object) -> bool:
    return (isinstance(value, tuple)
            and all(isinstance(pair, tuple) and len(pair) == 2 and _is_name(pair[0], _ENTRY) and _is_number(pair[1])
                    for pair in value)
            and len({entry for entry, _ in value}) == len(value))


def _one_of(*words: str) -> _Rule:
    return (lambda value: isinstance(value, str) and value in words), f"one of {', '.join(words)}"


_Rule = tuple[Callable[[object], bool], str]  # whether a field may have a value, and what it may have
_A_NAME: _Rule = (_is_name, "a name such as 'm0', of letters, digits, _ and .")
_SEVERAL: _Rule = (lambda v: isinstance(v, tuple) and bool(v) and all(map(_is_name, v)),
                   "a tuple of names such as ('m0', 'c')")
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(("loop", "outer", "inner", "first", "second", "fused", "tensor", "at", "stage"), _A_NAME),
    **dict.fromkeys(("factor", "ahead"), (_is_number, f"an integer of at most {MOST}, not negative")),
    **dict.fromkeys(("loops", "axes"), _SEVERAL),
    "Layout.order": (lambda v: bool(v) and _is_order(v), "a tuple of names such as ('m0', 'c') or ('c/16', 'c%16')"),
    "StageAt.order": (_is_order, "a tuple of names such as ('h', 'c/16')"),
    "align": (_is_align, f"a tuple of pairs such as ('h', 16), each entry once, of integers of at most {MOST}"),
    "tail": _one_of(*get_args(Tail)),
    "where": _one_of(*get_args(Where)),
    "which": _one_of(*get_args(Which)),
}


class _Checked:
    """Raises ScheduleError where a step is made with a field that its text could not say."""

    __dataclass_fields__: ClassVar[dict[str, object]]

    def __post_init__(self) -> None:
        for field in self.__dataclass_fields__:
            own = f"{type(self).__name__}.{field}"
            is_allowed, allowed = _RULES[own if own in _RULES else field]
            value = getattr(self, field)
            if not is_allowed(value):
                raise ScheduleError(f"{type(self).__name__}({field}={_shown(value)})", "is no step",
                                    f"{field} is {allowed}")


def _shown(value: object) -> str:
    """A value, shortened; an integer of thousands of digits has no decimal form."""
    try:
        return reprlib.repr(value)
    except ValueError:
        return type(value).__name__
