"""Vector idioms as LLVM IR: splat, masks, transposition, arithmetic, exp.

Everything takes the writer and SSA names of ``<lanes x float>`` values, or ``float`` where lanes is 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from convsched.kernels.emit.writer import Writer, float_literal

Mask = tuple[bool, ...] | str  # static lanes, or the SSA name of an <lanes x i1> (i1 where lanes is 1)


def vector_type(lanes: int, element: str = "float") -> str:
    """The LLVM type of a value of that many lanes."""
    return f"<{lanes} x {element}>" if lanes > 1 else element


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


def shuffle(w: Writer, a: str, b: str, lanes: int, picks: Sequence[int]) -> str:
    """Lanes of two vectors: ``picks`` below ``lanes`` are of ``a``, the others of ``b``."""
    if a == b == "poison":
        return "poison"
    kind = vector_type(lanes)
    where = ", ".join(f"i32 {p}" for p in picks)
    return w.let(f"shufflevector {kind} {a}, {kind} {b}, <{len(picks)} x i32> <{where}>")


def transpose(w: Writer, rows: Sequence[str], lanes: int) -> list[str]:
    """``lanes`` rows of ``lanes`` floats (missing ones poison) to columns; lanes is 4, 8 or 16.

    Four rows become four columns inside each block of 128 bits by unpacking; then blocks are exchanged.
    """
    full = [*rows, *["poison"] * (lanes - len(rows))]
    blocks = lanes // 4

    def per_block(pattern: Sequence[int]) -> list[int]:
        return [(p % 4) + 4 * block + (lanes if p >= 4 else 0) for block in range(blocks) for p in pattern]

    quads: list[list[str]] = []  # quads[g][q]: block k is column 4 k + q of rows 4 g .. 4 g + 3
    for g in range(blocks):
        a, b, c, d = full[4 * g:4 * g + 4]
        ab_low, ab_high = (shuffle(w, a, b, lanes, per_block(p)) for p in ((0, 4, 1, 5), (2, 6, 3, 7)))
        cd_low, cd_high = (shuffle(w, c, d, lanes, per_block(p)) for p in ((0, 4, 1, 5), (2, 6, 3, 7)))
        quads.append([
            shuffle(w, ab_low, cd_low, lanes, per_block((0, 1, 4, 5))),
            shuffle(w, ab_low, cd_low, lanes, per_block((2, 3, 6, 7))),
            shuffle(w, ab_high, cd_high, lanes, per_block((0, 1, 4, 5))),
            shuffle(w, ab_high, cd_high, lanes, per_block((2, 3, 6, 7))),
        ])
    if blocks > 1:
        quads = [[w.kept(column, vector_type(lanes)) for column in quad] for quad in quads]
    columns = [""] * lanes
    for q in range(4):
        for k, column in enumerate(_exchange_blocks(w, [quads[g][q] for g in range(blocks)], lanes)):
            columns[4 * k + q] = column
    return columns


def _exchange_blocks(w: Writer, rows: list[str], lanes: int) -> list[str]:
    """Transpose a square of 128-bit blocks: 1, 2 or 4 rows of as many blocks."""
    def pick(a: str, b: str, blocks: Sequence[int]) -> str:
        return shuffle(w, a, b, lanes, [4 * block + i for block in blocks for i in range(4)])

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
