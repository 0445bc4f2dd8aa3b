"""The candidates for a problem: every recipe's parameters, as far as they make a legal schedule.

A recipe joins by a ``Domain``: the values of each parameter worth trying for a problem, and which
combinations fit. The search needs nothing else: it enumerates a domain, and it walks from a recipe to its
neighbours, which differ in one parameter. What the parameters of the three recipes decide:

    register tile          vectors, rows, pixels (channels, depthwise); maps, rows, vectors, lanes (pixels)
    cache blocks           block: tiles that share a piece of input; depth: channels before the next tap
    loop order             the whole image as one block walks it inside the weights, small blocks outside;
                           depth below all channels puts taps inside channel blocks; order (pixels)
    unrolling              unroll (channels); unroll_taps
    layout of the input    pack: in place, a window with a physical border, or in the order of use
    threads                parallel: over blocks of pixels or of output channels
    tails                  tail: own copies, the last tile moved back, or masks; tiles that divide have none
    borders                skip: products with padding left out, or computed with zeros; peel_borders
    padding of strides     align: of the copy of the input, where its strides are multiples of a page
    prefetch               prefetch: of the weights, where they are larger than L2

The layout of the activations belongs to the target, and that of the weights follows the loops.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from convsched.algorithms import choose, named
from convsched.analytic import meets_input
from convsched.machine import Machine
from convsched.names import Accuracy
from convsched.problem import Conv2d, Linear, Problem
from convsched.recipes import Channels, Depthwise, Pixels, Recipe, copy_stride, is_flat
from convsched.schedule import Schedule

PAGE = 1024  # elements (4096 bytes): rows so far apart share the sets of L1
APART = 1040  # elements (65 cache lines): no multiple up to 63 of them is one of a page


@dataclass(frozen=True)
class Target:
    """What is compiled: a problem, for a machine, in a layout, on a number of threads, by algorithms that fit a
    class of accuracy, or by one ``algorithm``."""

    problem: Problem
    machine: Machine
    layout: str = "nchw"
    threads: int = 1
    accuracy: Accuracy = "normal"
    algorithm: str | None = None


@dataclass(frozen=True)
class Domain:
    """The values of a recipe's parameters, by name, and which combinations fit the target.

    Numbers are in ascending order. A parameter that is not named keeps the recipe's own default. Those in ``finer``
    do too where the domain is enumerated: they matter less, and are varied around what is good already. ``seed`` is
    the default of an algorithm whose only recipe this is.
    """

    recipe: Callable[..., Recipe]
    values: Mapping[str, tuple[Any, ...]]
    fits: Callable[[Any], bool]
    finer: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    algorithm: str = "direct"
    seed: Recipe | None = None

    def __iter__(self) -> Iterator[Recipe]:
        for combination in itertools.product(*self.values.values()):
            made = self.recipe(**dict(zip(self.values, combination, strict=True)))
            if self.fits(made):
                yield made

    def neighbours(self, recipe: Recipe) -> Iterator[Recipe]:
        """The recipes that differ in one parameter: a number by one place in its list of values, wherever
        it lies itself; anything else by any other value."""
        options = {**self.values, **self.finer}
        for parameter in fields(recipe):
            name = parameter.name
            for value in _near(options.get(name, ()), getattr(recipe, name)):
                made = replace(recipe, **{name: value})
                if self.fits(made):
                    yield made


def _near(options: tuple[Any, ...], current: Any) -> tuple[Any, ...]:
    """The options next to a number, below and above; all others where there is no order."""
    if isinstance(current, bool) or not isinstance(current, int):
        return tuple(value for value in options if value != current)
    return (*[value for value in options if value < current][-1:],
            *[value for value in options if value > current][:1])


@dataclass(frozen=True)
class Choice:
    """A candidate: an algorithm by its full name, and the recipe that schedules it."""

    algorithm: str
    recipe: Recipe

    def schedule(self, problem: Problem, layout: str) -> Schedule:
        """The steps for a problem, as the algorithm lowers it."""
        return self.recipe.schedule(problem, layout)


Maker = Callable[[Target], Domain | Iterable[Domain] | None]
_MAKERS: list[Maker] = []


def register(maker: Maker) -> Maker:
    """Add a recipe to the space: ``maker(target)`` gives its domain, or one for each algorithm, or None where it
    does not apply."""
    _MAKERS.append(maker)
    return maker


def domains(target: Target) -> tuple[Domain, ...]:
    """The domains of all recipes that apply, of the algorithms that the target allows."""
    found: list[Domain] = []
    for maker in _MAKERS:
        made = maker(target)
        found += [made] if isinstance(made, Domain) else made or ()
    only = named(target.algorithm, target.problem).name if target.algorithm else None
    return tuple(domain for domain in found if only in (None, domain.algorithm))


def candidates(target: Target) -> tuple[Choice, ...]:
    """All candidates, the analytic default first. Raises LoweringError where the algorithm does not apply."""
    p, machine = target.problem, target.machine
    algorithm = (named(target.algorithm, p) if target.algorithm
                 else choose(p, machine, target.layout, target.threads, target.accuracy))
    found = dict.fromkeys([Choice(algorithm.name, algorithm.default(machine, target.layout, target.threads))])
    for domain in domains(target):
        found.update(dict.fromkeys(Choice(domain.algorithm, recipe) for recipe in domain))
    return tuple(found)


def seeds(target: Target) -> tuple[Choice, ...]:
    """The defaults of all algorithms that may compute the problem: the search tries each."""
    p, found = target.problem, {domain.algorithm: domain.seed for domain in domains(target)}
    for name, seed in found.items():
        found[name] = seed or named(name, p).default(target.machine, target.layout, target.threads)
    return tuple(Choice(name, seed) for name, seed in found.items() if seed is not None)


def neighbours(target: Target, choice: Choice) -> tuple[Choice, ...]:
    """The candidates one step from another, of the same algorithm."""
    own = [domain for domain in domains(target) if domain.algorithm == choice.algorithm and (
        domain.seed is not None or domain.recipe is type(choice.recipe))]
    return tuple(dict.fromkeys(Choice(choice.algorithm, near)
                               for domain in own for near in domain.neighbours(choice.recipe)))


def _per_group(problem: Problem) -> tuple[int, int, int, int]:
    """(output channels, input channels, rows, columns) that a group's tiles cover."""
    if isinstance(problem, Linear):
        return problem.M, problem.C, 1, problem.N
    rows, columns = (1, problem.E * problem.F) if is_flat(problem) else (problem.E, problem.F)
    return problem.M // problem.groups, problem.C // problem.groups, rows, columns


