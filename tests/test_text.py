"""The printed form of programs."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convsched.ir import (
    Affine,
    Body,
    Const,
    Kind,
    Load,
    Loop,
    Op,
    Program,
    Reduce,
    Stage,
    Store,
    Tensor,
    Value,
    storage_of,
)
from convsched.ir.text import WIDTH, print_nest, print_statement, print_tensor, print_value


def affine(constant: int = 0, **terms: int) -> Affine:
    return Affine.total(terms.items(), constant)


def nest(body: Body, *loops: tuple[str, int, Kind]) -> Body:
    for var, extent, kind in reversed(loops):
        body = (Loop(var, extent, body, kind),)
    return body


def tensor(name: str, letters: str, shape: tuple[int, ...], role: str, order: str = "") -> Tensor:
    names = tuple(letters)
    storage = storage_of(names, shape, tuple(order.split()) or None)
    return Tensor(name, names, shape, role, storage)  # type: ignore[arg-type]


def tiled() -> Program:
    """A 1x1 convolution of 100 output channels with a register tile."""
    x, w = Load("x", (affine(c=1), affine(f=1))), Load("w_packed", (affine(m0=1), affine(c=1), affine(m1=1)))
    m, guard = affine(m0=16, m1=1), (affine(-100, m0=16, m1=1),)
    pack = Store("w_packed", (affine(m0=1), affine(c=1), affine(m1=1)), Load("w", (m, affine(c=1))), guard)
    start = Store("t", (affine(m1=1), affine(f=1)), Const(0.0))
    add = Reduce("t", (affine(m1=1), affine(f=1)), Op("mul", (x, w)))
    result = Op("max", (Const(0.0), Load("t", (affine(m1=1), affine(f=1)))))
    finish = Store("y", (m, affine(f=1)), result, guard)
    tile: tuple[tuple[str, int, Kind], ...] = (("f", 6, "unroll"), ("m1", 16, "vector"))
    body = (*nest((start,), *tile), *nest((add,), ("c", 32, "serial"), *tile), *nest((finish,), *tile))
    tensors = (
        tensor("x", "cw", (32, 6), "input", "c/16 w c%16"), tensor("w", "mc", (100, 32), "weight"),
        tensor("y", "cw", (100, 6), "output"), tensor("w_packed", "mcl", (7, 32, 16), "local"),
        tensor("t", "mf", (16, 6), "register"), tensor("unused", "m", (16,), "local"),
    )
    packing = nest((pack,), ("m0", 7, "serial"), ("c", 32, "serial"), ("m1", 16, "serial"))
    conv = nest(body, ("m0", 7, "parallel"))
    return Program("pointwise", tensors, (Stage("pack w", packing, "bind"), Stage("conv", conv)))


TILED = """\
pointwise
  input x[c < 32, w < 6] stored c/16 w c%16
  weight w[m < 100, c < 32]
  output y[c < 100, w < 6]
  local w_packed[m < 7, c < 32, l < 16]
  register t[m < 16, f < 6]

pack w (bind):
  for m0 < 7: for c < 32: for m1 < 16:
    if 16 m0 + m1 < 100: w_packed[m0, c, m1] = w[16 m0 + m1, c]

