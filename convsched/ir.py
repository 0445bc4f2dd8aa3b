"""The loop-nest IR: the whole grammar on one screen.

    Program  = tensors, stages                        Stage = name, when, body
    Body     = statements in order
             | Loop(var, extent, body, kind, ahead)   kind: serial | unroll | vector | parallel
             | Loop(var, extent, body, "digit", of=, step=)   once, with var = of // step % extent
             | Store(tensor, index, value, where)     t[i, j] = v
             | Reduce(tensor, index, value, where)    t[i, j] += v
    Value    = Load(tensor, index) | Const(number) | Op(name, values)
    index    = Affine in loop variables; loops are half-open with constant extents
    where    = conjunction of ``Affine < 0``: the statement runs only where all hold
    Tensor   = name, shape, role, storage, border, values

Local and register tensors are zero when a program starts. A read of a tensor inside its ``border`` (a
virtual frame around the shape, used for padding) gives zero. A ``constant`` tensor has its values in the
program: after unrolling, its zeros vanish and its ones become plain additions. A loop's ``ahead`` are (tensor,
iterations): a hint to fetch what the tensor gives so many iterations later. A digit is a value in the form of a loop:
of a pixel p = 7 e + f of rows of 7, ``e`` is ``p // 7`` and ``f`` is ``p % 7``. Stages run in order; those with
``when="bind"`` depend on weights only and run once, when weights are bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from convsched.lazy import cached_property

Kind = Literal["serial", "unroll", "vector", "parallel", "digit"]
Role = Literal["input", "weight", "output", "local", "register", "constant"]
When = Literal["bind", "run"]

OPS = {  # name -> number of operands
    "add": 2, "sub": 2, "mul": 2, "div": 2, "max": 2, "min": 2, "exp": 1, "neg": 1, "select_positive": 3,
}  # select_positive(a, b, c) is b where a > 0, else c


@dataclass(frozen=True, slots=True)
class Affine:
    """``sum(coefficient * variable) + constant`` over integers; ``terms`` sorted by name, none zero."""

    terms: tuple[tuple[str, int], ...] = ()
    constant: int = 0

    @staticmethod
    def of(value: Affine | str | int) -> Affine:
        """An affine expression from a variable's name or an integer."""
        if isinstance(value, Affine):
            return value
        return Affine(((value, 1),)) if isinstance(value, str) else Affine((), value)

    @staticmethod
    def total(terms: Iterable[tuple[str, int]], constant: int) -> Affine:
        """The canonical form of a sum: like terms added, zeros dropped."""
        sums: dict[str, int] = {}
        for name, coefficient in terms:
            sums[name] = sums.get(name, 0) + coefficient
        return Affine(tuple(sorted((n, c) for n, c in sums.items() if c)), constant)

    def __add__(self, other: Affine | str | int) -> Affine:
        if isinstance(other, int):
            return Affine(self.terms, self.constant + other)
        other = Affine.of(other)
        if not other.terms:
            return Affine(self.terms, self.constant + other.constant)
        return Affine.total((*self.terms, *other.terms), self.constant + other.constant)

    def __sub__(self, other: Affine | str | int) -> Affine:
        return self + Affine.of(other) * -1

    def __mul__(self, factor: int) -> Affine:
        return Affine(tuple([(n, c * factor) for n, c in self.terms]) if factor else (), self.constant * factor)

    @property
    def variables(self) -> frozenset[str]:
        """The names of the variables it depends on."""
        return frozenset(n for n, _ in self.terms)

    def coefficient(self, name: str) -> int:
        """The factor of ``name``, 0 where it is absent."""
        return next((c for n, c in self.terms if n == name), 0)

    def part(self, names: Iterable[str]) -> Affine:
        """The terms of the given variables, without the constant."""
        keep = set(names)
        return Affine(tuple(t for t in self.terms if t[0] in keep), 0)

    def substitute(self, values: Mapping[str, Affine]) -> Affine:
        """Replace variables by affine expressions."""
        if not any(n in values for n, _ in self.terms):
            return self
        terms: list[tuple[str, int]] = []
        constant = self.constant
        for name, coefficient in self.terms:
            if name in values:
                inner = values[name]
                terms += [(n, c * coefficient) for n, c in inner.terms]
                constant += inner.constant * coefficient
            else:
                terms.append((name, coefficient))
        return Affine.total(terms, constant)

    def bounds(self, extents: Mapping[str, int]) -> tuple[int, int]:
        """The least and greatest value (both inclusive) over ``0 <= var < extent``."""
        low = high = self.constant
        for name, coefficient in self.terms:
            step = coefficient * (extents[name] - 1)
            low += min(0, step)
            high += max(0, step)
        return low, high

    def evaluate(self, values: Mapping[str, int]) -> int:
        """Its value at a point."""
        return self.constant + sum(c * values[n] for n, c in self.terms)

    def __str__(self) -> str:
        text = ""
        for name, coefficient in sorted(self.terms, key=lambda t: (-abs(t[1]), t[0])):
            sign = "-" if coefficient < 0 else "+"
            body = name if abs(coefficient) == 1 else f"{abs(coefficient)} {name}"
            text += f" {sign} {body}" if text else (f"-{body}" if coefficient < 0 else body)
        if self.constant or not text:
            sign = "-" if self.constant < 0 else "+"
            text += f" {sign} {abs(self.constant)}" if text else str(self.constant)
        return text


