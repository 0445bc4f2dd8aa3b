"""What may compute a problem: each algorithm's lowering and default recipe, and where it does not apply.

``algorithm=`` takes the name of a family, such as "winograd", which stands for its usual member, or a member's
full name, such as "winograd(4,3)". A new lowering joins by an entry in ``FAMILIES``.

``choices`` orders those that a problem may use without measuring: errors are predicted, and times estimated from
the default recipes. A time is in vector FMAs of one core, so that only ratios between a core and its caches matter:
products at full rate, or at that of the latency of FMAs where a register tile is small; transforms by the vector;
filters, where they do not stay in L2, by the bytes that each block streams. What costs all algorithms alike is left
out, such as reading the input and writing the output once.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from math import hypot, inf, prod, sqrt

from convsched.accuracy import BOUNDS, UNIT, Prediction, predict, predict_direct
from convsched.analytic import best_blocking, default_recipe, default_tiles, default_toeplitz, direct_time
from convsched.bilinear import Bilinear, kronecker
from convsched.errors import LoweringError
from convsched.ir import Program
from convsched.lower.bilinear import lower_bilinear
from convsched.lower.blocks import blocks_of, lower_strassen
from convsched.lower.direct import lower_direct
from convsched.lower.fft_layers import Fft, fft
from convsched.lower.im2col import lower_im2col
from convsched.lower.plane import Plane, Shape
from convsched.lower.strassen import strassen
from convsched.lower.winograd import products, winograd_side
from convsched.machine import Machine
from convsched.names import Accuracy
from convsched.problem import Conv2d, Linear, Problem
from convsched.recipes import Recipe, is_flat
from convsched.strassen_recipe import default_strassen

OUTPUTS = {2: (4,), 3: (4, 2)}  # of Winograd tiles along a side of so many taps, the usual one first
MANY_TAPS = (2, 4)  # the same for other sides
FAST_OUTPUTS = {2: (6,), 3: (5, 6)}  # further ones, of more error than accuracy="normal" allows
MOST_SPLIT = 16  # taps of a side, for Winograd
MARGIN = 4 / 3  # that an estimate must be below direct's: in doubt, direct
FFT_TAPS = 7  # of a side, from which FFT is tried
BLOCKS = 2  # of channels each way, in Strassen's product
STRASSEN_CHANNELS = 512  # in and out, from which Strassen's products are tried
LEAST_CHANNELS = 16  # in and out, below which vectors of channels are mostly empty
FFT = 1.5  # the time of FFT tiles over that of their products at full rate
IM2COL = 1.25  # the time of im2col over direct's


class AccuracyWarning(UserWarning):
    """No algorithm is as accurate as asked; the most accurate one is used."""


def _unknown(machine: Machine, layout: str, threads: int) -> float:
    """The estimate of what no model is known for: it is chosen last."""
    return inf


@dataclass(frozen=True)
class Algorithm:
    """A way to compute one problem: ``lower(layout)`` is the unscheduled program, ``default(machine, layout,
    threads)`` the recipe that nothing was measured for.

    ``predict(terms, outputs)`` tells the errors of sums of so many products; ``terms`` are those of each product of
    transformed data, ``outputs`` the elements of the output. ``estimate(machine, layout, threads)`` is the time of a
    call by the default recipe, in vector FMAs of one core; infinite where it is not known.

    ``keeps_nonfinite``: each product is of one input and one weight, as in the definition, so that Inf and NaN reach
    the outputs that they reach there, and no others. Transforms mix all elements of a tile, or of several blocks: an
    Inf in the input makes NaN of whole tiles, finite neighbours included.
    """

    name: str
    lower: Callable[[str], Program]
    default: Callable[[Machine, str, int], Recipe]
    predict: Callable[[int, int], Prediction]
    terms: int
    outputs: int
    estimate: Callable[[Machine, str, int], float] = _unknown
    keeps_nonfinite: bool = False

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
        return self.keeps_nonfinite or accuracy != "strict"

    def require(self, accuracy: Accuracy) -> None:
        """Raise LoweringError unless the class takes the algorithm."""
        if not self.keeps_enough(accuracy):
            raise LoweringError(
                f"accuracy={accuracy!r}: {self.name} makes NaN of finite outputs beside an Inf or a NaN in the input, "
                "and the class keeps them where the definition has them; use accuracy=\"normal\", or algorithm=None "
                "for the fastest that fits")
        if not self.fits(accuracy):
            expected, found = max(self.prediction.expected, self.prediction.adverse), self.prediction.accuracy
            fix = f'use accuracy="{found}", or' if found else "no class takes it: use"
            raise LoweringError(
                f"accuracy={accuracy!r}: {self.name} has an expected error of {expected:.2g} of the output's rms, and "
                f"the class allows {BOUNDS[accuracy]:.2g}; {fix} algorithm=None for the fastest that fits")


def named(name: str, problem: Problem) -> Algorithm:
    """The algorithm of a name for a problem; raises LoweringError where there is none, or it does not apply."""
    family, sizes = parse_name(name)
    return FAMILIES[family](problem, sizes)


def parse_name(name: str) -> tuple[str, tuple[tuple[int, ...], ...]]:
    """The family of a name and the sizes of its member; raises LoweringError for what is no name of an algorithm."""
    match = re.fullmatch(r"([a-z0-9]+)((?:x?\(\d{1,4}(?:,\d{1,2})?\)){0,2})", name) if isinstance(name, str) else None
    if match is None or match[1] not in FAMILIES:
        raise LoweringError(f"algorithm={name!r}: use one of {', '.join(FAMILIES)}, or a member such as winograd(4,3)")
    sizes = tuple(tuple(map(int, pair.split(","))) for pair in re.findall(r"\(([\d,]+)\)", match[2]))
    return match[1], sizes


def _direct(problem: Problem, sizes: tuple[tuple[int, ...], ...]) -> Algorithm:
    if sizes:
        raise LoweringError("algorithm='direct' has no sizes: leave the brackets out")
    return Algorithm("direct", partial(lower_direct, problem),
                     lambda machine, layout, threads: default_recipe(problem, machine, layout, threads),
                     partial(_direct_error, _taps(problem)), problem.weights // problem.M, prod(problem.output_shape),
                     partial(_direct_time, problem), keeps_nonfinite=True)


def _taps(problem: Problem) -> int:
    return problem.R * problem.S if isinstance(problem, Conv2d) else 1


def _im2col(problem: Problem, sizes: tuple[tuple[int, ...], ...]) -> Algorithm:
    if sizes:
        raise LoweringError("algorithm='im2col' has no sizes: leave the brackets out")
    if isinstance(problem, Linear) or is_flat(problem):
        raise LoweringError(f"im2col: {problem.text} is a product of matrices as it stands; use direct")
    return Algorithm("im2col", partial(lower_im2col, problem), partial(default_toeplitz, problem),
                     partial(_direct_error, _taps(problem)), problem.weights // problem.M, prod(problem.output_shape),
                     lambda machine, layout, threads: IM2COL * _direct_time(problem, machine, layout, threads),
                     keeps_nonfinite=True)


def _winograd(problem: Problem, sizes: tuple[tuple[int, ...], ...]) -> Algorithm:
    """F(m, r) along each side of more than one tap; (m, r) once for both, or for the height and the width."""
    return _tiled("winograd", problem, sizes)


def _nested(problem: Problem, sizes: tuple[tuple[int, ...], ...]) -> Algorithm:
    """F(m, r) as above, with Strassen's product of blocks of channels and tiles in place of each of its products. Its
    filters are 7/4 as large, and it was never measured to win: it is used where it is asked for."""
    return _tiled("nested", problem, sizes, BLOCKS)


def _tiled(family: str, problem: Problem, sizes: tuple[tuple[int, ...], ...], parts: int = 1) -> Algorithm:
    """Two algorithms of short tiles, which are made, and proved, where more than their sizes is needed; that along
    rows acts on ``parts`` blocks of channels."""
    conv = _convolution(family, problem)
    taps = [r for r in (conv.R, conv.S) if r > 1]
    if not taps:
        raise LoweringError(f"{family}: {problem.text} has one tap; use direct")
    if any(s > 1 and d > 1 for s, d in zip(conv.stride, conv.dilation, strict=True)):
        raise LoweringError(f"{family}: {problem.text} has a stride and a dilation along one side; use direct")
    if max(taps) > MOST_SPLIT:
        raise LoweringError(f"{family}: {problem.text} has {max(taps)} taps along a side, more than {MOST_SPLIT}; "
                            "use fft")
    if any(count // conv.groups % parts for count in (conv.C, conv.M)):
        raise LoweringError(f"{family}: {problem.text} has channels that do not make {parts} blocks; use winograd")
    sizes = sizes or tuple((OUTPUTS.get(r, MANY_TAPS)[0], r) for r in taps)
    if len(sizes) == 1:
        sizes = sizes * len(taps)
    if any(len(pair) != 2 for pair in sizes) or [r for _, r in sizes] != taps or any(m < 2 for m, _ in sizes):
        given = "x".join(f"({','.join(map(str, pair))})" for pair in dict.fromkeys(sizes))
        raise LoweringError(f"{family}{given}: {problem.text} has "
                            f"{' and '.join(map(str, taps))} taps; write (m,r) with r={taps[0]} and m of at least 2, "
                            "once for both sides, or (m,r)x(m,r)")
    along = iter(sizes)
    sides = [(*(next(along) if r > 1 else (1, 1)), stride)
             for r, stride in zip((conv.R, conv.S), conv.stride, strict=True)]
    name = family + "x".join(f"({m},{r})" for m, r in dict.fromkeys(sizes))
    column, row = partial(winograd_side, *sides[0]), partial(_row, sides[1], parts)
    outputs, points = (sides[0][0], sides[1][0]), (products(*sides[0]), products(*sides[1]))

    def time(machine: Machine, layout: str, threads: int) -> float:
        if min(conv.C, conv.M) // conv.groups < LEAST_CHANNELS:
            return inf
        return best_blocking(Plane(conv, outputs), points, machine, threads).time

    return Algorithm(name, lambda layout: lower_bilinear(conv, column(), row(), layout, parts=parts),
                     lambda machine, layout, threads: default_tiles(
                         conv, Shape.of(column(), row(), parts=parts), machine, layout, threads),
                     lambda terms, size: _bilinear_error(column(), row(), terms, size),
                     conv.C // conv.groups // parts, prod(conv.output_shape), time if parts == 1 else _unknown)


@lru_cache(256)
def _row(side: tuple[int, int, int], parts: int) -> Bilinear:
    along = winograd_side(*side)
    return along if parts == 1 else kronecker(strassen(), along)


def _fft(problem: Problem, sizes: tuple[tuple[int, ...], ...]) -> Algorithm:
    """Tiles of n points along both sides or the one with taps; or of n points and rows of its folded plane."""
    conv = _convolution("fft", problem)
    if conv.stride != (1, 1) or conv.dilation != (1, 1) or conv.groups != 1:
        raise LoweringError(f"fft: {problem.text} has a stride, a dilation or groups; use direct")
    if any(len(pair) > 1 for pair in sizes):
        raise LoweringError("algorithm='fft' has the points of a tile as its sizes: write fft(64), or fft(32)x(64)")
    tiles = fft(conv, tuple(n for n, in sizes))
    return Algorithm(tiles.name, tiles.lower,
                     partial(default_tiles, conv, tiles.shape, by_lines=True),
                     partial(_fft_error, tiles), conv.C, prod(conv.output_shape), partial(_fft_time, tiles))


def _strassen(problem: Problem, sizes: tuple[tuple[int, ...], ...]) -> Algorithm:
    """One level, or strassen(levels), of any dense layer; how long it takes is only known by measuring."""
    if sizes not in ((), ((1,),), ((2,),)):
        raise LoweringError("algorithm='strassen' has its levels as size: write strassen, strassen(1) or strassen(2)")
    levels = sizes[0][0] if sizes else 1
    return Algorithm(f"strassen({levels})", partial(lower_strassen, problem, levels),
                     partial(default_strassen, problem, levels), partial(_strassen_error, levels),
                     blocks_of(problem, levels).block[1] * problem.R * problem.S, prod(problem.output_shape))


def _convolution(name: str, problem: Problem) -> Conv2d:
    if isinstance(problem, Linear):
        raise LoweringError(f"{name}: {problem.text} is a fully connected layer; use direct")
    return problem


FAMILIES: dict[str, Callable[[Problem, tuple[tuple[int, ...], ...]], Algorithm]] = {
    "direct": _direct,
    "im2col": _im2col,
    "winograd": _winograd,
    "nested": _nested,
    "fft": _fft,
    "strassen": _strassen,
}
"""The families by name: each gives the member of some sizes for a problem, or raises LoweringError."""


def applicable(problem: Problem) -> Iterator[Algorithm]:
    """The usual member of each family that applies to a problem."""
    return _that_apply(problem, *FAMILIES)


def members(problem: Problem, accuracy: Accuracy = "normal") -> tuple[str, ...]:
    """The names of those that may be worth trying for a problem."""
    found = ["direct"]
    if isinstance(problem, Conv2d) and problem.R * problem.S > 1:
        taps = [r for r in (problem.R, problem.S) if r > 1]
        sides = [OUTPUTS.get(r, MANY_TAPS) + (FAST_OUTPUTS.get(r, ()) if accuracy == "fast" else ()) for r in taps]
        found += ["winograd" + "x".join(dict.fromkeys(f"({m},{r})" for m, r in zip(outputs, taps, strict=True)))
                  for outputs in zip(*sides, strict=False)]
        found += ["fft"] if max(taps) >= FFT_TAPS else []
    if isinstance(problem, Conv2d) and not is_flat(problem):
        found.append("im2col")
    if min(problem.M, problem.C) >= STRASSEN_CHANNELS:
        found += ["strassen(1)", "strassen(2)"]
    if accuracy == "strict":
        return tuple(name for name in found if any(one.keeps_nonfinite for one in _that_apply(problem, name)))
    return tuple(found)


def choices(problem: Problem, machine: Machine, layout: str = "nchw", threads: int = 1,
            accuracy: Accuracy = "normal") -> Iterator[Algorithm]:
    """The algorithms whose predicted errors fit a class, the one with the least estimated time first.

    Those without an estimate come last. Where none fits, it is the most accurate one that applies (for "strict", of
    those that keep Inf and NaN where they belong), with an AccuracyWarning.
    """
    def time(algorithm: Algorithm) -> float:
        return algorithm.estimate(machine, layout, threads) * (1 if algorithm.name == "direct" else MARGIN)

    found: list[Algorithm] = []
    fitting = False
    tried = members(problem, accuracy)
    for names in (tried, [family for family in FAMILIES if not any(name.startswith(family) for name in tried)]):
        group = sorted(_that_apply(problem, *names), key=time)
        for algorithm in group:
            if algorithm.fits(accuracy):
                fitting = True
                yield algorithm
        found += group
    if not fitting:
        best = min((one for one in found if one.keeps_enough(accuracy)), key=lambda one: one.prediction.expected)
        kind = "algorithm that keeps Inf and NaN in their places" if accuracy == "strict" else "algorithm"
        warnings.warn(f"{problem.text}: no {kind} has an expected error within accuracy={accuracy!r}, which is "
                      f"{BOUNDS[accuracy]:.2g} of the output's rms; {best.name} is used, with "
                      f"{best.prediction.expected:.2g}", AccuracyWarning, stacklevel=3)
        yield best


def choose(problem: Problem, machine: Machine, layout: str = "nchw", threads: int = 1,
           accuracy: Accuracy = "normal") -> Algorithm:
    """The algorithm of which ``compile`` takes the default recipe where nothing is stored: the first of ``choices``."""
    return next(choices(problem, machine, layout, threads, accuracy))


def _that_apply(problem: Problem, *names: str) -> Iterator[Algorithm]:
    for name in names:
        try:
            yield named(name, problem)
        except LoweringError:
            continue


@lru_cache(1024)
def _direct_error(taps: int, terms: int, outputs: int) -> Prediction:
    return predict_direct(terms, outputs, taps=taps)


@lru_cache(1024)
def _bilinear_error(column: Bilinear, row: Bilinear, channels: int, outputs: int) -> Prediction:
    return predict(kronecker(column, row), channels, outputs)


@lru_cache(1024)
def _strassen_error(levels: int, channels: int, outputs: int) -> Prediction:
    return predict(strassen(levels), channels, outputs)


@lru_cache(1024)
def _fft_error(tiles: Fft, channels: int, outputs: int) -> Prediction:
    """Independent errors of both directions add in squares, as F is orthogonal up to scales. The worst are products
    of gains times the sum of all roundings, where each prediction is one gain times its own."""
    sides = [side for side in (tiles.column, tiles.row) if side.n > 1]
    found = [predict(side.dense, channels, outputs) for side in sides]
    if len(found) == 1:
        return found[0]
    both = sum(1 / (UNIT * (3 * (side.reads + side.points) + channels)) for side in sides)
    return Prediction(
        hypot(*(one.expected for one in found)), hypot(*(one.adverse for one in found)),
        prod(one.worst for one in found) * both / sqrt(channels), prod(one.norm_bound for one in found) * both)


def _fft_time(tiles: Fft, machine: Machine, layout: str, threads: int) -> float:
    if min(tiles.problem.C, tiles.problem.M) < LEAST_CHANNELS:
        return inf
    return FFT * tiles.cost / machine.lanes / threads


def _direct_time(problem: Problem, machine: Machine, layout: str, threads: int) -> float:
    return direct_time(problem, machine, layout) / threads
