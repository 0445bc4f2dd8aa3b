"""What users pass to kernels: every bad array is refused by name, every good one gives the right answer."""

import threading
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import convsched as cs
from convsched.errors import ArrayError
from convsched.problem import Conv2d, Linear, Problem
from convsched.problem.layout import from_layout, to_layout
from convsched.problem.reference import convolve

LAYER = Conv2d(5, 7, 3, padding=1, input_size=(6, 9), residual=True)
X, Y = LAYER.input_shape, LAYER.output_shape
PLAIN = Conv2d(5, 7, 3, padding=1, input_size=(6, 9), bias=False)

LAYERS: dict[str, Problem] = {
    "dense": Conv2d(20, 40, 3, padding=1, input_size=(13, 15), activation="relu"),
    "pointwise": Conv2d(33, 18, 1, input_size=(9, 11), batch_size=2),
    "depthwise": Conv2d(24, 24, 3, padding=1, groups=24, input_size=12),
    "stride2": Conv2d(16, 32, 3, stride=2, padding=1, input_size=15),
    "grouped": Conv2d(12, 24, 3, padding=1, groups=3, input_size=10),
    "linear": Linear(70, 50, batch_size=5),
}


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVSCHED_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def integers(problem: Problem, seed: int = 0) -> list[Any]:
    """x, weight, bias, residual of small integers: every sum is exact."""
    rng = np.random.default_rng(seed)
    shapes = (problem.input_shape, problem.weight_shape, problem.bias_shape if problem.bias else None,
              problem.output_shape if problem.residual else None)  # fmt: skip
    return [None if s is None else rng.integers(-3, 4, s).astype(np.float32) for s in shapes]


def f32(*shape: int) -> Any:
    return np.zeros(shape, np.float32)


def read_only(*shape: int) -> Any:
    array = f32(*shape)
    array.flags.writeable = False
    return array


def misaligned(array: Any) -> Any:
    """The same numbers one byte off."""
    memory = np.zeros(array.nbytes + 1, np.uint8)[1:]
    moved = memory.view(np.float32).reshape(array.shape)
    moved[...] = array
    return moved


# Bad arrays

class Tensor:
    """As torch's: it becomes an array without the history that its gradient needs."""

    def detach(self) -> "Tensor":
        return self

    def numpy(self) -> Any:
        return f32(*X)


class Eager:
    """As TensorFlow's."""

    def numpy(self) -> Any:
        return f32(*X)


