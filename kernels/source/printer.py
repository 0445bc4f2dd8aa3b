"""A scheduled nest as Python source: the second backend, for reading, for other machines, as a check.

One function, ``run(*buffers, thread, threads)``, over flat float32 arrays in physical storage, in the order
of ``arguments(program)``. It runs un-jitted and under ``numba.njit`` with the same result: every operation
is a float32 one, in the order of the program. A parallel loop runs the iterations ``extent * thread //
threads`` up to ``extent * (thread + 1) // threads``; what lies outside parallel loops runs in every thread.
"""

from __future__ import annotations

import hashlib
import keyword
import linecache
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, assert_never

import numpy as np
import numpy.typing as npt

from convsched.errors import MachineError
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
    Tensor,
    Value,
    leaves,
    loads,
    loop_names,
)
from convsched.ir.address import offset
from convsched.ir.bounds import bounds_where
from convsched.ir.interp import evaluate_bind, from_storage, to_storage
from convsched.kernels.signature import arguments
from convsched.machine import cache_folder

_RESERVED = {"np", "math", "range", "min", "max", "run", "thread", "threads", *keyword.kwlist}
_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
_EXP_LIMIT = 700.0  # math.exp raises OverflowError from 709.8 on; e^700 is infinite in float32


def source(program: Program) -> str:
    """The run stages of a program as a Python module; the same program gives the same text."""
    printer = _Printer(program)
    stages = [stage for stage in program.stages if stage.when == "run"]
    used = {name for stage in stages for _, leaf in leaves(stage.body)
            for name in (leaf.tensor, *(load.tensor for load in loads(leaf.value)))}
    buffers = [printer.names[t.name] for t in arguments(program)]
    constants = [f"{printer.names[t.name]} = np.array([{', '.join(map(repr, t.values))}], np.float32)"
                 for t in program.tensors if t.role == "constant" and t.name in used]
    lines = ["import math", "", "import numpy as np", "", *constants, "",
             f"def run({', '.join([*buffers, 'thread', 'threads'])}):", f'    """{program.name}"""']
    lines += [f"    {printer.names[t.name]} = np.empty({t.elements}, np.float32)"
              for t in program.tensors if t.role == "register" and t.name in used]
    for stage in stages:
        lines += [f"    # {stage.name}", *printer.body(stage.body, {}, 1)]
    return "\n".join([*lines, ""])


def load_source(text: str, jit: bool) -> Callable[..., None]:
    """The function ``run`` of a module that ``source`` wrote, compiled by Numba if ``jit``.

    The text is kept in the cache folder, so that tracebacks and debuggers show it; where the folder cannot
    be written, they take it from memory.
    """
    digest = hashlib.sha256(text.encode()).hexdigest()[:24]
    file = _write(text, f"{digest}.py")
    if file is None:
        file = f"<convsched {digest}>"
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    namespace: dict[str, Any] = {"__name__": f"convsched_source_{digest}"}
    exec(compile(text, file, "exec"), namespace)
    run: Callable[..., None] = namespace["run"]
    if not jit:
        return np.errstate(all="ignore")(run)  # as compiled code, which has infinities and NaN without a warning
    import numba

    compiled: Callable[..., None] = numba.njit(error_model="numpy")(run)
    return compiled


def run_source(program: Program, arrays: Mapping[str, npt.NDArray[Any]], jit: bool = False,
               threads: int = 1) -> dict[str, npt.NDArray[np.float32]]:
    """The outputs of a program by its source, from logical arrays: binds, runs one thread after another."""
    bound = evaluate_bind(program, arrays)
    buffers: dict[str, npt.NDArray[np.float32]] = {}
    for tensor in arguments(program):
        if tensor.role in ("input", "weight"):
            buffers[tensor.name] = to_storage(tensor, np.asarray(arrays[tensor.name], np.float32))
        else:
            unset = 0.0 if tensor.role == "output" else np.nan  # no element of a local is read before it is stored
            buffers[tensor.name] = bound.get(tensor.name, np.full(tensor.elements, unset, np.float32))
    run = load_source(source(program), jit)
    for thread in range(threads):
        run(*buffers.values(), thread, threads)
    return {t.name: from_storage(t, buffers[t.name]) for t in arguments(program) if t.role == "output"}


