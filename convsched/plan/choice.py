"""Which algorithms may compute a problem within a class of accuracy, the fastest by estimate first."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from convsched.algebra.accuracy import BOUNDS
from convsched.options import Accuracy
from convsched.plan.families import FAMILIES, Algorithm, member_name, parse_name, that_apply
from convsched.plan.plan import Target
from convsched.problem import Problem


class AccuracyWarning(UserWarning):
    """No algorithm is as accurate as asked; the most accurate one is used."""


def members(problem: Problem, accuracy: Accuracy = "normal") -> tuple[str, ...]:
    """The names of those that may be worth trying for a problem, as their families tell."""
    found = [member_name(name, sizes) for name, family in FAMILIES.items() for sizes in family.tried(problem, accuracy)]
    if accuracy == "strict":
        return tuple(name for name in found if any(one.is_exact for one in that_apply(problem, name)))
    return tuple(found)


def choices(problem: Problem, target: Target) -> Iterator[Algorithm]:
    """The algorithms whose predicted errors fit a class, the one with the least estimated time first.

    Those without an estimate come last. Where none fits, it is the most accurate one that applies (for "strict", of
    those that keep Inf and NaN where they belong), with an AccuracyWarning.
    """
    accuracy = target.accuracy

    def time(algorithm: Algorithm) -> float:
        return algorithm.estimate(target.machine, target.layout, target.threads) * algorithm.margin

    found: list[Algorithm] = []
    fitting = False
    tried = members(problem, accuracy)
    families = {parse_name(name)[0] for name in tried}
    for names in (tried, [family for family in FAMILIES if family not in families]):
        group = sorted(that_apply(problem, *names), key=time)
        for algorithm in group:
            if algorithm.fits(accuracy):
                fitting = True
                yield algorithm
        found += group
    if not fitting:
        best = min((one for one in found if one.keeps_enough(accuracy)), key=lambda one: one.prediction.greatest)
        least = best.prediction
        kind = "algorithm that keeps Inf and NaN in their places" if accuracy == "strict" else "algorithm"
        warnings.warn(f"{problem.text}: no {kind} has an expected error within accuracy={accuracy!r}, which is "
                      f"{BOUNDS[accuracy]:.2g} of the output's rms; {best.name} is used, with "
                      f"{least.greatest:.2g}" + f"; accuracy={least.accuracy!r} allows it" * bool(least.accuracy),
                      AccuracyWarning, stacklevel=4)
        yield best


def choose(problem: Problem, target: Target) -> Algorithm:
    """The algorithm of which ``compile`` takes the default recipe where nothing is stored: the first of ``choices``."""
    return next(choices(problem, target))
