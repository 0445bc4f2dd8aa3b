"""What may compute a problem: each algorithm's lowering and default recipe, and where it does not apply.

``algorithm=`` takes the name of a family, such as "winograd", which stands for its usual member, or a member's
full name, such as "winograd(4,3)". A new lowering joins by an entry in ``FAMILIES``: a ``Family``, which makes its
members and tells which of them may be worth trying.

``choice.choices`` orders those that a problem may use without measuring: errors are predicted, and times estimated from
the default recipes. A time is in vector FMAs of one core, so that only ratios between a core and its caches matter:
products at full rate, or at that of the latency of FMAs where a register tile is small; transforms by the vector;
filters, where they do not stay in L2, by the bytes that each block streams. What costs all algorithms alike is left
out, such as reading the input and writing the output once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from math import hypot, inf, prod, sqrt
from typing import Any, TypeAlias

from convsched.algebra.accuracy import BOUNDS, UNIT, Gains, Prediction
from convsched.algebra.bilinear import direct, kronecker
from convsched.algebra.strassen import strassen
from convsched.algebra.winograd import products, winograd_side
from convsched.errors import LoweringError
from convsched.ir import Program
from convsched.lazy import cached_property
from convsched.lower.direct import lower_direct
from convsched.lower.fft_tiles import Fft, Side, fft_tiles
from convsched.lower.im2col import lower_im2col
from convsched.lower.plane import Plane, Shape
from convsched.lower.strassen import blocks_of, lower_strassen
from convsched.lower.tiles import lower_bilinear
from convsched.machine import Machine
from convsched.model.blocking import best_blocking, fft_products
from convsched.model.constants import CORE
from convsched.options import Accuracy
from convsched.plan.defaults import default_recipe, default_strassen, default_tiles, default_toeplitz, direct_time
from convsched.problem import Conv2d, Linear, Problem
from convsched.problem.problem import is_flat
from convsched.recipes.recipe import Recipe

Sizes: TypeAlias = tuple[tuple[int, ...], ...]
"""Those of a member, as its name has them: ((4, 3),) of winograd(4,3); () for the usual member of a family."""

OUTPUTS = {2: (4,), 3: (4, 2)}  # of Winograd tiles along a side of so many taps, the usual one first
MANY_TAPS = (2, 4)  # the same for other sides
FAST_OUTPUTS = {2: (6,), 3: (5, 6)}  # further ones, of more error than accuracy="normal" allows
WINOGRAD_TAPS = 16  # of a side at most, for Winograd
TILE_PIXELS = 64  # that a tile of Winograd's reads along a side at most: each is written out, those between taps too
MARGIN = 4 / 3  # that an estimate must be below direct's: in doubt, direct
TOLERANCE = 2e-5  # of max |error| / rms(output), where only float32's roundings of a sum are allowed
FFT_TAPS = 7  # of a side, from which FFT is tried
STRASSEN_CHANNELS = 512  # in and out, from which Strassen's products are tried
LEAST_CHANNELS = 16  # in and out, below which vectors of channels are mostly empty


def _unknown(machine: Machine, layout: str, threads: int) -> float:
    """The estimate of what no model is known for: it is chosen last."""
    return inf


@dataclass(frozen=True, eq=False)
class Algorithm:
    """A way to compute one problem: ``lower(layout)`` is the unscheduled program, ``default(machine, layout,
    threads)`` the recipe that nothing was measured for. Those of the same name and problem are equal.

    ``predict(terms, outputs)`` tells the errors of sums of so many products; ``terms`` are those of each product of
    transformed data, ``outputs`` the elements of the output. ``estimate(machine, layout, threads)`` is the time of a
    call by the default recipe, in vector FMAs of one core; infinite where it is not known.

    ``is_exact``: each product is of one input and one weight, as in the definition, so that small integers give exact
    sums, and Inf and NaN reach the outputs that they reach there, and no others. Transforms mix all elements of a tile,
    or of several blocks: an Inf in the input makes NaN of whole tiles, finite neighbours included.

    ``margin``: what its estimate is multiplied by when it is compared with others.
    """

    name: str
    problem: Problem
    lower: Callable[[str], Program]
    default: Callable[[Machine, str, int], Recipe]
    predict: Callable[[int, int], Prediction]
    terms: int
    outputs: int
    estimate: Callable[[Machine, str, int], float] = _unknown
    is_exact: bool = False
    margin: float = MARGIN

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Algorithm) and (self.name, self.problem) == (other.name, other.problem)

    def __hash__(self) -> int:
        return hash((self.name, self.problem))

    def __reduce__(self) -> tuple[Any, ...]:
        return named, (self.name, self.problem)

    @cached_property
    def prediction(self) -> Prediction:
        """The errors to expect, over rms(output), in some milliseconds."""
        return self.predict(self.terms, self.outputs)

    def fits(self, accuracy: Accuracy) -> bool:
        """Whether the class takes the algorithm: by its errors, and "strict" also by what becomes of Inf and NaN.

        More terms and outputs have more error: most problems are decided by the next round numbers, which are
        predicted once for many problems.
        """
        if not self.keeps_enough(accuracy):
            return False
        above = self.predict(1 << (self.terms - 1).bit_length(), 1 << -(-self.outputs.bit_length() // 8) * 8)
        return above.allowed(accuracy) or self.prediction.allowed(accuracy)

    def keeps_enough(self, accuracy: Accuracy) -> bool:
        """Whether Inf and NaN reach the outputs that the class asks for: "strict" all of them, the others none."""
        return self.is_exact or accuracy != "strict"

    def tolerance(self, accuracy: Accuracy = "fast") -> float:
        """What a check of results on data that are not exact allows of max |error| / rms(output)."""
        return TOLERANCE if self.is_exact else BOUNDS[accuracy]

    def require(self, accuracy: Accuracy) -> None:
        """Raise LoweringError unless the class takes the algorithm."""
        if not self.keeps_enough(accuracy):
            raise LoweringError(
                f"accuracy={accuracy!r}: {self.name} makes NaN of finite outputs beside an Inf or a NaN in the input, "
                "and the class keeps them where the definition has them; use accuracy=\"normal\", or algorithm=None "
                "for the fastest that fits")
        if not self.fits(accuracy):
            expected, found = self.prediction.greatest, self.prediction.accuracy
            fix = f'use accuracy="{found}", or' if found else "no class takes it: use"
            raise LoweringError(
                f"accuracy={accuracy!r}: {self.name} has an expected error of {expected:.2g} of the output's rms, and "
                f"the class allows {BOUNDS[accuracy]:.2g}; {fix} algorithm=None for the fastest that fits")


def named(name: str, problem: Problem) -> Algorithm:
    """The algorithm of a name for a problem; raises LoweringError where there is none, or it does not apply."""
    family, sizes = parse_name(name)
    return FAMILIES[family].make(problem, sizes)


def parse_name(name: str) -> tuple[str, Sizes]:
    """The family of a name and the sizes of its member; raises LoweringError for the name of none."""
    match = re.fullmatch(r"([a-z0-9]+)((?:x?\(\d{1,4}(?:,\d{1,2})?\)){0,2})", name) if isinstance(name, str) else None
    if match is None or match[1] not in FAMILIES:
        raise LoweringError(f"algorithm={name!r}: use one of {', '.join(FAMILIES)}, or a member such as winograd(4,3)")
    sizes = tuple(tuple(map(int, pair.split(","))) for pair in re.findall(r"\(([\d,]+)\)", match[2]))
    return match[1], sizes


def member_name(family: str, sizes: Sizes) -> str:
    """The name of the member of some sizes; equal sizes of both sides are written once.

    >>> member_name("winograd", ((4, 3), (4, 3))), member_name("winograd", ((4, 3), (2, 5))), member_name("fft", ())
    ('winograd(4,3)', 'winograd(4,3)x(2,5)', 'fft')
    """
    return family + "x".join(f"({','.join(map(str, each))})" for each in dict.fromkeys(sizes))


def _usual(problem: Problem, accuracy: Accuracy) -> tuple[Sizes, ...]:
    return ((),)


def _direct(problem: Problem, sizes: Sizes) -> Algorithm:
    if sizes:
        raise LoweringError("algorithm='direct' has no sizes: leave the brackets out")
    return Algorithm("direct", problem, partial(lower_direct, problem),
                     lambda machine, layout, threads: default_recipe(problem, machine, layout, threads),
                     partial(_error, _direct_gains, (_taps(problem),)), problem.weights // problem.M,
                     prod(problem.output_shape),
                     partial(_direct_time, problem), is_exact=True, margin=1)


def _taps(problem: Problem) -> int:
    return problem.R * problem.S if isinstance(problem, Conv2d) else 1


def _im2col(problem: Problem, sizes: Sizes) -> Algorithm:
    if sizes:
        raise LoweringError("algorithm='im2col' has no sizes: leave the brackets out")
    if isinstance(problem, Linear) or is_flat(problem):
        raise LoweringError(f"im2col: {problem.text} is a product of matrices as it stands; use direct")
    return Algorithm("im2col", problem, partial(lower_im2col, problem), partial(default_toeplitz, problem),
                     partial(_error, _direct_gains, (_taps(problem),)), problem.weights // problem.M,
                     prod(problem.output_shape),
                     lambda machine, layout, threads: CORE.im2col * _direct_time(problem, machine, layout, threads),
                     is_exact=True)


def _im2col_tried(problem: Problem, accuracy: Accuracy) -> tuple[Sizes, ...]:
    return ((),) if isinstance(problem, Conv2d) and not is_flat(problem) else ()


def _winograd(problem: Problem, sizes: Sizes) -> Algorithm:
    """F(m, r) along each side of more than one tap; (m, r) once for both, or for the height and the width.

    The two algorithms of short tiles are made, and proved, where more than their sizes is needed.
    """
    conv = _convolution("winograd", problem)
    steps = [(r, stride) for r, stride in zip((conv.R, conv.S), conv.stride, strict=True) if r > 1]
    taps = [r for r, _ in steps]
    if not taps:
        raise LoweringError(f"winograd: {problem.text} has one tap; use direct")
    if any(s > 1 and d > 1 for s, d in zip(conv.stride, conv.dilation, strict=True)):
        raise LoweringError(f"winograd: {problem.text} has a stride and a dilation along one side; use direct")
    if max(taps) > WINOGRAD_TAPS:
        raise LoweringError(f"winograd: {problem.text} has {max(taps)} taps along a side, more than {WINOGRAD_TAPS}; "
                            "use fft")
    sizes = sizes or tuple((OUTPUTS.get(r, MANY_TAPS)[0] if stride <= r else 2, r) for r, stride in steps)
    if len(sizes) == 1:
        sizes = sizes * len(taps)
    if any(len(pair) != 2 for pair in sizes) or [r for _, r in sizes] != taps or any(m < 2 for m, _ in sizes):
        raise LoweringError(f"{member_name('winograd', sizes)}: {problem.text} has "
                            f"{' and '.join(map(str, taps))} taps; write (m,r) with r={taps[0]} and m of at least 2, "
                            "once for both sides, or (m,r)x(m,r)")
    reads = [(m - 1) * stride + r for (m, r), (_, stride) in zip(sizes, steps, strict=True)]
    if max(reads) > TILE_PIXELS:
        raise LoweringError(f"winograd: a tile would read {max(reads)} pixels along a side of {problem.text}, more "
                            f"than {TILE_PIXELS}; use fewer outputs or direct")
    along = iter(sizes)
    sides = [(*(next(along) if r > 1 else (1, 1)), stride)
             for r, stride in zip((conv.R, conv.S), conv.stride, strict=True)]
    column, row = partial(winograd_side, *sides[0]), partial(winograd_side, *sides[1])
    outputs, points = (sides[0][0], sides[1][0]), (products(*sides[0]), products(*sides[1]))

    def time(machine: Machine, layout: str, threads: int) -> float:
        if min(conv.C, conv.M) // conv.groups < LEAST_CHANNELS:
            return inf
        return best_blocking(Plane(conv, outputs), points, machine, threads).time

    return Algorithm(member_name("winograd", sizes), conv, lambda layout: lower_bilinear(conv, column(), row(), layout),
                     lambda machine, layout, threads: default_tiles(
                         conv, Shape.of(column(), row()), machine, layout, threads),
                     partial(_error, _winograd_gains, tuple(sides)),
                     conv.C // conv.groups, prod(conv.output_shape), time)


def _winograd_tried(problem: Problem, accuracy: Accuracy) -> tuple[Sizes, ...]:
    taps = _long_sides(problem)
    further = FAST_OUTPUTS if accuracy == "fast" else {}
    outputs = [OUTPUTS.get(r, MANY_TAPS) + further.get(r, ()) for r in taps]
    return tuple(tuple(zip(each, taps, strict=True)) for each in zip(*outputs, strict=False))


def _long_sides(problem: Problem) -> tuple[int, ...]:
    """The taps of the sides that have more than one."""
    return tuple(r for r in (problem.R, problem.S) if r > 1) if isinstance(problem, Conv2d) else ()


def _fft(problem: Problem, sizes: Sizes) -> Algorithm:
    """Tiles of n points along both sides or the one with taps; or of n points and rows of its folded plane."""
    conv = _convolution("fft", problem)
    if conv.stride != (1, 1) or conv.dilation != (1, 1) or conv.groups != 1:
        raise LoweringError(f"fft: {problem.text} has a stride, a dilation or groups; use direct")
    if any(len(pair) > 1 for pair in sizes):
        raise LoweringError("algorithm='fft' has the points of a tile as its sizes: write fft(64), or fft(32)x(64)")
    tiles = fft(conv, tuple(n for n, in sizes))
    return Algorithm(tiles.name, conv, tiles.lower,
                     partial(default_tiles, conv, tiles.shape, by_lines=True),
                     partial(_fft_error, tiles.column, tiles.row), conv.C, prod(conv.output_shape),
                     partial(_fft_time, tiles))


def _fft_tried(problem: Problem, accuracy: Accuracy) -> tuple[Sizes, ...]:
    return ((),) if max(_long_sides(problem), default=1) >= FFT_TAPS else ()


def _strassen(problem: Problem, sizes: Sizes) -> Algorithm:
    """One level, or strassen(levels), of any dense layer; how long it takes is only known by measuring."""
    if sizes not in ((), ((1,),), ((2,),)):
        raise LoweringError("algorithm='strassen' has its levels as size: write strassen, strassen(1) or strassen(2)")
    levels = sizes[0][0] if sizes else 1
    return Algorithm(f"strassen({levels})", problem, partial(lower_strassen, problem, levels),
                     partial(default_strassen, problem, levels), partial(_error, _strassen_gains, (levels,)),
                     blocks_of(problem, levels).block[1] * problem.R * problem.S, prod(problem.output_shape))


def _strassen_tried(problem: Problem, accuracy: Accuracy) -> tuple[Sizes, ...]:
    return (((1,),), ((2,),)) if min(problem.M, problem.C) >= STRASSEN_CHANNELS else ()


def _convolution(name: str, problem: Problem) -> Conv2d:
    if isinstance(problem, Linear):
        raise LoweringError(f"{name}: {problem.text} is a fully connected layer; use direct")
    return problem


@dataclass(frozen=True)
class Family:
    """Algorithms that differ by sizes: ``make(problem, sizes)`` is the member of some sizes, or raises LoweringError;
    ``tried(problem, accuracy)`` are the sizes of those that may be worth trying."""

    make: Callable[[Problem, Sizes], Algorithm]
    tried: Callable[[Problem, Accuracy], tuple[Sizes, ...]]


FAMILIES = {
    "direct": Family(_direct, _usual),
    "winograd": Family(_winograd, _winograd_tried),
    "fft": Family(_fft, _fft_tried),
    "im2col": Family(_im2col, _im2col_tried),
    "strassen": Family(_strassen, _strassen_tried),
}
"""The families by name, in the order in which their members are tried."""


def applicable(problem: Problem) -> Iterator[Algorithm]:
    """The usual member of each family that applies to a problem."""
    return that_apply(problem, *FAMILIES)


def that_apply(problem: Problem, *names: str) -> Iterator[Algorithm]:
    for name in names:
        try:
            yield named(name, problem)
        except LoweringError:
            continue


@lru_cache(1024)
def _error(gains: Callable[..., Gains], of: tuple[Any, ...], terms: int, outputs: int) -> Prediction:
    """The prediction of what ``gains`` makes of some sizes: the gains are made once, and serve many layers."""
    return gains(*of).predict(terms, outputs)


@lru_cache(256)
def _direct_gains(taps: int) -> Gains:
    return Gains.of(direct(1, 1), taps)


@lru_cache(256)
def _winograd_gains(column: tuple[int, int, int], row: tuple[int, int, int]) -> Gains:
    return Gains.of(kronecker(winograd_side(*column), winograd_side(*row)))


@lru_cache(256)
def _strassen_gains(levels: int) -> Gains:
    return Gains.of(strassen(levels))


@lru_cache(256)
def _fft_gains(side: Side) -> Gains:
    return Gains.of(side.dense)


def _fft_error(column: Side, row: Side, channels: int, outputs: int) -> Prediction:
    """Independent errors of both directions add in squares, as F is orthogonal up to scales. The worst are products
    of gains times the sum of all roundings, where each prediction is one gain times its own."""
    sides = [side for side in (column, row) if side.n > 1]
    found = [_error(_fft_gains, (side,), channels, outputs) for side in sides]
    if len(found) == 1:
        return found[0]
    both = sum(1 / (UNIT * (3 * (side.reads + side.points) + channels)) for side in sides)
    return Prediction(
        hypot(*(one.expected for one in found)), hypot(*(one.adverse for one in found)),
        prod(one.worst for one in found) * both / sqrt(channels), prod(one.norm_bound for one in found) * both)


def _fft_time(tiles: Fft, machine: Machine, layout: str, threads: int) -> float:
    if min(tiles.problem.C, tiles.problem.M) < LEAST_CHANNELS:
        return inf
    return CORE.fft * fft_products(tiles) / machine.lanes / threads


def _direct_time(problem: Problem, machine: Machine, layout: str, threads: int) -> float:
    return direct_time(problem, machine, layout) / threads


TILE_POINTS = 64, 128  # of an FFT's side at most by default; the latter only where need be: it takes seconds to compile


def fft(problem: Conv2d, sizes: tuple[int, ...] = ()) -> Fft:
    """The FFT tiles of a problem: ``sizes`` are the points along both sides (one for both), or along the side with
    taps, and of a row of its folded plane; none for those of the least cost.

    Raises LoweringError for sizes that do not fit.
    """
    if problem.R == problem.S == 1:
        raise LoweringError(f"fft: {problem.text} has one tap; use direct")
    if sizes:
        return fft_tiles(problem, sizes)
    for longest in TILE_POINTS:
        powers = [1 << k for k in range(1, longest.bit_length())]
        found = []
        for pair in [*((n,) for n in powers), *((n, k) for n in powers for k in powers)]:
            try:
                found.append(fft_tiles(problem, pair))
            except LoweringError:
                continue
        if found:
            return min(found, key=fft_products)
    raise LoweringError(f"fft: {problem.text} has more taps than a tile of {TILE_POINTS[-1]} points; write fft(n) with "
                        "a larger n")
