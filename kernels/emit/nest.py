"""A stage's nest as the emitter walks it: its loops and statements with what is known of each where it stands."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

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
    Stage,
    Value,
    leaves,
    loads,
    matrix_of,
)
from convsched.kernels.emit.forms import ONE, Form, Lanes, Reference, Site
from convsched.kernels.emit.vectors import constant

AXIS_STRIDE = 1 << 20  # more than an index of a register tensor: keeps the places along its axes apart in one number


@dataclass(slots=True)
class Held:
    """Elements of a tensor in registers: ``place`` is a number of its own for each index, with lane 0."""

    tensor: str
    place: Form
    count: int  # lanes of the register
    empty: str  # what it holds at the start
    narrow: bool  # fewer lanes than the statement


@dataclass(slots=True)
class Literal:
    """A number in all lanes."""

    text: str


@dataclass(slots=True)
class Coefficient:
    """An element of a constant tensor: its place in the values, or, where only run time knows that, in a table."""

    tensor: str
    values: tuple[float, ...]
    place: Form | None
    table: Reference | None


@dataclass(slots=True)
class Operation:
    """An operation on values."""

    name: str
    operands: list[Term]


Term = Held | Literal | Coefficient | Operation | Reference


@dataclass(slots=True)
class Statement:
    """A statement in its lanes. ``own``: the load of what a sum in memory adds to. ``read``: its loads from memory, by
    tensor. ``contributes``: whether a guard selects what is added, rather than elements. ``matrix``: the element of a
    constant by which it multiplies what it adds; ``factor`` the same, and ``other`` what it multiplies, where the
    element is known."""

    leaf: Leaf
    site: Site
    lanes: Lanes
    adds: bool
    guards: list[tuple[Affine, Form]]
    target: Held | Reference
    own: Reference | None
    value: Term
    read: list[tuple[str, Reference]]
    contributes: bool
    matrix: Load | None
    factor: Coefficient | None = None
    other: Term | None = None


@dataclass(slots=True)
class Unrolled:
    """A loop written out. ``sums``: whether iterations add products of data to the same registers. ``matrix``: the
    element of a constant that alone decides which iterations do something."""

    loop: Loop
    body: list[Node]
    sums: bool
    matrix: Matrix | None


@dataclass(slots=True)
class Matrix:
    """An index of a constant inside an unrolled loop: its places, None where run time decides."""

    tensor: str
    places: list[Form | None]


@dataclass(slots=True)
class Digit:
    """Statements for which a variable is a digit of a value."""

    named: Let
    of: Form
    body: list[Node]


@dataclass(slots=True)
class Repeated:
    """A run-time loop. ``guards``: of those that all its statements share, the ones that may become its bounds.
    ``writes``: the registers that its body may write."""

    loop: Loop
    body: list[Node]
    site: Site
    guards: list[Form]
    writes: list[Written]


@dataclass(slots=True)
class Written:
    """Registers that the loops inside a run-time loop write: the element in the first iterations, and the distances
    of the places from there in all of them."""

    first: Held
    moves: list[int]


Node = Statement | Unrolled | Digit | Repeated


class Nest:
    """Makes the nodes of one stage; ``width`` lanes of a register."""

    def __init__(self, program: Program, stage: Stage, width: int) -> None:
        self.program = program
        self.on_stack = on_stack(program, stage)
        self.statements: list[Statement] = []  # as they stand, so that those of a loop are neighbours
        self.body = self._body(stage.body, Site({}, frozenset(), {}, frozenset(), ONE, width))

    def _body(self, body: Body, site: Site) -> list[Node]:
        nodes: list[Node] = []
        for part in body:
            if isinstance(part, Let):
                nodes.append(self._digit(part, site))
            elif not isinstance(part, Loop):
                self.statements.append(self._statement(part, site))
                nodes.append(self.statements[-1])
            elif part.kind == "vector" and part.extent > 1:
                nodes += self._body(part.body, replace(site, extents={**site.extents, part.var: part.extent},
                                                       lanes=Lanes(part.var, part.extent)))
            else:
                nodes.append(self._loop(part, site))
        return nodes

    def _digit(self, named: Let, site: Site) -> Node:
        of = site.form(named.of)
        return Digit(named, of, self._body(named.body, replace(
            site, extents={**site.extents, named.var: named.extent}, digits=site.digits | {named.var},
            known=site.known if of.dynamic else site.known | {named.var})))

    def _loop(self, loop: Loop, site: Site) -> Node:
        extents, known, start = {**site.extents, loop.var: loop.extent}, site.known | {loop.var}, len(self.statements)
        if loop.kind == "unroll" or (loop.extent == 1 and loop.kind != "parallel"):
            inside = replace(site, extents=extents, known=known, unrolled={**site.unrolled, loop.var: loop.extent})
            body = self._body(loop.body, inside)
            statements = self.statements[start:]
            return Unrolled(loop, body, _sums_over(loop, statements), _matrix(loop, statements, inside))
        inside = replace(site, extents=extents)
        body = self._body(loop.body, inside)
        statements = self.statements[start:]
        return Repeated(loop, body, inside, _shared_guards(loop, statements, inside), _written(statements, inside))

    # Registers

    def in_registers(self, tensor: str) -> bool:
        """Whether a tensor's elements are SSA values."""
        return self.program.tensor(tensor).role == "register" and tensor not in self.on_stack

    def _held(self, tensor: str, index: Index, site: Site) -> Held:
        place = site.flat(index, [AXIS_STRIDE] * len(index))
        count = site.lanes.count if place.stride else 1
        return Held(tensor, place, count, "zeroinitializer" if count > 1 else "0.0", count < site.lanes.count)

    # Statements

    def _statement(self, leaf: Leaf, site: Site) -> Statement:
        in_registers, adds = self.in_registers(leaf.tensor), isinstance(leaf, Reduce)
        tensor = self.program.tensor(leaf.tensor)
        target = self._held(leaf.tensor, leaf.index, site) if in_registers else site.store(tensor, leaf.index)
        own = site.load(tensor, leaf.index) if adds and not in_registers else None
        value = self._term(leaf.value, site)
        made = Statement(leaf, site, site.lanes, adds, [(w, site.form(w)) for w in leaf.where], target, own, value,
                         _read(value), _selects_contributions(leaf), matrix_of(self.program, leaf))
        if adds and in_registers and isinstance(value, Operation) and value.name == "mul":
            pairs = (value.operands, value.operands[::-1])
            found = next(((one, other) for one, other in pairs if isinstance(one, Coefficient)), None)
            if found is not None and found[0].place is not None:
                made.factor, made.other = found
        return made

    def _term(self, value: Value, site: Site) -> Term:
        match value:
            case Const(number):
                return Literal(constant(number, site.lanes.count))
            case Load(name, index):
                tensor = self.program.tensor(name)
                if tensor.role == "constant":
                    return self._coefficient(value, site)
                return self._held(name, index, site) if self.in_registers(name) else site.load(tensor, index)
            case Op(name, operands):
                return Operation(name, [self._term(operand, site) for operand in operands])
        raise AssertionError(value)

    def _coefficient(self, load: Load, site: Site) -> Coefficient:
        tensor = self.program.tensor(load.tensor)
        if not all(var in site.known for a in load.index for var, _ in a.terms):
            return Coefficient(load.tensor, tensor.values, None, site.load(tensor, load.index))
        return Coefficient(load.tensor, tensor.values, site.flat(load.index, tensor.shape), None)


