"""Bound kernels called from a user's own ``@numba.njit`` functions."""

import copy
import gc
import pickle
import tracemalloc
import weakref
from collections.abc import Iterator
from typing import Any

import numba
import numpy as np
import pytest

import convsched as cs
from convsched.problem import Conv2d, Linear, Problem
from convsched.problem.layout import from_layout, to_layout
from convsched.problem.reference import convolve

LAYERS: list[Problem] = [
    Conv2d(5, 20, 3, padding=1, input_size=(6, 9), activation="relu", batch_size=2),
    Conv2d(33, 16, 1, input_size=7, bias=False),
    Conv2d(8, 8, 3, stride=2, padding=1, groups=8, input_size=12),
    Linear(30, 12, batch_size=3),
]


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVSCHED_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def integers(problem: Problem) -> list[Any]:
    rng = np.random.default_rng(0)
    shapes = (problem.input_shape, problem.weight_shape, problem.bias_shape if problem.bias else None)
    return [None if s is None else rng.integers(-3, 4, s).astype(np.float32) for s in shapes]


call = cs.call


@numba.njit
def twice(native: Any, x: Any, out: Any) -> float:
    """The kernel on x, then on 2 x: a user's loop around a kernel."""
    total = 0.0
    for factor in range(1, 3):
        call(native, x * np.float32(factor), out)
        total += out.sum()
    return total


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.text)
def test_kernels_run_inside_compiled_functions(layer: Problem, threads: int) -> None:
    x, weight, bias = integers(layer)
    conv = cs.compile(layer, threads=threads).bind(weight, bias)
    out = np.full(layer.output_shape, np.nan, np.float32)
    total = twice(conv.native, x, out)
    expected = [convolve(layer, factor * x, weight, bias) for factor in (1, 2)]
    np.testing.assert_array_equal(out, expected[1])
    assert total == expected[0].sum() + expected[1].sum()


@pytest.mark.parametrize("schedule", ["", "parallel m"])
def test_stages_with_local_tensors_run_too(schedule: str) -> None:
    x, weight, bias = integers(LAYERS[0])
    conv = cs.compile(LAYERS[0], schedule=schedule, threads=1).bind(weight, bias)
    out = np.empty(LAYERS[0].output_shape, np.float32)
    cs.call(conv.native, x, out)
    np.testing.assert_array_equal(out, convolve(LAYERS[0], x, weight, bias))


def test_blocked_outputs_have_zero_tails() -> None:
    x, weight, bias = integers(LAYERS[0])
    conv = cs.compile(LAYERS[0], layout="nchw16c", threads=1).bind(weight, bias)
    out = np.full(conv.native.y_shape, 7, np.float32)
    cs.call(conv.native, to_layout(x, "nchw16c"), out)
    expected = convolve(LAYERS[0], x, weight, bias)
    np.testing.assert_array_equal(from_layout(out, LAYERS[0].output_shape, "nchw16c"), expected)
    assert not out[:, -1, :, :, LAYERS[0].M % 16:].any()


def test_the_python_call_and_the_native_call_do_not_disturb_each_other() -> None:
    x, weight, bias = integers(LAYERS[0])
    conv = cs.compile(LAYERS[0], threads=1).bind(weight, bias)
    expected = convolve(LAYERS[0], x, weight, bias)
    native, out = conv.native, np.empty(LAYERS[0].output_shape, np.float32)
    assert conv.native.table is not native.table  # a workspace each
    for _ in range(3):
        np.testing.assert_array_equal(conv(x), expected)
        out[...] = np.nan
        cs.call(native, x, out)
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(
    ("x_shape", "y_shape"),
    [((2, 5, 6, 8), (2, 20, 6, 9)), ((2, 5, 6, 9), (2, 20, 9, 6)), ((1, 5, 6, 9), (2, 20, 6, 9)),
     ((5, 6, 9), (2, 20, 6, 9)), ((2, 5, 6, 9), (2160,)), ((2, 5, 6, 0), (2, 20, 6, 9))],
)  # fmt: skip
def test_wrong_shapes_are_refused(x_shape: tuple[int, ...], y_shape: tuple[int, ...]) -> None:
    _, weight, bias = integers(LAYERS[0])
    conv = cs.compile(LAYERS[0], threads=1).bind(weight, bias)
    with pytest.raises(ValueError, match="x or out does not have the kernel's shape"):
        cs.call(conv.native, np.zeros(x_shape, np.float32), np.zeros(y_shape, np.float32))


@pytest.mark.parametrize(
    "bad", ["float64 x", "float64 out", "strided x", "strided out", "int x", "fortran x"])
def test_wrong_dtypes_and_orders_are_refused(bad: str) -> None:
    x, weight, bias = integers(LAYERS[0])
    conv = cs.compile(LAYERS[0], threads=1).bind(weight, bias)
    out = np.zeros(LAYERS[0].output_shape, np.float32)
    match bad:
        case "float64 x":
            x = x.astype(np.float64)
        case "float64 out":
            out = out.astype(np.float64)
        case "strided x":
            x = np.repeat(x, 2, axis=-1)[..., ::2]
        case "strided out":
            out = np.repeat(out, 2, axis=-1)[..., ::2]
        case "fortran x":
            x = np.asfortranarray(x)
        case _:
            x = x.astype(np.int32)
    with pytest.raises(ValueError, match="C-contiguous float32"):
        cs.call(conv.native, x, out)


