"""The fully connected layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, SupportsIndex

from convsched.problem.conv2d import FLOAT32_BYTES, Conv2d
from convsched.problem.rules import Activation, Check, common_words


@dataclass(frozen=True, init=False)
class Linear:
    """A fully connected layer, y[n, m] = act(bias[m] + residual[n, m] + sum over c of x[n, c] w[m, c]).

    The letters are those of the 1x1 convolution on a 1x1 map that it equals (`as_conv2d`).
    Raises ProblemError, which names the parameter, its value and the rule.

    >>> print(Linear(2048, 1000))
    linear c=2048 m=1000 bias
    """

    in_features: int
    out_features: int
    bias: bool
    batch_size: int
    activation: Activation
    residual: bool

    H: ClassVar[int] = 1
    W: ClassVar[int] = 1
    R: ClassVar[int] = 1
    S: ClassVar[int] = 1
    E: ClassVar[int] = 1
    F: ClassVar[int] = 1
    groups: ClassVar[int] = 1
    is_depthwise: ClassVar[bool] = False
    is_pointwise: ClassVar[bool] = True

    def __init__(
        self,
        in_features: SupportsIndex,
        out_features: SupportsIndex,
        bias: bool = True,
        *,
        batch_size: SupportsIndex = 1,
        activation: str | Sequence[object] | None = None,
        residual: bool = False,
    ) -> None:
        check = Check("Linear")
        values: dict[str, object] = {
            "in_features": check.positive("in_features", in_features),
            "out_features": check.positive("out_features", out_features),
            "bias": check.flag("bias", bias),
            "batch_size": check.positive("batch_size", batch_size),
            "activation": check.activation(activation),
            "residual": check.flag("residual", residual),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        check.tensors(input=self.input_shape, weight=self.weight_shape, output=self.output_shape)

    @property
    def as_conv2d(self) -> Conv2d:
        """The 1x1 convolution on a 1x1 map that computes the same."""
        return Conv2d(
            self.C, self.M, 1, bias=self.bias, input_size=1, batch_size=self.N,
            activation=self.activation, residual=self.residual,
        )  # fmt: skip

    @property
    def N(self) -> int:
        """Rows in a batch."""
        return self.batch_size

    @property
    def C(self) -> int:
        """Input features."""
        return self.in_features

    @property
    def M(self) -> int:
        """Output features."""
        return self.out_features

    @property
    def input_shape(self) -> tuple[int, int]:
        """(N, C)."""
        return (self.N, self.C)

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(M, C)."""
        return (self.M, self.C)

    @property
    def bias_shape(self) -> tuple[int]:
        """(M,)."""
        return (self.M,)

    @property
    def output_shape(self) -> tuple[int, int]:
        """(N, M); the residual's shape, too."""
        return (self.N, self.M)

    @property
    def macs(self) -> int:
        """Multiply-accumulates: N M C."""
        return self.N * self.weights

    @property
    def flops(self) -> int:
        """2 for each multiply-accumulate; the epilogue is not counted."""
        return 2 * self.macs

    @property
    def weights(self) -> int:
        """Weight elements, without the bias."""
        return self.M * self.C

    @property
    def parameters(self) -> int:
        """Weight elements and bias."""
        return self.weights + self.bias * self.M

    @property
    def bytes(self) -> int:
        """Bytes of float32 input, weights, bias, residual and output, each touched once."""
        return FLOAT32_BYTES * (self.N * self.C + self.parameters + (1 + self.residual) * self.N * self.M)

    @property
    def text(self) -> str:
        """The canonical one-line text; what is at its default is left out, but for the bias."""
        return linear_text(self)

    @property
    def short(self) -> str:
        """A name for narrow terminals: fc 2048>1000."""
        return linear_short(self)

    def __str__(self) -> str:
        return self.text


def linear_text(layer: Linear) -> str:
    """The canonical text of a fully connected layer."""
    words = common_words(layer.N, layer.bias, layer.activation, layer.residual)
    return " ".join([f"linear c={layer.C} m={layer.M}", *words])


def linear_short(layer: Linear) -> str:
    """A fully connected layer's name where its text is too long."""
    return f"fc {layer.C}>{layer.M}" + (f" n{layer.N}" if layer.N != 1 else "")
