"""Problems: normal forms, shapes and counts, text, and an error for every broken rule."""

import dataclasses
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convsched.errors import ConvschedError, ProblemError, ScheduleError
from convsched.problem import Conv2d, Linear, Problem, parse_problem
from convsched.problem.parse import names_within
from convsched.problem.rules import ACTIVATIONS

numbers = st.floats(-100, 100, width=32)
activations = st.one_of(
    st.none(),
    st.sampled_from([name for name, parameters in ACTIVATIONS.items() if not parameters]),
    st.tuples(st.sampled_from(["leaky_relu", "elu"]), numbers),
    st.tuples(numbers, st.floats(0, 100) | st.just(math.inf)).map(lambda p: ("clip", p[0], p[0] + p[1])),
)
pairs = st.integers(1, 4) | st.tuples(st.integers(1, 4), st.integers(1, 4))
paddings = st.one_of(
    st.integers(0, 3),
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.tuples(*[st.integers(0, 3)] * 4),
    st.sampled_from(["same", "valid"]),
)


@st.composite
def conv2ds(draw: st.DrawFn) -> Conv2d:
    groups = draw(st.integers(1, 4))
    return Conv2d(
        groups * draw(st.integers(1, 4)), groups * draw(st.integers(1, 4)), draw(pairs), draw(pairs),
        draw(paddings), draw(pairs), groups, draw(st.booleans()),
        input_size=draw(st.tuples(st.integers(13, 20), st.integers(13, 20))),
        batch_size=draw(st.integers(1, 3)), activation=draw(activations), residual=draw(st.booleans()),
    )  # fmt: skip


linears = st.builds(
    Linear, st.integers(1, 9), st.integers(1, 9), st.booleans(),
    batch_size=st.integers(1, 3), activation=activations, residual=st.booleans(),
)  # fmt: skip


@given(st.one_of(conv2ds(), linears))
def test_text_reads_back(problem: Problem) -> None:
    assert parse_problem(problem.text) == problem
    assert hash(parse_problem(problem.text)) == hash(problem)
    assert parse_problem(problem.text).text == problem.text == str(problem)


@given(conv2ds())
def test_normal_form_is_a_fixed_point(problem: Conv2d) -> None:
    values = {field.name: getattr(problem, field.name) for field in dataclasses.fields(problem)}
    assert Conv2d(**values) == problem == dataclasses.replace(problem)
    assert pickle.loads(pickle.dumps(problem)) == problem


@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 5), st.integers(1, 3))
def test_same_padding_gives_the_ceiling(size: int, kernel: int, stride: int, dilation: int) -> None:
    layer = Conv2d(1, 1, kernel, stride, "same", dilation, input_size=size)
    top, left, bottom, right = layer.padding
    assert layer.output_shape[2:] == (math.ceil(size / stride),) * 2
    assert (top, bottom) == (left, right)
    assert bottom - top in (0, 1)  # the odd zero is at the end


def test_letters_shapes_and_counts() -> None:
    layer = Conv2d(8, 12, (3, 5), (2, 1), (1, 2), groups=4, input_size=(9, 10), batch_size=2, residual=True)
    assert (layer.N, layer.C, layer.H, layer.W) == layer.input_shape == (2, 8, 9, 10)
    assert (layer.M, 2, layer.R, layer.S) == layer.weight_shape == (12, 2, 3, 5)
    assert (layer.N, layer.M, layer.E, layer.F) == layer.output_shape == (2, 12, 5, 10)
    assert layer.bias_shape == (12,)
    assert layer.weights == 12 * 2 * 15
    assert layer.parameters == layer.weights + 12
    assert layer.macs == 2 * 12 * 5 * 10 * 2 * 15
    assert layer.flops == 2 * layer.macs
    assert layer.bytes == 4 * (2 * 8 * 90 + layer.weights + 12 + 2 * (2 * 12 * 50))
    assert not layer.is_depthwise
    assert not layer.is_pointwise


@given(linears)
def test_linear_counts_as_its_convolution(problem: Linear) -> None:
    layer = problem.as_conv2d
    counts = "macs flops weights parameters bytes is_depthwise is_pointwise bias_shape"
    for name in [*"NCHWMRSEF", "groups", *counts.split()]:
        assert getattr(problem, name) == getattr(layer, name), name
    assert layer.output_shape == (*problem.output_shape, 1, 1)
    assert layer.weight_shape == (*problem.weight_shape, 1, 1)
    assert layer.input_shape == (*problem.input_shape, 1, 1)


