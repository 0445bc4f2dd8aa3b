"""A problem: which convolution, with all its sizes, and nothing about how it is computed.

    y[n, m, e, f] = act(bias[m] + residual[n, m, e, f]
                        + sum over c, r, s of  x[n, g C/groups + c, e sh + r dh - top, f sw + s dw - left]
                                               * w[m, c, r, s])

with g = m // (M/groups), x zero outside its edges, and

    E = (H + top + bottom - dh (R - 1) - 1) // sh + 1,   F likewise.

The letters are those of Sze et al., "Efficient Processing of Deep Neural Networks" (2020), table 2.1:
N batch, C x H x W input, M x E x F output, R x S filter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import SupportsIndex

from convsched.problem.rules import Activation, Check, Pair, _side, by, common_words

FLOAT32_BYTES = 4


@dataclass(frozen=True, init=False)
class Conv2d:
    """A 2-D convolution layer; parameters are named and ordered as in `torch.nn.Conv2d`.

    `kernel_size`, `stride`, `dilation`: one int for both sides or (height, width). `padding`: int,
    (height, width), (top, left, bottom, right), "valid" (none) or "same": E = ceil(H / stride), the odd
    zero at the end, as ONNX's SAME_UPPER. `input_size`: int or (H, W). `activation`: a name, or
    ("leaky_relu", alpha), ("elu", alpha), ("clip", lo, hi), applied after bias and residual.
    The fields hold the normalised values, so that two spellings of one layer are equal.
    Raises ProblemError, which names the parameter, its value and the rule.

    >>> layer = Conv2d(256, 256, 3, padding=1, input_size=56, activation="relu")
    >>> print(layer)
    conv2d c=256 m=256 k=3x3 in=56x56 pad=1,1,1,1 bias act=relu
    >>> layer.macs, layer.output_shape
    (1849688064, (1, 256, 56, 56))
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int
    bias: bool
    input_size: tuple[int, int]
    batch_size: int
    activation: Activation
    residual: bool

    def __init__(
        self,
        in_channels: SupportsIndex,
        out_channels: SupportsIndex,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair | str = 0,
        dilation: Pair = 1,
        groups: SupportsIndex = 1,
        bias: bool = True,
        *,
        input_size: Pair,
        batch_size: SupportsIndex = 1,
        activation: str | Sequence[object] | None = None,
        residual: bool = False,
    ) -> None:
        check = Check("Conv2d")
        kernel = check.pair("kernel_size", kernel_size)
        strides = check.pair("stride", stride)
        dilations = check.pair("dilation", dilation)
        size = check.pair("input_size", input_size)
        extent = (dilations[0] * (kernel[0] - 1) + 1, dilations[1] * (kernel[1] - 1) + 1)
        values: dict[str, object] = {
            "in_channels": check.positive("in_channels", in_channels),
            "out_channels": check.positive("out_channels", out_channels),
            "kernel_size": kernel,
            "stride": strides,
            "padding": check.padding(padding, size, extent, strides),
            "dilation": dilations,
            "groups": check.positive("groups", groups),
            "bias": check.flag("bias", bias),
            "input_size": size,
            "batch_size": check.positive("batch_size", batch_size),
            "activation": check.activation(activation),
            "residual": check.flag("residual", residual),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        check.groups(self.groups, self.in_channels, self.out_channels)
        check.output(size, self.padding, extent)
        top, left, bottom, right = self.padding
        padded = (self.N, self.C, self.H + top + bottom, self.W + left + right)
        check.tensors(input=padded, weight=self.weight_shape, output=self.output_shape)

    @property
    def N(self) -> int:
        """Images in a batch."""
        return self.batch_size

    @property
    def C(self) -> int:
        """Input channels, of all groups together."""
        return self.in_channels

    @property
    def H(self) -> int:
        """Input height, without padding."""
        return self.input_size[0]

    @property
    def W(self) -> int:
        """Input width, without padding."""
        return self.input_size[1]

    @property
    def M(self) -> int:
        """Output channels, of all groups together."""
        return self.out_channels

    @property
    def R(self) -> int:
        """Filter height, in taps."""
        return self.kernel_size[0]

    @property
    def S(self) -> int:
        """Filter width, in taps."""
        return self.kernel_size[1]

    @property
    def E(self) -> int:
        """Output height."""
        top, _, bottom, _ = self.padding
        return (self.H + top + bottom - self.dilation[0] * (self.R - 1) - 1) // self.stride[0] + 1

    @property
    def F(self) -> int:
        """Output width."""
        _, left, _, right = self.padding
        return (self.W + left + right - self.dilation[1] * (self.S - 1) - 1) // self.stride[1] + 1

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W)."""
        return (self.N, self.C, self.H, self.W)

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """(M, C/groups, R, S)."""
        return (self.M, self.C // self.groups, self.R, self.S)

    @property
    def bias_shape(self) -> tuple[int]:
        """(M,)."""
        return (self.M,)

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """(N, M, E, F); the residual's shape, too."""
        return (self.N, self.M, self.E, self.F)

    @property
    def macs(self) -> int:
        """Multiply-accumulates by definition, those on padding zeros included: N M E F C/groups R S."""
        return self.N * self.E * self.F * self.weights

    @property
    def flops(self) -> int:
        """2 for each multiply-accumulate; the epilogue is not counted."""
        return 2 * self.macs

    @property
    def weights(self) -> int:
        """Filter elements, without the bias."""
        return math.prod(self.weight_shape)

    @property
    def parameters(self) -> int:
        """Filter elements and bias."""
        return self.weights + self.bias * self.M

    @property
    def bytes(self) -> int:
        """Bytes of float32 input, weights, bias, residual and output, each touched once."""
        outputs = (1 + self.residual) * math.prod(self.output_shape)
        return FLOAT32_BYTES * (math.prod(self.input_shape) + self.parameters + outputs)

    @property
    def is_depthwise(self) -> bool:
        """Whether every input channel is a group of its own (any channel multiplier)."""
        return self.groups == self.C and self.groups > 1

    @property
    def is_pointwise(self) -> bool:
        """Whether the filter is 1x1."""
        return self.kernel_size == (1, 1)

    @property
    def text(self) -> str:
        """The canonical one-line text; what is at its default is left out, but for the bias."""
        return conv2d_text(self)

    @property
    def short(self) -> str:
        """A name for narrow terminals, which leaves out more than the text.

        >>> Conv2d(32, 64, 3, stride=2, padding=1, input_size=56, activation="relu").short
        '3x3 s2 32>64 56'
        """
        return conv2d_short(self)

    def __str__(self) -> str:
        return self.text


def conv2d_text(layer: Conv2d) -> str:
    """The canonical text of a convolution."""
    words = [f"conv2d c={layer.C} m={layer.M} k={by(layer.kernel_size)} in={by(layer.input_size)}"]
    if layer.stride != (1, 1): words.append(f"stride={by(layer.stride)}")
    if any(layer.padding): words.append("pad=" + ",".join(map(str, layer.padding)))
    if layer.dilation != (1, 1): words.append(f"dil={by(layer.dilation)}")
    if layer.groups != 1: words.append(f"g={layer.groups}")
    return " ".join(words + common_words(layer.N, layer.bias, layer.activation, layer.residual))


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
