"""What every step checks before and after: the names it is given, and the nest it leaves.

All of them raise ``ScheduleError`` with the nest printed and the loop marked. The limits keep a compilation
within minutes: the time of the compiler grows with the square of the statements of one block of code.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from convsched.errors import ScheduleError
from convsched.ir import (
    Affine,
    Block,
    Body,
    Leaf,
    Let,
    Load,
    Loop,
    Program,
    Stage,
    Store,
    leaves,
    loop_names,
    matrix_of,
)
from convsched.ir.address import offset
from convsched.ir.text import print_nest
from convsched.ir.walk import indices
from convsched.schedule.legality import race
from convsched.schedule.step import Step

DEPTH = 20  # the most loops around a statement, as Python nests no more; recipes have up to 15
COPIES = 512  # the most statements of a nest, as printed; recipes have up to 40
LANES = 512  # the most iterations of a vector loop; recipes have one vector, at most 16
STATEMENTS = 16384  # the most statements, with their tests, that unrolled loops write out: 2 s of LLVM or less
REGISTERS = 65536  # the most elements of all register tensors: 256 KiB of stack; recipes have up to 512
PADDING = 256  # the most a schedule may add: elements of a buffer for one that is used, or statements run for one
ALLOWANCE = 2**20  # elements (4 MiB) or statements (1 ms) that are few enough whatever is added
_VECTOR = 16  # lanes of the widest vector instruction: a longer vector loop is several statements


def fail(program: Program, step: Step | str, why: str, fix: str, mark: str | None = None) -> ScheduleError:
    """The error of a step, or of what several gave, with the nest printed and a loop marked."""
    return ScheduleError(str(step), why, fix, print_nest(program, mark))


def require_loop(program: Program, step: Step, name: str) -> None:
    """Raise unless some stage has a loop of that name."""
    stages = [stage for stage in program.stages if name in stage.facts.names]
    if not stages:
        known = ", ".join(dict.fromkeys(n for stage in program.stages for n in loop_names(stage.body)))
        raise fail(program, step, f"there is no loop {name}", f"use one of {known}")
    if any(isinstance(block, Let) and block.var == name for stage in stages if "let" in stage.facts.kinds
           for path, _ in stage.paths for block in path):
        raise fail(program, step, f"{name} is a digit of other loops", "name one of these, or inline later", name)


def require_new(program: Program, step: Step, names: Sequence[str], loop: str) -> None:
    """Raise if one of the names is a loop's already in a nest that has ``loop``, or they are not distinct
    identifiers."""
    for position, name in enumerate(names):
        if not name.replace(".", "_").isidentifier():
            raise fail(program, step, f"{name!r} is not a name", "use letters, digits, _ and .")
        if name == "root":
            raise fail(program, step, "root is where stage copies once, before all loops", "use another name")
        if name in names[:position]:
            raise fail(program, step, f"{name} is named twice", "use two names")
        if any({name, loop} <= nest.facts.names for stage in program.stages for nest in stage.body):
            raise fail(program, step, f"a loop {name} exists already", "choose another name", name)


def checked(before: Program, step: Step, after: Program) -> Program:
    """The program after a step, if loops still hold what they may, and weights are packed by plain copies."""
    facts = [stage.facts for stage in after.stages]
    depth = max([found.depth for found in facts])
    if depth > DEPTH:
        deepest = next(stage for stage in after.stages if stage.facts.depth == depth)
        outermost = max((s for s in deepest.body if isinstance(s, Block)), key=lambda block: block.facts.depth)
        raise fail(before, step, f"{depth} loops would be around a statement", f"leave at most {DEPTH}",
                   outermost.var)
    copies = sum([found.statements for found in facts])
    if copies > COPIES:
        raise fail(before, step, f"the nest would have {copies} statements", f"peel less: at most {COPIES}")
    known = {id(stage) for stage in before.stages}
    for stage in (stage for stage in after.stages if id(stage) not in known):
        is_plain = stage.facts.is_nested_well and "let" not in stage.facts.kinds
        found = None if is_plain else _misplaced(stage.body)
        if found is not None:
            loop, why, fix = found
            raise fail(before, step, why, fix, loop)
        is_new = stage.when == "bind" and stage not in before.stages
        broken = _broken_packing(after, stage) if is_new else None
        if broken is not None:
            why, fix = broken
            raise fail(before, step, f"stage {stage.name!r} runs when weights are bound and {why}", fix)
    shared = race(after)
    if shared is not None:
        loop, tensor = shared
        raise fail(before, step, f"threads that share out {loop} would meet in {tensor} without waiting for "
                   "each other", "make parallel a loop that all uses of it are inside", loop)
    return after


def _misplaced(body: Body, parallel: str | None = None,
               around: frozenset[str] = frozenset()) -> tuple[str, str, str] | None:
    """A loop where its kind may not be: its name, the rule, and the fix."""
    for loop in body:
        if not isinstance(loop, Block):
            continue
        if isinstance(loop, Let) and not loop.of.variables <= around:
            outside = min(loop.of.variables - around)
            return (loop.var, f"{loop.var} would be outside {outside}, of which it is a digit",
                    "inline after the loops are in order")
        inside = next((s.var for s in loop.body if isinstance(s, Block)), None)
        if loop.kind == "vector" and inside is not None:
            return (loop.var, f"{inside} would be inside the vector loop {loop.var}, which may hold "
                    "statements only", "vectorize last, and the innermost loop")
        if loop.kind == "parallel" and parallel is not None:
            return (loop.var, f"{loop.var} would be parallel inside the parallel loop {parallel}",
                    "make one of them parallel")
        found = _misplaced(loop.body, loop.var if loop.kind == "parallel" else parallel, around | {loop.var})
        if found is not None:
            return found
    return None


def _broken_packing(program: Program, stage: Stage) -> tuple[str, str] | None:
    """Why a stage is not a copy that is a view of the weights with other strides, and the fix; None if it is one."""
    (loops, statement), *others = leaves(stage.body)
    if (others or not isinstance(statement, Store) or not isinstance(statement.value, Load)
            or any(a.constant for a in statement.index)):
        return "would be more than a copy", "leave it a single copy"
    target, source = program.tensor(statement.tensor), program.tensor(statement.value.tensor)
    extents = {loop.var: loop.extent for loop in loops}
    ends = {a - size for a, size in zip(statement.value.index, source.shape, strict=True)}
    inside = all(a.bounds(extents)[1] < size for a, size in zip(statement.index, target.shape, strict=True))
    if not inside or not ends.issuperset(statement.where):
        return "would be cut short by a guard", "split its loops into equal parts"
    return None


def bounded(before: Program, program: Program) -> Program:
    """A finished program, if what it writes out can be compiled (unrolled loops, vectors and registers), and runs
    not many more statements than the unscheduled one: each ragged split may double them."""
    counts = _written(program)
    for loop in (loop for _, path in counts for loop in path):
        if loop.kind == "vector" and loop.extent > LANES:
            raise fail(program, f"vectorize {loop.var}", f"{loop.var} has {loop.extent} iterations",
                       f"split it first: a vector loop has at most {LANES}", loop.var)
    total = sum(count for count, _ in counts)
    if total > STATEMENTS:
        unrolled = [loop for loop in max(counts, key=lambda found: found[0])[1] if loop.kind == "unroll"]
        names = " ".join(loop.var for loop in unrolled)
        step, mark = ((f"unroll {names}", max(unrolled, key=lambda loop: loop.extent).var) if unrolled else
                      ("schedule", None))
        raise fail(program, step, f"{total} statements would be written out, tests of borders and remainders counted",
                   f"unroll fewer or shorter loops, or peel less: at most {STATEMENTS}", mark)
    elements = sum(t.elements for t in program.tensors if t.role == "register")
    if elements > REGISTERS:
        names = " ".join(t.name for t in program.tensors if t.role == "register")
        raise fail(program, f"stage {names} in registers", f"they would have {elements} elements",
                   f"stage a smaller tile: at most {REGISTERS}")
    runs, needed = _runs(program), _runs(before)
    if runs > max(ALLOWANCE, needed * PADDING):
        raise fail(program, "schedule", f"{runs} statements would run where the nest without it runs {needed}",
                   f"use factors that divide: at most {PADDING} times as many")
    return program


def _tests(program: Program, path: Sequence[Loop | Let], leaf: Leaf) -> int:
    """How many tests each written statement has: of guards and of borders that a run-time loop decides, and of each
    lane of a gather or scatter."""
    extents = {loop.var: loop.extent for loop in path}
    running = {loop.var for loop in path if loop.kind not in ("unroll", "vector") and loop.extent > 1}
    lanes = {loop.var: loop.extent for loop in path if loop.kind == "vector"}
    ends, scattered = set(leaf.where), 0
    for name, index in indices(leaf):
        tensor = program.tensor(name)
        if tensor.role in ("register", "constant"):
            continue
        if tensor.border:
            ends |= {end for a, size in zip(index, tensor.shape, strict=True) if not running.isdisjoint(a.variables)
                     for end in (Affine() - a - 1, a - size)}
        if any(name in lanes for a in index for name, _ in a.terms):
            rest = offset(tensor, index, extents).rest
            scattered += max((lanes[var] for a, *_ in rest for var in a.variables if var in lanes), default=0)
    return scattered + sum(1 for end in ends if end.variables & running and end.bounds(extents)[1] >= 0)


def written(program: Program) -> int:
    """How many statements a program writes out, unrolled loops and tests of borders and remainders counted."""
    return sum(count for count, _ in _written(program))


def _written(program: Program) -> list[tuple[int, Sequence[Loop | Let]]]:
    return [(_statements(program, path, leaf) * (1 + _tests(program, path, leaf)), path)
            for stage in program.stages for path, leaf in stage.paths]


def _runs(program: Program) -> int:
    """How many statements run, those that a guard turns off included."""
    return sum(prod(loop.iterations for loop in path) for stage in program.stages for path, _ in stage.paths)


def _statements(program: Program, path: Sequence[Loop | Let], leaf: Leaf) -> int:
    """How often a statement is written out; a vector loop longer than an instruction counts as several, and a product
    with the zero of a matrix does not count."""
    lanes = prod(loop.extent for loop in path if loop.kind == "vector")
    unrolled = {loop.var: loop.extent for loop in path if loop.kind == "unroll"}
    count = prod(unrolled.values()) * -(-lanes // _VECTOR)
    matrix = matrix_of(program, leaf)
    if matrix is None or not {v for a in matrix.index for v in a.variables} <= unrolled.keys():
        return count
    values = program.tensor(matrix.tensor).values
    return count * sum(map(bool, values)) // len(values)
