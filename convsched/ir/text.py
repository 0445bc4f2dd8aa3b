"""Prints a program the way a person writes loops.

    Linear(...)
      input x[n < 1, c < 64]
      weight w[m < 100, c < 64]
      output y[n < 1, m < 100] stored n m/16 m%16

    conv:
      parallel m0 < 7: for n < 1: for c < 64:
        vector m1 < 16:
          if 16 m0 + m1 < 100: y[n, 16 m0 + m1] += x[n, c] * w[16 m0 + m1, c]

Perfectly nested loops share a line; consecutive ``unroll`` or ``vector`` loops share the word. The same
program always gives the same text.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import assert_never

from convsched.ir.affine import Affine, Index
from convsched.ir.grammar import (
    Block,
    Body,
    Const,
    Leaf,
    Let,
    Load,
    Loop,
    Op,
    Program,
    Reduce,
    Stage,
    Tensor,
    Value,
    leaves,
    storage_of,
)

WIDTH = 110  # columns

_WORDS = {"serial": "for", "unroll": "unroll", "vector": "vector", "parallel": "parallel", "let": "with"}
_INFIX = {"add": ("+", 1), "sub": ("-", 1), "mul": ("*", 2), "div": ("/", 2)}  # sign, how tightly it binds
_NEG, _ATOM = 3, 4


def print_nest(program: Program, mark: str | None = None) -> str:
    """The program as text; lines with a loop named ``mark`` end in an arrow."""
    used = {name for stage in program.stages for _, leaf in leaves(stage.body)
            for name in (leaf.tensor, *(load.tensor for load in leaf.loads))}
    tensors = [f"  {print_tensor(t)}" for t in program.tensors if t.name in used]
    paragraphs = ["\n".join([program.name, *tensors])]
    paragraphs += ["\n".join(_stage(stage, mark)) for stage in program.stages]
    return "\n\n".join(paragraphs)


def print_tensor(tensor: Tensor) -> str:
    """One line: role, name, axes, and the storage and border where they are not the plain ones.

    >>> storage = storage_of(("c", "h"), (64, 9), ("h", "c"))
    >>> print_tensor(Tensor("x", ("c", "h"), (64, 9), "input", storage, ((0, 0), (1, 2))))
    'input x[c < 64, h < 9] stored h c, border h 1 2'
    """
    axes = ", ".join(f"{letter} < {size}" for letter, size in zip(tensor.letters, tensor.shape, strict=True))
    text = f"{tensor.role} {tensor.name}[{axes}]"
    if tensor.storage != storage_of(tensor.letters, tensor.shape):
        text += f" stored {' '.join(_storage(tensor))}"
    frames = [f"{letter} {tensor.frame(axis)[0]} {tensor.frame(axis)[1]}"
              for axis, letter in enumerate(tensor.letters) if tensor.frame(axis) != (0, 0)]
    return text + (f", border {', '.join(frames)}" if frames else "")


def _storage(tensor: Tensor) -> Iterator[str]:
    """The order of storage, with ``:stride`` where it is not the dense one."""
    for position, (entry, stored) in enumerate(zip(tensor.order, tensor.storage, strict=True)):
        inner = tensor.storage[position + 1:]
        dense = inner[0].stride * inner[0].size if inner else 1
        yield entry if stored.stride == dense else f"{entry}:{stored.stride}"


def _stage(stage: Stage, mark: str | None) -> Iterator[str]:
    yield f"{stage.name} (bind):" if stage.when == "bind" else f"{stage.name}:"
    yield from _body(stage.body, 1, mark)


def _body(body: Body, depth: int, mark: str | None) -> Iterator[str]:
    for statement in body:
        if isinstance(statement, Block):
            yield from _loops(statement, depth, mark)
        else:
            yield from _wrapped(print_statement(statement), depth)


def _loops(outermost: Loop | Let, depth: int, mark: str | None) -> Iterator[str]:
    """A chain of perfectly nested loops: run-time loops on one line, unrolled and vector ones on the next."""
    chain = [outermost]
    while len(body := chain[-1].body) == 1 and isinstance(body[0], Block):
        chain.append(body[0])
    for _, group in groupby(chain, key=lambda found: found.kind in ("unroll", "vector")):
        line: list[Loop | Let] = []
        for found in group:
            if line and 2 * depth + len(_header([*line, found])) > WIDTH:
                yield _marked(line, depth, mark)
                depth, line = depth + 1, []
            line.append(found)
        yield _marked(line, depth, mark)
        depth += 1
    yield from _body(chain[-1].body, depth, mark)


def _marked(line: Sequence[Loop | Let], depth: int, mark: str | None) -> str:
    arrow = " <--" if any(loop.var == mark for loop in line) else ""
    return "  " * depth + _header(line) + arrow


def _header(line: Sequence[Loop | Let]) -> str:
    parts = []
    for kind, group in groupby(line, key=lambda block: block.kind):
        bounds = [f"{block.var} < {block.extent}{_rest(block)}" for block in group]
        word = _WORDS[kind]
        parts += [f"{word} {', '.join(bounds)}:"] if kind in ("unroll", "vector") else [
            f"{word} {bound}:" for bound in bounds]
    return " ".join(parts)


def _rest(block: Loop | Let) -> str:
    """What a loop fetches ahead of its use; what a value is: ``e < 7 = p / 7`` is ``e = p // 7 % 7``."""
    if isinstance(block, Loop):
        return "".join(f" ({tensor} {iterations} ahead)" for tensor, iterations in block.ahead)
    of, step = block.of, block.step
    text = f"({of})" if step > 1 and (len(of.terms) > 1 or of.constant) else str(of)
    return f" = {text} / {step}" if step > 1 else f" = {text}"