class Detachable:
    """Something else: it has no array to give."""

    def detach(self) -> None: ...


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": f32(1, 5, 6, 8)}, r"x has shape \(1, 5, 6, 8\); this kernel takes \(1, 5, 6, 9\)"),
        ({"x": f32(5, 6, 9)}, r"x has shape \(5, 6, 9\)"),
        ({"x": f32(2, 5, 6, 9)}, r"x has shape \(2, 5, 6, 9\)"),
        ({"x": f32(1, 5, 6, 0)}, r"x has shape \(1, 5, 6, 0\)"),
        ({"x": f32(0, 5, 6, 9)}, r"x has shape \(0, 5, 6, 9\)"),
        ({"x": np.zeros(X)}, "x has dtype float64; this kernel takes float32: x.astype"),
        ({"x": np.zeros(X, np.float16)}, "x has dtype float16"),
        ({"x": np.zeros(X, np.int32)}, "x has dtype int32"),
        ({"x": np.zeros(X, ">f4")}, "x has dtype >f4"),
        ({"x": np.zeros(X, np.complex64)}, "x has dtype complex64"),
        ({"x": np.zeros(X, object)}, "x has dtype object"),
        ({"x": f32(*X).tolist()}, r"x is a list; give a NumPy array of shape \(1, 5, 6, 9\), float32"),
        ({"x": Tensor()}, r"x is a Tensor; give .* float32: x\.detach\(\)\.numpy\(\)$"),
        ({"x": Eager()}, r"x is a Eager; give .* float32: x\.numpy\(\)$"),
        ({"x": Detachable()}, "x is a Detachable; give .* float32$"),
        ({"weight": Tensor()}, r"weight is a Tensor; give .* float32: weight\.detach\(\)\.numpy\(\)$"),
        ({"bias": Tensor()}, r"bias is a Tensor; give .* float32: bias\.detach\(\)\.numpy\(\)$"),
        ({"x": None}, "x is a NoneType"),
        ({"x": np.ma.masked_array(f32(*X))}, "x is a MaskedArray; give a NumPy array"),
        ({"x": 1.0}, "x is a float"),
        ({"weight": f32(7, 5, 3)}, r"weight has shape \(7, 5, 3\); this kernel takes \(7, 5, 3, 3\)"),
        ({"weight": f32(5, 7, 3, 3)}, r"weight has shape \(5, 7, 3, 3\)"),
        ({"weight": np.zeros((7, 5, 3, 3))}, "weight has dtype float64"),
        ({"weight": None}, "weight is a NoneType"),
        ({"bias": None}, r"bias is missing; the layer has bias=True: give shape \(7,\)"),
        ({"bias": f32(5)}, r"bias has shape \(5,\)"),
        ({"bias": np.zeros(7)}, "bias has dtype float64"),
        ({"bias": [0.0] * 7}, "bias is a list"),
        ({"residual": None}, r"residual is missing; the layer has residual=True: give \(1, 7, 6, 9\)"),
        ({"residual": f32(1, 7, 6, 8)}, r"residual has shape \(1, 7, 6, 8\)"),
        ({"residual": np.zeros(Y)}, "residual has dtype float64"),
        ({"out": f32(1, 7, 6, 8)}, r"out has shape \(1, 7, 6, 8\) and dtype float32; this kernel writes"),
        ({"out": np.zeros(Y)}, "out has shape .* and dtype float64"),
        ({"out": f32(*Y).tolist()}, "out is a list"),
        ({"out": np.ma.masked_array(f32(*Y))}, "out is a MaskedArray"),
        ({"out": f32(1, 7, 6, 18)[..., ::2]}, "out must be C-contiguous"),
        ({"out": f32(9, 6, 7, 1).T}, "out must be C-contiguous"),
        ({"out": read_only(*Y)}, "out must be C-contiguous, aligned and writeable"),
        ({"out": misaligned(f32(*Y))}, "out must be C-contiguous, aligned"),
    ],
)  # fmt: skip
def test_bad_arrays_are_named(changes: dict[str, Any], message: str) -> None:
    x, weight, bias, residual = integers(LAYER)
    given = {"x": x, "weight": weight, "bias": bias, "residual": residual, "out": f32(*Y), **changes}
    with pytest.raises(ArrayError, match=message):
        cs.compile(LAYER, threads=1)(**given)


def test_what_the_layer_has_not_is_refused() -> None:
    kernel = cs.compile(PLAIN, threads=1)
    x, weight, _, _ = integers(PLAIN)
    with pytest.raises(ArrayError, match="bias is given but the layer has bias=False"):
        kernel(x, weight, f32(7))
    with pytest.raises(ArrayError, match="residual is given but the layer has residual=False"):
        kernel(x, weight, residual=f32(*Y))


@pytest.mark.parametrize(("layout", "shape"), [("nhwc", (1, 6, 9, 5)), ("nchw16c", (1, 1, 6, 9, 16))])
def test_shapes_are_those_of_the_layout(layout: Any, shape: tuple[int, ...]) -> None:
    kernel = cs.compile(PLAIN, layout=layout, threads=1)
    assert kernel(f32(*shape), integers(PLAIN)[1]).shape == kernel.y_shape
    with pytest.raises(ArrayError, match="x has shape"):
        kernel(f32(*X), integers(PLAIN)[1])


