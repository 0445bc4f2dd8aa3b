"""Convolution as a product of matrices: the filters, and the Toeplitz view of the input.

    i[n, c, r, s, p] = x[n, c, sh e + dh r - top, sw f + dw s - left]                 with p = F e + f
    y[n, m, p] = act(b[m] + sum_{c,r,s} i[n, c, r, s, p] w[m, c, r, s] + z[n, m, p])

Stage ``i`` has the loops ``e f``; the others count output pixels by ``p``. Whether the view is made as a whole, block
by block beside the product, or not at all (``inline``, then the product reads the input), is the schedule's choice.

Source: Chellapilla, Puri and Simard, "High Performance Convolutional Neural Networks for Document Processing", 2006.
"""

from __future__ import annotations

from dataclasses import replace

from convsched.ir import Affine, Load, Op, Program, Stage, Store, nested
from convsched.lower.direct import init_conv_epilogue, padded_input, weight_index
from convsched.lower.stages import tensor_of
from convsched.problem import Conv2d
from convsched.problem.layout import LAYOUTS
from convsched.problem.problem import taps


def lower_im2col(problem: Conv2d, layout: str = "nchw") -> Program:
    """The unscheduled program of a problem."""
    p = problem
    x, index = padded_input(p, layout)
    pixels, group = p.E * p.F, {"g": p.groups} if p.groups > 1 else {}
    order = tuple("p" if letter == "h" else letter for letter in LAYOUTS[layout] if letter != "w")
    tensors = [
        x,
        tensor_of("i", "ncrsp", (p.N, p.C, p.R, p.S, pixels), "local"),
        tensor_of("w", "mcrs", p.weight_shape, "weight"),
        tensor_of("y", "ncp", (p.N, p.M, pixels), "output", order),
    ]
    outer = {"n": p.N, **group, "m": p.M // p.groups, "p": pixels}
    inner = {"c": p.C // p.groups, **taps(p)}
    element = (Affine.of("n"), index[1], *weight_index(p)[2:])
    product = Op("mul", (Load("i", (*element, Affine.of("p"))), Load("w", weight_index(p))))
    program = init_conv_epilogue(p, tensors, outer, inner, product)
    toeplitz = nested({"n": p.N, **group, **inner, "e": p.E, "f": p.F},
                      Store("i", (*element, Affine.of("e") * p.F + "f"), Load("x", index)))
    return replace(program, stages=(Stage("i", toeplitz), *program.stages))
