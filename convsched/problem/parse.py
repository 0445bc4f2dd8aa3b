"""The one-line text of a problem: the words of its parameters, and the parameters of its words.

    conv2d c=256 m=256 k=3x3 in=56x56 pad=1,1,1,1 bias act=relu
    linear c=2048 m=1000 bias

What is at its default is left out, but for the bias. Narrow terminals get a shorter name, which leaves out more:

    3x3 256>256 56
    fc 2048>1000
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from convsched.errors import ProblemError
from convsched.problem.conv2d import Conv2d
from convsched.problem.linear import Linear
from convsched.problem.problem import Problem

_COMMON_KEYS = {"n": "batch_size", "act": "activation"}
_KEYS = {
    "conv2d": {
        "c": "in_channels", "m": "out_channels", "k": "kernel_size", "in": "input_size", "stride": "stride",
        "pad": "padding", "dil": "dilation", "g": "groups", **_COMMON_KEYS,
    },
    "linear": {"c": "in_features", "m": "out_features", **_COMMON_KEYS},
}  # fmt: skip
_EXAMPLES = {"k": "k=3x3", "in": "in=56x56", "stride": "stride=2x2", "dil": "dil=2x2", "pad": "pad=1,1,1,1",
             "act": "act=clip(0.0,6.0)"}  # fmt: skip
_REQUIRED = {"conv2d": ("c", "m", "k", "in"), "linear": ("c", "m")}


def names_within(layers: Sequence[Problem | str], room: int) -> list[str]:
    """The layers' texts if each has at most `room` characters, else their short names, which may be longer too.

    A text that is not a problem's (of another version) stands for itself.
    """
    if all(len(str(layer)) <= room for layer in layers):
        return [str(layer) for layer in layers]
    return [layer if isinstance(layer, str) else layer.short for layer in layers]


def parse_words(text: str) -> tuple[str, dict[str, object]]:
    """The kind of a problem's text, "conv2d" or "linear", and the arguments that make the problem.

    Raises ProblemError for words that are unknown, missing, twice or no numbers; the values' rules are checked
    where the problem is made.
    """
    kind, *words = text.split() or [""]
    if kind not in _KEYS:
        raise ProblemError("parse_problem", "text", text, "must start with conv2d or linear")
    keys = _KEYS[kind]
    arguments: dict[str, object] = {"bias": False}
    seen: set[str] = set()
    for word in words:
        key, equals, value = word.partition("=")
        if key in seen:
            raise ProblemError("parse_problem", "text", text, f"{key} is given twice")
        seen.add(key)
        if key in ("bias", "residual") and not equals:
            arguments[key] = True
        elif key in keys and value:
            arguments[keys[key]] = _value(text, word, key, value)
        else:
            known = " ".join(f"{name}=" for name in keys)
            raise ProblemError("parse_problem", "text", text, f"{word!r} is not one of {known} bias residual")
    if missing := [f"{key}=" for key in _REQUIRED[kind] if key not in seen]:
        raise ProblemError("parse_problem", "text", text, f"{' '.join(missing)} is missing")
    return kind, arguments


def _value(text: str, word: str, key: str, value: str) -> object:
    """The value of one word, its rules still unchecked."""
    try:
        if key in ("k", "in", "stride", "dil"):
            return tuple(int(side) for side in value.split("x"))
        if key == "pad":
            return value if value in ("same", "valid") else tuple(int(side) for side in value.split(","))
        if key == "act":
            call = re.fullmatch(r"(\w+)\((.*)\)", value)
            return (call[1], *map(float, call[2].split(","))) if call else value
        return int(value)
    except ValueError:
        rule = f"{word!r} must hold numbers, such as {_EXAMPLES.get(key, f'{key}=1')}"
        raise ProblemError("parse_problem", "text", text, rule) from None


def parse_problem(text: str) -> Problem:
    """Read a problem back from its text: parse_problem(p.text) == p. Raises ProblemError.

    >>> parse_problem("conv2d c=8 m=16 k=3x3 in=14x14 pad=same act=clip(0.0,6.0)").padding
    (1, 1, 1, 1)
    """
    kind, arguments = parse_words(text)
    return Conv2d(**arguments) if kind == "conv2d" else Linear(**arguments)  # type: ignore[arg-type]