conv:
  parallel m0 < 7:
    unroll f < 6: vector m1 < 16:
      t[m1, f] = 0
    for c < 32:
      unroll f < 6: vector m1 < 16:
        t[m1, f] += x[c, f] * w_packed[m0, c, m1]
    unroll f < 6: vector m1 < 16:
      if 16 m0 + m1 < 100: y[16 m0 + m1, f] = max(0, t[m1, f])"""


def test_a_scheduled_program_reads_like_loops() -> None:
    assert print_nest(tiled()) == TILED


def test_the_marked_loop_has_an_arrow_wherever_it_stands() -> None:
    marked = print_nest(tiled(), "c").splitlines()
    assert [line.strip() for line in marked if line.endswith(" <--")] == [
        "for m0 < 7: for c < 32: for m1 < 16: <--", "for c < 32: <--"]
    assert "\n".join(marked).replace(" <--", "") == TILED


def test_neighbouring_loops_of_a_kind_share_a_word() -> None:
    leaf = Store("y", (affine(a=1),), Const(1.5))
    loops: list[tuple[str, int, Kind]] = [
        ("n", 1, "serial"), ("p", 2, "parallel"), ("a", 3, "unroll"), ("b", 4, "unroll"), ("v", 8, "vector")]
    program = Program("p", (tensor("y", "a", (3,), "output"),), (Stage("s", nest((leaf,), *loops)),))
    assert print_nest(program).splitlines()[-3:] == [
        "  for n < 1: parallel p < 2:", "    unroll a < 3, b < 4: vector v < 8:", "      y[a] = 1.5"]


def test_long_lines_break_at_operators() -> None:
    load = Load("x", (affine(7, first=100, second=10, third=1), affine(fourth=12)))
    value: Value = load
    for _ in range(5):
        value = Op("add", (value, Op("mul", (load, Const(0.25)))))
    names = ["first", "second", "third", "fourth", *(f"loop_number_{i}" for i in range(9))]
    loops: list[tuple[str, int, Kind]] = [(name, 2, "serial") for name in names]
    program = Program("p", (), (Stage("s", nest((Store("y", (), value),), *loops)),))
    lines = print_nest(program).splitlines()
    assert len(lines) > 5
    assert all(len(line) <= WIDTH and line.count("[") == line.count("]") for line in lines)


@pytest.mark.parametrize(("where", "text"), [
    ((affine(-100, m0=16, m1=1),), "if 16 m0 + m1 < 100: y = 1"),
    ((affine(3, f=-2),), "if 2 f > 3: y = 1"),
    ((affine(1, a=1, b=-1), affine(-5, b=1)), "if a - b < -1 and b < 5: y = 1"),
])
def test_conditions_have_their_constant_on_the_right(where: tuple[Affine, ...], text: str) -> None:
    assert print_statement(Store("y", (), Const(1.0), where)) == text


def test_a_tensor_shows_border_and_padded_strides() -> None:
    letters, shape = ("c", "h", "w"), (4, 5, 6)
    storage = storage_of(letters, shape, None, {"c": 32})
    x = Tensor("x", letters, shape, "input", storage, ((0, 0), (1, 1), (0, 2)))
    assert print_tensor(x) == "input x[c < 4, h < 5, w < 6] stored c:32 h w, border h 1 1, w 0 2"


def test_all_operations() -> None:
    a, b = Load("a", (affine(i=1),)), Load("b", (affine(-1, e=1, r=1),))
    select = Op("select_positive", (Op("sub", (a, b)), Op("exp", (a,)), Op("neg", (Op("add", (a, b)),))))
    assert print_value(select) == "select(a[i] - b[e + r - 1] > 0, exp(a[i]), -(a[i] + b[e + r - 1]))"
    assert print_value(Op("div", (Const(1.0), Op("min", (a, Const(-0.5)))))) == "1 / min(a[i], -0.5)"


_CONSTANTS = st.integers(-9, 9).map(lambda n: Const(float(n)))


def _grow(values: st.SearchStrategy[Value]) -> st.SearchStrategy[Value]:
    pair = st.tuples(values, values)
    binary = st.builds(Op, st.sampled_from(["add", "sub", "mul", "max", "min"]), pair)
    select = st.builds(Op, st.just("select_positive"), st.tuples(values, values, values))
    return st.one_of(binary, select, st.builds(Op, st.just("neg"), st.tuples(values)))


def _compute(value: Value) -> float:
    if isinstance(value, Const):
        return value.number
    assert isinstance(value, Op)
    meaning: dict[str, Callable[..., float]] = {
        "add": operator.add, "sub": operator.sub, "mul": operator.mul, "max": max, "min": min,
        "neg": operator.neg, "select_positive": lambda a, b, c: b if a > 0 else c}
    return meaning[value.name](*map(_compute, value.values))


@given(st.recursive(_CONSTANTS, _grow, max_leaves=12))
def test_brackets_say_what_the_tree_says(value: Value) -> None:
    """The printed value is a Python expression with the tree's value."""
    text = print_value(value)
    names = {"max": max, "min": min, "select": lambda test, b, c: b if test else c}
    assert eval(re.sub(r"(\d+)", r"\1.0", text), names) == _compute(value)
