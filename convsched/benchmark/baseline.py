"""The NumPy baseline that benchmarks compare with: im2col and one matrix product a group, in float32.

    y[n, g] = w[g] @ columns[n, g]
    columns[n, g, (c, r, s), (e, f)] = xpad[n, g C/groups + c, e sh + r dh, f sw + s dw]

Chellapilla et al., "High performance convolutional neural networks for document processing" (2006). It is
what one writes by hand with NumPy: a strided view, one copy into columns (none for a 1x1 filter at
stride 1 without padding) and BLAS.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from convsched.problem import Conv2d, Linear, Problem
from convsched.problem.reference import activate_as_is, check_shapes


def gemm_baseline(
    problem: Problem,
    x: NDArray[np.float32],
    weight: NDArray[np.float32],
    bias: NDArray[np.float32] | None = None,
    residual: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """The output of a problem in float32; the arrays are those of `reference.convolve`.

    Raises ArrayError for wrong shapes.
    """
    check_shapes(problem, x, weight, bias, residual)
    if isinstance(problem, Linear):
        y = x @ weight.T
    else:
        columns = im2col(problem, x)
        groups, depth = columns.shape[1:3]
        y = weight.reshape(groups, problem.M // groups, depth) @ columns
    y = y.reshape(problem.N, problem.M, problem.E * problem.F)
    if bias is not None:
        y += bias[:, np.newaxis]
    y = y.reshape(problem.output_shape)
    if residual is not None:
        y += residual
    return activate_as_is(problem.activation, y).astype(np.float32, copy=False)


def im2col(layer: Conv2d, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The columns of a layer's input, of shape (N, groups, C/groups R S, E F)."""
    top, left, bottom, right = layer.padding
    (sh, sw), (dh, dw) = layer.stride, layer.dilation
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right))) if any(layer.padding) else x
    extent = (dh * (layer.R - 1) + 1, dw * (layer.S - 1) + 1)
    windows = np.lib.stride_tricks.sliding_window_view(padded, extent, axis=(2, 3))
    taps = windows[:, :, ::sh, ::sw, ::dh, ::dw]  # n c e f r s
    depth = layer.C // layer.groups * layer.R * layer.S
    return taps.transpose(0, 1, 4, 5, 2, 3).reshape(layer.N, layer.groups, depth, layer.E * layer.F)