@pytest.mark.parametrize("shift", [0, 1, 200])
def test_out_over_an_input_is_refused(shift: int) -> None:
    square = Conv2d(4, 4, 3, padding=1, input_size=8, residual=True)
    conv = cs.compile(square, threads=1).bind(*integers(square)[1:3])
    memory, elements = f32(3 * 256), 256
    first = memory[:elements].reshape(square.input_shape)
    second = memory[shift:shift + elements].reshape(square.input_shape)
    apart = memory[-elements:].reshape(square.input_shape)
    with pytest.raises(ArrayError, match="out overlaps x; give it memory of its own"):
        conv(first, out=second, residual=apart)
    if shift:
        with pytest.raises(ArrayError, match="out overlaps residual"):
            conv(apart, out=second, residual=first)


# Good arrays

@pytest.mark.parametrize("layout", ["nchw", "nhwc", "nchw16c"])
@pytest.mark.parametrize("order", ["strided", "reversed", "fortran", "misaligned"])
def test_any_memory_order_of_inputs_is_right(order: str, layout: Any) -> None:
    data = integers(LAYER)

    def moved(array: Any) -> Any:
        match order:
            case "strided":
                return np.repeat(array, 2, axis=-1)[..., ::2]
            case "reversed":
                return np.ascontiguousarray(array[..., ::-1])[..., ::-1]
            case "fortran":
                return np.asfortranarray(array)
        return misaligned(array)

    x, weight, bias, residual = data
    kernel = cs.compile(LAYER, layout=layout, threads=1)
    laid_x, laid_residual = (moved(to_layout(a, layout)) for a in (x, residual))
    y = kernel(laid_x, moved(weight), moved(bias), residual=laid_residual)
    np.testing.assert_array_equal(from_layout(y, Y, layout), convolve(LAYER, *data))


def test_broadcast_inputs_are_right() -> None:
    data = [np.broadcast_to(array[..., :1], array.shape) for array in integers(LAYER)]
    x, weight, bias, residual = data
    y = cs.compile(LAYER, threads=1)(x, weight, bias, residual=residual)
    np.testing.assert_array_equal(y, convolve(LAYER, *data))


def test_inputs_are_left_as_they_are() -> None:
    data = integers(LAYER)
    before = [array.copy() for array in data]
    for array in data:
        array.flags.writeable = False
    x, weight, bias, residual = data
    cs.compile(LAYER, threads=1)(x, weight, bias, residual=residual)
    for array, old in zip(data, before, strict=True):
        np.testing.assert_array_equal(array, old)


def test_bound_weights_are_copies() -> None:
    x, weight, _, _ = integers(PLAIN)
    expected = convolve(PLAIN, x, weight)
    for schedule in (None, cs.Schedule()):
        conv = cs.compile(PLAIN, schedule=schedule, threads=1).bind(own := weight.copy())
        own[...] = np.nan
        np.testing.assert_array_equal(conv(x), expected)


SCHEDULES = [
    None, "", "split f 4 -> f0 f1 tail=mask; parallel f0",
    "split f 4 -> f0 f1 tail=mask; reorder f0 c r s f1; attach init at f0; attach epilogue at f0; "
    "stage t at f0 registers; parallel f0; unroll f1",
]  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_out_may_be_the_residual(schedule: str | None, threads: int) -> None:
    x, weight, bias, residual = data = integers(LAYER)
    expected = convolve(LAYER, *data)
    conv = cs.compile(LAYER, schedule=schedule, threads=threads).bind(weight, bias)
    assert conv(x, out=residual, residual=residual) is residual
    np.testing.assert_array_equal(residual, expected)


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "nchw16c"])
@pytest.mark.parametrize("name", [*LAYERS, "residual"])
def test_two_threads_give_what_one_gives(name: str, layout: Any) -> None:
    problem = LAYER if name == "residual" else LAYERS[name]
    x, weight, bias, residual = integers(problem)
    laid = to_layout(x, layout)
    laid_residual = None if residual is None else to_layout(residual, layout)
    expected = convolve(problem, x, weight, bias, residual)
    for threads in (1, 2, 3):
        conv = cs.compile(problem, algorithm="direct", layout=layout, threads=threads).bind(weight, bias)
        for _ in range(3):
            y = conv(laid, residual=laid_residual)
            np.testing.assert_array_equal(from_layout(y, problem.output_shape, layout), expected)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["dense", "pointwise", "depthwise", "stride2"])
