"""Tuning a network: which layer gets what, on a worker and a clock that do as they are told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from convsched.autotune.measure.calibrate import LEVELS, Calibration
from convsched.autotune.search import tuner as tuning
from convsched.autotune.search.budget import Budget, Progress
from convsched.autotune.search.network import TunedLayer, TunedNetwork, part, tune_network
from convsched.autotune.search.tuner import Tuner
from convsched.autotune.store.cache import ScheduleCache
from convsched.autotune.store.record import Key
from convsched.autotune.workers.candidate import Job, Outcome
from convsched.machine import host
from convsched.model.cost import Cost
from convsched.plan.defaults import default_recipe
from convsched.plan.plan import Target
from convsched.problem import Conv2d, Problem, parse_problem

LIGHT, MIDDLE, HEAVY = (Conv2d(16, m, 1, input_size=6) for m in (16, 32, 48))
SECONDS = {LIGHT.text: 1.0, MIDDLE.text: 2.0, HEAVY.text: 6.0}
LAYERS: Sequence[tuple[Problem, int]] = [(LIGHT, 1), (HEAVY, 1), (MIDDLE, 1), (LIGHT, 1)]
JOB, LOOK = 1.0, 0.01  # seconds of a job, and of an estimate


class Lab:
    """A worker and a clock: a job takes a second, a candidate the seconds of its layer or 5% less."""

    def __init__(self, failing: Callable[[Job], bool] = lambda job: False) -> None:
        self.failing, self.jobs, self.now = failing, list[Job](), 0.0

    def start(self) -> None: ...

    def close(self) -> None: ...

    def run(self, job: Job, timeout: float | None, meanwhile: Callable[[], bool]) -> Outcome:
        self.jobs.append(job)
        self.now += JOB
        if self.failing(job):
            return Outcome("wrong", "max |error| / rms is 1")
        hot, incumbent = (self.seconds(job.plan.problem.text, str(plan.schedule) if plan else "")
                          for plan in (job.plan, job.incumbent))
        return Outcome("ok", hot=hot, incumbent=incumbent if job.incumbent else float("nan"), cold=hot)

    def seconds(self, problem: str, schedule: str) -> float:
        """The layer's, or 5% less for half of the candidates."""
        default = default_recipe(parse_problem(problem), host.machine()).schedule(parse_problem(problem)).text
        is_faster = schedule != default and sum(map(ord, schedule)) % 2
        return SECONDS[problem] * (0.95 if is_faster else 1.0)

    def look(self, *_: object) -> Cost:
        self.now += LOOK
        return Cost(1.0, 1.0, 1.0, 1.0)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ScheduleCache:
    rates = dict.fromkeys(LEVELS, 50e9)
    known = Calibration("test", 100e9, rates, rates, 1e-5, 0.0, ())
    monkeypatch.setattr(tuning, "calibration", lambda: known)
    return ScheduleCache(tmp_path / "schedules.sqlite")


def run(lab: Lab, cache: ScheduleCache, monkeypatch: pytest.MonkeyPatch, budget: Budget,
        layers: Sequence[tuple[Problem, int]] = LAYERS, report: Callable[[TunedLayer], None] = lambda _: None,
        progress: Callable[[Progress], None] = lambda _: None) -> TunedNetwork:
    monkeypatch.setattr(tuning, "cost", lab.look)
    monkeypatch.setattr("convsched.plan.plan.apply", lambda program, schedule: program)
    tuner = Tuner(cache, Target(host.machine()), report=progress, clock=lambda: lab.now)
    tuner.worker = lab  # type: ignore[assignment]
    with tuner:
        return tune_network(tuner, layers, budget, report)


