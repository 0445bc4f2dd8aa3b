"""Locals are stored before they are read: what is proved is so, and what is needed is proved."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import convsched as cs
from convsched.errors import VerifyError
from convsched.ir import Affine, Body, Const, Leaf, Let, Load, Loop, Program, Reduce, Stage, Store, Tensor, storage_of
from convsched.ir.interp import interpret
from convsched.ir.stored import unproved
from convsched.ir.verify import verify
from convsched.kernels.run import bound
from convsched.kernels.run.packing import aligned_zeros
from convsched.plan.families import FAMILIES
from convsched.problem import Conv2d
from convsched.problem.layout import Layout, from_layout, to_layout
from convsched.problem.reference import convolve

SIZE = 12  # of the local tensor along each axis


def affine(constant: int = 0, **terms: int) -> Affine:
    return Affine.total(terms.items(), constant)


def loops(leaf: Leaf | Body, **extents: int) -> Body:
    body: Body = leaf if isinstance(leaf, tuple) else (leaf,)
    for var, extent in reversed(extents.items()):
        body = (Loop(var, extent, body),)
    return body


def stored(*index: Affine, where: tuple[Affine, ...] = ()) -> Store:
    return Store("t", (*index, affine())[:2], Const(1.0), where)


def read(*index: Affine, where: tuple[Affine, ...] = ()) -> Reduce:
    """y += t[index]"""
    return Reduce("y", (affine(),), Load("t", (*index, affine())[:2]), where)


def program(*stages: Body, role: str = "local") -> Program:
    tensors = (Tensor("t", ("a", "b"), (SIZE, SIZE), role, storage_of(("a", "b"), (SIZE, SIZE))),  # type: ignore[arg-type]
               Tensor("y", ("c",), (1,), "output", storage_of(("c",), (1,))))
    return Program("p", tensors, tuple(Stage(f"s{number}", body) for number, body in enumerate(stages)))


I, J, K = affine(i=1), affine(j=1), affine(k=1)
PROVED: dict[str, tuple[Body, ...]] = {
    "one loop": (loops(stored(I), i=5), loops(read(I), i=5)),
    "in one iteration": (loops((stored(I), read(I)), i=5),),
    "blocks": (loops(stored(I * 4 + "j"), i=3, j=4), loops(read(I * 6 + "j"), i=2, j=6)),
    "a block an iteration": (loops((*loops(stored(I * 4 + "j"), j=4), *loops(read(I * 4 + 3 - K), k=3)), i=3),),
    "a tile that is moved back": (loops(stored(I), i=5) + loops(stored(I + 2), i=5), loops(read(I), i=7)),
    "a peeled tail": (loops(stored(I * 4 + "j"), i=2, j=4) + loops(stored(J + 8), j=3), loops(read(I), i=11)),
    "a guard on both": (loops(stored(I * 4 + "j", where=(I * 4 + "j" - 9,)), i=3, j=4), loops(read(I), i=9)),
    "a guard of a shared loop": (loops((
        *loops(stored(J, where=(I * 4 + "j" - 9,)), j=4), *loops(read(K, where=(I * 4 + "k" - 9,)), k=4)), i=3),),
    "a guard that binds half of an index": (loops(stored(I * 3 + "j", where=(J - 3,)), i=4, j=8), loops(read(I), i=12)),
    "outer digits inside": (loops((*loops(stored(J * 3 + "i"), j=4), *loops(read(K * 3 + "i"), k=4)), i=3),),
    "odd and even": (loops(stored(I * 2), i=6) + loops(stored(I * 2 + 1), i=6), loops(read(I), i=12)),
    "halves of blocks": (loops(stored(I * 4 + "j"), i=3, j=2) + loops(stored(I * 4 + "j" + 2), i=2, j=2),
                         loops(read(I), i=10)),
    "a guard on one of two points": (loops(stored(I * 3 + 2, where=(I * 3 - 2,)), i=2),
                                     loops(read(J * 3 + 2, where=(J * 3 - 2,)), j=2)),
    "a guard with a loop of one iteration": (loops(stored(I * 4 + "j" + 3, where=(I * 4 + "j" - 2,)), i=2, j=1),
                                             loops(read(I * 4 + "k" + 3, where=(I * 4 + "k" - 2,)), i=2, k=1)),
    "two axes": (loops(stored(I, J), i=3, j=4), loops(read(J, I), i=4, j=3)),
    "a guard on two axes": (loops(stored(I, J, where=(I * 4 + "j" - 9,)), i=3, j=4),
                            loops(read(J, I, where=(J * 4 + "i" - 9,)), i=4, j=3)),
    "backwards": (loops(stored(affine(11) - I), i=12), loops(read(I), i=12)),
    "what never runs": (loops(read(I, where=(I,)), i=12),),
    "all, then a sum": (loops(stored(I), i=4), loops(Reduce("t", (J, affine()), Const(1.0)), j=4)),
}
BROKEN: dict[str, tuple[Body, ...]] = {
    "nothing stored": (loops(read(I), i=5),),
    "too little": (loops(stored(I), i=4), loops(read(I), i=5)),
    "the wrong end": (loops(stored(I + 1), i=4), loops(read(I), i=4)),
    "later": (loops(read(I), i=4), loops(stored(I), i=4)),
    "later in the iteration": (loops((read(I), stored(I)), i=5),),
    "the next iteration's": (loops((stored(I), read(I + 1)), i=5),),
    "a sum without a start": (loops(Reduce("t", (I, affine()), Const(1.0)), i=4),),
    "gaps": (loops(stored(I * 2), i=4), loops(read(I), i=7)),
    "a guard that the read has not": (loops(stored(I, where=(I - 3,)), i=4), loops(read(I), i=4)),
    "a guard of another loop": (loops(stored(I, where=(J - K,)), i=4, j=3, k=3), loops(read(I), i=4)),
    "only the diagonal": (loops(stored(I, I), i=4), loops(read(I, J), i=4, j=4)),
    "a hole between two": (loops(stored(I), i=3) + loops(stored(I + 4), i=3), loops(read(I), i=7)),
    "one of two axes": (loops(stored(I, J), i=3, j=3), loops(read(I, J), i=3, j=4)),
    "only one digit": (loops((Let("e", 3, (stored(affine(e=1)),), I, 1),), i=3), loops(read(I, J), i=3, j=2)),
}


@pytest.mark.parametrize("role", ["local", "register"])
@pytest.mark.parametrize("name", PROVED)
def test_what_is_stored_before_is_proved(name: str, role: str) -> None:
    assert unproved(program(*PROVED[name], role=role)) is None
    assert np.isfinite(interpret(program(*PROVED[name]), {})["y"]).all()


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_stored_before_is_an_error(name: str) -> None:
    with pytest.raises(VerifyError, match=r"stage s\d: .*: it reads t\[.*\], and no proof is found"):
        verify(program(*BROKEN[name]))


def test_a_local_is_nan_until_it_is_stored() -> None:
    assert np.isnan(interpret(program(*BROKEN["too little"]), {})["y"]).all()


COEFFICIENTS = st.sampled_from([0, 0, 1, 1, 2, 3, 4])


@st.composite
def indices(draw: Any, names: str) -> tuple[Affine, Affine]:
    """An index of the local tensor for loops of at most 3 iterations, kept inside."""
    found = []
    for _ in range(2):
        terms = {name: draw(COEFFICIENTS) for name in names}
        while 2 * sum(terms.values()) >= SIZE:
            terms[max(terms, key=lambda name: terms[name])] = 0
        found.append(affine(draw(st.integers(0, 1)) if 2 * sum(terms.values()) < SIZE - 1 else 0, **terms))
    return found[0], draw(st.sampled_from([affine(), found[1]]))


@st.composite
def guards(draw: Any, names: str) -> tuple[Affine, ...]:
    """At most two guards."""
    return tuple(affine(draw(st.integers(-5, 2)), **{name: draw(st.integers(-1, 2)) for name in names})
                 for _ in range(draw(st.sampled_from([0, 0, 1, 2]))))


@st.composite
def programs(draw: Any) -> Program:
    """Some stores, then a read, in loops of which some are shared."""
    shared = {name: draw(st.integers(1, 3)) for name in draw(st.sampled_from(["", "i", "ij"]))}
    body: Body = ()
    for number in range(draw(st.integers(1, 4))):
        own = {f"{name}{number}": draw(st.integers(1, 3)) for name in draw(st.sampled_from(["", "k", "kl"]))}
        names = "".join(shared) + "".join(name[0] for name in own)
        renamed = {name[0]: Affine.of(name) for name in own}
        index = tuple(a.substitute(renamed) for a in draw(indices(names)))
        where = tuple(a.substitute(renamed) for a in draw(guards(names)))
        is_read = number > 0 and draw(st.booleans())
        body += loops((read if is_read else stored)(*index, where=where), **own)
    return program(loops(body, **shared) if shared else body)


@settings(max_examples=60, deadline=None)
@given(programs())
def test_what_is_proved_is_stored(made: Program) -> None:
    if unproved(made) is None:
        assert np.isfinite(interpret(made, {})["y"]).all()


@pytest.mark.parametrize("layout", ["nchw", "nchw16c"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_kernel_needs_a_cleared_workspace(family: str, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels, rows and columns are ragged for all of them."""
    def spoiled(elements: int) -> Any:
        found = aligned_zeros(elements)
        found[...] = np.nan
        return found

    monkeypatch.setattr(bound, "aligned_zeros", spoiled)
    problem = Conv2d(12, 20, 3, padding=1, input_size=(9, 10), activation="relu")
    random = np.random.default_rng(0)
    x, w, b = (random.standard_normal(shape).astype(np.float32) for shape in (
        problem.input_shape, problem.weight_shape, problem.bias_shape))
    kernel = cs.compile(problem, algorithm=family, layout=layout, accuracy="fast", threads=1, cache=False)
    y = from_layout(kernel(to_layout(x, layout), w, b), problem.output_shape, layout)
    np.testing.assert_allclose(y, convolve(problem, x, w, b), atol=1e-3)
