"""Numba source of scheduled nests: un-jitted, jitted, interpreted and by NumPy, all the same."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from convsched.ir import (
    Affine,
    Body,
    Const,
    Index,
    Kind,
    Leaf,
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
    storage_of,
)
from convsched.ir.interp import interpret
from convsched.ir.verify import verify
from convsched.kernels.source.printer import load_source, run_source, source

Floats = npt.NDArray[np.float32]
Loops = list[tuple[str, int, Kind]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CONVSCHED_CACHE", str(tmp_path))
    return tmp_path


def affine(constant: int = 0, **terms: int) -> Affine:
    return Affine.total(terms.items(), constant)


def variables(names: str) -> Index:
    return tuple(Affine.of(name) for name in names.split())


def nest(body: Body, loops: Loops) -> Body:
    for var, extent, kind in reversed(loops):
        body = (Loop(var, extent, body, kind),)
    return body


def tensor(name: str, role: Role, letters: str, shape: tuple[int, ...], order: str = "",
           pad: int = 0) -> Tensor:
    names = tuple(letters)
    border = tuple((pad, pad) if letter in "hw" else (0, 0) for letter in letters) if pad else ()
    return Tensor(name, names, shape, role, storage_of(names, shape, tuple(order.split()) or None), border)


def integers(*shape: int) -> Floats:
    return np.random.default_rng(sum(shape)).integers(-4, 5, shape).astype(np.float32)


BLOCKED = "n c/16 h w c%16"


def blocked() -> Program:
    """relu(x * w), 3x3, 20 to 40 channels, 6x7, all blocked: packed weights, a register tile, vectors."""
    m, guard = affine(m0=16, m1=1), (affine(-40, m0=16, m1=1),)  # w has zeros for the maps past the end
    c = affine(c0=4, c1=1)
    packed = (affine(m0=1), c, affine(r=1), affine(s=1), affine(m1=1))
    pack = Store("w_packed", packed, Load("w", (m, c, affine(r=1), affine(s=1))))
    f = affine(f0=4, f1=1)
    within = (affine(-7, f0=4, f1=1),)
    x = Load("x", (affine(), c, affine(-1, e=1, r=1), f - 1 + "s"))
    t = (affine(f1=1), affine(m1=1))
    tile: Loops = [("f1", 4, "unroll"), ("m1", 16, "vector")]
    sums: Loops = [("c0", 5, "serial"), ("r", 3, "serial"), ("s", 3, "serial"), ("c1", 4, "unroll")]
    y = Store("y", (affine(), m, affine(e=1), f), Op("max", (Const(0.0), Load("t", t))), (*guard, *within))
    body = (*nest((Store("t", t, Const(0.0)),), tile),
            *nest((Reduce("t", t, Op("mul", (x, Load("w_packed", packed))), within),), [*sums, *tile]),
            *nest((y,), tile))
    packing: Loops = [("m0", 3, "serial"), ("c0", 5, "serial"), ("c1", 4, "serial"), ("r", 3, "serial"),
                      ("s", 3, "serial"), ("m1", 16, "serial")]
    return Program("blocked", (
        tensor("x", "input", "nchw", (1, 20, 6, 7), BLOCKED, pad=1),
        replace(tensor("w", "weight", "mcrs", (40, 20, 3, 3)), border=((0, 8), (0, 0), (0, 0), (0, 0))),
        tensor("y", "output", "nchw", (1, 40, 6, 7), BLOCKED),
        tensor("w_packed", "local", "mcrsl", (3, 20, 3, 3, 16)), tensor("t", "register", "fm", (4, 16))), (
        Stage("pack", nest((pack,), packing), "bind"),
        Stage("conv", nest(body, [("m0", 3, "parallel"), ("e", 6, "serial"), ("f0", 2, "serial")]))))


def by_einsum(x: Floats, w: Floats) -> Floats:
    padded = np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    return np.asarray(np.einsum("ncefrs,mcrs->nmef", windows, w))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_blocked_register_tiled_convolution(jit: bool, threads: int) -> None:
    program = blocked()
    verify(program)
    arrays = {"x": integers(1, 20, 6, 7), "w": integers(40, 20, 3, 3)}
    expected = np.maximum(0, by_einsum(arrays["x"], arrays["w"]))
    np.testing.assert_array_equal(interpret(program, arrays)["y"], expected)
    np.testing.assert_array_equal(run_source(program, arrays, jit, threads)["y"], expected)


def pointwise(values: Mapping[str, Value], size: int, where: tuple[Affine, ...] = ()) -> Program:
    """Each of some outputs as a value of x[i] and z[i]."""
    names = list(values)
    tensors = [tensor(name, "input", "i", (size,)) for name in ("x", "z")]
    tensors += [tensor(name, "output", "i", (size,)) for name in names]
    body = tuple(Store(name, variables("i"), values[name], where) for name in names)
    return Program("pointwise", tuple(tensors), (Stage("s", nest(body, [("i", size, "serial")])),))


X, Z = Load("x", variables("i")), Load("z", variables("i"))
OPERATIONS: dict[str, Value] = {
    "add": Op("add", (X, Const(0.1))), "sub": Op("sub", (X, Z)), "mul": Op("mul", (X, Op("add", (X, Z)))),
    "div": Op("div", (X, Z)), "max": Op("max", (X, Z)), "min": Op("min", (X, Z)), "neg": Op("neg", (X,)),
    "select": Op("select_positive", (X, Z, Const(-1.5))), "exp": Op("exp", (X,)),
    "sigmoid": Op("div", (Const(1.0), Op("add", (Const(1.0), Op("exp", (Op("neg", (X,)),)))))),
}


def test_operations_are_those_of_the_interpreter() -> None:
    special = np.array([0.0, 1.0, np.nan, 3.0, 80.0, -100.0], np.float32)
    x, z = np.repeat(special, 6), np.tile(special, 6)
    x, z = (np.append(a, np.random.default_rng(i).standard_normal(99).astype(np.float32))
            for i, a in enumerate((x, z)))
    program = pointwise(OPERATIONS, x.size)
    expected = interpret(program, {"x": x, "z": z})
    with np.errstate(all="ignore"):
        plain = run_source(program, {"x": x, "z": z})
    jitted = run_source(program, {"x": x, "z": z}, jit=True)
    for name in OPERATIONS:
        tolerance = 3e-7 if name in ("exp", "sigmoid") else 0.0  # exp in float32, or in float64 and rounded
        np.testing.assert_allclose(plain[name], expected[name], rtol=tolerance, atol=1e-38, err_msg=name)
        np.testing.assert_array_equal(plain[name], jitted[name], err_msg=name)


@pytest.mark.parametrize("jit", [False, True])
def test_exp_overflows_without_a_warning(jit: bool) -> None:
    x = np.array([1000.0, -1000.0, 88.0, np.inf, -np.inf], np.float32)
    program = pointwise({"sigmoid": OPERATIONS["sigmoid"]}, 5)
    found = run_source(program, {"x": x, "z": x}, jit)["sigmoid"]
    np.testing.assert_allclose(found, [1.0, 0.0, 1.0, 1.0, 0.0], atol=1e-38)


def test_infinite_constants() -> None:
    low, high = Op("max", (X, Const(float("-inf")))), Op("min", (Const(float("inf")), X))
    program = pointwise({"y": high, "u": low}, 4)
    x = integers(4)
    for jit in (False, True):
        found = run_source(program, {"x": x, "z": x}, jit)
        assert found["y"].tolist() == found["u"].tolist() == x.tolist()


@pytest.mark.parametrize("jit", [False, True])
def test_a_tile_over_the_edge_of_a_block_divides(jit: bool) -> None:
    shape = (10, 2)
    x = tensor("x", "input", "cw", shape, "c/4 w c%4")
    y = tensor("y", "output", "cw", shape, "c/8 w c%8")
    index = (affine(3, a=1), affine(b=1))
    body = nest((Store("y", index, Load("x", index)),), [("a", 7, "serial"), ("b", 2, "serial")])
    program = Program("p", (x, y), (Stage("s", body),))
    assert "//" in source(program)
    given = integers(*shape)
    found = run_source(program, {"x": given}, jit)["y"]
    np.testing.assert_array_equal(found[3:], given[3:])
    assert not found[:3].any()


def test_names_become_identifiers_that_do_not_collide() -> None:
    leaf: Leaf = Store("y.a", (affine(**{"x.h": 1, "thread": 3}),), Load("x_h", (Affine.of("x.h"),)))
    program = Program("p", (tensor("x_h", "input", "i", (3,)), tensor("y.a", "output", "i", (6,))), (
        Stage("s", nest((leaf,), [("thread", 2, "serial"), ("x.h", 3, "serial")])),))
    x = integers(3)
    assert run_source(program, {"x_h": x})["y.a"].tolist() == [*x, *x]


GOLDEN = '''\
import math

import numpy as np


def run(x, y, w_packed, thread, threads):
    """conv"""
    t = np.empty(4, np.float32)
    # conv
    for m0 in range(2 * thread // threads, 2 * (thread + 1) // threads):
        for m1 in range(4):
            t[m1] = np.float32(0.0)
        for r in range(4):
            for m1 in range(4):
                t[m1] += (x[r - 1] if r >= 1 and r < 3 else np.float32(0.0)) * w_packed[16 * m0 + 4 * r + m1]
        for m1 in range(4):
            if 4 * m0 + m1 < 7:
                y[4 * m0 + m1] = max(t[m1], np.float32(0.0))
'''


def small() -> Program:
    """One output pixel of 7 channels, four taps on 2 pixels with padding 1."""
    m, guard, t = affine(m0=4, m1=1), (affine(-7, m0=4, m1=1),), variables("m1")
    product = Op("mul", (Load("x", (affine(-1, r=1),)), Load("w_packed", variables("m0 r m1"))))
    lanes: Loops = [("m1", 4, "vector")]
    body = (*nest((Store("t", t, Const(0.0)),), lanes),
            *nest((Reduce("t", t, product),), [("r", 4, "serial"), *lanes]),
            *nest((Store("y", (m,), Op("max", (Const(0.0), Load("t", t))), guard),), lanes))
    pack = Store("w_packed", variables("m0 r m1"), Load("w", (m, affine(r=1))), guard)
    packing: Loops = [("m0", 2, "serial"), ("r", 4, "serial"), ("m1", 4, "serial")]
    return Program("conv", (
        tensor("x", "input", "w", (2,), pad=1), tensor("w", "weight", "mr", (7, 4)),
        tensor("y", "output", "m", (7,)), tensor("w_packed", "local", "mrl", (2, 4, 4)),
        tensor("t", "register", "m", (4,))), (
        Stage("pack", nest((pack,), packing), "bind"), Stage("conv", nest(body, [("m0", 2, "parallel")]))))


def test_the_source_is_readable_and_always_the_same() -> None:
    assert source(small()) == GOLDEN
    assert source(replace(small())) == GOLDEN
    arrays = {"x": integers(2), "w": integers(7, 4)}
    expected = np.maximum(0, arrays["w"][:, 1:3] @ arrays["x"])
    np.testing.assert_array_equal(run_source(small(), arrays)["y"], expected)


def test_the_source_lies_in_the_cache_folder_and_in_tracebacks(cache: Path) -> None:
    run = load_source(GOLDEN, jit=False)
    files = list(cache.rglob("*.py"))
    assert [file.read_text() for file in files] == [GOLDEN]
    files[0].write_text("raise SystemExit  # a foreign file is replaced, not run")
    load_source(GOLDEN, jit=False)
    assert files[0].read_text() == GOLDEN
    with pytest.raises(IndexError) as caught:
        run(integers(2), integers(7), integers(1), 0, 1)
    assert "* w_packed[16 * m0" in "".join(traceback.format_exception(caught.value))


def test_without_a_cache_folder_tracebacks_come_from_memory(
        cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "file").touch()
    monkeypatch.setenv("CONVSCHED_CACHE", str(cache / "file" / "inside"))
    run = load_source(GOLDEN, jit=False)
    with pytest.raises(IndexError) as caught:
        run(integers(2), integers(7), integers(1), 0, 1)
    assert "* w_packed[16 * m0" in "".join(traceback.format_exception(caught.value))
    jitted = load_source(GOLDEN, jit=True)
    y = np.zeros(7, np.float32)
    jitted(integers(2), y, np.ones(32, np.float32), 0, 1)
    assert y.tolist() == [max(0.0, float(integers(2).sum()))] * 7