def _write(text: str, name: str) -> str | None:
    """The path of a file of the cache folder that holds the text; None if it cannot be written."""
    data = text.encode()
    try:
        file = cache_folder() / "source" / name
        if file.exists() and file.read_bytes() == data:
            return str(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=name, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
            Path(temporary).replace(file)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise
    except (OSError, MachineError):
        return None
    return str(file)


class _Printer:
    """Prints statements with loop and tensor names that are distinct Python identifiers."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.names: dict[str, str] = {}
        self.variables: dict[str, str] = {}
        taken = set(_RESERVED)
        for tensor in program.tensors:
            self.names[tensor.name] = _identifier(tensor.name, taken)
        for stage in program.stages:
            for name in loop_names(stage.body):
                if name not in self.variables:
                    self.variables[name] = _identifier(name, taken)

    def body(self, body: Body, extents: Mapping[str, int], depth: int) -> Iterator[str]:
        """The lines of statements inside loops of ``extents``."""
        indent = "    " * depth
        for statement in body:
            if isinstance(statement, Let):
                quotient = f"({self.affine(statement.of)}) // {statement.step}"
                yield f"{indent}{self.variables[statement.var]} = {quotient} % {statement.extent}"
                yield from self.body(statement.body, {**extents, statement.var: statement.extent}, depth)
            elif isinstance(statement, Loop):
                yield f"{indent}for {self.variables[statement.var]} in range({_share(statement)}):"
                yield from self.body(statement.body, {**extents, statement.var: statement.extent}, depth + 1)
            elif statement.where:
                yield f"{indent}if {' and '.join(map(self.condition, statement.where))}:"
                yield f"{indent}    {self.statement(statement, extents)}"
            else:
                yield f"{indent}{self.statement(statement, extents)}"

    def statement(self, leaf: Leaf, extents: Mapping[str, int]) -> str:
        target = self.element(self.program.tensor(leaf.tensor), leaf.index, extents)
        sign = "+=" if isinstance(leaf, Reduce) else "="
        value = self.value(leaf.value, leaf.where, extents)
        if isinstance(leaf.value, Op) and leaf.value.name in _INFIX:
            value = value[1:-1]  # the brackets of the outermost operation
        return f"{target} {sign} {value}"

    def value(self, value: Value, where: Index, extents: Mapping[str, int]) -> str:
        """A value in brackets, unless it is a single term."""
        match value:
            case Const(number):
                return _constant(number)
            case Load(name, index):
                return self.load(self.program.tensor(name), index, where, extents)
            case Op(name, operands):
                return _operation(name, [self.value(operand, where, extents) for operand in operands])
            case _:
                assert_never(value)

    def load(self, tensor: Tensor, index: Index, where: Index, extents: Mapping[str, int]) -> str:
        """An element, or zero in the border; tests only the sides that the index can pass."""
        tests = []
        for axis, a in enumerate(index):
            if tensor.frame(axis) == (0, 0):
                continue
            low, high = bounds_where(a, where, extents)
            if low < 0:
                tests.append(f"{self.affine(Affine(a.terms))} >= {-a.constant}")
            if high >= tensor.shape[axis]:
                tests.append(self.condition(a - tensor.shape[axis]))
        element = self.element(tensor, index, extents)
        return f"({element} if {' and '.join(tests)} else {_constant(0.0)})" if tests else element

    def element(self, tensor: Tensor, index: Index, extents: Mapping[str, int]) -> str:
        found = offset(tensor, index, extents)
        parts = [self.affine(found.affine)] if found.affine != Affine() or not found.rest else []
        for a, step, size, stride in found.rest:
            quotient = f" // {step}" if step > 1 else ""
            parts.append(f"({self.affine(a)}){quotient} % {size} * {stride}")
        return f"{self.names[tensor.name]}[{' + '.join(parts)}]"

    def condition(self, condition: Affine) -> str:
        return f"{self.affine(Affine(condition.terms))} < {-condition.constant}"

    def affine(self, a: Affine) -> str:
        """An affine expression, greatest strides first."""
        text = ""
        for name, c in sorted(a.terms, key=lambda term: (-abs(term[1]), term[0])):
            term = self.variables[name] if abs(c) == 1 else f"{abs(c)} * {self.variables[name]}"
            sign = "-" if c < 0 else "+"
            text += f" {sign} {term}" if text else (f"-{term}" if c < 0 else term)
        if not text:
            return str(a.constant)
        return text + (f" {'-' if a.constant < 0 else '+'} {abs(a.constant)}" if a.constant else "")


def _identifier(name: str, taken: set[str]) -> str:
    """A Python identifier like ``name`` that is not taken yet."""
    found = "".join(letter if letter.isalnum() else "_" for letter in name)
    found = f"_{found}" if found[:1].isdigit() else found
    while found in taken:
        found += "_"
    taken.add(found)
    return found


def _share(loop: Loop) -> str:
    if loop.kind != "parallel":
        return str(loop.extent)
    return f"{loop.extent} * thread // threads, {loop.extent} * (thread + 1) // threads"


def _constant(number: float) -> str:
    if math.isfinite(number):
        return f"np.float32({number!r})"
    return "np.float32(np.nan)" if math.isnan(number) else f"np.float32({'-' if number < 0 else ''}np.inf)"


def _operation(name: str, operands: list[str]) -> str:
    """An operation in float32. ``max(b, a)`` of Python is ``a if a > b else b``: a NaN in b passes."""
    match name, operands:
        case ("max" | "min"), [a, b]:
            return f"{name}({b}, {a})"
        case "exp", [a]:
            return f"np.float32(math.exp(min(np.float64({a}), {_EXP_LIMIT})))"
        case "neg", [a]:
            return f"(-{a})"
        case "select_positive", [a, b, c]:
            return f"({b} if {a} > 0 else {c})"
        case _, [a, b]:
            return f"({a} {_INFIX[name]} {b})"
    raise AssertionError(f"{name} with {len(operands)} operands passed the verifier")
