"""Activations as IR values: the last thing that happens to an output element.

``max`` and ``min`` give their second operand when an operand is NaN, so a NaN in the sum reaches the output.
"""

from __future__ import annotations

from convsched.ir import Const, Op, Value
from convsched.parameters import Activation


def _clip(value: Value, low: float, high: float) -> Value:
    return Op("min", (Const(high), Op("max", (Const(low), value))))


def _sigmoid(value: Value) -> Value:
    """1 / (1 + exp(-v)); exp saturates, so the limits 0 and 1 are reached without overflow."""
    return Op("div", (Const(1.0), Op("add", (Const(1.0), Op("exp", (Op("neg", (value,)),))))))


def _hardsigmoid(value: Value) -> Value:
    return _clip(Op("add", (Op("mul", (value, Const(1.0 / 6.0))), Const(0.5))), 0.0, 1.0)


def _tanh(value: Value) -> Value:
    """1 - 2 / (exp(2 v) + 1): absolute error of a few units in the last place of 1."""
    grown = Op("exp", (Op("mul", (Const(2.0), value)),))
    return Op("sub", (Const(1.0), Op("div", (Const(2.0), Op("add", (grown, Const(1.0)))))))


def _elu(value: Value, alpha: float) -> Value:
    below = Op("mul", (Const(alpha), Op("sub", (Op("exp", (value,)), Const(1.0)))))
    return Op("select_positive", (value, value, below))


def activation(kind: Activation, value: Value) -> Value:
    """The value after the activation ``kind``, as ``Conv2d(activation=...)`` names it."""
    match kind:
        case None:
            return value
        case "relu":
            return Op("max", (Const(0.0), value))
        case "relu6":
            return _clip(value, 0.0, 6.0)
        case "sigmoid":
            return _sigmoid(value)
        case "tanh":
            return _tanh(value)
        case "silu":
            return Op("mul", (value, _sigmoid(value)))
        case "hardsigmoid":
            return _hardsigmoid(value)
        case "hardswish":
            return Op("mul", (value, _hardsigmoid(value)))
        case ("leaky_relu", float(alpha)):
            return Op("select_positive", (value, value, Op("mul", (Const(alpha), value))))
        case ("elu", float(alpha)):
            return _elu(value, alpha)
        case ("clip", float(low), float(high)):
            return _clip(value, low, high)
    raise AssertionError(f"activation {kind!r} passed the problem's checks")