def test_misaligned_arrays_are_refused() -> None:
    x, weight, bias = integers(LAYERS[0])
    native = cs.compile(LAYERS[0], threads=1).bind(weight, bias).native
    out = np.zeros(LAYERS[0].output_shape, np.float32)
    moved_x, moved_out = (np.zeros(a.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(a.shape) for a in (x, out))
    for arrays in ((moved_x, out), (x, moved_out)):
        with pytest.raises(ValueError, match="aligned to 4 bytes"):
            cs.call(native, *arrays)


def test_slices_that_are_contiguous_are_taken() -> None:
    layer = LAYERS[1]
    x, weight, bias = integers(layer)
    conv = cs.compile(layer, threads=1).bind(weight, bias)

    @numba.njit
    def each(native: Any, batch: Any, out: Any) -> None:
        for i in range(len(batch)):
            call(native, batch[i:i + 1], out[i:i + 1])

    batch = np.concatenate([x, 2 * x])
    out = np.empty((2, *layer.output_shape[1:]), np.float32)
    each(conv.native, batch, out)
    np.testing.assert_array_equal(out, [f * convolve(layer, x, weight)[0] for f in (1, 2)])


def test_layers_with_a_residual_refuse() -> None:
    layer = Conv2d(5, 7, 3, padding=1, input_size=(6, 9), residual=True)
    _, weight, bias = integers(layer)
    conv = cs.compile(layer, threads=1).bind(weight, bias)
    x, out = (np.zeros(shape, np.float32) for shape in (layer.input_shape, layer.output_shape))
    with pytest.raises(ValueError, match=r"the layer has a residual, .* call the bound kernel from Python"):
        cs.call(conv.native, x, out)


def test_out_may_not_overlap_x() -> None:
    layer = cs.Conv2d(4, 4, 3, padding=1, input_size=5)
    x, weight, bias = integers(layer)
    native = cs.compile(layer, threads=1).bind(weight, bias).native
    with pytest.raises(ValueError, match="overlaps"):
        cs.call(native, x, x)


def test_a_read_only_out_is_refused_and_stays_as_it_is() -> None:
    layer = LAYERS[1]
    x, weight, bias = integers(layer)
    native = cs.compile(layer, threads=1).bind(weight, bias).native
    out = np.full(layer.output_shape, 7, np.float32)
    for array in (x, out):
        array.flags.writeable = False
    with pytest.raises(numba.TypingError, match="out is read-only"):
        cs.call(native, x, out)
    with pytest.raises(numba.TypingError, match="out is read-only"):
        twice(native, x, out)
    assert (out == 7).all()
    written = np.empty(layer.output_shape, np.float32)
    cs.call(native, x, written)  # a read-only x is as good as any
    np.testing.assert_array_equal(written, convolve(layer, x, weight))


def test_a_native_keeps_code_and_weights_alive() -> None:
    """Each of many outlives its kernel and weights, whose memory would else be used again by the next ones."""
    layer = LAYERS[0]
    x, weight, bias = integers(layer)
    natives = []
    for factor in range(1, 6):
        natives.append(cs.compile(layer, threads=1).bind(factor * weight, bias).native)
        gc.collect()
    out = np.empty(layer.output_shape, np.float32)
    for factor, native in enumerate(natives, 1):
        total = twice(native, x, out)
        once, both = (convolve(layer, times * x, factor * weight, bias) for times in (1, 2))
        np.testing.assert_array_equal(out, both)
        assert total == once.sum() + both.sum()


def test_a_dropped_native_gives_its_weights_back() -> None:
    _, weight, bias = integers(LAYERS[0])
    conv = cs.compile(LAYERS[0], threads=1).bind(weight, bias)
    packed = weakref.ref(next(iter(conv.weights.values())))
    native = conv.native
    del conv
    gc.collect()
    assert packed() is not None
    del native
    gc.collect()
    assert packed() is None


def test_a_native_is_made_for_one_thread_whatever_the_kernel_runs_on() -> None:
    _, weight, bias = integers(LAYERS[0])
    one, many = (cs.compile(LAYERS[0], schedule="", threads=threads).bind(weight, bias) for threads in (1, 64))
    tracemalloc.start()
    try:
        sizes = []
        for conv in (one, many):
            before, _ = tracemalloc.get_traced_memory()
            native = conv.native
            sizes.append(tracemalloc.get_traced_memory()[0] - before)
            del native
    finally:
        tracemalloc.stop()
    assert sizes[1] < 2 * sizes[0]


def test_a_native_cannot_be_copied_or_pickled() -> None:
    _, weight, bias = integers(LAYERS[0])
    native = cs.compile(LAYERS[0], threads=1).bind(weight, bias).native
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="copy or pickle the bound kernel, and take the copy's native"):
            duplicate(native)
