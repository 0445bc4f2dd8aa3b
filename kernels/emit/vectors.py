"""Vector idioms as LLVM IR: splat, masks, transposition, arithmetic, exp.

Everything takes the writer and SSA names of ``<lanes x float>`` values, or ``float`` where lanes is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from convsched.kernels.emit.writer import Writer, float_literal

Mask = tuple[bool, ...] | str  # static lanes, or the SSA name of an <lanes x i1> (i1 where lanes is 1)


@cache
def vector_type(lanes: int, element: str = "float") -> str:
    """The LLVM type of a value of that many lanes."""
    return f"<{lanes} x {element}>" if lanes > 1 else element


@cache
def constant(number: float, lanes: int) -> str:
    """A literal, the same in all lanes."""
    return f"splat (float {float_literal(number)})" if lanes > 1 else float_literal(number)


def integer(number: int, lanes: int) -> str:
    """An i32 literal, the same in all lanes."""
    return f"splat (i32 {number})" if lanes > 1 else str(number)


def splat(w: Writer, scalar: str, lanes: int, element: str = "float") -> str:
    """A scalar in all lanes."""
    kind = vector_type(lanes, element)
    first = w.let(f"insertelement {kind} poison, {element} {scalar}, i64 0")
    return w.let(f"shufflevector {kind} {first}, {kind} poison, <{lanes} x i32> zeroinitializer")


def mask_text(mask: Mask, lanes: int) -> str:
    """A mask as an operand."""
    if isinstance(mask, str):
        return mask
    bits = [f"i1 {str(bit).lower()}" for bit in mask]
    return f"<{', '.join(bits)}>" if lanes > 1 else bits[0].split()[1]


def both(w: Writer, a: Mask | None, b: Mask | None, lanes: int) -> Mask | None:
    """The lanes in both masks; None stands for all lanes."""
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, tuple) and isinstance(b, tuple):
        return tuple(x and y for x, y in zip(a, b, strict=True))
    kind = vector_type(lanes, "i1")
    return w.let(f"and {kind} {mask_text(a, lanes)}, {mask_text(b, lanes)}")


def shuffle(w: Writer, a: str, b: str, lanes: int, picks: Sequence[int], element: str = "float") -> str:
    """Lanes of two vectors: ``picks`` below ``lanes`` are of ``a``, the others of ``b``."""
    if a == b == "poison":
        return "poison"
    kind = vector_type(lanes, element)
    return w.let(f"shufflevector {kind} {a}, {kind} {b}, {_picked(tuple(picks))}")


@cache
def _picked(picks: tuple[int, ...]) -> str:
    return f"<{len(picks)} x i32> <{', '.join([f'i32 {p}' for p in picks])}>"


def transpose(w: Writer, rows: Sequence[str], lanes: int, wanted: int) -> list[str]:
    """The first ``wanted`` columns of ``lanes`` rows of ``lanes`` floats (missing ones poison); lanes is 4, 8 or 16.

    Four rows become four columns inside each block of 128 bits by unpacking; then blocks are exchanged.
    """
    blocks, pairs = lanes // 4, _Pairs(w, lanes, fenced=lanes == 16 and min(len(rows), wanted) > 8)
    full = [*rows, *["poison"] * (lanes - len(rows))]
    low, high = ([half + p + 4 * block + q for block in range(blocks) for p in range(2) for q in (0, lanes)]
                 for half in (0, 2))
    left, right = ([half + 2 * block + q for block in range(blocks) for q in (0, lanes // 2)] for half in (0, 1))
    quads: list[list[str]] = []  # quads[g][q]: block k is column 4 k + q of rows 4 g .. 4 g + 3
    for g in range(blocks):
        a, b, c, d = full[4 * g:4 * g + 4]
        ab_low, ab_high, cd_low, cd_high = (pairs.of(shuffle(w, one, other, lanes, picks))
                                            for one, other in ((a, b), (c, d)) for picks in (low, high))
        quads.append([pairs.fence(pairs.shuffle(ab, cd, picks))
                      for ab, cd in ((ab_low, cd_low), (ab_high, cd_high)) for picks in (left, right)])
    columns = [""] * lanes
    for q in range(4):
        for k, column in enumerate(_exchange_blocks(pairs, [quads[g][q] for g in range(blocks)])):
            columns[4 * k + q] = pairs.floats(column)
    return columns[:wanted]


@dataclass
class _Pairs:
    """Vectors whose lanes move in pairs. Those of 16 lanes are written as doubles: LLVM takes half as long for a
    shuffle of half as many elements. It tries for long, and in vain, to make fewer shuffles of those of a square of
    more than half of the rows and columns: a fence, which is not an instruction, hides what is before it."""

    w: Writer
    lanes: int
    fenced: bool

    def of(self, floats: str) -> str:
        """A vector of floats as one of pairs."""
        if self.lanes < 16 or floats == "poison":
            return floats
        return self.w.let(f"bitcast <16 x float> {floats} to <8 x double>")

    def floats(self, value: str) -> str:
        """A vector of pairs as one of floats."""
        if self.lanes < 16 or value == "poison":
            return value
        return self.w.let(f"bitcast <8 x double> {value} to <16 x float>")

    def shuffle(self, a: str, b: str, picks: Sequence[int]) -> str:
        """Pairs of two vectors."""
        if self.lanes == 16:
            return shuffle(self.w, a, b, 8, picks, "double")
        return shuffle(self.w, a, b, self.lanes, [2 * p + i for p in picks for i in range(2)])

    def fence(self, value: str) -> str:
        """The vector, whose making LLVM does not look at."""
        if not self.fenced or value == "poison":
            return value
        self.w.declare("<8 x double> @llvm.arithmetic.fence.v8f64(<8 x double>)")
        return self.w.let(f"call <8 x double> @llvm.arithmetic.fence.v8f64(<8 x double> {value})")


def _exchange_blocks(pairs: _Pairs, rows: list[str]) -> list[str]:
    """Transpose a square of 128-bit blocks, each two pairs: 1, 2 or 4 rows of as many blocks."""
    def pick(a: str, b: str, blocks: Sequence[int]) -> str:
        return pairs.shuffle(a, b, [2 * block + i for block in blocks for i in range(2)])

    if len(rows) == 1:
        return rows
    if len(rows) == 2:
        a, b = rows
        return [pick(a, b, (0, 2)), pick(a, b, (1, 3))]
    a, b, c, d = rows
    even, odd = (0, 2, 4, 6), (1, 3, 5, 7)
    ab, cd, ab_odd, cd_odd = pick(a, b, even), pick(c, d, even), pick(a, b, odd), pick(c, d, odd)
    return [pick(ab, cd, even), pick(ab_odd, cd_odd, even), pick(ab, cd, odd), pick(ab_odd, cd_odd, odd)]


def multiply_add(w: Writer, a: str, b: str, c: str, lanes: int, fused: bool) -> str:
    """``a * b + c``; one rounding where the machine has FMA."""
    kind = vector_type(lanes)
    if not fused:
        return w.let(f"fadd {kind} {w.let(f'fmul {kind} {a}, {b}')}, {c}")
    name = f"@llvm.fma.{suffix(lanes)}"
    w.declare(f"{kind} {name}({kind}, {kind}, {kind})")
    return w.let(f"call {kind} {name}({kind} {a}, {kind} {b}, {kind} {c})")


@cache
def suffix(lanes: int) -> str:
    """The type suffix of an overloaded intrinsic."""
    return f"v{lanes}f32" if lanes > 1 else "f32"


_ARITHMETIC = {"add": "fadd", "sub": "fsub", "mul": "fmul", "div": "fdiv"}


def operation(w: Writer, name: str, operands: Sequence[str], lanes: int) -> str:
    """An operation of ``ir.OPS``. ``max`` and ``min`` give their second operand if either is NaN."""
    kind = vector_type(lanes)
    condition = vector_type(lanes, "i1")
    if name in _ARITHMETIC:
        return w.let(f"{_ARITHMETIC[name]} {kind} {operands[0]}, {operands[1]}")
    if name == "neg":
        return w.let(f"fneg {kind} {operands[0]}")
    if name == "exp":
        return _exp(w, operands[0], lanes)
    if name == "select_positive":
        test = w.let(f"fcmp ogt {kind} {operands[0]}, {constant(0.0, lanes)}")
        return w.let(f"select {condition} {test}, {kind} {operands[1]}, {kind} {operands[2]}")
    test = w.let(f"fcmp {'ogt' if name == 'max' else 'olt'} {kind} {operands[0]}, {operands[1]}")
    return w.let(f"select {condition} {test}, {kind} {operands[0]}, {kind} {operands[1]}")


_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def _exp(w: Writer, x: str, lanes: int) -> str:
    """e^x = 2^n e^r with n = round(x / ln 2), r = x - n ln 2 in two parts, e^r by a polynomial.

    Rounding adds 1.5 * 2^23, whose low bits then hold n. x is bounded so that n is -127 far below and 128 far above,
    for which the bits of 2^n are those of 0 and of infinity: e^x is 0 where it is below 2^-126.5, and infinite above
    2^127.5. Coefficients: Moshier, Cephes Mathematical Library, ``expf`` (1989); 2 ulp.
    """
    kind, ints = vector_type(lanes), vector_type(lanes, "i32")

    def mad(a: str, b: str, c: str) -> str:
        return w.let(f"fadd {kind} {w.let(f'fmul {kind} {a}, {b}')}, {c}")

    x = operation(w, "max", (constant(-88.0, lanes), x), lanes)
    x = operation(w, "min", (constant(88.5, lanes), x), lanes)
    magic = constant(12582912.0, lanes)
    shifted = mad(x, constant(1.44269504088896341, lanes), magic)
    n = w.let(f"fsub {kind} {shifted}, {magic}")
    r = mad(n, constant(-0.693359375, lanes), x)
    r = mad(n, constant(2.12194440e-4, lanes), r)
    polynomial = constant(_EXP[0], lanes)
    for coefficient in _EXP[1:]:
        polynomial = mad(polynomial, r, constant(coefficient, lanes))
    square = w.let(f"fmul {kind} {r}, {r}")
    value = w.let(f"fadd {kind} {mad(polynomial, square, r)}, {constant(1.0, lanes)}")
    bits = w.let(f"bitcast {kind} {shifted} to {ints}")
    exponent = w.let(f"shl {ints} {bits}, {integer(23, lanes)}")
    scale = w.let(f"add {ints} {exponent}, {integer(0x3F800000, lanes)}")
    return w.let(f"fmul {kind} {value}, {w.let(f'bitcast {ints} {scale} to {kind}')}")
