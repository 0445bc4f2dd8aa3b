"""Addresses: the affine form equals the definition at every point of the loops."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convsched.ir import Affine, Index, Tensor, storage_of
from convsched.ir.address import Digit, floor_divide, modulo, offset, storage_index

ORDERS = [("m", "c"), ("c", "m"), ("m/4", "c", "m%4"), ("m/8", "c", "m%8"), ("c/4", "m/4", "c%4", "m%4")]


def tensor(order: tuple[str, ...], shape: tuple[int, int] = (24, 12)) -> Tensor:
    letters = ("m", "c")
    return Tensor("t", letters, shape, "local", storage_of(letters, shape, order, {order[0]: 16}))


def by_definition(t: Tensor, index: Index, point: dict[str, int]) -> int:
    values = [a.evaluate(point) for a in index]
    return sum(values[s.axis] // s.step % s.size * s.stride for s in t.storage)


def affine(terms: dict[str, int], constant: int = 0) -> Affine:
    return Affine.total(terms.items(), constant)


@pytest.mark.parametrize("order", ORDERS)
def test_split_loops_give_an_affine_address(order: tuple[str, ...]) -> None:
    t, extents = tensor(order), {"m0": 3, "m1": 2, "m2": 4, "c0": 3, "c1": 4}
    index = (affine({"m0": 8, "m1": 4, "m2": 1}), affine({"c0": 4, "c1": 1}))
    found = offset(t, index, extents)
    assert found.rest == ()
    for values in itertools.product(*map(range, extents.values())):
        point = dict(zip(extents, values, strict=True))
        assert found.affine.evaluate(point) == by_definition(t, index, point)


@given(st.sampled_from(ORDERS), st.integers(1, 7), st.integers(1, 4), st.integers(1, 8), st.integers(0, 5))
def test_any_index_in_range_has_the_address_of_the_definition(
        order: tuple[str, ...], a: int, b: int, step: int, start: int) -> None:
    index = (affine({"a": step, "b": 1}, start), affine({"b": -2, "a": 1}, 2 * b - 2))
    t = tensor(order, (step * (a - 1) + b + start, a - 1 + 2 * b - 1))
    extents = {"a": a, "b": b}
    found = offset(t, index, extents)
    for point in ({"a": i, "b": j} for i in range(a) for j in range(b)):
        assert found.evaluate(point) == by_definition(t, index, point)


def test_a_tile_over_the_edge_of_a_block_keeps_the_division() -> None:
    found = offset(tensor(("m/4", "c", "m%4")), (affine({"m2": 1}, 18), Affine.of("c")), {"m2": 4, "c": 12})
    assert found.affine == Affine.of("c") * 4
    assert found.rest == (Digit(affine({"m2": 1}, 18), 4, 6, 48), Digit(affine({"m2": 1}, 18), 1, 4, 1))


def test_an_axis_within_one_block_needs_no_division() -> None:
    index = (affine({"m0": 12, "m1": 1}), Affine.of(0))
    found = offset(tensor(("m/32", "c", "m%32")), index, {"m0": 2, "m1": 16})
    assert (found.affine, found.rest) == (affine({"m0": 12, "m1": 1}), ())


def test_storage_index_gives_the_place_along_each_stored_axis() -> None:
    parts = storage_index(tensor(("m/4", "c", "m%4")), (affine({"m0": 4, "m1": 1}, 8), Affine.of("c")),
                          {"m0": 4, "m1": 4, "c": 12})
    assert [str(part) for part in parts] == ["m0 + 2", "c", "m1"]


@given(st.lists(st.tuples(st.integers(-40, 40), st.integers(1, 5)), max_size=3), st.integers(-50, 50),
       st.integers(1, 20))
def test_division_is_exact_or_refused(terms: list[tuple[int, int]], constant: int, step: int) -> None:
    extents = {f"v{i}": extent for i, (_, extent) in enumerate(terms)}
    a = affine({f"v{i}": c for i, (c, _) in enumerate(terms)}, constant)
    quotient, remainder = floor_divide(a, step, extents), modulo(a, step, extents)
    assert (quotient is None) == (remainder is None)
    if quotient is None or remainder is None:
        return
    for values in itertools.product(*map(range, extents.values())):
        point = dict(zip(extents, values, strict=True))
        assert quotient.evaluate(point) == a.evaluate(point) // step
        assert remainder.evaluate(point) == a.evaluate(point) % step
