"""Bare programs as kernels: bound by the names of their weights, called by the names of their inputs."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import convsched as cs
from convsched.errors import ArrayError, LoweringError, ScheduleError, VerifyError
from convsched.ir import Const, Load, Op, Program, Reduce, Stage, Store, storage_of
from convsched.ir.examples import at, filtered, nest, product, scaled, tensor
from convsched.ir.interp import interpret
from convsched.kernels.run.program import ProgramKernel
from convsched.options import Backend
from convsched.plan.families import named
from convsched.problem.layout import from_layout, to_layout

M, C = 12, 7
BACKENDS: tuple[Backend, ...] = ("llvm", "numba")


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVSCHED_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def times(one: Load, other: Load) -> Op:
    return Op("mul", (one, other))


def twins() -> Program:
    """Two inputs, two weights, two outputs: y[m] = relu(sum_c w[m, c] x[c] + b[m]) and q[m, c] = z[m] x[c]."""
    x, z, t = Load("x", at("c")), Load("z", at("m")), Load("t", at("m"))
    stages = (
        Stage("init", nest({"m": M}, Store("t", at("m"), Load("b", at("m"))))),
        Stage("conv", nest({"m": M, "c": C}, Reduce("t", at("m"), times(Load("w", at("m", "c")), x)))),
        Stage("epilogue", nest({"m": M}, Store("y", at("m"), Op("max", (Const(0.0), t))))),
        Stage("outer", nest({"m": M, "c": C}, Store("q", at("m", "c"), times(z, x)))))
    tensors = (tensor("x", "c", (C,), "input"), tensor("z", "m", (M,), "input"), tensor("w", "mc", (M, C), "weight"),
               tensor("b", "m", (M,), "weight"), tensor("y", "m", (M,), "output"),
               tensor("q", "mc", (M, C), "output"), tensor("t", "m", (M,), "local"))
    return Program("twins", tensors, stages)


SHAPES = {"x": (C,), "z": (M,), "w": (M, C), "b": (M,)}
SCHEDULE = "split conv.m 4 -> m0 m1; layout w m0 c m1; reorder m0 c m1; vectorize m1"


def integers(*names: str) -> dict[str, Any]:
    """Small integers, the same for the same name: every sum is exact."""
    return {name: np.random.default_rng(ord(name)).integers(-3, 4, SHAPES[name]).astype(np.float32) for name in names}


def expected() -> dict[str, Any]:
    a = integers(*SHAPES)
    return {"y": np.maximum(0, a["w"] @ a["x"] + a["b"]), "q": np.outer(a["z"], a["x"])}


def check(found: Any) -> None:
    assert isinstance(found, dict)
    assert list(found) == ["y", "q"]
    for name, array in expected().items():
        np.testing.assert_array_equal(found[name], array)


def f32(*shape: int) -> Any:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("schedule", [None, "", "unroll c", "parallel m"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_inputs_and_two_outputs_by_name(backend: Backend, schedule: str | None, threads: int) -> None:
    program = twins() if schedule in (None, "") else replace(twins(), stages=twins().stages[3:], tensors=tuple(
        one for one in twins().tensors if one.name in "xzq"))
    kernel = cs.compile(program, schedule=schedule, threads=threads, backend=backend)
    if schedule not in (None, ""):
        np.testing.assert_array_equal(kernel(**integers("x", "z")), expected()["q"])
        return
    bound = kernel.bind(**integers("b", "w"))
    for _ in range(2):
        check(bound(**integers("z", "x")))
    check(kernel(**integers("w", "x", "b", "z")))
    out = {"q": f32(M, C), "y": f32(M)}
    found = bound(**integers("x", "z"), out=out)
    assert isinstance(found, dict)
    assert all(found[name] is out[name] for name in out)
    check(found)


def test_the_interface_is_known_by_name_and_shape() -> None:
    interface = cs.compile(twins(), threads=1).code.interface
    assert interface.inputs == {"x": (C,), "z": (M,)}
    assert interface.weights == {"w": (M, C), "b": (M,)}
    assert interface.outputs == {"y": (M,), "q": (M, C)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("program", [product(6, 5), scaled(3, 4, 5), filtered(9, 3), filtered(9, 3, pad=1)], ids=str)
def test_one_output_gives_an_array(program: Program, backend: Backend) -> None:
    kernel = cs.compile(program, threads=1, backend=backend)
    rng = np.random.default_rng(0)
    given = {name: rng.integers(-3, 4, program.tensor(name).shape).astype(np.float32) for name in "xw"}
    y = interpret(program, given)["y"]
    np.testing.assert_array_equal(kernel(**given), y)
    out = np.full(y.shape, 7, np.float32)
    bound = kernel.bind(w=given["w"])
    assert bound(x=given["x"], out=out) is out
    np.testing.assert_array_equal(out, y)
    out.fill(-7)
    bound(x=given["x"], out={"y": out})
    np.testing.assert_array_equal(out, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_schedule_packs_weights_by_name(backend: Backend) -> None:
    kernel = cs.compile(product(8, 6), schedule="split m 4 -> m0 m1; layout w m0 c m1; reorder m0 c m1; vectorize m1",
                        threads=1, backend=backend)
    assert kernel.code.interface.bindings
    rng = np.random.default_rng(0)
    w, x = (rng.integers(-3, 4, shape).astype(np.float32) for shape in ((8, 6), (6,)))
    np.testing.assert_array_equal(kernel.bind(w=w)(x=x), w @ x)


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "nchw16c"])
def test_arrays_are_as_tensors_are_stored(layout: Any) -> None:
    layer = cs.Conv2d(5, 18, 3, padding=1, input_size=(6, 7))
    kernel = cs.compile(named("direct", layer).lower(layout), threads=1)
    rng = np.random.default_rng(0)
    x, w, b = (rng.integers(-3, 4, s).astype(np.float32)
               for s in (layer.input_shape, layer.weight_shape, layer.bias_shape))
    out = np.full(kernel.code.interface.outputs["y"], np.nan, np.float32)
    y = kernel(x=to_layout(x, layout), w=w, b=b, out=out)
    assert isinstance(y, np.ndarray)
    reference = cs.compile(layer, threads=1, layout=layout)
    np.testing.assert_array_equal(y, reference(to_layout(x, layout), w, b))
    assert from_layout(y, layer.output_shape, layout).shape == layer.output_shape


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"x": f32(C + 1)}, rf"x has shape \({C + 1},\); this kernel takes \({C},\)"),
    ({"z": f32(M, 1)}, rf"z has shape \({M}, 1\)"),
    ({"x": np.zeros(C)}, "x has dtype float64; this kernel takes float32: x.astype"),
    ({"z": [0.0] * M}, "z is a list; give a NumPy array"),
    ({"r": f32(3)}, "r is not the name of an input; this kernel has the inputs x, z"),
    ({"out": f32(M)}, "out is a ndarray; this kernel has the outputs y, q: give a dict of arrays by their names"),
    ({"out": {"y": f32(M)}}, "out: q is missing; this kernel has the outputs y, q"),
    ({"out": {}}, "out: y, q are missing"),
    ({"out": {"y": f32(M), "q": f32(M, C), "t": f32(M)}}, "out: t is not the name of an output"),
    ({"out": {"y": f32(M), "q": f32(C, M)}}, rf"q has shape \({C}, {M}\) and dtype float32; this kernel writes"),
    ({"out": {"y": np.zeros(M), "q": f32(M, C)}}, "y has shape .* and dtype float64"),
    ({"out": {"y": f32(2 * M)[::2], "q": f32(M, C)}}, "y must be C-contiguous, aligned and writeable"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_wrong_arrays_of_a_call_are_named(changes: dict[str, Any], message: str) -> None:
    bound = cs.compile(twins(), threads=1).bind(**integers("w", "b"))
    with pytest.raises(ArrayError, match=message):
        bound(**{**integers("x", "z"), **changes})


@pytest.mark.parametrize(("weights", "message"), [
    ({"w": f32(M, C)}, "b is missing; this kernel has the weights w, b"),
    ({}, "w, b are missing; this kernel has the weights w, b"),
    ({"w": f32(M, C), "b": f32(M), "x": f32(C)}, "x is not the name of a weight; this kernel has the weights w, b"),
    ({"w": f32(C, M), "b": f32(M)}, rf"w has shape \({C}, {M}\); this kernel takes \({M}, {C}\)"),
    ({"w": f32(M, C), "b": np.zeros(M)}, "b has dtype float64"),
])
def test_wrong_weights_are_named(weights: dict[str, Any], message: str) -> None:
    with pytest.raises(ArrayError, match=message):
        cs.compile(twins(), threads=1).bind(**weights)


def test_missing_inputs_are_named() -> None:
    kernel = cs.compile(twins(), threads=1)
    bound = kernel.bind(**integers("w", "b"))
    with pytest.raises(ArrayError, match="z is missing; this kernel has the inputs x, z"):
        bound(**integers("x"))
    with pytest.raises(ArrayError, match="b is missing; this kernel has the weights w, b"):
        kernel(**integers("x", "z", "w"))
    with pytest.raises(ArrayError, match="k is not the name of an input"):
        kernel(**integers(*SHAPES), k=f32(1))
    alone = replace(twins(), stages=twins().stages[3:], tensors=tuple(t for t in twins().tensors if t.name in "xzq"))
    with pytest.raises(ArrayError, match="w is not the name of a weight; this kernel has no weights"):
        cs.compile(alone, threads=1).bind(w=f32(1))


def test_outputs_overlap_neither_inputs_nor_each_other() -> None:
    bound = cs.compile(twins(), threads=1).bind(**integers("w", "b"))
    memory = f32(M * C + M)
    x, z = memory[:C], memory[C:C + M]
    q, y = memory[M:].reshape(M, C), memory[:M]
    with pytest.raises(ArrayError, match="y overlaps x; give it memory of its own"):
        bound(x=x, z=f32(M), out={"y": y, "q": f32(M, C)})
    with pytest.raises(ArrayError, match="q overlaps z; give it memory of its own"):
        bound(x=f32(C), z=z, out={"y": f32(M), "q": q})
    with pytest.raises(ArrayError, match="q overlaps y; give it memory of its own"):
        bound(x=f32(C), z=f32(M), out={"y": memory[M:2 * M], "q": q})
    single, whole = cs.compile(scaled(2, 3, 4), threads=1).bind(w=f32(2)), f32(24)
    with pytest.raises(ArrayError, match="out overlaps x"):
        single(x=whole[:12].reshape(3, 4), out=whole.reshape(2, 3, 4))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))],
                         ids=["copy", "deepcopy", "pickle"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_of_programs_can_be_copied(backend: Backend, duplicate: Callable[[Any], Any]) -> None:
    kernel = cs.compile(twins(), threads=2, backend=backend)
    bound, other = kernel.bind(**integers("w", "b")), duplicate(kernel)
    assert type(other) is ProgramKernel
    assert (other.plan, other.code.interface, type(other.code)) == (kernel.plan, kernel.code.interface,
                                                                   type(kernel.code))
    check(other(**integers(*SHAPES)))
    check(duplicate(bound)(**integers("x", "z")))


def test_a_kernel_from_the_object_cache_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    first = cs.compile(twins(), threads=1)

    def refuse(*_: object) -> None:
        raise AssertionError("compiled in spite of the cache")

    monkeypatch.setattr("convsched.plan.plan.apply", refuse)
    second = cs.compile(twins(), threads=2)
    assert second.code.interface == first.code.interface
    check(second(**integers(*SHAPES)))


def test_calls_from_several_threads_at_once() -> None:
    bound = cs.compile(twins(), threads=1).bind(**integers("w", "b"))
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(bound(**integers("x", "z")))) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(found) == 8
    for one in found:
        check(one)


@pytest.mark.parametrize("options", [{"algorithm": "direct"}, {"layout": "nhwc"}, {"accuracy": "strict"}], ids=str)
def test_what_the_nest_says_cannot_be_asked_for(options: dict[str, Any]) -> None:
    with pytest.raises(LoweringError, match="takes schedule, threads, backend and memory_limit"):
        cs.compile(twins(), **options)


def test_the_memory_limit_of_a_program() -> None:
    kernel = cs.compile(twins(), threads=1)
    assert cs.compile(twins(), threads=1, memory_limit=kernel.workspace_bytes)
    size = kernel.workspace_bytes
    with pytest.raises(LoweringError, match=f"memory_limit=1: twins needs a workspace of {size} bytes"):
        cs.compile(twins(), threads=1, memory_limit=1)


def changed(tensor: str, /, **changes: Any) -> Program:
    """The program with one tensor changed."""
    return replace(twins(), tensors=tuple(replace(t, **changes) if t.name == tensor else t for t in twins().tensors))


def doubled(x: str = "x", t: str = "t", y: str = "y", loop: str = "m") -> Program:
    """y[m] = t[m] + t[m], where t[m] = x[m], with names of its own."""
    index = at(loop)
    stages = (Stage("copy", nest({loop: M}, Store(t, index, Load(x, index)))),
              Stage("add", nest({loop: M}, Store(y, index, Op("add", (Load(t, index), Load(t, index)))))))
    return Program("doubled", (tensor(x, "m", (M,), "input"), tensor(t, "m", (M,), "local"),
                               tensor(y, "m", (M,), "output")), stages)


@pytest.mark.parametrize("names", [
    ("threads", "entry", "thread"), ("v1", "v2", "p3"), ("head1", "m.1", "done1"), ("v1.slot", "v1", "m.2"),
    ("stage_0", "zeros", "tensors"), ("o1", "a1", "np"), ("float", "lambda", "m"),
], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_names_of_tensors_are_apart_from_those_of_the_code(backend: Backend, names: tuple[str, str, str]) -> None:
    x = np.arange(M, dtype=np.float32)
    for order in (names, names[::-1]):
        np.testing.assert_array_equal(cs.compile(doubled(*order), backend=backend)(**{order[0]: x}), 2 * x)


@pytest.mark.parametrize(("program", "message"), [
    (changed("x", storage=storage_of(("c",), (C,), ("c/4", "c%4"), {"c/4": 8})), "input x is stored with gaps"),
    (changed("w", storage=storage_of(("m", "c"), (M, C), ("c", "m"))), "weight w is not stored in the order"),
    (changed("b", name="out"), "a tensor is called 'out'; use a name"),
    (changed("b", name="a b"), "a tensor is called 'a b'; use a name"),
    (replace(twins(), tensors=tuple(t for t in twins().tensors if t.role != "output")), "has no output"),
    (doubled(loop="a b"), "a loop is called 'a b'; use a name"),
    (doubled(loop="0"), "a loop is called '0'; use a name"),
    (doubled(loop=""), "a loop is called ''; use a name"),
    (replace(twins(), stages=tuple(replace(stage, name=f"{stage.name}\n x") for stage in twins().stages)),
     r"a stage is called 'init\\n x'; use a name"),
    (replace(twins(), name='the "twins"'), "use a name of one line, without quotes"),
])
def test_programs_that_have_no_interface_are_refused(program: Program, message: str) -> None:
    with pytest.raises(LoweringError, match=message):
        cs.compile(program, threads=1)


def test_wrong_nests_and_schedules_are_refused() -> None:
    with pytest.raises(ScheduleError, match="nowhere"):
        cs.compile(twins(), schedule="unroll nowhere")
    wrong = replace(twins(), stages=(Stage("wrong", nest({"m": M}, Store("y", at("m"), Load("x", at("m"))))),))
    with pytest.raises(VerifyError, match="load from x: axis c"):
        cs.compile(wrong)
    with pytest.raises(LoweringError, match=r"takes a Conv2d, a Linear or a convsched.ir.Program, not str"):
        cs.compile("a nest")  # type: ignore[call-overload]


def test_texts() -> None:
    kernel = cs.compile(twins(), threads=1)
    for part in ("program    twins", f"inputs     x ({C},), z ({M},)", f"weights    w ({M}, {C}), b ({M},)", "outer:"):
        assert part in kernel.explain()
    assert repr(kernel) == "ProgramKernel('twins', threads=1)"
    assert "define void @stage_" in kernel.llvm
    assert "def run(" in kernel.source
    assert repr(kernel.bind(**integers("w", "b"))) == "BoundProgram(ProgramKernel('twins', threads=1))"
