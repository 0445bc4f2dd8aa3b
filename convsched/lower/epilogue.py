"""What is done to the sum of an output element, the same after every algorithm.

    y[point] = act(b[channel] + sum + z[point])                    z is the residual

Activations are values of the IR. NaN in gives NaN out: ``max`` and ``min`` give their second operand when an operand is
NaN. Infinities give the limits: ``exp`` is 0 far below and infinite far above, and what would be 0 times an infinity is
bounded first. The sign of a zero is of no account, and errors are relative to the greater of 1 and the value.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from convsched.ir import Affine, Const, Index, Load, Op, Tensor, Value
from convsched.lower.stages import tensor_of
from convsched.problem import Problem
from convsched.problem.rules import Activation


@dataclass(frozen=True)
class Epilogue:
    """Bias, residual and activation of a problem's outputs.

    A sum begins with ``start`` or, where all of it comes from one that begins at zero, gets the bias by ``biased``;
    ``finish`` gives what is stored. ``tensors`` are those read.
    """

    problem: Problem

    def tensors(self, y: Tensor) -> tuple[Tensor, ...]:
        """The bias, and the residual, which lies in memory as the output ``y`` does."""
        bias = tensor_of("b", "m", self.problem.bias_shape, "weight")
        return (*([bias] if self.problem.bias else []),
                *([replace(y, name="z", role="input")] if self.problem.residual else []))

    def start(self, channel: Affine) -> Value:
        """What the sum of an output channel begins with."""
        return Load("b", (channel,)) if self.problem.bias else Const(0.0)

    def biased(self, total: Value, channel: Affine) -> Value:
        """The sum of an output channel that began at zero, with the bias."""
        return Op("add", (total, self.start(channel))) if self.problem.bias else total

    def finish(self, total: Value, point: Index) -> Value:
        """The output at a point, of the sum with its bias."""
        if self.problem.residual:
            total = Op("add", (total, Load("z", point)))
        return activation(self.problem.activation, total)


def _clip(value: Value, low: float, high: float) -> Value:
    return Op("min", (Const(high), Op("max", (Const(low), value))))


def _sigmoid(value: Value) -> Value:
    """1 / (1 + exp(-v)): 1 over infinity at -inf."""
    return Op("div", (Const(1.0), _gate(value)))


def _gate(value: Value) -> Value:
    """1 + exp(-v), infinite from about v = -88 down."""
    return Op("add", (Const(1.0), Op("exp", (Op("neg", (value,)),))))


def _silu(value: Value) -> Value:
    """v / (1 + exp(-v)); the bound, of which exp is infinite in float64 too, makes 0 of the limit at -inf."""
    bounded = Op("max", (Const(-1000.0), value))
    return Op("div", (bounded, _gate(bounded)))


def _hardsigmoid(value: Value) -> Value:
    return _clip(Op("add", (Op("mul", (value, Const(1.0 / 6.0))), Const(0.5))), 0.0, 1.0)


def _hardswish(value: Value) -> Value:
    """v hardsigmoid(v), which is 0 from -3 down, at -inf too."""
    return Op("mul", (Op("max", (Const(-3.0), value)), _hardsigmoid(value)))


def _leaky_relu(value: Value, alpha: float) -> Value:
    """v above 0, alpha v below; ReLU where the slope is 0 in float32, as 0 times -inf is NaN."""
    if np.float32(alpha) == 0:
        return Op("max", (Const(0.0), value))
    return Op("select_positive", (value, value, Op("mul", (Const(alpha), value))))


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
            return _silu(value)
        case "hardsigmoid":
            return _hardsigmoid(value)
        case "hardswish":
            return _hardswish(value)
        case ("leaky_relu", float(alpha)):
            return _leaky_relu(value, alpha)
        case ("elu", float(alpha)):
            return _elu(value, alpha)
        case ("clip", float(low), float(high)):
            return _clip(value, low, high)
    raise AssertionError(f"activation {kind!r} passed the problem's checks")
