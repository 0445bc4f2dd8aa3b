"""The candidates for a problem: every recipe's parameters, as far as they make a legal schedule.

A recipe joins by a ``Domain``: the values of each parameter worth trying for a problem, and which
combinations fit. The search needs nothing else: it enumerates a domain, and it walks from a recipe to its
neighbours, which differ in one parameter. What the parameters of the three recipes decide:

    register tile          vectors, rows, pixels (channels, depthwise); maps, rows, vectors (pixels)
    cache blocks           block: tiles that share a piece of input; depth: channels before the next tap
    loop order             the whole image as one block walks it inside the weights, small blocks outside;
                           depth below all channels puts taps inside channel blocks
    unrolling              unroll (channels); unroll_taps
    layout of the input    pack: in place, a window with a physical border, or in the order of use
    threads                parallel: over blocks of pixels or of output channels
    tails, borders         peel_borders; tiles that divide the image have no tail

The layout of the activations belongs to the target, and that of the weights follows the loops.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from convsched.analytic import default_recipe
from convsched.machine import Machine
from convsched.problem import Conv2d, Linear, Problem
from convsched.recipes import Channels, Depthwise, Pixels, Recipe, is_flat


@dataclass(frozen=True)
class Target:
    """What is compiled: a problem, for a machine, in a layout, on a number of threads."""

    problem: Problem
    machine: Machine
    layout: str = "nchw"
    threads: int = 1


@dataclass(frozen=True)
class Domain:
    """The values of a recipe's parameters, by name, and which combinations fit the target.

    Numbers are in ascending order. A parameter that is not named keeps the recipe's own default.
    """

    recipe: type[Recipe]
    values: Mapping[str, tuple[Any, ...]]
    fits: Callable[[Any], bool]

    def __iter__(self) -> Iterator[Recipe]:
        for combination in itertools.product(*self.values.values()):
            made = self.recipe(**dict(zip(self.values, combination, strict=True)))
            if self.fits(made):
                yield made

    def neighbours(self, recipe: Recipe) -> Iterator[Recipe]:
        """The recipes that differ in one parameter: a number by one place in its list of values, wherever
        it lies itself; anything else by any other value."""
        for field in fields(recipe):
            current = getattr(recipe, field.name)
            for value in _near(self.values.get(field.name, ()), current):
                made = replace(recipe, **{field.name: value})
                if self.fits(made):
                    yield made


def _near(options: tuple[Any, ...], current: Any) -> tuple[Any, ...]:
    """The options next to a number, below and above; all others where there is no order."""
    if isinstance(current, bool) or not isinstance(current, int):
        return tuple(value for value in options if value != current)
    return (*[value for value in options if value < current][-1:],
            *[value for value in options if value > current][:1])


Maker = Callable[[Target], Domain | None]
_MAKERS: list[Maker] = []


def register(maker: Maker) -> Maker:
    """Add a recipe to the space: ``maker(target)`` gives its domain, or None where it does not apply."""
    _MAKERS.append(maker)
    return maker


def domains(target: Target) -> tuple[Domain, ...]:
    """The domains of all recipes that apply."""
    made = (maker(target) for maker in _MAKERS)
    return tuple(domain for domain in made if domain is not None)


def candidates(target: Target) -> tuple[Recipe, ...]:
    """All candidates, the analytic default first."""
    default = default_recipe(target.problem, target.machine, target.layout, target.threads)
    found = dict.fromkeys([default])
    for domain in domains(target):
        found.update(dict.fromkeys(domain))
    return tuple(found)


def neighbours(target: Target, recipe: Recipe) -> tuple[Recipe, ...]:
    """The candidates one step from a recipe."""
    own = [domain for domain in domains(target) if domain.recipe is type(recipe)]
    return tuple(dict.fromkeys(near for domain in own for near in domain.neighbours(recipe)))


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
    packs: tuple[str, ...] = ("none",)
    if isinstance(problem, Conv2d) and not flat:
        packs = ("none", "window")
    elif isinstance(problem, Conv2d) and target.layout == "nchw":
        packs = ("none", "packed")

    def fits(recipe: Channels) -> bool:
        tile = recipe.vectors * recipe.rows * recipe.pixels
        return (tile >= 8 or recipe.pixels == columns) and tile + recipe.vectors < machine.registers and (
            recipe.unroll <= recipe.depth) and (recipe.rows == 1 or recipe.pixels == columns)

    return Domain(Channels, {
        "lanes": (machine.lanes,),
        "vectors": _sizes(-(-maps // machine.lanes), (1, 2, 3, 4, 5, 6, 8, 12)),
        "rows": (1,) if flat else _sizes(rows, (1, 2, 3, 4)),
        "pixels": _sizes(columns, (1, 4, 6, 7, 8, 9, 12, 13, 14, 16, 24, 28)),
        "block": _sizes(columns if flat else rows, (1, 2, 4, 7, 14, 28, 56, 112)),
        "depth": (inputs,) if flat else _sizes(inputs, (16, 32, 64, 128, 256)),
        "unroll": _sizes(inputs, (1, 2, 3, 4, 8)),
        "pack": packs,
        "parallel": ("pixels", "channels") if target.threads > 1 else ("pixels",),
    }, fits)


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

    def fits(recipe: Pixels) -> bool:
        tile = recipe.maps * recipe.rows * recipe.vectors
        return tile <= machine.registers - 4 and (not recipe.unroll_taps or taps * tile <= 600)

    return Domain(Pixels, {
        "lanes": (machine.lanes,),
        "maps": _sizes(maps, (1, 2, 4, 8)),
        "rows": (1,) if is_flat(problem) else _sizes(rows, (1, 2, 3, 4, 5, 6, 7, 8)),
        "vectors": _sizes(-(-columns // machine.lanes), (1, 2, 3, 4, 7, 8, 14)),
        "unroll_taps": (True, False) if taps > 1 else (False,),
        "peel_borders": (True, False),
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
        return tile <= machine.registers - 4 and (not recipe.unroll_taps or taps * tile <= 600)

    return Domain(Depthwise, {
        "lanes": (machine.lanes,),
        "rows": _sizes(problem.E, (1, 2, 3, 4)),
        "pixels": _sizes(problem.F, (1, 2, 4, 6, 7, 8, 14)),
        "unroll_taps": (True, False),
    }, fits)