def _sizes(extent: int, options: tuple[int, ...]) -> tuple[int, ...]:
    """The options below an extent, and the extent itself where it is no larger than the greatest."""
    found = {o for o in options if o < extent} | ({extent} if extent <= max(options) else set())
    return tuple(sorted(found))


@register
def channels(target: Target) -> Domain | None:
    """Blocked schedules with vectors of output channels."""
    problem, machine = target.problem, target.machine
    maps, inputs, rows, columns = _per_group(problem)
    if isinstance(problem, Conv2d) and maps < machine.lanes // 4:
        return None
    flat = isinstance(problem, Linear) or is_flat(problem)
    copies = _copies(problem, target.layout)
    spare = 0 if machine.isa == "avx512" else 1  # registers for a broadcast, where FMAs cannot load and broadcast

    def fits(recipe: Channels) -> bool:
        tile = recipe.vectors * recipe.rows * recipe.pixels
        return ((tile >= 8 or recipe.pixels == columns) and tile + recipe.vectors + spare <= machine.registers
                and recipe.unroll <= recipe.depth and (recipe.rows == 1 or recipe.pixels == columns)
                and (recipe.pack, recipe.skip) in copies and (recipe.rows == 1 or not recipe.skip)
                and _has_tail(recipe, problem, columns) and _is_apart(recipe, problem, target.layout))

    return Domain(Channels, {
        "lanes": (machine.lanes,),
        "vectors": _sizes(-(-maps // machine.lanes), (1, 2, 3, 4, 5, 6, 8, 12)),
        "rows": (1,) if flat else _sizes(rows, (1, 2, 3, 4)),
        "pixels": _sizes(columns, (1, 4, 6, 7, 8, 9, 12, 13, 14, 16, 24, 28)),
        "block": _sizes(columns if flat else rows, (1, 2, 4, 7, 14, 28, 56, 112)),
        "depth": (inputs,) if flat else _sizes(inputs, (16, 32, 64, 128, 256)),
        "unroll": _sizes(inputs, (1, 2, 3, 4, 8)),
        "pack": tuple(dict.fromkeys(pack for pack, _ in copies)),
        "skip": tuple(dict.fromkeys(skip for _, skip in copies)),
        "parallel": ("pixels", "channels") if target.threads > 1 else ("pixels",),
    }, fits, {
        "tail": ("peel", "overlap", "mask"),
        "align": (0, APART),
        "prefetch": (0, 8, 16) if 4 * problem.weights > machine.l2 else (0,),
    })


def _copies(problem: Problem, layout: str) -> tuple[tuple[str, str], ...]:
    """How the input may be read, (pack, skip): a border is copied, or what would read it is left out."""
    if isinstance(problem, Linear):
        return (("none", ""),)
    if is_flat(problem):
        return (("none", ""), ("packed", "")) if layout == "nchw" else (("none", ""),)
    if not any(problem.padding):
        return ("none", ""), ("window", "")
    if not meets_input(problem):
        return (("window", ""),)
    rows = (("window", "h"),) if problem.padding[0] or problem.padding[2] else ()
    return ("none", "hw"), ("window", ""), *rows


def _has_tail(recipe: Channels, problem: Problem, columns: int) -> bool:
    """Whether a ragged tile can be treated as the recipe says; "peel" is all there is to say where none is."""
    if recipe.tail == "peel":
        return True
    flat = isinstance(problem, Linear) or is_flat(problem)
    last = columns % (recipe.block * recipe.pixels) if flat else columns  # pixels of the last block
    if columns % recipe.pixels == 0 or last < recipe.pixels:
        return False
    residual = isinstance(problem, Conv2d) and problem.residual  # it may share memory with what is written
    return recipe.tail == "mask" or (recipe.skip != "hw" and recipe.pack != "packed" and not residual)


def _is_apart(recipe: Channels, problem: Problem, layout: str) -> bool:
    """Whether strides are padded only where they would be multiples of a page."""
    if not recipe.align:
        return True
    stride = copy_stride(recipe, problem, layout) if isinstance(problem, Conv2d) else 0
    return stride > 0 and stride % PAGE == 0


@register
def pixels(target: Target) -> Domain | None:
    """Schedules with vectors of neighbouring pixels, for depthwise and thin layers; in layouts that keep
    channels together, where nothing else applies."""
    problem, machine = target.problem, target.machine
    maps, inputs, rows, columns = _per_group(problem)
    if isinstance(problem, Linear) or maps * inputs > 256:
        return None
    if target.layout != "nchw" and (channels(target) or depthwise(target)):
        return None
    taps = problem.R * problem.S

    half = machine.lanes // 2

    def fits(recipe: Pixels) -> bool:
        tile = recipe.maps * recipe.rows * recipe.vectors
        return (tile <= machine.registers - 4 and (not recipe.unroll_taps or taps * tile <= 600)
                and (recipe.vectors - 1) * recipe.lanes < columns
                and (recipe.order == "taps" or (recipe.unroll_taps and recipe.rows > 1)))

    return Domain(Pixels, {
        "lanes": (half, machine.lanes) if half >= 4 else (machine.lanes,),
        "maps": _sizes(maps, (1, 2, 4, 8)),
        "rows": (1,) if is_flat(problem) else _sizes(rows, (1, 2, 3, 4, 5, 6, 7, 8, 14)),
        "vectors": _sizes(-(-columns // half), (1, 2, 3, 4, 7, 8, 14)),
        "unroll_taps": (True, False) if taps > 1 else (False,),
        "peel_borders": (True, False),
        "order": ("taps", "rows"),
    }, fits)


@register
def depthwise(target: Target) -> Domain | None:
    """Schedules with a channel a lane, for layouts that keep channels together."""
    problem, machine = target.problem, target.machine
    if target.layout == "nchw" or isinstance(problem, Linear) or problem.groups == 1:
        return None
    if not problem.groups == problem.C == problem.M:
        return None
    taps = problem.R * problem.S

    def fits(recipe: Depthwise) -> bool:
        tile = recipe.rows * recipe.pixels
        if not recipe.unroll_taps:
            return tile <= machine.registers - 4
        return tile <= machine.registers // 2 and taps * tile <= 600  # inputs wait in registers for the next tap

    return Domain(Depthwise, {
        "lanes": (machine.lanes,),
        "rows": _sizes(problem.E, (1, 2, 3, 4)),
        "pixels": _sizes(problem.F, (1, 2, 4, 6, 7, 8, 14)),
        "unroll_taps": (True, False),
    }, fits)
