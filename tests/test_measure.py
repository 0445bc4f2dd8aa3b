"""The clock's rules, on a clock that only moves when a call says so; and the FMA peak kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from convsched.autotune.measure import evict as evict_module
from convsched.autotune.measure.evict import evict, eviction_bytes
from convsched.autotune.measure.measure import (
    RACE_ROUNDS,
    Timing,
    cold,
    count_for,
    decided,
    interleave,
    measure_peak,
    now,
    once,
    race,
)
from convsched.benchmark.blas import blas_threads
from convsched.kernels.jit import load
from convsched.kernels.probes.peak import SYMBOL, PeakKernel, fma_loop, peak_kernel
from convsched.kernels.probes.stream import stream_kernel
from convsched.machine import Machine, host


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


def test_rounds_end_when_there_is_enough() -> None:
    clock = FakeClock()
    seen = []

    def enough(samples: Mapping[str, Sequence[float]]) -> bool:
        seen.append({name: len(own) for name, own in samples.items()})
        return len(samples["a"]) == 3

    timings = interleave({name: clock.call(name, 100.0) for name in "ab"}, repeats=9, enough=enough, clock=clock)
    assert [len(timings[name].samples) for name in "ab"] == [3, 3]
    assert seen == [{"a": n, "b": n} for n in (1, 2, 3)]


@pytest.mark.parametrize(("candidate", "incumbent", "verdict"), [
    ([2.1, 2.1], [1.0, 1.0], True), ([2.1], [1.0], False), ([1.9, 1.9], [1.0, 1.0], False),  # hopeless, or not yet
    ([1.2, 1.3, 1.2], [1.0, 1.1, 1.3], True), ([1.2, 1.3], [1.0, 1.1], False),  # clearly slower, or not yet
    ([1.0, 1.001, 1.005], [1.1, 1.1, 1.1], True),  # settled
    ([1.0, 1.001, 1.005], [1.1, 1.1, 1.2], False), ([1.0, 0.9, 1.0], [1.0, 1.0, 1.0], False),
    ([1.0, 1.2, 1.1, 1.001, 1.4, 1.002], [0.9, 0.9, 0.95, 0.9, 1.3, 0.9], True),  # whatever disturbed it between
])  # fmt: skip
def test_when_a_race_is_decided(candidate: list[float], incumbent: list[float], verdict: bool) -> None:
    assert decided({"candidate": candidate, "incumbent": incumbent}) is verdict


def test_a_candidate_alone_is_timed_until_it_settles() -> None:
    assert not decided({"candidate": [1.0, 1.0]})
    assert decided({"candidate": [1.0, 1.0, 1.0]})
    clock = FakeClock()
    timing, other = race(clock.call("a", 900.0, 800.0, 500.0, 300.0, 300.0, 300.0, 300.0), clock=clock)
    assert timing.samples == pytest.approx((500e-6, 300e-6, 300e-6, 300e-6))
    assert other is None


def test_a_race_has_a_last_round() -> None:
    clock = FakeClock()
    restless = [100.0 + 7 * (i % 5) + 50 / (i + 1) for i in range(100)]
    timing, other = race(clock.call("a", *restless), clock.call("b", *restless), clock=clock)
    assert other is not None
    assert len(timing.samples) == len(other.samples) <= RACE_ROUNDS


def test_a_hopeless_candidate_is_sampled_twice() -> None:
    clock = FakeClock()
    timing, other = race(clock.call("a", 500.0), clock.call("b", 100.0), clock=clock)
    assert other is not None
    assert (len(timing.samples), len(other.samples)) == (2, 2)


def test_the_flush_is_outside_the_timed_region() -> None:
    clock = FakeClock()
    is_cold = False

    def flush() -> None:
        nonlocal is_cold
        clock.log.append("flush")
        clock.now += 5_000_000
        is_cold = True

    def call() -> None:
        nonlocal is_cold
        clock.log.append("call")
        clock.now += 90_000 if is_cold else 2_000
        is_cold = False

    timing = cold(call, repeats=3, flush=flush, clock=clock)
    assert timing.batch == 1  # a second call in a sample would find warm caches
    assert timing.samples == pytest.approx((90e-6,) * 3)
    assert clock.log == ["call"] + ["flush", "call"] * 3


def test_arrays_to_keep_are_read_after_the_flush() -> None:
    clock = FakeClock()

    class Watched:
        def max(self, **options: object) -> None:  # what np.max calls
            clock.log.append("read")

    array: Any = Watched()
    flush, call = clock.call("flush", 1.0), clock.call("call", 1.0)
    cold(call, repeats=1, flush=flush, keep=[array], clock=clock)
    assert clock.log == ["call", "flush", "read", "call"]


@pytest.mark.parametrize("threads", [1, 3])
def test_eviction_reads_twice_the_last_level(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for machine in (Machine.example("avx512"), Machine.example("neon"), host.machine()):
        assert eviction_bytes(machine) >= 2 * machine.l3
    small = dataclasses.replace(host.machine(), l1=1 << 12, l2=1 << 14, l3=1 << 16)
    kernel, sums = stream_kernel(small), []

    class Watched:
        def read(self, buffer: Any) -> None:
            sums.append(kernel.read(buffer))  # of ones: the number of float32 read

    monkeypatch.setattr(evict_module, "stream_kernel", lambda machine: Watched())
    evict(small, threads)
    assert sums == [eviction_bytes(small) // (1 << 10) * (1 << 10) / 4] * threads  # each core's, whole iterations


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
    machine = host.machine()
    kernel = peak_kernel(machine)
    assert (kernel.lanes, kernel.accumulators) == (machine.lanes, machine.registers - 4)


def test_the_peak_is_more_than_one_scalar_operation_a_cycle() -> None:
    assert 1e9 < measure_peak(0.01) < 1e13


def test_blas_threads_are_restored() -> None:
    with blas_threads(1) as inside, blas_threads(2) as nested:
        assert inside is nested
