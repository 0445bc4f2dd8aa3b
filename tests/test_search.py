"""The search over fake measurements: no clock, no process, nothing compiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from convsched.autotune.search import RACERS, Measured, Search, better, distance
from convsched.autotune.tune import Budget, TuneError, shares
from convsched.autotune.worker import Outcome
from convsched.problem import Conv2d
from convsched.recipes import Pixels, Recipe

DEFAULT = Pixels(16, 1, 1, 1, False, False)
SPACE = tuple(replace(DEFAULT, maps=maps, rows=rows) for maps in range(1, 6) for rows in range(1, 6))


class Lab:
    """Measures with given seconds (1 where not given), workspaces and failures; remembers what was asked."""

    def __init__(self, seconds: Mapping[Recipe, float] | None = None, budget: float = float("inf"),
                 failing: Mapping[Recipe, str] | None = None, workspace: Mapping[Recipe, int] | None = None,
                 estimates: Mapping[Recipe, float | None] | None = None) -> None:
        self.seconds, self.budget = dict(seconds or {}), budget
        self.failing, self.workspace = dict(failing or {}), dict(workspace or {})
        self.estimates = dict(estimates or {})
        self.asked: list[tuple[Recipe, Recipe | None]] = []

    def measure(self, recipe: Recipe, incumbent: Recipe | None) -> Outcome:
        self.asked.append((recipe, incumbent))
        if recipe in self.failing:
            return Outcome(self.failing[recipe])  # type: ignore[arg-type]
        other = float("nan") if incumbent is None else self.seconds.get(incumbent, 1.0)
        return Outcome("ok", hot=self.seconds.get(recipe, 1.0), incumbent=other,
                       workspace=self.workspace.get(recipe, 0))

    def search(self, space: Sequence[Recipe] = SPACE) -> Search:
        def near(recipe: Recipe) -> list[Recipe]:
            return [other for other in space if distance(recipe, other) == 1]

        return Search(DEFAULT, space, near, self.measure, lambda r: self.estimates.get(r, 1.0),
                      lambda: len(self.asked) >= self.budget)

    @property
    def order(self) -> list[Recipe]:
        return [recipe for recipe, _ in self.asked]


def test_the_default_is_measured_first_and_alone() -> None:
    lab = Lab(estimates={recipe: float(i) for i, recipe in enumerate(reversed(SPACE))})
    lab.search().run()
    assert lab.asked[0] == (DEFAULT, None)
    assert all(incumbent is not None for _, incumbent in lab.asked[1:])


@pytest.mark.parametrize("budget", [0, 1])
def test_the_least_budget_gives_the_default(budget: int) -> None:
    lab = Lab({SPACE[7]: 0.1}, budget)
    search = lab.search()
    best = search.run()
    assert best is not None
    assert (best.recipe, best.speed, search.complete) == (DEFAULT, 1.0, False)
    assert lab.order == [DEFAULT]


def test_a_default_that_fails_ends_the_search() -> None:
    lab = Lab(failing={DEFAULT: "wrong"})
    search = lab.search()
    assert search.run() is None
    assert lab.order == [DEFAULT]
    assert not search.complete


@pytest.mark.parametrize("budget", range(1, 25))
def test_never_slower_than_the_default(budget: int) -> None:
    lab = Lab({recipe: 1 + 0.1 * ((7 * i) % 5 - 2) for i, recipe in enumerate(SPACE) if i}, budget)
    best = lab.search().run()
    assert best is not None
    assert lab.seconds.get(best.recipe, 1.0) <= 1.0
    assert best.speed == pytest.approx(1 / lab.seconds.get(best.recipe, 1.0))


def test_the_fastest_is_found() -> None:
    lab = Lab({SPACE[13]: 0.5, SPACE[3]: 0.8})
    best = lab.search().run()
    assert best is not None
    assert best.recipe == SPACE[13]
    assert best.speed == pytest.approx(2.0)


@pytest.mark.parametrize(("seconds", "workspace", "wins"), [
    (0.99, 50, True), (1.005, 50, True), (0.99, 100, False), (1.0, 150, False), (0.97, 150, True),
    (1.05, 0, False)])
def test_ties_go_to_less_workspace(seconds: float, workspace: int, wins: bool) -> None:
    incumbent = Measured(DEFAULT, Outcome("ok", workspace=100), 1.0)
    candidate = Measured(SPACE[1], Outcome("ok", workspace=workspace), 1 / seconds)
    assert better(candidate, incumbent) is wins


@pytest.mark.parametrize("status", ["failed", "wrong", "crashed", "timed out"])
def test_what_fails_never_wins(status: str) -> None:
    lab = Lab({SPACE[1]: 0.1, SPACE[2]: 0.9}, failing={SPACE[1]: status})
    search = lab.search()
    best = search.run()
    assert best is not None
    assert best.recipe == SPACE[2]
    assert search.tried[SPACE[1]].outcome.status == status
    assert all(incumbent != SPACE[1] for _, incumbent in lab.asked)


def test_complete_only_when_the_climb_ends() -> None:
    whole = Lab({SPACE[13]: 0.5})
    search = whole.search()
    search.run()
    assert search.complete
    for budget in range(1, len(whole.asked)):
        cut = Lab({SPACE[13]: 0.5}, budget).search()
        cut.run()
        assert not cut.complete


def test_no_candidate_is_measured_twice() -> None:
    lab = Lab({recipe: 1 - 0.03 * i for i, recipe in enumerate(SPACE)})
    lab.search().run()
    assert len(set(lab.order)) == len(lab.order)


def test_the_race_follows_the_model() -> None:
    estimates = {recipe: float((11 * i) % 25) for i, recipe in enumerate(SPACE)}
    lab = Lab(estimates=estimates)
    lab.search().run()
    expected = sorted(SPACE[1:], key=lambda r: estimates[r])[:RACERS]
    assert lab.order[1:1 + RACERS] == expected


def test_recipes_without_a_schedule_are_not_measured() -> None:
    lab = Lab(estimates=dict.fromkeys(SPACE[1:20], None))
    lab.search().run()
    assert not set(lab.order) & set(SPACE[1:20])


@pytest.mark.parametrize(("text", "budget"), [
    ("10s", Budget(seconds=10)), (" 1.5 m ", Budget(seconds=90)), ("1h", Budget(seconds=3600)),
    ("100 candidates", Budget(candidates=100)), ("1 candidate", Budget(candidates=1))])
def test_budgets(text: str, budget: Budget) -> None:
    assert Budget.parse(text) == budget
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize("text", ["", "10", "s", "-1s", "10 days", "ten seconds", "1e3s", "10s or so"])
def test_budgets_that_are_none(text: str) -> None:
    with pytest.raises(TuneError, match="write a time such as 10s"):
        Budget.parse(text)


def test_shares_sum_to_the_budget() -> None:
    small, large = Conv2d(4, 8, 1, input_size=4), Conv2d(64, 64, 3, input_size=28)
    parts = shares([(small, 1), (large, 1), (large, 3)], 60.0)
    assert sum(parts) == pytest.approx(60)
    assert 10 <= parts[0] < parts[1] < parts[2]
