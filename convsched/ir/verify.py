"""What a legal program is. ``verify`` raises at the first rule that is broken, naming stage and statement; ``stored``
has the proof that locals are stored before they are read.

A bound on an index may use the statement's conditions. With ``c < 0``, so ``c <= -1``, and any ``k > 0``,

    a = (a - k c) + k c  <=  max(a - k c) - k        a = (a + k c) - k c  >=  min(a + k c) + k

for instance ``a = 2 e + r`` with ``e = 14 e0 + e1`` and the condition ``14 e0 + e1 - 27 < 0``, ``k = 2``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

from convsched.errors import VerifyError
from convsched.ir.affine import Index
from convsched.ir.bounds import bounds_where
from convsched.ir.grammar import (
    OPS,
    Block,
    Body,
    Leaf,
    Let,
    Load,
    Loop,
    Op,
    Path,
    Program,
    Stage,
    Tensor,
    Value,
    leaves,
)
from convsched.ir.stored import unproved
from convsched.ir.text import print_statement


def verify(program: Program) -> None:
    """Raise VerifyError at the first rule of the IR that the program breaks."""
    _check_tensors(program)
    packed = {leaf.tensor for s in program.stages if s.when == "bind" for leaf in s.leaves}
    for stage in program.stages:
        _check_loops(stage, stage.body, {})
        for around, leaf in stage.paths:
            rule = next(_broken(program, stage, packed, around, leaf), None)
            if rule is not None:
                raise VerifyError(f"stage {stage.name}: {print_statement(leaf)}: {rule}")
    _check_registers(program)
    _check_stored(program)


def _check_tensors(program: Program) -> None:
    names = [t.name for t in program.tensors]
    for position, tensor in enumerate(program.tensors):
        if tensor.name in names[:position]:
            raise VerifyError(f"tensor {tensor.name}: there are two tensors of that name; give each its own")
        rule = _broken_tensor(tensor)
        if rule:
            raise VerifyError(f"tensor {tensor.name}: {rule}")


def _broken_tensor(tensor: Tensor) -> str | None:
    """The rule that a tensor's description breaks."""
    rank = len(tensor.shape)
    if len(tensor.letters) != rank or len(tensor.border) not in (0, rank):
        return (f"letters {tensor.letters}, shape {tensor.shape} and border {tensor.border} differ in length: "
                "give one of each for an axis")
    if any(size < 1 for size in tensor.shape):
        return f"the shape {tensor.shape} must be positive"
    if len(tensor.values) != (math.prod(tensor.shape) if tensor.role == "constant" else 0):
        return (f"it is {tensor.role} and has {len(tensor.values)} values: give a constant one for "
                "each element, and other tensors none")
    for axis, size in enumerate(tensor.shape):
        reach = 1
        for stored in sorted((s for s in tensor.storage if s.axis == axis), key=lambda s: s.step):
            if stored.step != reach:
                return f"the storage of axis {tensor.letters[axis]} has a step {stored.step} after {reach}"
            reach *= stored.size
        if reach < size:
            return f"the storage of axis {tensor.letters[axis]} holds {reach} of {size}"
    end = 1
    for stored in sorted(tensor.storage, key=lambda s: (s.stride, s.size)):
        if stored.size > 1 and stored.stride < end:
            return f"elements overlap: a stride of {stored.stride} within {end} elements"
        end += (stored.size - 1) * stored.stride
    return None


def _check_loops(stage: Stage, body: Body, around: Mapping[str, int], in_parallel: bool = False) -> None:
    """Raise at a loop or value that breaks a rule, given the extents of those around, and whether one is parallel."""
    for block in body:
        if not isinstance(block, Block):
            continue
        rule = _broken_value(block, around) if isinstance(block, Let) else _broken_loop(block, in_parallel)
        if block.extent < 1:
            rule = f"the extent {block.extent} must be positive"
        elif block.var in around:
            rule = f"it is inside another loop {block.var}: give one of them another name"
        if rule:
            kind = "let" if isinstance(block, Let) else f"{block.kind} loop"
            raise VerifyError(f"stage {stage.name}: {kind} {block.var} < {block.extent}: {rule}")
        _check_loops(stage, block.body, {**around, block.var: block.extent}, in_parallel or block.kind == "parallel")


def _broken_loop(loop: Loop, in_parallel: bool) -> str | None:
    """The rule that a loop breaks by its kind."""
    if loop.kind == "vector" and any(isinstance(s, Block) for s in loop.body):
        return "a vector loop may hold statements only: make it innermost"
    if loop.kind == "parallel" and in_parallel:
        return "it is inside another parallel loop: make one of them serial"
    return None