Index = tuple[Affine, ...]


@dataclass(frozen=True, slots=True)
class StorageAxis:
    """One stored dimension: ``(index[axis] // step) % size``, ``stride`` elements apart."""

    axis: int
    step: int
    size: int
    stride: int


@dataclass(frozen=True)
class Tensor:
    """A named array. ``letters`` name its axes; ``border`` is the (before, after) frame of zeros of each;
    ``values`` are those of a constant, rows last."""

    name: str
    letters: tuple[str, ...]
    shape: tuple[int, ...]
    role: Role
    storage: tuple[StorageAxis, ...]
    border: tuple[tuple[int, int], ...] = ()
    values: tuple[float, ...] = ()

    @cached_property
    def elements(self) -> int:
        """Elements of storage, gaps between padded strides included."""
        return 1 + sum((a.size - 1) * a.stride for a in self.storage)

    def frame(self, axis: int) -> tuple[int, int]:
        """The border of one axis, (0, 0) where there is none."""
        return self.border[axis] if self.border else (0, 0)

    @property
    def order(self) -> tuple[str, ...]:
        """The storage order, as ``stage`` and ``layout`` take it: ``("n", "c/16", "h", "w", "c%16")``."""
        names = []
        for stored in self.storage:
            letter = self.letters[stored.axis]
            split = sum(other.axis == stored.axis for other in self.storage) > 1
            names.append(letter if not split else
                         f"{letter}/{stored.step}" if stored.step > 1 else f"{letter}%{stored.size}")
        return tuple(names)


def storage_of(letters: tuple[str, ...], shape: tuple[int, ...], order: tuple[str, ...] | None = None,
               align: Mapping[str, int] | None = None) -> tuple[StorageAxis, ...]:
    """Dense storage in ``order`` (default: as the axes stand), rows last.

    ``align`` gives, for an entry of ``order``, the multiple its stride is rounded up to.
    """
    parsed: list[tuple[str, int, int, int]] = []
    for entry in order or letters:
        letter = entry[0] if entry not in letters else entry
        rest = entry[len(letter):]
        axis = letters.index(letter)
        block = int(rest[1:]) if rest else 0
        if rest.startswith("%"):
            parsed.append((entry, axis, 1, block))
        elif rest.startswith("/"):
            parsed.append((entry, axis, block, -(-shape[axis] // block)))
        else:
            parsed.append((entry, axis, 1, shape[axis]))
    stored: list[StorageAxis] = []
    stride = 1
    for entry, axis, step, size in reversed(parsed):
        multiple = (align or {}).get(entry, 1)
        stride = -(-stride // multiple) * multiple
        stored.append(StorageAxis(axis, step, size, stride))
        stride *= size
    return tuple(reversed(stored))


@dataclass(frozen=True, slots=True)
class Load:
    """An element of a tensor."""

    tensor: str
    index: Index


@dataclass(frozen=True, slots=True)
class Const:
    """A float32 number."""

    number: float


@dataclass(frozen=True, slots=True)
class Op:
    """An operation of ``OPS`` on values."""

    name: str
    values: tuple[Value, ...]


Value = Load | Const | Op


@dataclass(frozen=True, slots=True)
class Store:
    """``tensor[index] = value`` where all of ``where`` are negative."""

    tensor: str
    index: Index
    value: Value
    where: tuple[Affine, ...] = ()


@dataclass(frozen=True, slots=True)
class Reduce:
    """``tensor[index] += value`` where all of ``where`` are negative."""

    tensor: str
    index: Index
    value: Value
    where: tuple[Affine, ...] = ()


@dataclass(frozen=True, slots=True)
class Loop:
    """``for var < extent: body``; of kind "digit", the body once, with ``var = of // step % extent``: ``extent`` is the
    number of values, and ``of`` is never negative."""

    var: str
    extent: int
    body: Body
    kind: Kind = "serial"
    ahead: tuple[tuple[str, int], ...] = ()
    of: Affine = Affine()
    step: int = 1

    @property
    def iterations(self) -> int:
        """How often the body runs."""
        return 1 if self.kind == "digit" else self.extent


Leaf = Store | Reduce
Statement = Loop | Store | Reduce
Body = tuple[Statement, ...]


@dataclass(frozen=True)
class Stage:
    """A named piece of a program; ``when="bind"`` runs once for given weights."""

    name: str
    body: Body
    when: When = "run"


@dataclass(frozen=True)
class Program:
    """Tensors and the stages that compute them."""

    name: str
    tensors: tuple[Tensor, ...]
    stages: tuple[Stage, ...]
    by_name: Mapping[str, Tensor] = field(init=False, repr=False, compare=False, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_name", {t.name: t for t in self.tensors})

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name."""
        return self.by_name[name]

    def with_body(self, change: Callable[[Body], Body]) -> Program:
        """The program with every stage's body changed; stages whose body stays the same object are kept."""
        bodies = [change(s.body) for s in self.stages]
        return replace(self, stages=tuple(s if body is s.body else replace(s, body=body)
                                          for s, body in zip(self.stages, bodies, strict=True)))

    def with_tensor(self, tensor: Tensor) -> Program:
        """The program with a tensor added, or replaced by name."""
        kept = [t for t in self.tensors if t.name != tensor.name]
        place = next((i for i, t in enumerate(self.tensors) if t.name == tensor.name), len(kept))
        return replace(self, tensors=(*kept[:place], tensor, *kept[place:]))


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
