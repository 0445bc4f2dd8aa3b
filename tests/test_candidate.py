"""A candidate in the worker's process: what is checked, when it is timed cold, what is told of conditions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from convsched.autotune.measure.measure import Timing
from convsched.autotune.workers import candidate as module
from convsched.autotune.workers.candidate import Data, Job, Outcome, Prepared, data_of, prepared, run_job
from convsched.machine import CpuCounters, host
from convsched.plan.families import TOLERANCE, named
from convsched.plan.plan import Plan, Target
from convsched.problem import Conv2d, Linear, Problem
from convsched.schedule import Schedule, parse_schedule

PROBLEM = Conv2d(4, 8, 3, padding=1, input_size=6)


def job_of(problem: Problem, layout: str = "nchw", threads: int = 1) -> Job:
    return Job(Plan.of(named("direct", problem), Target(host.machine(), layout, threads)))


JOB = job_of(PROBLEM)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    prepared.cache_clear()
    data_of.cache_clear()


@pytest.mark.parametrize("problem", [
    PROBLEM, Conv2d(4, 8, 3, 2, 1, groups=2, input_size=9, activation="relu6", residual=True),
    Conv2d(16, 16, 3, padding=1, groups=16, input_size=7, activation="relu"), Linear(32, 16, batch_size=3)])
@pytest.mark.parametrize("layout", ["nchw", "nchw16c"])
def test_integers_are_exact(problem: Problem, layout: str) -> None:
    if isinstance(problem, Linear) and layout != "nchw":
        return
    outcome = run_job(job_of(problem, layout, threads=2))
    assert (outcome.status, outcome.error, outcome.message) == ("ok", 0.0, "")
    assert min(outcome.hot, outcome.cold) > 0


@pytest.mark.parametrize("activation", ["tanh", "hardswish", ("elu", 0.5)])
def test_other_activations_have_a_tolerance(activation: object) -> None:
    outcome = run_job(job_of(Conv2d(4, 8, 3, padding=1, input_size=6, activation=activation)))  # type: ignore[arg-type]
    assert outcome.status == "ok"
    assert 0 <= outcome.error <= TOLERANCE


def test_sums_beyond_float32_are_not_called_exact() -> None:
    deep = Linear(2_000_000, 1, bias=False)
    assert not data_of(deep).exact
    assert data_of(PROBLEM).exact


def test_the_parent_knows_when_it_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    call = Prepared.call
    monkeypatch.setattr(Prepared, "call", lambda self: log.append("call") or call(self))
    assert run_job(JOB, lambda: log.append("compiled")).status == "ok"
    assert log[:2] == ["compiled", "call"]
    assert log.count("compiled") == 1


def test_the_answer_is_checked_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    true = data_of(PROBLEM)
    spoiled = true.expected.copy()
    spoiled[0, 3, 2, 1] += 1
    monkeypatch.setattr(module, "data_of", lambda text: replace(true, expected=spoiled))
    monkeypatch.setattr(module, "race", None)  # not called
    outcome = run_job(JOB)
    assert outcome.status == "wrong"
    assert outcome.error == pytest.approx(1 / true.scale)
    assert np.isnan(outcome.hot)


WINOGRAD = Conv2d(16, 16, 3, padding=1, input_size=8)
SMALLEST = "the smallest step of one float"


def judged(problem: Problem, algorithm: str, error: float | str, patch: pytest.MonkeyPatch) -> Outcome:
    """What becomes of a candidate whose kernel makes an error, over rms(output), in one element of small value."""
    job = Job(Plan.of(named(algorithm, problem), Target(host.machine())))
    call, scale = Prepared.call, data_of(problem).scale

    def inaccurate(self: Prepared) -> None:
        call(self)
        flat = self.out.reshape(-1)
        smallest = np.argmin(np.where(flat == 0, np.inf, np.abs(flat)))
        flat[smallest] = np.nextafter(flat[smallest], np.float32(np.inf)) if isinstance(error, str) else (
            flat[smallest] + error * scale)

    patch.setattr(Prepared, "call", inaccurate)
    patch.setattr(module, "race", lambda call, other: (Timing((1.0,), 1), None))
    patch.setattr(module, "cold", lambda call, **options: Timing((1.0,), 1))
    return run_job(job)


@pytest.mark.parametrize("error", [SMALLEST, 1e-6, 1e-3])
@pytest.mark.parametrize(("problem", "algorithm"), [
    (WINOGRAD, "direct"), (WINOGRAD, "im2col"), (Linear(32, 16, batch_size=3), "direct"),
    (Conv2d(4, 8, 3, 2, 1, groups=2, input_size=9, activation="relu6", residual=True), "im2col"),
    (Conv2d(16, 16, 3, padding=1, groups=16, input_size=7, activation="relu"), "direct")])
def test_no_error_is_small_enough_where_sums_are_exact(problem: Problem, algorithm: str, error: float | str,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = judged(problem, algorithm, error, monkeypatch)
    assert outcome.status == "wrong"
    assert 0 < outcome.error < 2e-3


@pytest.mark.parametrize(("problem", "algorithm", "bound"), [
    (replace(WINOGRAD, activation="tanh"), "direct", 2e-5),
    (Conv2d(16, 16, 3, padding=1, groups=16, input_size=7, activation="hardswish"), "direct", 2e-5),
    (WINOGRAD, "winograd(2,3)", 2e-4), (WINOGRAD, "winograd(4,3)", 2e-4), (WINOGRAD, "fft(8)", 2e-4),
    (WINOGRAD, "strassen(1)", 2e-4), (Linear(32, 32, batch_size=4), "strassen(1)", 2e-4),
    (Conv2d(16, 16, (1, 3), padding=(0, 1), input_size=8, activation="relu"), "winograd(4,3)", 2e-4)])
def test_errors_up_to_a_bound_where_sums_are_not_exact(problem: Problem, algorithm: str, bound: float,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        assert judged(problem, algorithm, 0.8 * bound, patch).status == "ok"
    outcome = judged(problem, algorithm, 1.2 * bound, monkeypatch)
    assert outcome.status == "wrong"
    assert outcome.message == f"max |error| / rms is {outcome.error:.3g}"
    assert outcome.error == pytest.approx(1.2 * bound, rel=0.1)


def test_an_element_that_is_not_written_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Prepared.call

    def forgetful(self: Prepared) -> None:
        call(self)
        self.out[0, 0, 0, 0] = np.nan

    monkeypatch.setattr(Prepared, "call", forgetful)
    outcome = run_job(JOB)
    assert (outcome.status, outcome.error) == ("wrong", float("inf"))


def test_a_kernel_that_is_right_only_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    call, calls = Prepared.call, []

    def tiring(self: Prepared) -> None:
        call(self)
        calls.append(self)
        if len(calls) > 3:
            self.out[0] += 1

    monkeypatch.setattr(Prepared, "call", tiring)
    outcome = run_job(JOB)
    assert outcome.status == "wrong"
    assert outcome.message.startswith("after many calls, max |error| / rms is ")


@pytest.mark.parametrize(("ratio", "is_cold"), [(0.9, True), (1.0, True), (1.01, False), (3, False)])
def test_only_what_is_no_slower_is_timed_cold(ratio: float, is_cold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "race", lambda call, other: (Timing((ratio,), 1), Timing((1.0,), 1)))
    outcome = run_job(Job(replace(JOB.plan, schedule=Schedule()), JOB.plan))
    assert outcome.ratio == ratio
    assert np.isnan(outcome.cold) is not is_cold


def test_only_the_weights_are_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[np.ndarray] = []

    def watch(call: object, *, keep: tuple[np.ndarray, ...], **options: object) -> Timing:
        kept.extend(keep)
        return Timing((1.0,), 1)

    monkeypatch.setattr(module, "cold", watch)
    assert run_job(JOB).cold == 1.0
    (x,) = kept
    assert x is prepared(JOB.plan).x


@pytest.mark.parametrize(("error", "message"), [(MemoryError(), "MemoryError"), (KeyError("x"), "KeyError: 'x'"),
                                                (RuntimeError("a\nb"), "RuntimeError: a")])
def test_any_error_of_a_candidate_is_its_outcome(error: Exception, message: str,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(module, "_run", fail)
    assert (run_job(JOB).status, run_job(JOB).message) == ("failed", message)


def test_the_incumbent_stays_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    class Counted(module.Kernel):
        def __init__(self, plan: Plan) -> None:
            made.append(plan.schedule.text)
            super().__init__(plan)

    monkeypatch.setattr(module, "Kernel", Counted)
    others = ["", "unroll s", "unroll r", "unroll r; unroll s"]
    for other in others:
        assert run_job(Job(replace(JOB.plan, schedule=parse_schedule(other)), JOB.plan)).status == "ok"
    assert made == [JOB.plan.schedule.text, *others]


def test_data_is_small_integers() -> None:
    data: Data = data_of(Conv2d(4, 8, 3, input_size=6, residual=True))
    for array in (data.x, data.weight, data.bias, data.residual):
        assert array is not None
        assert array.dtype == np.float32
        assert set(np.unique(array)) <= set(range(-module.MAGNITUDE, module.MAGNITUDE + 1))


def test_conditions_are_judged_over_many_short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    now = CpuCounters()
    judged: list[CpuCounters] = []

    def flags(since: CpuCounters) -> tuple[str, ...]:
        judged.append(CpuCounters(*(getattr(now, name) - getattr(since, name) for name in vars(now))))
        return ("others",)

    monkeypatch.setattr(module, "cpu_counters", lambda: now)
    monkeypatch.setattr(module, "timing_flags", flags)
    watch = module._Watch()
    told = []
    for _ in range(12):
        now = CpuCounters(0, now.total + 500, now.wanted + 500)  # between measurements: nobody's business
        before = now
        now = CpuCounters(1, now.total + 10, now.wanted + 8, now.stolen + 1, now.own + 5)
        told.append(watch.flags(before))
    assert told == [()] * 4 + [("others",)] * 8
    assert [since.total for since in judged] == [10 * n for n in range(5, 13)]
    assert judged[0] == CpuCounters(5, 50, 40, 5, 25)