def _sums_over(loop: Loop, statements: list[Statement]) -> bool:
    """Whether iterations add products of data to the same registers."""
    return loop.extent > 1 and any(
        s.adds and isinstance(s.target, Held) and s.matrix is None
        and all(var != loop.var for var, _ in s.target.place.known) for s in statements)


def _matrix(loop: Loop, statements: list[Statement], site: Site) -> Matrix | None:
    """The element of a constant by which all that a loop does is multiplied, if the loop moves it and if each of its
    places follows one loop."""
    load = statements[0].matrix if len(statements) == 1 else None
    if load is None or any(len(a.terms) > 1 for a in load.index):
        return None
    if all(var != loop.var for a in load.index for var, _ in a.terms):
        return None
    return Matrix(load.tensor, [site.form(a) if all(var in site.known for var, _ in a.terms) else None
                                for a in load.index])


def _shared_guards(loop: Loop, statements: list[Statement], site: Site) -> list[Form]:
    """The guards that all statements of a loop share, that depend on its variable and on nothing inside."""
    shared = statements[0].leaf.where
    for statement in statements[1:]:
        if not shared:
            return []
        shared = tuple(w for w in shared if w in statement.leaf.where)
    return [site.form(w) for w in shared if loop.var in w.variables and w.variables <= site.extents.keys()]


def _written(statements: list[Statement], site: Site) -> list[Written]:
    """The registers that a loop's statements may write, in the order they do."""
    found = []
    for statement in statements:
        if not isinstance(held := statement.target, Held):
            continue
        here = [(var, c) for var, c in held.place.known if var in site.known]
        steps = {var: c for var, c in held.place.known if var not in site.known}
        moves = [[step * i for i in range(extent)] for var, extent in statement.site.extents.items()
                 if (step := steps.get(var))]
        place = replace(held.place, known=here)
        found.append(Written(replace(held, place=place), [sum(move) for move in itertools.product(*moves)]))
    return found


def _read(term: Term) -> list[tuple[str, Reference]]:
    """The references of a value's loads from memory, by tensor."""
    if isinstance(term, Reference):
        return [(term.tensor.name, term)]
    if isinstance(term, Operation):
        return [found for operand in term.operands for found in _read(operand)]
    return []


def _selects_contributions(leaf: Leaf) -> bool:
    """Whether a guard has no variable of a register's index, as 14 f0 + f1 < F has one of acc[f1]."""
    own = {v for a in leaf.index for v in a.variables}
    return any(not w.variables & own for w in leaf.where)


def on_stack(program: Program, stage: Stage) -> set[str]:
    """Register tensors that a run-time loop or a digit indexes, or that are seen as vectors and as scalars."""
    stacked, seen = set(), dict[str, int]()
    for around, leaf in leaves(stage.body):
        kinds: dict[str, Loop | Let] | None = None
        for name, index in ((leaf.tensor, leaf.index), *((ld.tensor, ld.index) for ld in loads(leaf.value))):
            if program.tensor(name).role != "register":
                continue
            if kinds is None:
                kinds = {lp.var: lp for lp in around}
            used = [kinds[v] for a in index for v, _ in a.terms]
            if any(lp.kind in ("parallel", "let") or (lp.kind == "serial" and lp.extent > 1) for lp in used):
                stacked.add(name)
            width = next((lp.extent for lp in used if lp.kind == "vector"), 1)
            if seen.setdefault(name, width) != width:
                stacked.add(name)
    return stacked
