"""Direct convolution: the seven loops of the definition, unscheduled.

    y[n, m, e, f] = act(b[m] + sum_{c,r,s} x[n, c, sh e + dh r - top, sw f + dw s - left] w[m, c, r, s] + z)

With groups, ``m`` and ``c`` count within a group and ``g`` counts groups; a filter side of 1 has no loop. Three
stages share the names of their loops, so that a schedule blocks them together: ``init`` starts the sum ``t`` at
the bias, ``conv`` adds the products, ``epilogue`` writes the output. Padding is the border of ``x``.
"""

from __future__ import annotations

from convsched.ir import Affine, Index, Load, Op, Program, Reduce, Stage, Store, Tensor, Value, nested
from convsched.lower.epilogue import Epilogue
from convsched.lower.stages import at, tensor_of
from convsched.problem import Conv2d, Linear, Problem
from convsched.problem.layout import LAYOUTS
from convsched.problem.problem import taps


def lower_direct(problem: Problem, layout: str = "nchw") -> Program:
    """The unscheduled program of a problem, with activations stored as ``layout`` says.

    Source: Sze et al., "Efficient Processing of Deep Neural Networks", 2020, section 2.1.
    """
    return _lower_linear(problem) if isinstance(problem, Linear) else _lower_conv2d(problem, layout)


def init_conv_epilogue(problem: Problem, tensors: list[Tensor], outer: dict[str, int], inner: dict[str, int],
                       product: Value) -> Program:
    """The three stages around a product; ``outer`` are the loops of the output, those of pixels last."""
    output, epilogue = next(t for t in tensors if t.name == "y"), Epilogue(problem)
    channel = Affine.of("m") + (Affine.of("g") * outer["m"] if "g" in outer else 0)
    point = at("n", channel, *(name for name in outer if name in ("e", "f", "p")))
    result = epilogue.finish(Load("t", point), point)
    stages = (
        Stage("init", nested(outer, Store("t", point, epilogue.start(channel)))),
        Stage("conv", nested({**outer, **inner}, Reduce("t", point, product))),
        Stage("epilogue", nested(outer, Store("y", point, result))),
    )
    local = tensor_of("t", "".join(output.letters), output.shape, "local")
    return Program(problem.text, (*tensors, *epilogue.tensors(output), local), stages)


def _lower_conv2d(p: Conv2d, layout: str) -> Program:
    x, index = padded_input(p, layout)
    group = {"g": p.groups} if p.groups > 1 else {}
    outer = {"n": p.N, **group, "m": p.M // p.groups, "e": p.E, "f": p.F}
    inner = {"c": p.C // p.groups, **taps(p)}
    tensors = [
        x,
        tensor_of("w", "mcrs", p.weight_shape, "weight"),
        tensor_of("y", "nchw", p.output_shape, "output", LAYOUTS[layout]),
    ]
    return init_conv_epilogue(p, tensors, outer, inner, Op("mul", (Load("x", index), Load("w", weight_index(p)))))


def padded_input(p: Conv2d, layout: str) -> tuple[Tensor, Index]:
    """The input with its padding as border, and what element of it meets tap r, s at output e, f."""
    top, left, bottom, right = p.padding
    border = ((0, 0), (0, 0), (top, bottom), (left, right)) if any(p.padding) else ()
    r, s = _tap(p)
    return tensor_of("x", "nchw", p.input_shape, "input", LAYOUTS[layout], border), (
        Affine.of("n"), _group(p) * (p.C // p.groups) + "c",
        Affine.of("e") * p.stride[0] + r * p.dilation[0] - top,
        Affine.of("f") * p.stride[1] + s * p.dilation[1] - left)


def weight_index(p: Conv2d) -> Index:
    """The element of the filters that output map m of a group has for input channel c and tap r, s."""
    return (_group(p) * (p.M // p.groups) + "m", Affine.of("c"), *_tap(p))


def _group(p: Conv2d) -> Affine:
    return Affine.of("g") if p.groups > 1 else Affine()


def _tap(p: Conv2d) -> tuple[Affine, Affine]:
    r, s = (Affine.of(name) if name in taps(p) else Affine() for name in ("r", "s"))
    return r, s


def _lower_linear(p: Linear) -> Program:
    tensors = [
        tensor_of("x", "nc", p.input_shape, "input"),
        tensor_of("w", "mc", p.weight_shape, "weight"),
        tensor_of("y", "nc", p.output_shape, "output"),
    ]
    product = Op("mul", (Load("x", at("n", "c")), Load("w", at("m", "c"))))
    return init_conv_epilogue(p, tensors, {"n": p.N, "m": p.M}, {"c": p.C}, product)