def _wrapped(text: str, depth: int) -> list[str]:
    """Lines that break at operators, never inside an index."""
    indent = "  " * depth
    joined = re.sub(r"\[[^]]*\]", lambda index: index[0].replace(" ", "\0"), text)
    lines = textwrap.wrap(joined, max(WIDTH, len(indent) + 40), initial_indent=indent,
                          subsequent_indent=f"{indent}    ", break_long_words=False, break_on_hyphens=False)
    return [line.replace("\0", " ") for line in lines]


def print_statement(leaf: Leaf) -> str:
    """A statement on one line, behind its condition.

    >>> index = (Affine.of("m0") * 16 + "m1",)
    >>> print_statement(Reduce("y", index, Load("x", index), (index[0] - 100,)))
    'if 16 m0 + m1 < 100: y[16 m0 + m1] += x[16 m0 + m1]'
    """
    sign = "+=" if isinstance(leaf, Reduce) else "="
    text = f"{_access(leaf.tensor, leaf.index)} {sign} {print_value(leaf.value)}"
    return f"if {' and '.join(map(print_condition, leaf.where))}: {text}" if leaf.where else text


def print_condition(condition: Affine) -> str:
    """``condition < 0`` with its constant on the right.

    >>> print_condition(Affine.of("f") - 5), print_condition(Affine.of(5) - "f")
    ('f < 5', 'f > 5')
    """
    if condition.terms and all(c < 0 for _, c in condition.terms):
        return f"{Affine(condition.terms) * -1} > {condition.constant}"
    return f"{Affine(condition.terms)} < {-condition.constant}"


def print_value(value: Value) -> str:
    """A value with no more brackets than it needs.

    >>> a, b = Load("a", ()), Load("b", (Affine.of("i"),))
    >>> print_value(Op("sub", (a, Op("add", (b, Op("mul", (a, Op("max", (Const(0.0), b)))))))))
    'a - (b[i] + a * max(0, b[i]))'
    """
    return _value(value)[0]


def _value(value: Value) -> tuple[str, int]:
    """The text of a value and how tightly its outermost operation binds."""
    match value:
        case Load(tensor, index):
            return _access(tensor, index), _ATOM
        case Const(number):
            return f"{number:.9g}", _NEG if number < 0 else _ATOM
        case Op("neg", (operand,)):
            return f"-{_bracketed(operand, _ATOM)}", _NEG
        case Op("select_positive", (test, above, below)):
            test_text = f"{_bracketed(test, 1)} > 0"
            return f"select({test_text}, {print_value(above)}, {print_value(below)})", _ATOM
        case Op(name, (left, right)) if name in _INFIX:
            sign, binding = _INFIX[name]
            return f"{_bracketed(left, binding)} {sign} {_bracketed(right, binding + 1)}", binding
        case Op(name, operands):
            return f"{name}({', '.join(map(print_value, operands))})", _ATOM
        case _:
            assert_never(value)


def _bracketed(value: Value, binding: int) -> str:
    text, own = _value(value)
    return text if own >= binding else f"({text})"


def _access(tensor: str, index: Index) -> str:
    return f"{tensor}[{', '.join(map(str, index))}]" if index else tensor
