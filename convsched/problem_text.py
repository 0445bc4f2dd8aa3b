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
from typing import TYPE_CHECKING

from convsched.errors import ProblemError
from convsched.parameters import by

if TYPE_CHECKING:
    from convsched.problem import Conv2d, Linear, Problem

_COMMON_KEYS = {"n": "batch_size", "act": "activation"}
_KEYS = {
    "conv2d": {
        "c": "in_channels", "m": "out_channels", "k": "kernel_size", "in": "input_size", "stride": "stride",
        "pad": "padding", "dil": "dilation", "g": "groups", **_COMMON_KEYS,
    },
    "linear": {"c": "in_features", "m": "out_features", **_COMMON_KEYS},
}  # fmt: skip
_REQUIRED = {"conv2d": ("c", "m", "k", "in"), "linear": ("c", "m")}


def conv2d_text(layer: Conv2d) -> str:
    """The canonical text of a convolution."""
    words = [f"conv2d c={layer.C} m={layer.M} k={by(layer.kernel_size)} in={by(layer.input_size)}"]
    if layer.stride != (1, 1): words.append(f"stride={by(layer.stride)}")
    if any(layer.padding): words.append("pad=" + ",".join(map(str, layer.padding)))
    if layer.dilation != (1, 1): words.append(f"dil={by(layer.dilation)}")
    if layer.groups != 1: words.append(f"g={layer.groups}")
    return " ".join(words + _common_words(layer))


def linear_text(layer: Linear) -> str:
    """The canonical text of a fully connected layer."""
    return " ".join([f"linear c={layer.C} m={layer.M}", *_common_words(layer)])


def conv2d_short(layer: Conv2d) -> str:
    """A convolution's name where its text is too long: kernel, stride, dilation, groups, channels, input size, batch.

    Padding, bias, activation and residual are left out, so that layers which differ in nothing else share a name.
    """
    words = [by(layer.kernel_size)]
    if layer.stride != (1, 1): words.append(f"s{_side(layer.stride)}")
    if layer.dilation != (1, 1): words.append(f"d{_side(layer.dilation)}")
    if layer.groups != 1: words.append(f"g{layer.groups}")
    words += [f"{layer.C}>{layer.M}", _side(layer.input_size)]
    return " ".join(words if layer.N == 1 else [*words, f"n{layer.N}"])


def linear_short(layer: Linear) -> str:
    """A fully connected layer's name where its text is too long."""
    return f"fc {layer.C}>{layer.M}" + (f" n{layer.N}" if layer.N != 1 else "")


def names_within(layers: Sequence[Problem | str], room: int) -> list[str]:
    """The layers' texts if each has at most `room` characters, else their short names, which may be longer too.

    A text that is not a problem's (of another version) stands for itself.
    """
    if all(len(str(layer)) <= room for layer in layers):
        return [str(layer) for layer in layers]
    return [layer if isinstance(layer, str) else layer.short for layer in layers]


def _side(pair: tuple[int, int]) -> str:
    """A pair of sides, equal ones once."""
    return str(pair[0]) if pair[0] == pair[1] else by(pair)


def parse_words(text: str) -> tuple[str, dict[str, object]]:
    """The kind of a problem's text, "conv2d" or "linear", and the arguments that make the problem.

    Raises ProblemError for words that are unknown, missing, twice or no numbers; the values' rules are checked
    where the problem is made.
    """
    kind, *words = text.split() or [""]
    if kind not in _KEYS:
        raise ProblemError("parse_problem", "text", text, "starts with neither conv2d nor linear")
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
        raise ProblemError("parse_problem", "text", text, f"{word!r} does not hold numbers") from None


def _common_words(problem: Problem) -> list[str]:
    """The words that both kinds share."""
    words = [] if problem.N == 1 else [f"n={problem.N}"]
    if problem.bias: words.append("bias")
    match problem.activation:
        case None:
            pass
        case str(name):
            words.append(f"act={name}")
        case (name, *parameters):
            words.append(f"act={name}({','.join(map(repr, parameters))})")
    if problem.residual: words.append("residual")
    return words
