"""The candidates for a problem: every recipe's parameters, as far as they make a legal schedule.

A recipe joins by a ``Domain``: the values of each parameter worth trying for a problem, and which
combinations fit. The search needs nothing else: it enumerates a domain, and it walks from a recipe to its
neighbours, which differ in one parameter. What the parameters of direct convolution's recipes decide:

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

from collections.abc import Callable, Iterable

from convsched.autotune.search.domain import Choice, Domain
from convsched.autotune.search.parameters import algorithms, channels, depthwise, pixels
from convsched.plan.choice import choose
from convsched.plan.families import Algorithm
from convsched.plan.plan import Target
from convsched.problem import Problem

Maker = Callable[[Problem, Target], Domain | Iterable[Domain] | None]
MAKERS: tuple[Maker, ...] = (channels, pixels, depthwise, algorithms)
"""``maker(problem, target)`` gives a recipe's domain, or one for each algorithm, or None where it does not apply."""


def domains(problem: Problem, target: Target, only: Algorithm | None = None) -> tuple[Domain, ...]:
    """The domains of all recipes that apply, of the algorithms that fit the target's accuracy, or of one."""
    found: list[Domain] = []
    for maker in MAKERS:
        made = maker(problem, target)
        found += [made] if isinstance(made, Domain) else made or ()
    return tuple(domain for domain in found if only in (None, domain.algorithm))


def candidates(problem: Problem, target: Target, only: Algorithm | None = None) -> tuple[Choice, ...]:
    """All candidates, or those of one algorithm; the analytic default first. Raises LoweringError where the algorithm
    does not fit the class of accuracy: ``compile`` would not take what is found."""
    if only is not None:
        only.require(target.accuracy)
    algorithm = only or choose(problem, target)
    default = algorithm.default(target.machine, target.layout, target.threads)
    found = dict.fromkeys([Choice(algorithm, default)])
    for domain in domains(problem, target, only):
        found.update(dict.fromkeys(Choice(domain.algorithm, recipe) for recipe in domain))
    return tuple(found)


def seeds(problem: Problem, target: Target, only: Algorithm | None = None) -> tuple[Choice, ...]:
    """The defaults of all algorithms that may compute the problem: the search tries each."""
    found = {domain.algorithm: domain.seed for domain in domains(problem, target, only)}
    return tuple(Choice(algorithm, seed or algorithm.default(target.machine, target.layout, target.threads))
                 for algorithm, seed in found.items())


def neighbours(target: Target, choice: Choice) -> tuple[Choice, ...]:
    """The candidates one step from another, of the same algorithm."""
    own = [domain for domain in domains(choice.algorithm.problem, target, choice.algorithm)
           if domain.seed is not None or domain.recipe is type(choice.recipe)]
    return tuple(dict.fromkeys(Choice(choice.algorithm, near)
                               for domain in own for near in domain.neighbours(choice.recipe)))