def test_equal_layers_are_tuned_once_and_defaults_come_first(cache: ScheduleCache,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab()
    network = run(lab, cache, monkeypatch, Budget(candidates=12))
    assert {layer.tuned.problem: layer.count for layer in network.layers} == {LIGHT: 2, HEAVY: 1, MIDDLE: 1}
    assert [job.plan.problem for job in lab.jobs[:3]] == [LIGHT, HEAVY, MIDDLE]
    assert [job.incumbent for job in lab.jobs[:4]] == [None, None, None, lab.jobs[1].plan]
    assert sum(layer.tuned.tried for layer in network.layers) == 12


@pytest.mark.parametrize("budget", [Budget(candidates=23), Budget(seconds=26.5)])
def test_the_budget_goes_where_the_time_is(cache: ScheduleCache, monkeypatch: pytest.MonkeyPatch,
                                           budget: Budget) -> None:
    lab = Lab()
    network = run(lab, cache, monkeypatch, budget)
    spent = {layer.tuned.problem: layer.tuned.tried - 1 for layer in network.layers}  # but for the default
    assert spent[HEAVY] == pytest.approx(12, abs=2)  # 6 s of 10 s, of 20 candidates
    assert spent[MIDDLE] == pytest.approx(4, abs=2)
    assert spent[LIGHT] == pytest.approx(4, abs=2)  # 2 x 1 s
    if budget.candidates < float("inf"):
        assert sum(spent.values()) == 20
    assert network.default_seconds == pytest.approx(10)
    assert network.default_seconds >= network.seconds >= 9.5


def test_what_a_layer_leaves_goes_to_the_others(cache: ScheduleCache, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Conv2d(2, 2, 1, input_size=2)  # few schedules, and by far the most of the time
    monkeypatch.setitem(SECONDS, small.text, 1000.0)
    lab = Lab()
    network = run(lab, cache, monkeypatch, Budget(candidates=60), [(LIGHT, 1), (small, 1)])
    tried = {layer.tuned.problem: layer.tuned.tried for layer in network.layers}
    assert {layer.tuned.problem: layer.tuned.complete for layer in network.layers}[small]
    assert tried[LIGHT] + tried[small] == 60 or all(layer.tuned.complete for layer in network.layers)
    assert tried[LIGHT] > 10


def test_a_layer_that_fails_leaves_its_budget(cache: ScheduleCache, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(failing=lambda job: job.plan.problem == HEAVY)
    network = run(lab, cache, monkeypatch, Budget(candidates=21))
    assert network.failures == {HEAVY: f"the default of {HEAVY.text} wrong: max |error| / rms is 1"}
    tried = {layer.tuned.problem: layer.tuned.tried for layer in network.layers}
    assert tried == {MIDDLE: 10, LIGHT: 10}
    later = Lab(failing=lambda job: job.plan.problem == HEAVY and job.incumbent is not None)
    network = run(later, cache, monkeypatch, Budget(candidates=40))
    assert "candidates of conv2d c=16 m=48" in network.failures[HEAVY]
    assert not network.interrupted


@pytest.mark.parametrize("after", [1, 3, 5, 20])
def test_ctrl_c_keeps_everything(cache: ScheduleCache, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    def press(job: Job) -> bool:
        if len(lab.jobs) > after:
            raise KeyboardInterrupt
        return False

    lab = Lab(press)
    network = run(lab, cache, monkeypatch, Budget(candidates=60))
    assert network.interrupted
    keys = [Key.of(problem, Target(host.machine())) for problem in (LIGHT, MIDDLE, HEAVY)]
    kept = Counter({key.problem: len(cache.records(key)) for key in keys})
    measured = {(job.plan.problem, job.plan.schedule) for job in lab.jobs[:after]}
    assert kept.total() == len(measured)
    runs = [cache.run_of(key) for key in keys if kept[key.problem]]
    assert runs
    assert not any(run.complete for run in runs if run is not None)
    again = Lab()
    assert not run(again, cache, monkeypatch, Budget(candidates=60 - after)).interrupted
    repeated = [job for job in again.jobs if (job.plan.problem, job.plan.schedule) in measured]
    assert len(repeated) <= 3  # the winners, against their defaults


def test_progress_tells_what_is_left_of_the_whole(cache: ScheduleCache, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Progress] = []
    reported: list[TunedLayer] = []
    run(Lab(), cache, monkeypatch, Budget(candidates=12), report=reported.append, progress=seen.append)
    assert [progress.left.candidates for progress in seen] == [12 - n for n in range(1, 13)]
    assert [progress.problem for progress in seen[:3]] == [LIGHT, HEAVY, MIDDLE]
    assert [layer.tuned.problem for layer in reported[:3]] == [HEAVY, LIGHT, MIDDLE]


def test_no_layers(cache: ScheduleCache, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(Lab(), cache, monkeypatch, Budget(seconds=5), []) == TunedNetwork((), {}, interrupted=False)


def test_parts_of_what_is_left() -> None:
    assert part(Budget(seconds=10), 1.0, 4.0) == Budget(seconds=2.5)
    assert part(Budget(candidates=10), 1.0, 3.0) == Budget(candidates=3)
    assert part(Budget(seconds=10), 2.0, 2.0) == Budget(seconds=10)
    assert part(Budget(seconds=10), 0.0, 0.0) == Budget(seconds=10)
