"""The rules of the IR: one legal program, and one change for every rule that breaks it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convsched.errors import VerifyError
from convsched.ir import (
    Affine,
    Body,
    Const,
    Leaf,
    Let,
    Load,
    Loop,
    Op,
    Program,
    Reduce,
    Stage,
    StorageAxis,
    Store,
    Tensor,
    storage_of,
)
from convsched.ir.bounds import bounds_where
from convsched.ir.verify import verify


def affine(constant: int = 0, **terms: int) -> Affine:
    return Affine.total(terms.items(), constant)


def tensor(name: str, role: str, *shape: int, border: tuple[tuple[int, int], ...] = ()) -> Tensor:
    letters = tuple("abcd"[:len(shape)])
    return Tensor(name, letters, shape, role, storage_of(letters, shape), border)  # type: ignore[arg-type]


TENSORS = (
    tensor("x", "input", 10, border=((1, 1),)), tensor("w", "weight", 3), tensor("w_packed", "local", 3),
    tensor("y", "output", 10), tensor("t", "register", 1), tensor("scratch", "local", 10),
)
PACK = Store("w_packed", (affine(r=1),), Load("w", (affine(r=1),)))
START = Store("t", (affine(),), Const(0.0))
PRODUCT = Op("mul", (Load("x", (affine(-1, e=1, r=1),)), Load("w_packed", (affine(r=1),))))
ADD = Reduce("t", (affine(),), PRODUCT)
FINISH = Store("y", (affine(e=1),), Load("t", (affine(),)))


def program(start: Leaf = START, add: Leaf = ADD, finish: Leaf = FINISH, pack: Leaf = PACK,
            tensors: tuple[Tensor, ...] = TENSORS, run: Body | None = None) -> Program:
    """y[e] = sum_r x[e + r - 1] w[r], with packed weights and a register."""
    body = (Loop("e", 10, (start, Loop("r", 3, (add,)), finish), "parallel"),)
    packing = Stage("pack", (Loop("r", 3, (pack,)),), "bind")
    return Program("p", tensors, (packing, Stage("conv", run or body)))


def rejects(broken: Program, message: str) -> None:
    with pytest.raises(VerifyError) as caught:
        verify(broken)
    assert message in str(caught.value)


def loads_x(constant: int, **terms: int) -> Leaf:
    return replace(ADD, value=Load("x", (affine(constant, **terms),)))


def test_the_program_is_legal() -> None:
    verify(program())


def test_an_error_names_stage_statement_and_rule() -> None:
    rejects(program(finish=replace(FINISH, index=(affine(1, e=1),))),
            "stage conv: y[e + 1] = t[0]: store to y: axis a has the index e + 1 in [1, 10], out of [0, 9]")


@pytest.mark.parametrize(("finish", "message"), [
    (replace(FINISH, tensor="z"), "there is no tensor z"),
    (replace(FINISH, value=Load("z", ())), "there is no tensor z"),
    (replace(FINISH, value=Load("t", ())), "t has 1 axes, not 0"),
    (replace(FINISH, index=(affine(e=1), affine())), "y has 1 axes, not 2"),
    (replace(FINISH, index=(affine(f=1),)), "no loop f is around it"),
    (replace(FINISH, value=Load("t", (affine(r=1),))), "no loop r is around it"),
    (replace(FINISH, where=(affine(-1, q=1),)), "no loop q is around it"),
    (replace(FINISH, value=Op("mul", (Const(1.0),))), "mul takes 2 operands, not 1"),
    (replace(FINISH, value=Op("neg", (Op("root", (Const(1.0),)),))), "root is not an operation; use one of add"),
    (replace(FINISH, index=(affine(-1, e=1),)), "out of [0, 9]"),
    (replace(FINISH, tensor="x"), "it stores to x, which is input"),
    (replace(FINISH, tensor="w", index=(affine(),)), "it stores to w, which is weight"),
    (replace(FINISH, tensor="w_packed", index=(affine(),)), "which a bind stage has stored"),
])
def test_statements_that_break_a_rule(finish: Leaf, message: str) -> None:
    rejects(program(finish=finish), message)


@pytest.mark.parametrize(("add", "index"), [
    (loads_x(-2, e=1), "e - 2 in [-2, 7]"), (loads_x(0, e=1, r=1), "e + r in [0, 11]"),
    (loads_x(2, e=1), "e + 2 in [2, 11]"),
])
def test_loads_stay_within_the_border(add: Leaf, index: str) -> None:
    rejects(program(add=add), f"load from x: axis a has the index {index}, out of [-1, 10]")


def test_a_border_is_not_stored_to() -> None:
    tensors = tuple(replace(t, border=((1, 1),)) if t.name == "y" else t for t in TENSORS)
    rejects(program(finish=replace(FINISH, index=(affine(-1, e=1),)), tensors=tensors), "store to y")


@pytest.mark.parametrize(("pack", "message"), [
    (replace(PACK, tensor="y"), "a bind stage stores to local tensors only, and y is output"),
    (replace(PACK, tensor="t", index=(affine(),)), "stores to local tensors only, and t is register"),
    (replace(PACK, value=Load("x", (affine(r=1),))), "reads weights and what bind stages stored, not x"),
])
def test_bind_stages_depend_on_weights_only(pack: Leaf, message: str) -> None:
    rejects(program(pack=pack), message)


@pytest.mark.parametrize(("run", "message"), [
    ((Loop("e", 0, (FINISH,)),), "serial loop e < 0: the extent 0 must be positive"),
    ((Loop("e", 2, (Loop("f", 2, (Loop("e", 2, (FINISH,)),)),)),), "it is inside another loop e"),
    ((Loop("e", 2, (Loop("f", 2, (FINISH,)),), "vector"),), "a vector loop may hold statements only"),
    ((Loop("e", 2, (Loop("f", 2, (FINISH,), "parallel"),), "parallel"),), "inside another parallel loop"),
    ((Let("e", 9, (FINISH,), affine(f=1), 1),), "it is not a digit of f, step 1: give an expression of loops"),
    ((Loop("f", 9, (Let("e", 9, (FINISH,), affine(-1, f=1), 1),)),), "never negative"),
    ((Loop("f", 9, (Let("e", 9, (FINISH,), affine(f=1), 0),)),), "not a digit of f, step 0"),
    ((Loop("f", 9, (Let("e", 0, (FINISH,), affine(f=1), 1),)),), "let e < 0: the extent 0 must be positive"),
    ((Loop("f", 9, (Let("f", 9, (FINISH,), affine(f=1), 1),)),), "let f < 9: it is inside another loop f"),
    ((Loop("f", 9, (Let("e", 9, (FINISH,), affine(f=1), 1),), "vector"),), "hold statements only"),
])
def test_loops_that_break_a_rule(run: Body, message: str) -> None:
    rejects(program(run=run), message)


def test_registers_belong_to_one_nest() -> None:
    rejects(program(run=(Loop("e", 10, (START,)), Loop("e", 10, (FINISH,)))),
            "the register tensor t is also used in another loop nest")


@pytest.mark.parametrize(("changed", "message"), [
    (tensor("y", "input", 4), "there are two tensors of that name"),
    (tensor("z", "local", 0), "must be positive"),
    (replace(tensor("z", "local", 4), letters=("a", "b")), "differ in length"),
    (replace(tensor("z", "local", 4), storage=(StorageAxis(0, 1, 3, 1),)), "axis a holds 3 of 4"),
    (replace(tensor("z", "local", 4), storage=(StorageAxis(0, 2, 2, 1),)), "has a step 2 after 1"),
    (replace(tensor("z", "local", 4, 4), storage=(StorageAxis(0, 1, 4, 2), StorageAxis(1, 1, 4, 1))),
     "elements overlap: a stride of 2 within 4 elements"),
])
def test_tensors_that_break_a_rule(changed: Tensor, message: str) -> None:
    rejects(program(tensors=(*TENSORS, changed)), message)


def masked(index: Affine, where: tuple[Affine, ...], **extents: int) -> Program:
    body: Body = (Store("y", (index,), Const(1.0), where),)
    for var, extent in extents.items():
        body = (Loop(var, extent, body),)
    return program(run=body)


def test_conditions_prove_bounds() -> None:
    verify(masked(affine(a=4, b=1), (affine(-10, a=4, b=1),), a=3, b=4))
    verify(masked(affine(-2, a=4, b=1), (affine(1, a=-4, b=-1),), a=3, b=4))
    verify(masked(affine(a=4, b=2), (affine(-5, a=2, b=1),), a=3, b=4))
    verify(masked(affine(20, a=1), (affine(0, a=1),), a=3))  # never runs


def test_conditions_that_do_not_reach_are_no_proof() -> None:
    rejects(masked(affine(a=4, b=1), (affine(-11, a=4, b=1),), a=3, b=4), "in [0, 10], out of [0, 9]")
    rejects(masked(affine(-2, a=4, b=1), (affine(0, a=-4, b=-1),), a=3, b=4), "in [-1, 9], out of [0, 9]")


_SMALL = st.dictionaries(st.sampled_from("abc"), st.integers(-4, 4), max_size=3)


@given(_SMALL, st.integers(-9, 9), st.lists(st.tuples(_SMALL, st.integers(-9, 3)), max_size=2))
def test_bounds_hold_at_every_point(terms: dict[str, int], constant: int,
                                    conditions: list[tuple[dict[str, int], int]]) -> None:
    extents = {"a": 3, "b": 4, "c": 2}
    a, where = affine(constant, **terms), [affine(c, **t) for t, c in conditions]
    low, high = bounds_where(a, where, extents)
    for values in itertools.product(*map(range, extents.values())):
        point = dict(zip(extents, values, strict=True))
        if all(w.evaluate(point) < 0 for w in where):
            assert low <= a.evaluate(point) <= high