def _broken_value(value: Let, around: Mapping[str, int]) -> str | None:
    """The rule that a named digit breaks."""
    if value.step >= 1 and value.of.variables <= around.keys() and value.of.bounds(around)[0] >= 0:
        return None
    return (f"it is not a digit of {value.of}, step {value.step}: give an expression of loops around it that is never "
            "negative, and a step of at least 1")


def _broken(program: Program, stage: Stage, packed: set[str], around: Path,
            leaf: Leaf) -> Iterator[str]:
    """The rules that a statement breaks."""
    extents = {loop.var: loop.extent for loop in around}
    read = leaf.loads
    yield from _broken_names(program, leaf, extents)
    yield from _broken_ops(leaf.value)
    yield from _broken_roles(program, stage, packed, leaf, read)
    if any(w.bounds(extents)[0] >= 0 for w in leaf.where):
        return  # it never runs
    yield from _out_of_range(program.tensor(leaf.tensor), leaf.index, leaf.where, extents, is_load=False)
    for load in read:
        yield from _out_of_range(program.tensor(load.tensor), load.index, leaf.where, extents, is_load=True)


def _broken_names(program: Program, leaf: Leaf, extents: Mapping[str, int]) -> Iterator[str]:
    for name, index in leaf.accesses:
        if name not in program.by_name:
            yield f"there is no tensor {name}"
        elif len(index) != len(program.tensor(name).shape):
            yield f"{name} has {len(program.tensor(name).shape)} axes, not {len(index)}: give an index for each"
    for name in sorted(leaf.variables - extents.keys()):
        yield f"no loop {name} is around it: use variables of loops that are"


def _broken_ops(value: Value) -> Iterator[str]:
    if not isinstance(value, Op):
        return
    if value.name not in OPS:
        yield f"{value.name} is not an operation; use one of {', '.join(OPS)}"
    elif len(value.values) != OPS[value.name]:
        yield f"{value.name} takes {OPS[value.name]} operands, not {len(value.values)}"
    for operand in value.values:
        yield from _broken_ops(operand)


def _broken_roles(program: Program, stage: Stage, packed: set[str], leaf: Leaf,
                  read: Iterable[Load]) -> Iterator[str]:
    role = program.tensor(leaf.tensor).role
    if role in ("input", "weight", "constant"):
        yield f"it stores to {leaf.tensor}, which is {role}: store to an output, a local or a register tensor"
    if stage.when == "run":
        if leaf.tensor in packed:
            yield f"it stores to {leaf.tensor}, which a bind stage has stored: store to another tensor"
        return
    if role != "local":
        yield f"a bind stage stores to local tensors only, and {leaf.tensor} is {role}"
    for load in read:
        if program.tensor(load.tensor).role not in ("weight", "constant") and load.tensor not in packed:
            yield f"a bind stage reads weights and what bind stages stored, not {load.tensor}"


def _out_of_range(tensor: Tensor, index: Index, where: Index, extents: Mapping[str, int],
                  is_load: bool) -> Iterator[str]:
    for axis, a in enumerate(index):
        before, after = tensor.frame(axis) if is_load else (0, 0)
        low, high = bounds_where(a, where, extents)
        if low < -before or high >= tensor.shape[axis] + after:
            verb = "load from" if is_load else "store to"
            yield (f"{verb} {tensor.name}: axis {tensor.letters[axis]} has the index {a} in [{low}, {high}], "
                   f"out of [{-before}, {tensor.shape[axis] + after - 1}]")


def _check_registers(program: Program) -> None:
    """Each register tensor belongs to one loop nest: one outermost statement of one stage."""
    homes: dict[str, tuple[int, int]] = {}
    for number, stage in enumerate(program.stages):
        for position, statement in enumerate(stage.body):
            for _, leaf in leaves((statement,)):
                for name in (leaf.tensor, *(load.tensor for load in leaf.loads)):
                    if program.tensor(name).role != "register":
                        continue
                    if homes.setdefault(name, (number, position)) != (number, position):
                        raise VerifyError(f"stage {stage.name}: {print_statement(leaf)}: the register tensor "
                                          f"{name} is also used in another loop nest; use a local tensor, "
                                          "or a register tensor for each nest")


def _check_stored(program: Program) -> None:
    """What is read of local and register tensors was stored before."""
    found = unproved(program)
    if found is not None:
        place = ", ".join(map(str, found.index))
        raise VerifyError(
            f"stage {found.stage.name}: {print_statement(found.leaf)}: it reads {found.tensor}[{place}], and no proof "
            "is found that each element was stored before: store all that is read, in an earlier statement of the same "
            "iteration or in a loop that is through, under no guard that the read has not")
