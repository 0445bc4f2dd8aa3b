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
from convsched.options import Accuracy
from convsched.plan.choice import choices, members
from convsched.plan.families import FAMILIES, Algorithm, Family, Sizes, member_name, named
from convsched.plan.plan import Target
from convsched.problem import Conv2d, Linear, Problem

MACHINE = Machine.example("avx512")
TARGET = Target(MACHINE)
DENSE = Conv2d(64, 64, 3, padding=1, input_size=28)
RATES = Rates(100e9, 100e9, 50e9, 20e9)


def algorithms(problem: Problem, accuracy: Accuracy = "normal") -> set[str]:
    return {domain.algorithm.name for domain in domains(problem, Target(MACHINE, accuracy=accuracy))}


def test_members_that_apply_and_fit_have_a_domain() -> None:
    usual = {"direct", "im2col", "winograd(2,3)", "winograd(4,3)"}
    assert algorithms(DENSE) == usual
    assert algorithms(DENSE, accuracy="strict") == {"direct", "im2col"}
    assert algorithms(DENSE, accuracy="fast") == usual | {"winograd(5,3)", "winograd(6,3)"}
    assert "winograd(6,3)" not in algorithms(replace(DENSE, in_channels=512), accuracy="fast")
    assert algorithms(replace(DENSE, stride=(2, 2))) == usual
    assert algorithms(replace(DENSE, stride=(2, 2), dilation=(2, 2))) == {"direct", "im2col"}
    assert algorithms(Conv2d(64, 64, 1, input_size=28)) == {"direct"}
    assert algorithms(Conv2d(512, 512, 3, stride=2, padding=1, input_size=28)) == {
        *usual, "strassen(1)"}
    assert algorithms(Linear(1024, 1024, batch_size=64)) == {"direct", "strassen(1)", "strassen(2)"}
    assert members(Conv2d(8, 8, 1, 2, input_size=9)) == ("direct", "im2col")
    assert members(Conv2d(8, 8, (3, 5), input_size=9), "strict") == ("direct", "im2col")
    assert members(Conv2d(512, 512, 9, groups=2, stride=2, dilation=2, input_size=19), "strict") == ("direct", "im2col")
    assert members(Linear(1024, 1024), "strict") == ("direct",)
    assert members(Conv2d(8, 8, (3, 5), input_size=9)) == (
        "direct", "winograd(4,3)x(2,5)", "winograd(2,3)x(4,5)", "im2col")
    assert members(Conv2d(8, 8, (1, 9), input_size=19)) == (
        "direct", "winograd(2,9)", "winograd(4,9)", "fft", "im2col")


def test_one_algorithm_may_be_asked_for() -> None:
    only = named("winograd", DENSE)
    assert {domain.algorithm for domain in domains(DENSE, TARGET, only)} == {only}
    assert {choice.algorithm for choice in candidates(DENSE, TARGET, only)} == {only}
    with pytest.raises(LoweringError, match=r"winograd\(4,3\) makes NaN of finite outputs"):
        candidates(DENSE, replace(TARGET, accuracy="strict"), only)
    deep = replace(DENSE, in_channels=512)
    with pytest.raises(LoweringError, match=r"winograd\(6,3\) has an expected error"):
        candidates(deep, TARGET, named("winograd(6,3)", deep))


@pytest.mark.parametrize("problem", [DENSE, Linear(512, 512, batch_size=32)], ids=str)
def test_seeds_are_the_defaults_and_neighbours_keep_the_algorithm(problem: Conv2d | Linear) -> None:
    for seed in seeds(problem, TARGET):
        assert seed.recipe == seed.algorithm.default(MACHINE, "nchw", 1)
        assert cost(seed.plan(TARGET).program, MACHINE, RATES, 1).seconds > 0
        near = neighbours(TARGET, seed)
        assert near
        assert {choice.algorithm for choice in near} == {seed.algorithm}
        assert seed not in near


def test_tuning_measures_every_algorithm_and_compile_takes_the_best(tmp_path: Path) -> None:
    layer = Conv2d(8, 8, 3, padding=1, input_size=(6, 6))
    cache = ScheduleCache(tmp_path / "schedules.sqlite")
    with Tuner(cache, Target(host.machine())) as tuner:
        found = tuner.tune(layer, Budget(candidates=4))
    records = cache.records(Key.of(layer, Target(host.machine())))
    assert {"direct", "im2col", "winograd(2,3)", "winograd(4,3)"} <= {record.algorithm for record in records}
    assert all(record.status == "ok" for record in records)
    kernel = cs.compile(layer, threads=1, cache=cache)
    assert kernel.schedule == found.schedule
    best = min((r for r in records if r.algorithm == "im2col"), key=lambda record: record.hot or 1.0)
    assert cs.compile(layer, threads=1, cache=cache, algorithm="im2col").schedule.text == best.schedule


def test_an_algorithm_that_does_not_apply_cannot_be_tuned(tmp_path: Path) -> None:
    with Tuner(ScheduleCache(tmp_path / "s.sqlite"), Target(host.machine()), algorithm="winograd") as tuner, \
            pytest.raises(TuneError, match="fully connected"):
        tuner.tune(Linear(4, 4), Budget(candidates=1))


def test_an_entry_in_families_is_all_that_a_new_algorithm_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(problem: Problem, sizes: Sizes) -> Algorithm:
        return replace(named("im2col", problem), name=member_name("other", sizes))

    monkeypatch.setitem(FAMILIES, "other", Family(make, lambda problem, accuracy: (((3,),), ((4,),))))
    assert members(DENSE, "strict") == ("direct", "im2col", "other(3)", "other(4)")
    assert {"other(3)", "other(4)"} <= {one.name for one in choices(DENSE, TARGET)}
    assert {"other(3)", "other(4)"} <= algorithms(DENSE)
