"""The interpreter against NumPy by hand, against a point-by-point evaluation, and storage conversions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convsched.errors import ArrayError
from convsched.ir import (
    Affine,
    Body,
    Const,
    Index,
    Leaf,
    Let,
    Load,
    Loop,
    Op,
    Program,
    Reduce,
    Role,
    Stage,
    Store,
    Tensor,
    Value,
    interp,
    storage_of,
    substitute,
)
from convsched.ir.interp import evaluate_bind, from_storage, interpret, to_storage

Floats = npt.NDArray[np.float32]


def affine(constant: int = 0, **terms: int) -> Affine:
    return Affine.total(terms.items(), constant)


def variables(names: str) -> Index:
    return tuple(Affine.of(name) for name in names.split())


def nest(leaf: Leaf, **loops: int) -> Body:
    body: Body = (leaf,)
    for var, extent in reversed(loops.items()):
        body = (Loop(var, extent, body),)
    return body


def tensor(name: str, role: Role, letters: str, shape: tuple[int, ...], order: str = "",
           pad: int = 0) -> Tensor:
    names = tuple(letters)
    border = tuple((pad, pad) if letter in "hw" else (0, 0) for letter in letters) if pad else ()
    return Tensor(name, names, shape, role, storage_of(names, shape, tuple(order.split()) or None), border)


def integers(*shape: int) -> Floats:
    return np.random.default_rng(sum(shape)).integers(-4, 5, shape).astype(np.float32)


def convolution(stride: int, pad: int, epilogue: bool = True) -> Program:
    """y = relu(b + x * w) on 2 x 5 x 9 x 8, 3x3, 6 outputs."""
    rows, columns = (9 + 2 * pad - 3) // stride + 1, (8 + 2 * pad - 3) // stride + 1
    outer, point = {"n": 2, "m": 6, "e": rows, "f": columns}, variables("n m e f")
    x = Load("x", (affine(n=1), affine(c=1), affine(-pad, e=stride, r=1), affine(-pad, f=stride, s=1)))
    body = Reduce("t", point, Op("mul", (x, Load("w", variables("m c r s")))))
    result = Op("max", (Const(0.0), Op("add", (Load("t", point), Load("b", variables("m"))))))
    shape = (2, 6, rows, columns)
    return Program("conv", (
        tensor("x", "input", "nchw", (2, 5, 9, 8), pad=pad), tensor("w", "weight", "mcrs", (6, 5, 3, 3)),
        tensor("b", "weight", "m", (6,)), tensor("y", "output", "nchw", shape),
        tensor("t", "local", "nchw", shape)), (
        Stage("init", nest(Store("t", point, Const(0.0)), **outer)),
        Stage("conv", nest(body, **outer, c=5, r=3, s=3)),
        Stage("epilogue", nest(Store("y", point, result), **outer) if epilogue else ())))


def by_einsum(x: Floats, w: Floats, stride: int, pad: int) -> Floats:
    padded = np.pad(x, [(0, 0), (0, 0), (pad, pad), (pad, pad)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))[:, :, ::stride, ::stride]
    return np.asarray(np.einsum("ncefrs,mcrs->nmef", windows, w))


@pytest.mark.parametrize(("stride", "pad"), [(1, 0), (1, 1), (2, 1), (3, 2)])
@pytest.mark.parametrize("grid", [1 << 20, 1000, 9])
def test_convolution_with_border_and_epilogue(
        stride: int, pad: int, grid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interp, "GRID_POINTS", grid)
    arrays = {"x": integers(2, 5, 9, 8), "w": integers(6, 5, 3, 3), "b": integers(6)}
    found = interpret(convolution(stride, pad), arrays, keep=["t", "x"])
    sums = by_einsum(arrays["x"], arrays["w"], stride, pad)
    np.testing.assert_array_equal(found["t"], sums)
    np.testing.assert_array_equal(found["y"], np.maximum(0, sums + arrays["b"][:, None, None]))
    np.testing.assert_array_equal(found["x"], arrays["x"])
    assert found["y"].dtype == np.float32


def test_other_types_and_strided_arguments() -> None:
    x, w = integers(9, 8, 5, 2).transpose(3, 2, 0, 1), integers(6, 5, 3, 3).astype(np.int64)
    found = interpret(convolution(1, 1), {"x": x, "w": w, "b": np.zeros(6)}, np.float64)["y"]
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, np.maximum(0, by_einsum(x, w.astype(np.float32), 1, 1)))


def one(statement: Body, size: int = 6, **inputs: tuple[int, ...]) -> Program:
    tensors = [tensor(name, "input", "abcd"[:len(shape)], shape) for name, shape in inputs.items()]
    return Program("p", (*tensors, tensor("y", "output", "a", (size,))), (Stage("s", statement),))


def test_a_value_that_reads_what_was_stored_before_runs_in_order() -> None:
    step = Store("y", (affine(1, i=1),), Op("add", (Load("y", (affine(i=1),)), Load("x", (affine(i=1),)))))
    x = integers(5)
    np.testing.assert_array_equal(interpret(one(nest(step, i=5), x=(5,)), {"x": x})["y"][1:], np.cumsum(x))


def test_an_element_changed_in_place_many_times() -> None:
    twice = Op("mul", (Const(2.0), Load("y", variables("i"))))
    double = Store("y", variables("i"), Op("add", (twice, Const(1.0))))
    once = interpret(one(nest(double, i=6)), {})["y"]
    thrice = interpret(one(nest(double, k=3, i=6)), {})["y"]
    assert once.tolist() == [1.0] * 6
    assert thrice.tolist() == [7.0] * 6


def test_the_last_store_to_an_element_stays() -> None:
    load = Load("x", variables("i j"))
    x = integers(4, 3)
    for value in (load, Op("neg", (Op("neg", (load,)),))):
        leaf = Store("y", variables("i"), value)
        found = interpret(one(nest(leaf, i=4, j=3), 4, x=(4, 3)), {"x": x})["y"]
        np.testing.assert_array_equal(found, x[:, 2])


def test_points_outside_the_condition_are_not_read_or_written() -> None:
    index, guard = affine(a=4, b=1), (affine(-6, a=4, b=1),)
    x = integers(6)
    for kind in (Store, Reduce):
        leaf = kind("y", (index,), Load("x", (index,)), guard)
        np.testing.assert_array_equal(interpret(one(nest(leaf, a=3, b=4), x=(6,)), {"x": x})["y"], x)
    never = Store("y", (affine(100, a=1),), Load("x", (affine(-50, a=1),)), (affine(a=1),))
    assert not interpret(one(nest(never, a=3), x=(6,)), {"x": x})["y"].any()


def test_operations_and_nan() -> None:
    a, b = Load("x", (affine(),)), Load("x", (affine(1),))
    values: list[Value] = [Op("max", (a, b)), Op("max", (b, a)), Op("min", (a, b)), Op("min", (b, a)),
                           Op("select_positive", (a, Const(1.0), Const(2.0))), Op("exp", (Const(1000.0),))]
    body = tuple(Store("y", (affine(i),), value) for i, value in enumerate(values))
    found = interpret(one(body, x=(2,)), {"x": np.array([np.nan, 3.0])})["y"]
    np.testing.assert_array_equal(found, np.array([3.0, np.nan, 3.0, np.nan, 2.0, np.inf]))


@pytest.mark.parametrize(("arrays", "message"), [
    ({"w": (6, 5, 3, 3), "b": (6,)}, "x: it is missing; give an array of shape"),
    ({"x": (2, 5, 9, 8), "w": (6, 5, 3), "b": (6,)},
     r"w: the shape is \(6, 5, 3\); give an array of shape \(6, 5, 3, 3\)"),
])
def test_wrong_arrays(arrays: Mapping[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ArrayError, match=message):
        interpret(convolution(1, 1), {name: np.zeros(shape) for name, shape in arrays.items()})


# Storage

STORED = [
    tensor("x", "input", "nchw", (2, 5, 3, 4)), tensor("x", "input", "nchw", (2, 5, 3, 4), "n h w c"),
    tensor("x", "input", "nchw", (2, 21, 3, 4), "n c/16 h w c%16"),
    tensor("x", "input", "nchw", (2, 3, 3, 4), "c/16 n w h c%16"),
    Tensor("x", ("c", "h"), (5, 7), "input", storage_of(("c", "h"), (5, 7), ("c", "h"), {"c": 16})),
]


@pytest.mark.parametrize("stored", STORED, ids=lambda t: " ".join(t.order))
def test_storage_is_the_definition_and_converts_back(stored: Tensor) -> None:
    logical = integers(*stored.shape) + 10
    flat = to_storage(stored, logical)
    expected = np.zeros(stored.elements, np.float32)
    for place in itertools.product(*map(range, stored.shape)):
        expected[sum(place[s.axis] // s.step % s.size * s.stride for s in stored.storage)] = logical[place]
    np.testing.assert_array_equal(flat, expected)
    np.testing.assert_array_equal(from_storage(stored, flat), logical)


def test_storage_of_another_size_is_refused() -> None:
    with pytest.raises(ArrayError, match="give an array of shape"):
        to_storage(STORED[0], integers(2, 5, 3, 3))
    with pytest.raises(ArrayError, match="119 elements; give an array of 120"):
        from_storage(STORED[0], integers(119))


# Binding

def packing(m: int, c: int, guard: bool, packed: Tensor | None = None) -> Program:
    """w[m, c] into blocks of 4 outputs and 3 inputs."""
    blocks = -(-m // 4)
    rows, columns = affine(m0=4, m1=1), affine(c0=3, c1=1)
    leaf = Store("w_packed", variables("m0 c0 c1 m1"), Load("w", (rows, columns)),
                 (rows - m, columns - c) if guard else ())
    packed = packed or tensor("w_packed", "local", "abcd", (blocks, -(-c // 3), 3, 4))
    return Program("pack", (tensor("w", "weight", "mc", (m, c)), packed), (
        Stage("pack", nest(leaf, m0=blocks, c0=-(-c // 3), c1=3, m1=4), "bind"),))


def blocks_of(w: Floats) -> Floats:
    m, c = w.shape
    padded = np.pad(w, [(0, -m % 4), (0, -c % 3)])
    return padded.reshape(-(-m // 4), 4, -(-c // 3), 3).transpose(0, 2, 3, 1)


@pytest.mark.parametrize(("m", "c"), [(8, 6), (7, 6), (9, 5), (1, 1), (2, 40)])
def test_packing_is_a_blocked_copy(m: int, c: int) -> None:
    w = integers(m, c)
    program = packing(m, c, guard=bool(m % 4 or c % 3))
    found = evaluate_bind(program, {"w": w})["w_packed"]
    np.testing.assert_array_equal(found, blocks_of(w).ravel())
    assert found.dtype == np.float32


def test_packing_into_padded_strides() -> None:
    letters, shape = tuple("abcd"), (2, 2, 3, 4)
    packed = Tensor("w_packed", letters, shape, "local", storage_of(letters, shape, None, {"b": 16}))
    w = integers(8, 6)
    found = evaluate_bind(packing(8, 6, guard=False, packed=packed), {"w": w})["w_packed"]
    np.testing.assert_array_equal(from_storage(packed, found), blocks_of(w))


def test_packing_without_a_strided_form_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    w = integers(9, 5)
    monkeypatch.setattr(interp, "_strided", lambda *_, widen: None)
    np.testing.assert_array_equal(evaluate_bind(packing(9, 5, guard=True), {"w": w})["w_packed"],
                                  blocks_of(w).ravel())


def test_transforms_are_rounded_once() -> None:
    """(1 + 1e-8) - 1 is 0 in float32; in float64 it is not."""
    big = Store("u", variables("m"), Op("add", (Load("w", variables("m")), Const(1e-8))))
    small = Store("v", variables("m"), Op("sub", (Load("u", variables("m")), Const(1.0))))
    copy = Store("v_packed", (affine(1, m=-1),), Load("v", variables("m")))
    made = [tensor(name, "local", "m", (2,)) for name in ("u", "v", "v_packed")]
    program = Program("p", (tensor("w", "weight", "m", (2,)), *made),
                      tuple(Stage(leaf.tensor, nest(leaf, m=2), "bind") for leaf in (big, small, copy)))
    found = evaluate_bind(program, {"w": np.ones(2, np.float32)})
    np.testing.assert_array_equal(found["v_packed"], np.float32((1.0 + 1e-8) - 1.0))
    assert {a.dtype for a in found.values()} == {np.dtype(np.float32)}


def test_run_stages_do_not_run_when_weights_are_bound() -> None:
    program = Program("p", (tensor("x", "input", "a", (2,)), tensor("y", "output", "a", (2,))),
                      (Stage("s", nest(Store("y", variables("i"), Load("x", variables("i"))), i=2)),))
    assert evaluate_bind(program, {}) == {}


# Random programs, point by point

def point_by_point(program: Program, arrays: Mapping[str, Floats]) -> dict[str, dict[tuple[int, ...], float]]:
    """Every tensor as a dictionary from index to value: the definition."""
    memory: dict[str, dict[tuple[int, ...], float]] = {t.name: {} for t in program.tensors}
    unset = {t.name: math.nan if t.role == "local" else 0.0 for t in program.tensors}
    for name, array in arrays.items():
        memory[name] = {place: float(array[place]) for place in np.ndindex(array.shape)}

    def compute(value: Value, point: Mapping[str, int]) -> float:
        if isinstance(value, Const):
            return value.number
        if isinstance(value, Load):
            return memory[value.tensor].get(tuple(a.evaluate(point) for a in value.index), unset[value.tensor])
        left, right = (compute(v, point) for v in value.values)
        return left + right if value.name == "add" else left * right

    def run(body: Body, point: Mapping[str, int]) -> None:
        for s in body:
            if isinstance(s, Loop):
                for i in range(s.extent):
                    run(s.body, {**point, s.var: i})
            elif isinstance(s, Let):
                run(s.body, {**point, s.var: s.of.evaluate(point) // s.step % s.extent})
            elif all(w.evaluate(point) < 0 for w in s.where):
                place = tuple(a.evaluate(point) for a in s.index)
                old = memory[s.tensor].get(place, unset[s.tensor]) if isinstance(s, Reduce) else 0.0
                memory[s.tensor][place] = old + compute(s.value, point)

    for stage in program.stages:
        run(stage.body, {})
    return memory


_INDEX = st.builds(lambda a, b, c, k: affine(k, a=a, b=b, c=c), *[st.integers(0, 2)] * 3, st.integers(0, 3))
_LOADS = st.builds(Load, st.sampled_from(["x", "y", "t"]), st.tuples(_INDEX))
_VALUES = st.one_of(_LOADS, st.builds(Op, st.sampled_from(["add", "mul"]), st.tuples(_LOADS, _LOADS)))
_CONDITION = st.builds(lambda a, c, k: affine(k, a=a, c=c), *[st.integers(-2, 2)] * 3)
_WHERE = st.lists(_CONDITION, max_size=1).map(tuple)
_LEAVES = st.builds(lambda kind, *rest: kind(*rest), st.sampled_from([Store, Reduce]),
                    st.sampled_from(["y", "t"]), st.tuples(_INDEX), _VALUES, _WHERE)


@given(st.lists(_LEAVES, min_size=1, max_size=3), st.integers(0, 3), st.sampled_from([1 << 20, 8]))
def test_random_nests_equal_a_point_by_point_evaluation(leaves: list[Leaf], depth: int, grid: int) -> None:
    loops = [("a", 2), ("b", 3), ("c", 2)]
    inner: Body = tuple(leaves)
    for var, extent in reversed(loops[depth:]):
        inner = (Loop(var, extent, inner),)
    after = substitute(tuple(leaves), {var: Affine.of(1) for var, _ in loops[depth:]})
    body: Body = (*inner, *after)
    for var, extent in reversed(loops[:depth]):
        body = (Loop(var, extent, body),)
    program = Program("p", (tensor("x", "input", "i", (14,)), tensor("y", "output", "i", (14,)),
                            tensor("t", "local", "i", (14,))), (Stage("s", body),))
    x = integers(14) % 3 - 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interp, "GRID_POINTS", grid)
        found = interpret(program, {"x": x}, np.float64, keep=["t"])
    memory = point_by_point(program, {"x": x})
    for name in ("y", "t"):
        expected = [memory[name].get((i,), math.nan if name == "t" else 0.0) for i in range(14)]
        if max((abs(value) for value in expected if not math.isnan(value)), default=0.0) < 2**50:  # sums are exact
            np.testing.assert_array_equal(found[name], expected)
