"""LLVM IR as text: fresh names, blocks, scopes with hoisted pointers, declarations.

A scope is the body of one run-time loop. A pointer that depends on the loops down to some scope is computed
once at the start of that scope's body, so that the innermost loop only adds constants to it. It passes through an empty
piece of assembler, which hides how it was computed: LLVM's pass over loops (strength reduction) would otherwise take
every constant distance from it for a pointer of its own, run out of registers and reload them in the innermost loop.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

ZEROS = "@zeros"  # a vector of zeros, of any width


@dataclass
class Scope:
    """The body of a run-time loop; ``hoisted`` lines stand at its start."""

    hoisted: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    pointers: dict[tuple[str, str, int], str] = field(default_factory=dict)
    conditions: dict[tuple[object, ...], str] = field(default_factory=dict)
    digits: dict[tuple[object, ...], str] = field(default_factory=dict)
    ready: dict[tuple[object, ...], str] = field(default_factory=dict)  # pointers by what they depend on


def float_literal(number: float) -> str:
    """A float32 as LLVM writes it: the bits of the equal double.

    >>> float_literal(1.0)
    '0x3FF0000000000000'
    """
    single = struct.unpack("f", struct.pack("f", number))[0]
    return f"0x{struct.unpack('>Q', struct.pack('>d', single))[0]:016X}"


class Writer:
    """Builds one function's text."""

    def __init__(self) -> None:
        self.counter = 0
        self.scopes = [Scope()]
        self.lines = self.scopes[0].lines  # where lines go
        self.pointers = self.scopes[0].ready
        self.depths: dict[str, int] = {}  # the scope of each variable: its loop, or where a digit is computed
        self.label = "entry"
        self.declarations: set[str] = set()
        self.globals: dict[str, str] = {}

    def fresh(self, stem: str = "v") -> str:
        """A new SSA name."""
        self.counter += 1
        return f"%{stem}{self.counter}"

    def line(self, text: str) -> None:
        """Append a line to the innermost scope."""
        self.lines.append(text)

    def let(self, expression: str) -> str:
        """``%new = expression``."""
        self.counter += 1
        name = f"%v{self.counter}"
        self.lines.append(f"  {name} = {expression}")
        return name

    def start_block(self, label: str) -> None:
        """Begin a basic block in the innermost scope."""
        self.line(f"{label}:")
        self.label = label

    def declare(self, text: str) -> None:
        """Declare an intrinsic."""
        self.declarations.add(f"declare {text}")

    def zeros(self) -> str:
        """The address of a vector of zeros."""
        self.globals[ZEROS] = f"{ZEROS} = private unnamed_addr constant [16 x float] zeroinitializer, align 64"
        return ZEROS

    def depth(self, terms: Sequence[tuple[str, str, int]]) -> int:
        """The innermost scope of a sum of terms (var, value, coefficient)."""
        return max([self.depths[var] for var, _, _ in terms], default=0)

    def open_scope(self, var: str) -> None:
        """Begin the body of a run-time loop."""
        self.depths[var] = len(self.scopes)
        self.scopes.append(Scope())
        self._write_to_innermost()

    def close_scope(self) -> Scope:
        """End the body of a run-time loop."""
        scope = self.scopes.pop()
        self._write_to_innermost()
        return scope

    def _write_to_innermost(self) -> None:
        self.lines, self.pointers = self.scopes[-1].lines, self.scopes[-1].ready

    @contextmanager
    def at_start(self, depth: int) -> Iterator[None]:
        """Lines written meanwhile stand at the start of a scope's body."""
        lines, self.lines = self.lines, self.scopes[depth].hoisted
        try:
            yield
        finally:
            self.lines = lines

    def pointer(self, base: str, terms: list[tuple[str, str, int]]) -> str:
        """``base + sum(coefficient * value)`` floats, each term (var, value, coefficient) in its scope."""
        for var, value, coefficient in sorted(terms, key=lambda term: self.depths[term[0]]):
            scope = self.scopes[self.depths[var]]
            key = (base, value, coefficient)
            if key not in scope.pointers:
                offset, moved, kept = self.fresh("o"), self.fresh("p"), self.fresh("p")
                scope.hoisted.append(f"  {offset} = mul i64 {value}, {coefficient}")
                scope.hoisted.append(f"  {moved} = getelementptr float, ptr {base}, i64 {offset}")
                scope.hoisted.append(f'  {kept} = call ptr asm "", "=r,0"(ptr {moved})')
                scope.pointers[key] = kept
            base = scope.pointers[key]
        return base

    def displaced(self, base: str, offset: int) -> str:
        """``base`` plus a constant number of floats."""
        return self.let(f"getelementptr float, ptr {base}, i64 {offset}") if offset else base