def test_one_bound_kernel_may_be_called_by_several_threads_at_once(name: str, threads: int) -> None:
    problem = LAYERS[name]
    _, weight, bias, _ = integers(problem)
    conv = cs.compile(problem, algorithm="direct", threads=threads).bind(weight, bias)
    inputs = [integers(problem, seed)[0] for seed in range(4)]
    expected = [convolve(problem, x, weight, bias) for x in inputs]
    wrong: list[int] = []
    together = threading.Barrier(len(inputs))

    def work(i: int) -> None:
        together.wait()
        for _ in range(100):
            if not np.array_equal(conv(inputs[i]), expected[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "nchw16c"])
def test_relu_keeps_nan_and_infinity(layout: Any) -> None:
    problem = Conv2d(3, 4, 1, bias=False, input_size=(1, 4), activation="relu")
    x = np.ones(problem.input_shape, np.float32)
    x[0, 0, 0] = [np.nan, np.inf, -np.inf, 5]
    kernel = cs.compile(problem, algorithm="direct", layout=layout, threads=1)
    laid = kernel(to_layout(x, layout), np.ones(problem.weight_shape, np.float32))
    y = from_layout(laid, problem.output_shape, layout)
    np.testing.assert_array_equal(y, np.broadcast_to(np.array([np.nan, np.inf, 0, 7], np.float32), y.shape))


@pytest.mark.parametrize("schedule", [None, ""])
@pytest.mark.parametrize("name", LAYERS)
def test_denormal_weights_are_flushed_when_bound(name: str, schedule: str | None) -> None:
    problem = LAYERS[name]
    tiny = np.finfo(np.float32).tiny
    rng = np.random.default_rng(0)
    numbers = [tiny / 2, -tiny / 4, np.finfo(np.float32).smallest_subnormal, tiny, -tiny, 1.0, 0.0]
    shapes = (problem.weight_shape, problem.bias_shape)
    weight, bias = (rng.choice(np.array(numbers, np.float32), shape) for shape in shapes)
    before = weight.copy()
    conv = cs.compile(problem, algorithm="direct", schedule=schedule, threads=1).bind(weight, bias)
    for packed in conv.weights.values():
        assert not ((packed != 0) & (np.abs(packed) < tiny)).any()
        assert (np.abs(packed) == tiny).any()
        assert packed.ctypes.data % 64 == 0
    np.testing.assert_array_equal(weight, before)
    ones = np.ones(problem.input_shape, np.float32)
    flushed = [np.where(np.abs(a) < tiny, 0, a) for a in (weight, bias)]
    np.testing.assert_array_equal(conv(ones), convolve(problem, ones, *flushed).astype(np.float32))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_a_warm_call_with_out_allocates_nothing_big(name: str, threads: int) -> None:
    problem = LAYERS[name]
    x, weight, bias, _ = integers(problem)
    conv = cs.compile(problem, algorithm="direct", threads=threads).bind(weight, bias)
    out = np.empty(problem.output_shape, np.float32)
    for _ in range(3):
        conv(x, out=out)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(20):
            conv(x, out=out)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - before < 64 * 1024
    assert after - before < 16 * 1024


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "nchw16c"])
def test_a_warm_call_with_out_allocates_no_arrays(layout: Any) -> None:
    """On one thread: 200 calls keep nothing each, and no call needs more than its few Python objects."""
    problem = LAYERS["dense"]
    x, weight, bias, _ = integers(problem)
    laid = to_layout(x, layout)
    conv = cs.compile(problem, algorithm="direct", layout=layout, threads=1).bind(weight, bias)
    out = conv(laid)
    tracemalloc.start()
    try:
        conv(laid, out=out)
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        for _ in range(200):
            conv(laid, out=out)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 4096  # 20 bytes a call
    assert peak - before < 8192  # the output alone has 31200
