"""Walking and rebuilding nests: leaves, loads, loops, substitution. What does not change stays the same object."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from convsched.ir.affine import Affine, Index
from convsched.ir.grammar import Body, Leaf, Load, Loop, Op, Program, Reduce, Statement, Value


def nested(loops: Mapping[str, int], leaf: Leaf) -> Body:
    """A statement inside serial loops, given with their extents from the outermost in."""
    body: Body = (leaf,)
    for var, extent in reversed(list(loops.items())):
        body = (Loop(var, extent, body),)
    return body


def leaves(body: Body, loops: tuple[Loop, ...] = ()) -> list[tuple[tuple[Loop, ...], Leaf]]:
    """Every statement with the loops around it, outermost first, in program order."""
    found: list[tuple[tuple[Loop, ...], Leaf]] = []
    _collect(body, loops, found)
    return found


def _collect(body: Body, loops: tuple[Loop, ...], found: list[tuple[tuple[Loop, ...], Leaf]]) -> None:
    for statement in body:
        if isinstance(statement, Loop):
            _collect(statement.body, (*loops, statement), found)
        else:
            found.append((loops, statement))


def loads(value: Value) -> Iterator[Load]:
    """The loads in a value, left to right."""
    if isinstance(value, Load):
        yield value
    elif isinstance(value, Op):
        for operand in value.values:
            yield from loads(operand)


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
    return rebuilt(body, [holding(s, map_leaves(s.body, change)) if isinstance(s, Loop) else change(s)
                           for s in body])


def holding(loop: Loop, body: Body) -> Loop:
    """The loop around another body; the loop itself where it is the same. All fields, in their order: this runs for
    each loop at each step, and ``replace`` takes three times as long."""
    return loop if body is loop.body else Loop(
        loop.var, loop.extent, body, loop.kind, loop.ahead, loop.of, loop.step)


def rebuilt(body: Body, statements: list[Statement]) -> Body:
    """The body itself if it has just these statements, else one of them."""
    same = len(body) == len(statements) and all(a is b for a, b in zip(body, statements, strict=True))
    return body if same else tuple(statements)


def map_loops(body: Body, var: str, change: Callable[[Loop], Body]) -> Body:
    """The body with every loop over ``var`` replaced by the statements ``change`` gives; the same object where there
    is none."""
    out: list[Statement] = []
    for statement in body:
        if not isinstance(statement, Loop):
            out.append(statement)
        elif statement.var == var:
            out += change(statement)
        else:
            out.append(holding(statement, map_loops(statement.body, var, change)))
    return rebuilt(body, out)


def map_indices(leaf: Leaf, change: Callable[[Affine], Affine]) -> Leaf:
    """The statement with every affine expression in it changed."""
    def load(access: Load) -> Value:
        return Load(access.tensor, tuple(change(i) for i in access.index))
    return replace(leaf, index=tuple(change(i) for i in leaf.index), value=map_value(leaf.value, load),
                   where=tuple(change(w) for w in leaf.where))


def substitute(body: Body, values: Mapping[str, Affine]) -> Body:
    """The body with loop variables replaced by affine expressions."""
    def change(leaf: Leaf) -> Leaf:
        used = (*leaf.index, *leaf.where, *(a for load in loads(leaf.value) for a in load.index))
        is_used = any(name in values for a in used for name, _ in a.terms)
        return map_indices(leaf, lambda a: a.substitute(values)) if is_used else leaf

    def within(body: Body) -> Body:
        return rebuilt(body, [loop(s) if isinstance(s, Loop) else change(s) for s in body])

    def loop(found: Loop) -> Loop:
        inside, of = within(found.body), found.of.substitute(values)
        return holding(found, inside) if of is found.of else replace(found, body=inside, of=of)

    return within(body)


def find_loops(body: Body, var: str) -> list[Loop]:
    """Every loop over ``var``."""
    found: list[Loop] = []
    for statement in body:
        if isinstance(statement, Loop):
            if statement.var == var:
                found.append(statement)
            found += find_loops(statement.body, var)
    return found


def loop_names(body: Body) -> list[str]:
    """The names of all loops, outermost first, each once."""
    names: dict[str, None] = {}
    for around, _ in leaves(body):
        for loop in around:
            names.setdefault(loop.var)
    return list(names)


def indices(leaf: Leaf) -> list[tuple[str, Index]]:
    """Every tensor a statement touches, with the index: the target first, then the loads."""
    return [(leaf.tensor, leaf.index), *((load.tensor, load.index) for load in loads(leaf.value))]


def extents_of(body: Body) -> dict[str, int]:
    """The extent of every loop; the greatest, where a name has several."""
    extents: dict[str, int] = {}
    for around, _ in leaves(body):
        for loop in around:
            extents[loop.var] = max(loop.extent, extents.get(loop.var, 0))
    return extents
