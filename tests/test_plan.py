"""Targets and plans: what they hold, when they are equal, and what a pickle carries."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest

from convsched.algebra import accuracy
from convsched.errors import LoweringError, ScheduleError
from convsched.ir.text import print_nest
from convsched.kernels import objects
from convsched.kernels.run.kernel import Kernel
from convsched.machine import Machine
from convsched.plan import families
from convsched.plan.families import named
from convsched.plan.plan import Plan, Target
from convsched.problem import Conv2d, Linear, Problem
from convsched.schedule import parse_schedule

LAYER = Conv2d(16, 16, 3, padding=1, input_size=8)
MACHINE = Machine.example("avx512")
TARGET = Target(MACHINE)
EVERY: list[tuple[Problem, str]] = [
    (LAYER, "direct"), (LAYER, "im2col"), (LAYER, "winograd(4,3)"), (LAYER, "winograd(2,3)"), (LAYER, "fft(8)"),
    (Linear(32, 32, batch_size=4), "strassen(1)")]


@pytest.mark.parametrize(("problem", "name"), EVERY)
def test_algorithms_are_equal_by_name_and_problem(problem: Problem, name: str) -> None:
    one, other = named(name, problem), named(name, problem)
    assert one is not other
    assert one == other
    assert hash(one) == hash(other)
    assert one.problem == problem
    assert one != named(name, replace(problem, batch_size=problem.N + 1))
    assert len({named(each, layer) for layer, each in EVERY}) == len(EVERY)
    assert one != name


@pytest.mark.parametrize(("problem", "name"), EVERY)
def test_a_plan_is_copied_and_pickled_without_its_program(problem: Problem, name: str) -> None:
    plan = replace(Plan.of(named(name, problem), TARGET), origin="a test")
    before = len(pickle.dumps(plan))
    nest = print_nest(plan.program)
    assert plan.program is plan.program
    assert len(pickle.dumps(plan)) == before
    for other in (copy.copy(plan), copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert other == plan
        assert (other.recipe, other.origin, other.text) == (plan.recipe, plan.origin, plan.text)
        assert print_nest(other.program) == nest


def test_what_made_a_schedule_is_no_part_of_a_plans_value() -> None:
    made = Plan.of(named("direct", LAYER), TARGET)
    written = Plan(LAYER, TARGET, named("direct", LAYER), made.schedule, origin="by hand")
    assert written == made
    assert hash(written) == hash(made)
    assert written.object_key == made.object_key


def test_the_text_says_what_it_is() -> None:
    plan = Plan(LAYER, Target(MACHINE, "nhwc", 2, "fast"), named("direct", LAYER), parse_schedule("unroll s"))
    assert plan.text == ("conv2d c=16 m=16 k=3x3 in=8x8 pad=1,1,1,1 bias | nhwc, 2 threads, fast | direct | unroll s")


def test_the_object_key_holds_what_code_depends_on() -> None:
    plan = Plan.of(named("direct", LAYER), TARGET)
    same = [replace(plan, target=replace(TARGET, threads=3)), replace(plan, target=replace(TARGET, accuracy="fast"))]
    other = [plan.on(Machine.example("avx2")), replace(plan, target=replace(TARGET, layout="nhwc")),
             replace(plan, schedule=parse_schedule("unroll s")), replace(plan, algorithm=named("im2col", LAYER)),
             replace(plan, problem=replace(LAYER, activation="relu"))]
    key = objects.object_key(plan)
    assert {objects.object_key(one) for one in same} == {key}
    assert len({key, *map(objects.object_key, other)}) == 1 + len(other)


def test_a_schedule_that_does_not_fit_is_refused_when_it_is_applied() -> None:
    plan = Plan(LAYER, TARGET, named("winograd(4,3)", LAYER), parse_schedule("unroll nowhere"))
    with pytest.raises(ScheduleError, match="nowhere"):
        _ = plan.program


def test_an_algorithm_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes from outside is a name; from there on it is the algorithm itself."""
    from convsched.machine import host
    plan = Plan.of(named("winograd(2,3)", LAYER), Target(host.machine()))

    def refuse(name: str) -> None:
        raise LoweringError(f"{name} is parsed again")

    monkeypatch.setattr(families, "parse_name", refuse)
    kernel = Kernel(plan)
    assert kernel.predicted_error == plan.algorithm.prediction
    assert "winograd(2,3)" in kernel.explain()
    assert kernel.nest


def test_errors_of_many_layers_are_predicted_from_gains_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    of = accuracy.Gains.of
    monkeypatch.setattr(accuracy.Gains, "of", lambda triple, terms=1: made.append(triple.name) or of(triple, terms))
    for known in (families._error, families._winograd_gains, families._direct_gains):
        known.cache_clear()
    layers = [Conv2d(channels, 32, 3, padding=1, input_size=size) for channels in (16, 48, 160) for size in (9, 14, 70)]
    found = {named(name, layer).prediction for layer in layers for name in ("direct", "winograd(2,3)")}
    assert len(made) == 2
    assert len(found) == 2 * len(layers)