def test_two_spellings_are_one_problem() -> None:
    plain = Conv2d(8, 8, 3, 2, 1, input_size=16, activation=("clip", 0, 6))
    spelled = Conv2d(
        np.int64(8), np.int32(8), [3, np.int16(3)], (2, 2), (1, 1, 1, 1), (1, 1), np.uint8(1),
        np.True_,  # type: ignore[arg-type]
        input_size=np.array([16, 16]), activation=["clip", np.float32(-0.0), 6.0],
    )  # fmt: skip
    assert plain == spelled
    assert hash(plain) == hash(spelled)
    text = "conv2d c=8 m=8 k=3x3 in=16x16 stride=2x2 pad=1,1,1,1 bias act=clip(0.0,6.0)"
    assert plain.text == spelled.text == text
    assert type(spelled.in_channels) is type(spelled.kernel_size[1]) is type(spelled.input_size[0]) is int
    assert type(spelled.bias) is bool


def test_kinds() -> None:
    assert Conv2d(8, 16, 3, groups=8, input_size=9).is_depthwise  # a channel multiplier of 2
    assert not Conv2d(1, 16, 3, input_size=9).is_depthwise
    assert Conv2d(8, 16, 1, 2, input_size=9).is_pointwise
    assert not Conv2d(8, 16, (1, 3), input_size=9).is_pointwise


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"in_channels": 0}, "Conv2d(in_channels=0): must be at least 1"),
    ({"in_channels": True}, "Conv2d(in_channels=True): must be an integer, not bool"),
    ({"out_channels": 8.0}, "Conv2d(out_channels=8.0): must be an integer, not float"),
    ({"out_channels": "8"}, "Conv2d(out_channels='8'): must be an integer, not str"),
    ({"batch_size": -1}, "Conv2d(batch_size=-1): must be at least 1"),
    ({"batch_size": None}, "Conv2d(batch_size=None): must be an integer, not NoneType"),
    ({"kernel_size": (3, 0)}, "Conv2d(kernel_size=(3, 0)): must be at least 1"),
    ({"kernel_size": (3, 3, 3)}, "Conv2d(kernel_size=(3, 3, 3)): must be an integer or (height, width)"),
    ({"kernel_size": "3x3"}, "Conv2d(kernel_size='3x3'): must be an integer or (height, width)"),
    ({"kernel_size": {3, 5}}, "must be an integer or (height, width)"),
    ({"stride": 0}, "Conv2d(stride=0): must be at least 1"),
    ({"stride": (1, np.False_)}, "must be an integer, not bool"),
    ({"dilation": (1, 1.5)}, "Conv2d(dilation=(1, 1.5)): must be an integer, not float"),
    ({"padding": -1}, "Conv2d(padding=-1): must be at least 0"),
    ({"padding": (0, 1, 2)}, "(height, width) or (top, left, bottom, right)"),
    ({"padding": (0, 0, 0, -2)}, "Conv2d(padding=(0, 0, 0, -2)): must be at least 0"),
    ({"padding": "full"}, "Conv2d(padding='full'): a string must be \"same\" or \"valid\""),
    ({"padding": None}, "Conv2d(padding=None): must be an integer, not NoneType"),
    ({"input_size": (8, 0)}, "Conv2d(input_size=(8, 0)): must be at least 1"),
    ({"input_size": ()}, "Conv2d(input_size=()): must be an integer or (height, width)"),
    ({"input_size": (2, 9)}, "padded input 2x9 is smaller than the dilated filter 3x3"),
    ({"input_size": 6, "dilation": 3}, "padded input 6x6 is smaller than the dilated filter 7x7"),
    ({"groups": 3}, "Conv2d(groups=3): in_channels=64 is not a multiple of groups; use one of 1, 2, 4, 8"),
    ({"groups": 64}, "Conv2d(groups=64): out_channels=48 is not a multiple of groups; use one of 1, 2, 4, 8"),
    ({"groups": 0}, "Conv2d(groups=0): must be at least 1"),
    ({"bias": None}, "Conv2d(bias=None): must be True or False"),
    ({"bias": np.zeros(3)}, "must be True or False"),
    ({"residual": 1}, "Conv2d(residual=1): must be True or False"),
    ({"activation": "gelu"}, "Conv2d(activation='gelu'): must be None or one of relu, relu6,"),
    ({"activation": 6}, "must be None or one of relu"),
    ({"activation": ()}, "must be None or one of relu"),
    ({"activation": "leaky_relu"}, 'must be given as ("leaky_relu", alpha)'),
    ({"activation": ("relu", 1)}, 'must be given as "relu"'),
    ({"activation": ("clip", 0)}, 'must be given as ("clip", lo, hi)'),
    ({"activation": ("clip", 6, 0)}, "must have lo <= hi"),
    ({"activation": ("clip", math.nan, 6)}, "range of float32, not NaN"),
    ({"activation": ("clip", math.inf, math.inf)}, "lo below inf"),
    ({"activation": ("elu", math.inf)}, "range of float32, not NaN"),
    ({"activation": ("elu", 1e39)}, "range of float32, not NaN"),
    ({"activation": ("elu", 10**400)}, "range of float32, not NaN"),
    ({"activation": ("elu", "1")}, "its parameters must be numbers"),
    ({"activation": ("elu", None)}, "its parameters must be numbers"),
    ({"activation": ("elu", True)}, "its parameters must be numbers"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_a_broken_rule_is_named(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"in_channels": 64, "out_channels": 48, "kernel_size": 3, "input_size": 9}
    Conv2d(**good)
    with pytest.raises(ProblemError) as caught:
        Conv2d(**(good | change))
    assert message in str(caught.value)
    assert caught.value.parameter in change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_features": 0}, "Linear(in_features=0): must be at least 1"),
        ({"out_features": 1.0}, "Linear(out_features=1.0): must be an integer, not float"),
        ({"bias": 1}, "Linear(bias=1): must be True or False"),
        ({"batch_size": 0}, "Linear(batch_size=0): must be at least 1"),
        ({"activation": "swish"}, "Linear(activation='swish'): must be None or one of relu"),
    ],
)
def test_a_broken_rule_of_linear_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ProblemError) as caught:
        Linear(**({"in_features": 3, "out_features": 4} | change))
    assert message in str(caught.value)


