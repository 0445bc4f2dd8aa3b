"""Run times: the only clock of the package.

Times on one machine drift by a fifth within minutes (frequency, neighbours), so two times are only
comparable when they were taken in turn. `interleave` goes round all candidates, forwards and backwards by
turns, and takes one sample of each a round; the minimum over rounds is the figure to compare. A call
shorter than a clock can resolve is repeated within a sample. `race` compares two so, in as many rounds as it
takes to tell them apart.

Both find the data in the caches, as in a loop over one layer; `cold` finds them in memory, as the weights of a
network that do not fit the caches.

`measure_peak` is the denominator of "% of peak": the rate of one core on independent vector FMAs.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from convsched.autotune.measure.evict import evict
from convsched.kernels.probes.peak import PeakKernel, peak_kernel
from convsched.machine import host

Clock = Callable[[], int]
"""Nanoseconds since some fixed moment."""

CLOCK: Clock = time.perf_counter_ns

Result = TypeVar("Result")

SETTLED_FRACTION, SETTLED_SAMPLES = 0.015, 3  # so many samples this near to the least: it will not fall much more
SLOWER_RATIO = 1.15  # times the incumbent after as many rounds: timed no more
HOPELESS_RATIO = 2.0  # after the first round
RACE_ROUNDS, RACE_SECONDS = 12, 1.0  # the most

PEAK_CALL_SECONDS = 2e-3  # long against the cost of a call (2 us), short against a scheduler's slice (4 ms)


@dataclass(frozen=True)
class Timing:
    """What one callable took, in seconds a call; `batch` calls were made for each sample."""

    samples: tuple[float, ...]
    batch: int

    @property
    def minimum(self) -> float:
        return min(self.samples)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """The distance between the quartiles, as a fraction of the median; 0 for a single sample."""
        if len(self.samples) < 2 or self.median == 0:
            return 0.0
        first, _, third = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (third - first) / self.median


def interleave(
    callables: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 20,
    min_seconds: float = 50e-6,
    budget: float | None = None,
    settle: float = 0.0,
    prepare: Mapping[str, Callable[[], object]] | None = None,
    enough: Callable[[Mapping[str, Sequence[float]]], bool] = lambda _: False,
    clock: Clock = CLOCK,
) -> dict[str, Timing]:
    """Times the callables in turn: `repeats` rounds, or fewer when `budget` seconds are over or the samples
    so far are `enough`.

    Every callable is first called once to warm up, and again (unless the first call was long) to learn how
    many calls make a sample of at least `min_seconds`. There is always one whole round, however small the
    budget is, so every callable has a sample. `settle` is for callables with threads of their own: before
    each sample the process sleeps as many seconds, in which the threads of the callable before stop
    spinning, and makes one call that does not count. `prepare` has calls by a callable's name, one made
    before each of its samples and not timed: they bring the caches into a known state.
    """
    if not callables:
        return {}
    prepare = prepare or {}
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}: it must be at least 1")
    start = clock()
    batches = {name: _batch(call, min_seconds, clock) for name, call in callables.items()}
    samples: dict[str, list[float]] = {name: [] for name in callables}
    order = list(callables)
    for _ in range(repeats):
        for name in order:
            if settle:
                time.sleep(settle)
                callables[name]()
            if name in prepare:
                prepare[name]()
            samples[name].append(_sample(callables[name], batches[name], clock))
        order.reverse()
        if enough(samples) or (budget is not None and (clock() - start) * 1e-9 >= budget):
            break
    return {name: Timing(tuple(samples[name]), batches[name]) for name in callables}


def race(candidate: Callable[[], object], incumbent: Callable[[], object] | None = None, *,
         clock: Clock = CLOCK) -> tuple[Timing, Timing | None]:
    """Times a candidate in turn with an incumbent, until the times are settled or it is clearly slower."""
    calls = {"candidate": candidate} if incumbent is None else {"candidate": candidate, "incumbent": incumbent}
    timings = interleave(calls, repeats=RACE_ROUNDS, budget=RACE_SECONDS, enough=decided, clock=clock)
    return timings["candidate"], timings.get("incumbent")


def decided(samples: Mapping[str, Sequence[float]]) -> bool:
    """Whether more samples would not change which is faster: all settled, or the candidate clearly slower."""
    least = {name: min(own) for name, own in samples.items()}
    rounds, slower = len(samples["candidate"]), least["candidate"] / least.get("incumbent", math.inf)
    # one round may be unlucky
    if (slower > HOPELESS_RATIO and rounds > 1) or (slower > SLOWER_RATIO and rounds >= SETTLED_SAMPLES):
        return True
    return rounds >= SETTLED_SAMPLES and all(
        sorted(own)[SETTLED_SAMPLES - 1] <= least[name] * (1 + SETTLED_FRACTION) for name, own in samples.items())


def once(call: Callable[[], Result], clock: Clock = CLOCK) -> tuple[Result, float]:
    """The result of one call and the seconds it took: for things done once, such as a compilation."""
    start = clock()
    result = call()
    return result, (clock() - start) * 1e-9


def now() -> float:
    """Seconds since 1970: the date of a measurement."""
    return time.time()


def cold(
    call: Callable[[], object],
    *,
    repeats: int = 10,
    flush: Callable[[], object] | None = None,
    keep: Sequence[npt.NDArray[Any]] = (),
    budget: float | None = None,
    clock: Clock = CLOCK,
) -> Timing:
    """Times single calls with cold caches, each after `flush`.

    `flush` evicts every cache, unless another is given. It runs before the timed region; inside, it would
    favour whatever leaves less to evict. The arrays to `keep` are read again after the flush, such as the
    input, which the layer before has just written: then only the weights are cold.
    """
    empty = partial(evict, host.machine()) if flush is None else flush

    def cool() -> None:
        empty()
        for array in keep:
            np.max(array)

    # Samples of one call: a second one would find warm caches.
    return interleave({"cold": call}, repeats=repeats, min_seconds=0.0, budget=budget, prepare={"cold": cool},
                      clock=clock)["cold"]


def count_for(run: Callable[[int], object], seconds: float, clock: Clock = CLOCK) -> int:
    """The n for which `run(n)`, whose time is proportional to n, takes about so many seconds.

    Each n is tried twice: an interruption must not make a short run look long.
    """
    count, taken = 1, 0.0
    while taken < seconds / 4 and count < 1 << 40:
        count *= 4
        taken = min(once(partial(run, count), clock)[1] for _ in range(2))
    return max(1, round(count * seconds / max(taken, 1e-9)))


def peak_call(kernel: PeakKernel | None = None) -> tuple[Callable[[], object], float]:
    """A call of the FMA kernel for about 2 ms, and the FLOPs it does: one more entry for `interleave`."""
    ready = kernel or peak_kernel(host.machine())
    iterations = count_for(ready.run, PEAK_CALL_SECONDS)
    return partial(ready.run, iterations), float(iterations * ready.flops)


def measure_peak(seconds: float = 0.2) -> float:
    """FLOP/s of one core through a generated kernel of FMAs: the best of about `seconds` of runs."""
    call, flops = peak_call()
    rounds = max(3, math.ceil(seconds / PEAK_CALL_SECONDS))
    return flops / interleave({"peak": call}, repeats=rounds, budget=seconds)["peak"].minimum


def _batch(call: Callable[[], object], min_seconds: float, clock: Clock) -> int:
    """How many calls make a sample of at least `min_seconds`."""
    cold = _sample(call, 1, clock)
    if cold >= 100 * min_seconds:  # a warm call is not a hundred times as fast: one a sample is enough
        return 1
    warm = _sample(call, 1, clock)
    return max(1, math.ceil(min_seconds / max(warm, 1e-9)))


def _sample(call: Callable[[], object], batch: int, clock: Clock) -> float:
    """Seconds a call over `batch` calls."""
    start = clock()
    for _ in range(batch):
        call()
    return (clock() - start) * 1e-9 / batch
