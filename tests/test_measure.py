"""The clock's rules, on a clock that only moves when a call says so; and the FMA peak kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from convsched.autotune.blas import blas_threads
from convsched.autotune.evict import evict, eviction_bytes
from convsched.autotune.measure import (
    Timing,
    count_for,
    hot_and_cold,
    interleave,
    measure_peak,
    now,
    once,
)
from convsched.kernels.jit import load
from convsched.kernels.peak import SYMBOL, PeakKernel, fma_loop, peak_kernel
from convsched.machine import Machine


class FakeClock:
    """Time in nanoseconds that passes only while a call made by `call` runs."""

    def __init__(self) -> None:
        self.now = 0
        self.log: list[str] = []

    def __call__(self) -> int:
        return self.now

    def call(self, name: str, *microseconds: float) -> Callable[[], object]:
        """A callable that takes these times in turn, and the last one from then on."""
        times = list(microseconds)

        def run() -> None:
            self.log.append(name)
            self.now += round(1000 * (times.pop(0) if len(times) > 1 else times[0]))

        return run


def test_a_long_call_is_timed_one_at_a_time() -> None:
    clock = FakeClock()
    timing = interleave({"a": clock.call("a", 200.0)}, repeats=4, clock=clock)["a"]
    assert timing.batch == 1
    assert timing.samples == pytest.approx((200e-6,) * 4)
    assert len(clock.log) == 2 + 4  # two to warm up


def test_a_short_call_is_repeated_to_fill_a_sample() -> None:
    clock = FakeClock()
    timing = interleave({"a": clock.call("a", 3.0)}, repeats=2, min_seconds=50e-6, clock=clock)["a"]
    assert timing.batch == 17  # 17 * 3 us >= 50 us
    assert timing.samples == pytest.approx((3e-6,) * 2)


def test_the_first_call_does_not_count() -> None:
    clock = FakeClock()
    timing = interleave({"a": clock.call("a", 900.0, 3.0)}, repeats=1, clock=clock)["a"]
    assert (timing.batch, timing.minimum) == (17, pytest.approx(3e-6))


def test_a_very_long_call_is_warmed_up_once() -> None:
    clock = FakeClock()
    interleave({"a": clock.call("a", 1e6)}, repeats=3, clock=clock)
    assert len(clock.log) == 1 + 3


def test_rounds_go_forwards_and_backwards() -> None:
    clock = FakeClock()
    calls = {name: clock.call(name, 100.0) for name in "abc"}
    interleave(calls, repeats=3, clock=clock)
    assert "".join(clock.log) == "aabbcc" + "abc" + "cba" + "abc"


def test_the_budget_ends_the_rounds_but_not_the_first() -> None:
    clock = FakeClock()
    calls = {name: clock.call(name, 1000.0) for name in "ab"}
    timings = interleave(calls, repeats=100, budget=10e-3, clock=clock)  # 4 ms go on warming up
    assert [len(timings[name].samples) for name in "ab"] == [3, 3]
    timings = interleave(calls, repeats=100, budget=0, clock=clock)
    assert [len(timings[name].samples) for name in "ab"] == [1, 1]


def test_nothing_to_time_and_no_rounds() -> None:
    assert interleave({}) == {}
    with pytest.raises(ValueError, match="repeats is 0: it must be at least 1"):
        interleave({"a": lambda: None}, repeats=0)


def test_an_interrupt_ends_at_once() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interleave({"a": interrupt})


def test_the_statistics_of_a_timing() -> None:
    timing = Timing((4.0, 1.0, 2.0, 3.0, 5.0), batch=1)
    assert (timing.minimum, timing.median) == (1.0, 3.0)
    assert timing.spread == pytest.approx(2 / 3)  # quartiles 2 and 4
    assert Timing((1.0,), batch=1).spread == 0
    assert Timing((0.0, 0.0), batch=1).spread == 0


def test_once_gives_the_result_and_the_time() -> None:
    clock = FakeClock()
    call = clock.call("a", 5.0)
    result, seconds = once(lambda: (call(), "done")[1], clock)
    assert (result, seconds) == ("done", pytest.approx(5e-6))


def test_what_prepares_a_sample_is_not_timed() -> None:
    clock = FakeClock()
    calls = {name: clock.call(name, 100.0) for name in "ab"}
    timings = interleave(calls, repeats=2, prepare={"b": clock.call("p", 9000.0)}, clock=clock)
    assert "".join(clock.log) == "aabb" + "apb" + "pba"
    assert timings["b"].samples == pytest.approx((100e-6,) * 2)


def test_the_flush_is_outside_the_timed_region() -> None:
    clock = FakeClock()
    cold = False

    def flush() -> None:
        nonlocal cold
        clock.log.append("flush")
        clock.now += 5_000_000
        cold = True

    def call() -> None:
        nonlocal cold
        clock.log.append("call")
        clock.now += 90_000 if cold else 2_000
        cold = False

    hot, slow = hot_and_cold(call, repeats=3, flush=flush, clock=clock)
    assert (hot.batch, slow.batch) == (1, 1)  # a second call in a sample would find warm caches
    assert hot.samples == pytest.approx((2e-6,) * 3)
    assert slow.samples == pytest.approx((90e-6,) * 3)
    assert clock.log.count("flush") == 3  # one a cold sample


def test_arrays_to_keep_are_read_after_the_flush() -> None:
    clock = FakeClock()

    class Watched:
        def max(self, **options: object) -> None:  # what np.max calls
            clock.log.append("read")

    array: Any = Watched()
    flush, call = clock.call("flush", 1.0), clock.call("call", 1.0)
    hot_and_cold(call, repeats=1, flush=flush, keep=[array], clock=clock)
    # Two to warm up, a pair for the hot sample, then the cold one.
    assert clock.log == ["call"] * 4 + ["flush", "read", "call"]


def test_eviction_reads_twice_the_last_level() -> None:
    for machine in (Machine.example("avx512"), Machine.example("neon"), Machine.host()):
        assert eviction_bytes(machine) >= 2 * machine.l3
    host = Machine.host()
    small = dataclasses.replace(host, l1=1 << 12, l2=1 << 14, l3=1 << 16)
    assert evict(small) * 4 == eviction_bytes(small) // (1 << 10) * (1 << 10)  # whole iterations, of ones
    assert evict(small) == evict(small)


def test_a_count_that_takes_a_given_time() -> None:
    clock = FakeClock()

    def run(count: int) -> None:
        clock.now += 50 * count

    assert count_for(run, 1e-3, clock) == 20_000
    assert count_for(lambda count: clock.call("slow", 7000.0)(), 1e-3, clock) == 1


def test_an_interruption_does_not_shorten_the_count() -> None:
    clock = FakeClock()
    interruptions = [0, 4_000_000]

    def run(count: int) -> None:
        clock.now += 50 * count + (interruptions.pop() if interruptions else 0)

    assert count_for(run, 1e-3, clock) == 20_000


def test_the_date_is_after_this_was_written() -> None:
    assert now() > 1.7e9


@pytest.mark.parametrize(("lanes", "accumulators"), [(4, 2), (4, 12), (8, 5), (16, 28)])
def test_the_peak_kernel_multiplies_and_adds(lanes: int, accumulators: int) -> None:
    kernel = PeakKernel(load(fma_loop(lanes, accumulators), (SYMBOL,)), lanes, accumulators)
    assert kernel.flops == 2 * lanes * accumulators
    assert kernel.run(10) == 10 * 0.5 * 0.5 * lanes * accumulators  # exact in float32


def test_the_peak_kernel_of_this_machine() -> None:
    machine = Machine.host()
    kernel = peak_kernel(machine)
    assert (kernel.lanes, kernel.accumulators) == (machine.lanes, machine.registers - 4)


def test_the_peak_is_more_than_one_scalar_operation_a_cycle() -> None:
    assert 1e9 < measure_peak(0.01) < 1e13


def test_blas_threads_are_restored() -> None:
    with blas_threads(1) as inside, blas_threads(2) as nested:
        assert inside is nested