@pytest.mark.parametrize(("text", "short"), [
    ("conv2d c=32 m=64 k=3x3 in=56x56 stride=2x2 pad=1,1,1,1 bias act=relu", "3x3 s2 32>64 56"),
    ("conv2d n=8 c=32 m=32 k=1x7 in=48x320 stride=1x2 dil=2x2 g=32", "1x7 s1x2 d2 g32 32>32 48x320 n8"),
    ("conv2d c=3 m=8 k=1x1 in=7x7 bias residual", "1x1 3>8 7"),
    ("linear c=2048 m=1000 bias", "fc 2048>1000"), ("linear c=4 m=5 n=16", "fc 4>5 n16")])
def test_short_names(text: str, short: str) -> None:
    assert parse_problem(text).short == short


def test_names_within_a_width() -> None:
    """All whole or all short; what is not a layer's text stays as it is."""
    layers = [parse_problem("linear c=4 m=5"), parse_problem("linear c=40 m=50 bias")]
    assert names_within(layers, 21) == ["linear c=4 m=5", "linear c=40 m=50 bias"]
    assert names_within(layers, 20) == ["fc 4>5", "fc 40>50"]
    assert names_within(layers, -5) == ["fc 4>5", "fc 40>50"]
    assert names_within([*layers, "conv9d c=1 m=1"], 9) == ["fc 4>5", "fc 40>50", "conv9d c=1 m=1"]
    assert names_within([], 0) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Conv2d(1, 1, 1, input_size=2**32), "Conv2d(input=(1, 1, 4294967296, 4294967296)): "),
        (lambda: Conv2d(2**40, 1, 1, groups=1, input_size=1, batch_size=2**40), "Conv2d(input="),
        (lambda: Conv2d(1, 1, 1, 2**62, 2**62, input_size=8), "Conv2d(input="),  # with its padding
        (lambda: Conv2d(2**30, 2**30, 1, input_size=1), "Conv2d(weight=(1073741824, 1073741824, 1, 1)): "),
        (lambda: Conv2d(1, 2**40, 1, input_size=2**10), "Conv2d(output=(1, 1099511627776, 1024, 1024)): "),
        (lambda: Linear(2**40, 1, batch_size=2**40), "Linear(input="),
        (lambda: Linear(2**62, 2**62), "Linear(input="),
        (lambda: Linear(2**40, 2**40), "Linear(weight="),
        (lambda: Linear(1, 2**40, batch_size=2**40), "Linear(output="),
        (lambda: parse_problem("linear c=1099511627776 m=1099511627776"), "Linear(weight="),
    ],
)
def test_a_tensor_beyond_all_memory_is_named(make: Callable[[], Problem], message: str) -> None:
    with pytest.raises(ProblemError) as caught:
        make()
    assert str(caught.value).startswith(message)
    size = 4 * math.prod(caught.value.value)  # type: ignore[call-overload]
    assert caught.value.rule == (f"a tensor of {size} bytes, more than any CPU can address (72057594037927936); "
                                 "use smaller sizes")  # fmt: skip


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(2**63, 1), "Linear(in_features=9223372036854775808): must be at most 9223372036854775807"),
        (lambda: Linear(10**5000, 1), "Linear(in_features=...): must be at most 9223372036854775807"),
        (lambda: Linear(-(10**5000), 1), "Linear(in_features=...): must be at least 1"),
        (lambda: Conv2d(1, 1, (10**5000, 1), input_size=1), "Conv2d(kernel_size=...): must be at most 9223372"),
        (lambda: parse_problem(f"linear c={'9' * 4000} m=1"), "Linear(in_features=999999999999999999999999999999"),
        (lambda: parse_problem(f"linear c={'9' * 5000} m=1"), "parse_problem(text='linear c=9999999999999999999"),
    ],
)
def test_an_integer_without_measure_is_refused(make: Callable[[], Problem], message: str) -> None:
    with pytest.raises(ProblemError) as caught:
        make()
    assert str(caught.value).startswith(message)


