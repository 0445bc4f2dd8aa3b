"""The candidates of the algorithms beside direct: which members join, and that the tuner measures them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import convsched as cs
from convsched.autotune.search.budget import Budget, TuneError
from convsched.autotune.search.space import candidates, domains, neighbours, seeds
from convsched.autotune.search.tuner import Tuner
from convsched.autotune.store.cache import ScheduleCache
from convsched.autotune.store.record import Key
from convsched.errors import LoweringError
from convsched.machine import Machine, host
from convsched.model.cost import Rates, cost
from convsched.plan.choice import members
from convsched.plan.families import named
from convsched.plan.plan import Target
from convsched.problem import Conv2d, Linear
from convsched.schedule import apply

MACHINE = Machine.example("avx512")
DENSE = Conv2d(64, 64, 3, padding=1, input_size=28)
RATES = Rates(100e9, 100e9, 50e9, 20e9)


def algorithms(target: Target) -> set[str]:
    return {domain.algorithm for domain in domains(target)}


def test_members_that_apply_and_fit_have_a_domain() -> None:
    usual = {"direct", "im2col", "winograd(2,3)", "winograd(4,3)"}
    assert algorithms(Target(DENSE, MACHINE)) == usual
    assert algorithms(Target(DENSE, MACHINE, accuracy="strict")) == {"direct", "im2col"}
    assert algorithms(Target(DENSE, MACHINE, accuracy="fast")) == usual | {"winograd(5,3)", "winograd(6,3)"}
    assert "winograd(6,3)" not in algorithms(Target(replace(DENSE, in_channels=512), MACHINE, accuracy="fast"))
    assert algorithms(Target(replace(DENSE, stride=2), MACHINE)) == usual
    assert algorithms(Target(replace(DENSE, stride=2, dilation=2), MACHINE)) == {"direct", "im2col"}
    assert algorithms(Target(Conv2d(64, 64, 1, input_size=28), MACHINE)) == {"direct"}
    assert algorithms(Target(Conv2d(512, 512, 3, stride=2, padding=1, input_size=28), MACHINE)) == {
        *usual, "strassen(1)"}
    assert algorithms(Target(Linear(1024, 1024, batch_size=64), MACHINE)) == {"direct", "strassen(1)", "strassen(2)"}
    assert members(Conv2d(8, 8, 1, 2, input_size=9)) == ("direct", "im2col")
    assert members(Conv2d(8, 8, (3, 5), input_size=9), "strict") == ("direct", "im2col")
    assert members(Conv2d(512, 512, 9, groups=2, stride=2, dilation=2, input_size=19), "strict") == ("direct", "im2col")
    assert members(Linear(1024, 1024), "strict") == ("direct",)
    assert members(Conv2d(8, 8, (3, 5), input_size=9)) == (
        "direct", "winograd(4,3)x(2,5)", "winograd(2,3)x(4,5)", "im2col")
    assert members(Conv2d(8, 8, (1, 9), input_size=19)) == (
        "direct", "winograd(2,9)", "winograd(4,9)", "fft", "im2col")


def test_one_algorithm_may_be_asked_for() -> None:
    target = Target(DENSE, MACHINE, algorithm="winograd")
    assert algorithms(target) == {"winograd(4,3)"}
    assert {choice.algorithm for choice in candidates(target)} == {"winograd(4,3)"}
    with pytest.raises(LoweringError, match=r"winograd\(4,3\) makes NaN of finite outputs"):
        candidates(replace(target, accuracy="strict"))
    with pytest.raises(LoweringError, match=r"winograd\(6,3\) has an expected error"):
        candidates(replace(target, algorithm="winograd(6,3)", problem=replace(DENSE, in_channels=512)))
    with pytest.raises(LoweringError, match="a stride and a dilation"):
        candidates(Target(replace(DENSE, stride=2, dilation=2), MACHINE, algorithm="winograd"))


@pytest.mark.parametrize("problem", [DENSE, Linear(512, 512, batch_size=32)], ids=str)
def test_seeds_are_the_defaults_and_neighbours_keep_the_algorithm(problem: Conv2d | Linear) -> None:
    target = Target(problem, MACHINE)
    for seed in seeds(target):
        algorithm = named(seed.algorithm, problem)
        assert seed.recipe == algorithm.default(MACHINE, "nchw", 1)
        program = apply(algorithm.lower("nchw"), seed.schedule(problem, "nchw"))
        assert cost(program, MACHINE, RATES, 1).seconds > 0
        near = neighbours(target, seed)
        assert near
        assert {choice.algorithm for choice in near} == {seed.algorithm}
        assert seed not in near


def test_tuning_measures_every_algorithm_and_compile_takes_the_best(tmp_path: Path) -> None:
    layer = Conv2d(32, 32, 3, padding=1, input_size=(16, 16))
    cache = ScheduleCache(tmp_path / "schedules.sqlite")
    with Tuner(cache, threads=1) as tuner:
        found = tuner.tune(layer, Budget(candidates=8))
    records = cache.records(Key.of(layer, host.machine(), layout="nchw", threads=1))
    assert {"direct", "im2col", "winograd(2,3)", "winograd(4,3)"} <= {record.algorithm for record in records}
    assert all(record.status == "ok" for record in records)
    kernel = cs.compile(layer, threads=1, cache=cache)
    assert kernel.schedule == found.schedule
    best = min((r for r in records if r.algorithm == "im2col"), key=lambda record: record.hot or 1.0)
    assert cs.compile(layer, threads=1, cache=cache, algorithm="im2col").schedule.text == best.schedule


def test_an_algorithm_that_does_not_apply_cannot_be_tuned(tmp_path: Path) -> None:
    with Tuner(ScheduleCache(tmp_path / "s.sqlite"), threads=1, algorithm="winograd") as tuner, \
            pytest.raises(TuneError, match="fully connected"):
        tuner.tune(Linear(4, 4), Budget(candidates=1))
