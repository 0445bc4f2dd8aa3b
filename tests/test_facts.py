"""Facts that are kept with statements are those that a plain walk finds; steps keep what they do not change."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from convsched.ir import Block, Body, Leaf, Let, Loop, Program, Statement
from convsched.ir.examples import unfolded
from convsched.ir.facts import Facts
from convsched.lower.direct import lower_direct
from convsched.lower.im2col import lower_im2col
from convsched.problem import Conv2d
from convsched.schedule import apply, parse_schedule

LAYER = lower_direct(Conv2d(4, 6, 3, padding=1, input_size=(5, 7), activation="relu"))
TOEPLITZ = lower_im2col(Conv2d(4, 6, 3, padding=1, input_size=(5, 7)))
INNER = "attach init at f; attach epilogue at f"
SCHEDULED = [
    (LAYER, ""), (LAYER, "split m 4 -> m0 m1 tail=mask; reorder m0 e f c r s m1; unroll r s; parallel m0"),
    (LAYER, f"{INNER}; stage t at f registers; skip x h w; peel f guarded; layout w m c r s"),
    (LAYER, "split e 2 -> e0 e1 tail=mask; reorder n e0 e1 f c r s m; vectorize m; stage x at e0 window"),
    (unfolded(4, 3), "inline i"), (TOEPLITZ, "split p 7 -> p0 p1; split p1 4 -> p2 p3 tail=mask; inline i"),
]


def blocks(body: Body) -> Iterator[Loop | Let]:
    for statement in body:
        if isinstance(statement, Block):
            yield statement
            yield from blocks(statement.body)


def statements(body: Body) -> Iterator[Leaf]:
    for statement in body:
        if isinstance(statement, Block):
            yield from statements(statement.body)
        else:
            yield statement


def walked(statement: Statement) -> Facts:
    """The facts of one statement, from its parts alone."""
    if not isinstance(statement, Block):
        guards = {name for a in statement.where for name in a.variables}
        tensors = {statement.tensor, *(load.tensor for load in statement.loads)}
        return Facts(frozenset(tensors), guards=frozenset(guards), is_plain=not statement.where)
    inside = [walked(s) for s in statement.body]
    kinds = {found.kind for found in blocks((statement,))}
    lonely = not any(isinstance(s, Block) for found in blocks((statement,)) if found.kind == "vector"
                     for s in found.body)
    shared = any("parallel" in [b.kind for b in blocks(found.body)] for found in blocks((statement,))
                 if found.kind == "parallel")
    return Facts(
        frozenset().union(*[f.tensors for f in inside]), frozenset(found.var for found in blocks((statement,))),
        frozenset(kinds), 1 + max(f.depth for f in inside), sum(f.statements for f in inside),
        frozenset().union(*[f.guards for f in inside]), all(f.is_plain for f in inside), lonely and not shared)


@pytest.mark.parametrize(("program", "text"), SCHEDULED)
def test_facts_are_those_of_a_walk(program: Program, text: str) -> None:
    for stage in apply(program, parse_schedule(text)).stages:
        for block in blocks(stage.body):
            assert block.facts == walked(block)
            assert list(block.leaves) == list(statements(block.body))
            used = {name for leaf in block.leaves for _, index in leaf.accesses for a in (*index, *leaf.where)
                    for name in a.variables}
            used |= {name for b in (block, *blocks(block.body)) if isinstance(b, Let) for name in b.of.variables}
            assert block.variables == used
        assert [leaf for _, leaf in stage.paths] == list(stage.leaves)
        assert stage.extents == {block.var: max(b.extent for b in blocks(stage.body) if b.var == block.var)
                                 for block in blocks(stage.body)}


def test_facts_see_loops_where_none_may_be() -> None:
    leaf = LAYER.stages[0].leaves[0]
    inner = Loop("b", 2, (leaf,), "parallel")
    assert inner.facts.is_nested_well
    assert not Loop("a", 2, (inner,), "parallel").facts.is_nested_well
    assert not Loop("a", 2, (Loop("c", 2, (inner,)),), "vector").facts.is_nested_well
    assert not Loop("a", 2, (leaf, Loop("c", 2, ()))).facts.is_plain


@pytest.mark.parametrize(("before", "step", "kept"), [
    ("", "split c 2 -> c0 c1", ["init", "epilogue"]),
    ("", "reorder r c", ["init", "epilogue"]),
    ("", "unroll r s", ["init", "epilogue"]),
    ("", "peel c first", ["init", "epilogue"]),
    ("", "stage x at e window", ["init", "epilogue"]),
    ("", "layout w m c r s", ["init", "epilogue"]),
    ("", "skip x h w", ["init", "epilogue"]),
    ("split m 4 -> m0 m1 tail=mask", "peel c first", ["init", "epilogue"]),
    ("", "attach init at f", ["epilogue"]),
    ("", "reorder n m e f", ["init", "conv", "epilogue"]),
    ("unroll s", "unroll s", ["init", "conv", "epilogue"]),
])
def test_steps_keep_the_stages_that_they_do_not_change(before: str, step: str, kept: list[str]) -> None:
    """The same objects, of which nothing is computed again."""
    program = apply(LAYER, parse_schedule(before))
    found = parse_schedule(step).steps[0].apply(program)
    old = {stage.name: stage for stage in program.stages}
    assert [stage.name for stage in found.stages if stage is old.get(stage.name)] == kept


def test_steps_keep_the_loops_that_they_do_not_change() -> None:
    program = apply(LAYER, parse_schedule("split e 2 -> e0 e1 tail=peel"))
    done = parse_schedule("unroll e0").steps[0].apply(program)
    old, new = ([loop for stage in found.stages for loop in blocks(stage.body)] for found in (program, done))
    assert len(old) == len(new)
    assert [a is b for a, b in zip(old, new, strict=True)] == ["e0" not in loop.facts.names for loop in old]
    assert any(loop.var == "e1" for loop in old if "e0" not in loop.facts.names)