def test_the_greatest_tensor_is_a_problem() -> None:
    assert Linear(2**54, 1).bytes == 4 * (2**55 + 2)
    assert Conv2d(1, 1, 1, 2**62, input_size=2**27).output_shape == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must start with conv2d or linear"),
        ("conv3d c=1", "must start with conv2d or linear"),
        ("conv2d c=4 m=4 k=3x3", "in= is missing"),
        ("linear", "c= m= is missing"),
        ("linear c=4 m=4 k=3x3", "'k=3x3' is not one of c= m= n= act="),
        ("linear c=4 m=4 c=4", "c is given twice"),
        ("linear c=4 m=4 bias bias", "bias is given twice"),
        ("linear c=4 m=4 bias=yes", "'bias=yes' is not one of"),
        ("linear c=4 m=", "'m=' is not one of"),
        ("linear c=4 m=four", "'m=four' must hold numbers, such as"),
        ("conv2d c=4 m=4 k=3,3 in=9x9", "'k=3,3' must hold numbers, such as"),
        ("conv2d c=4 m=4 k=3x3x3 in=9x9", "must be an integer or (height, width)"),
        ("conv2d c=4 m=4 k=3x3 in=9x9 pad=1,2,3", "must be an integer or (height, width) or (top,"),
        ("conv2d c=4 m=4 k=3x3 in=9x9 act=clip(0,)", "must hold numbers, such as"),
        ("conv2d c=4 m=4 k=3x3 in=9x9 act=clip(0.0,6.0", "must be None or one of relu"),
        ("conv2d c=4 m=4 k=3x3 in=9x9 act=gelu", "must be None or one of relu"),
        ("conv2d c=4 m=4 k=3x3 in=2x2", "the output is empty"),
    ],
)
def test_a_bad_text_is_named(text: str, message: str) -> None:
    with pytest.raises(ProblemError) as caught:
        parse_problem(text)
    assert message in str(caught.value)


def test_problems_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Conv2d(1, 1, 1, input_size=1).groups = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    "error", [ProblemError("Conv2d", "groups", 3, "why"), ScheduleError("split c", "why", "fix", "for c < 3")]
)
def test_errors_survive_pickling(error: ConvschedError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))
    assert isinstance(copy, ValueError)
