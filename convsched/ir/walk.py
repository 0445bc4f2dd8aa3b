"""Walking and rebuilding nests: leaves, loads, loops, substitution. What does not change stays the same object."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace

from convsched.ir.affine import Affine, Index
from convsched.ir.grammar import Block, Body, Leaf, Let, Load, Loop, Op, Path, Program, Reduce, Statement, Value


def nested(loops: Mapping[str, int], leaf: Leaf) -> Body:
    """A statement inside serial loops, given with their extents from the outermost in."""
    body: Body = (leaf,)
    for var, extent in reversed(list(loops.items())):
        body = (Loop(var, extent, body),)
    return body


def touching(body: Body, tensors: Set[str], loops: Path = ()) -> list[tuple[Path, Leaf]]:
    """The statements that touch some tensors, with the loops around them."""
    found: list[tuple[Path, Leaf]] = []
    for statement in body:
        if statement.facts.tensors.isdisjoint(tensors):
            continue
        if isinstance(statement, Block):
            found += touching(statement.body, tensors, (*loops, statement))
        else:
            found.append((loops, statement))
    return found


def matrix_of(program: Program, leaf: Leaf) -> Load | None:
    """The element of a constant tensor by which a statement multiplies what it adds, if it does."""
    if isinstance(leaf, Reduce) and isinstance(leaf.value, Op) and leaf.value.name == "mul":
        for factor in leaf.value.values:
            if isinstance(factor, Load) and program.tensor(factor.tensor).role == "constant":
                return factor
    return None


def map_value(value: Value, change: Callable[[Load], Value]) -> Value:
    """The value with every load changed."""
    if isinstance(value, Load):
        return change(value)
    if isinstance(value, Op):
        return Op(value.name, tuple(map_value(v, change) for v in value.values))
    return value


def map_leaves(body: Body, change: Callable[[Leaf], Leaf]) -> Body:
    """The body with every statement changed, loops kept; the same object where nothing is."""
    return rebuilt(body, [holding(s, map_leaves(s.body, change)) if isinstance(s, Block) else change(s)
                           for s in body])


def map_touching(body: Body, tensor: str, change: Callable[[Leaf], Leaf]) -> Body:
    """The body with every statement changed that touches a tensor; what does not touch it stays the same object."""
    return rebuilt(body, [
        s if tensor not in s.facts.tensors
        else holding(s, map_touching(s.body, tensor, change)) if isinstance(s, Block) else change(s) for s in body])


def holding(block: Loop | Let, body: Body) -> Loop | Let:
    """The loop or value around another body; itself where that is the same."""
    return block if body is block.body else block.holding(body)


def rebuilt(body: Body, statements: list[Statement]) -> Body:
    """The body itself if it has just these statements, else one of them."""
    if len(body) != len(statements):
        return tuple(statements)
    for a, b in zip(body, statements, strict=True):
        if a is not b:
            return tuple(statements)
    return body


def map_loops(body: Body, var: str, change: Callable[[Loop], Body]) -> Body:
    """The body with every loop over ``var`` replaced by the statements ``change`` gives; the same object where there
    is none."""
    out: list[Statement] = []
    for statement in body:
        if not isinstance(statement, Block) or var not in statement.facts.names:
            out.append(statement)
        elif isinstance(statement, Loop) and statement.var == var:
            out += change(statement)
        else:
            out.append(holding(statement, map_loops(statement.body, var, change)))
    return rebuilt(body, out)


def map_indices(leaf: Leaf, change: Callable[[Affine], Affine]) -> Leaf:
    """The statement with every affine expression in it changed."""
    def load(access: Load) -> Value:
        return Load(access.tensor, tuple([change(i) for i in access.index]))
    return type(leaf)(leaf.tensor, tuple([change(i) for i in leaf.index]), map_value(leaf.value, load),
                      tuple([change(w) for w in leaf.where]))


def substitute(body: Body, values: Mapping[str, Affine]) -> Body:
    """The body with loop variables replaced by affine expressions."""
    def change(statement: Statement) -> Statement:
        if statement.variables.isdisjoint(values):
            return statement
        if not isinstance(statement, Block):
            return map_indices(statement, lambda a: a.substitute(values))
        inside = within(statement.body)
        if isinstance(statement, Let) and not statement.of.variables.isdisjoint(values):
            return replace(statement, body=inside, of=statement.of.substitute(values))
        return holding(statement, inside)

    def within(body: Body) -> Body:
        return rebuilt(body, [change(statement) for statement in body])

    return within(body)


def find_loops(body: Body, var: str) -> list[Loop]:
    """Every loop over ``var``."""
    found: list[Loop] = []
    for statement in body:
        if isinstance(statement, Block) and var in statement.facts.names:
            if isinstance(statement, Loop) and statement.var == var:
                found.append(statement)
            found += find_loops(statement.body, var)
    return found


def loop_names(body: Body) -> list[str]:
    """The names of all loops, outermost first, each once."""
    names: dict[str, None] = {}
    _collect_names(body, names)
    return list(names)


def _collect_names(body: Body, names: dict[str, None]) -> None:
    for statement in body:
        if isinstance(statement, Block):
            names.setdefault(statement.var)
            _collect_names(statement.body, names)


def indices(leaf: Leaf) -> Sequence[tuple[str, Index]]:
    """Every tensor a statement touches, with the index: the target first, then the loads."""
    return leaf.accesses
