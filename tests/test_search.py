"""The search over fake measurements: no clock, no process, nothing compiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from convsched.autotune.search.budget import Budget, TuneError
from convsched.autotune.search.domain import Choice
from convsched.autotune.search.search import FIRST_LOOKS, RACERS, Measured, Search, better, distance
from convsched.autotune.store.winner import Contender, winner
from convsched.autotune.workers.candidate import Outcome
from convsched.plan.families import named
from convsched.problem import Linear
from convsched.recipes.direct import Pixels

DIRECT = named("direct", Linear(8, 8))
DEFAULT = Choice(DIRECT, Pixels(16, 1, 1, 1, False, False))
SPACE = tuple(Choice(DIRECT, Pixels(16, maps, rows, 1, False, False)) for maps in range(1, 6) for rows in range(1, 6))


class Lab:
    """Measures with given seconds (1 where not given), workspaces and failures; remembers what was asked."""

    def __init__(self, seconds: Mapping[Choice, float] | None = None, budget: float = float("inf"),
                 failing: Mapping[Choice, str] | None = None, workspace: Mapping[Choice, int] | None = None,
                 estimates: Mapping[Choice, float | None] | None = None) -> None:
        self.seconds, self.budget = dict(seconds or {}), budget
        self.failing, self.workspace = dict(failing or {}), dict(workspace or {})
        self.estimates = dict(estimates or {})
        self.asked: list[tuple[Choice, Choice | None]] = []
        self.estimated: list[Choice] = []

    def measure(self, recipe: Choice, incumbent: Measured | None) -> Measured:
        self.asked.append((recipe, incumbent.choice if incumbent else None))
        return self.measured(recipe)

    def measured(self, recipe: Choice) -> Measured:
        if recipe in self.failing:
            return Measured(recipe, repr(recipe), Outcome(self.failing[recipe]), 1.0)  # type: ignore[arg-type]
        outcome = Outcome("ok", workspace=self.workspace.get(recipe, 0))
        return Measured(recipe, repr(recipe), outcome, 1 / self.seconds.get(recipe, 1.0))

    def estimate(self, recipe: Choice) -> float | None:
        self.estimated.append(recipe)
        return self.estimates.get(recipe, 1.0)

    def search(self, space: Sequence[Choice] = SPACE, looks: float = float("inf")) -> Search:
        def near(recipe: Choice) -> list[Choice]:
            return [other for other in space if distance(recipe, other) == 1]

        return Search(DEFAULT, space, near, self.measure, self.estimate,
                      lambda: len(self.asked) >= self.budget, lambda: len(self.estimated) < looks)

    @property
    def order(self) -> list[Choice]:
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
    assert (best.choice, best.speed, search.complete) == (DEFAULT, 1.0, False)
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
    assert lab.seconds.get(best.choice, 1.0) <= 1.0
    assert best.speed == pytest.approx(1 / lab.seconds.get(best.choice, 1.0))


def test_the_fastest_is_found() -> None:
    lab = Lab({SPACE[13]: 0.5, SPACE[3]: 0.8})
    best = lab.search().run()
    assert best is not None
    assert best.choice == SPACE[13]
    assert best.speed == pytest.approx(2.0)


@pytest.mark.parametrize(("seconds", "workspace", "wins"), [
    (0.99, 50, True), (1.015, 50, True), (0.99, 100, False), (1.0, 150, False), (0.97, 150, True),
    (1.05, 0, False), (0.99, 150, False)])
def test_ties_go_to_less_workspace(seconds: float, workspace: int, wins: bool) -> None:
    incumbent = Measured(DEFAULT, "unroll m", Outcome("ok", workspace=100), 1.5)
    candidate = Measured(SPACE[1], "unroll m", Outcome("ok", workspace=workspace), 1.5 / seconds)
    assert better(candidate, incumbent) is wins


def test_ties_in_workspace_go_to_the_simpler_schedule() -> None:
    simple, other = (Measured(DEFAULT, text, Outcome("ok"), 1.5) for text in ("unroll m", "unroll c; unroll m"))
    assert better(simple, other)
    assert not better(other, simple)


def test_a_tie_is_never_slower_than_the_default() -> None:
    incumbent = Measured(DEFAULT, "unroll m", Outcome("ok", workspace=100), 1.005)
    candidate = Measured(SPACE[1], "unroll m", Outcome("ok"), 0.995)
    assert not better(candidate, incumbent)


@pytest.mark.parametrize("seconds", [0.9, 0.985, 1.0, 1.01, 1.03])
@pytest.mark.parametrize("workspace", [0, 100, 200])
@pytest.mark.parametrize("text", ["split m 2", "split m 16"])
def test_the_search_and_the_cache_choose_alike(seconds: float, workspace: int, text: str) -> None:
    incumbent = Measured(DEFAULT, "split m 8", Outcome("ok", workspace=100), 1 / 0.95)
    candidate = Measured(SPACE[1], text, Outcome("ok", workspace=workspace), 1 / (0.95 * seconds))
    pair = [Contender(0.95, 100, "split m 8"), Contender(0.95 * seconds, workspace, text)]
    assert better(candidate, incumbent) is (winner(pair, default=1.0) == 1)


@pytest.mark.parametrize("status", ["failed", "wrong", "crashed", "timed out"])
def test_what_fails_never_wins(status: str) -> None:
    lab = Lab({SPACE[1]: 0.1, SPACE[2]: 0.9}, failing={SPACE[1]: status})
    search = lab.search()
    best = search.run()
    assert best is not None
    assert best.choice == SPACE[2]
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
    lab, space = Lab(estimates=estimates), SPACE[:FIRST_LOOKS + 1]
    lab.search(space).run()
    expected = sorted(space[1:], key=lambda r: estimates[r])[:RACERS]
    assert lab.order[1:1 + RACERS] == expected


def test_recipes_without_a_schedule_are_not_measured() -> None:
    lab = Lab(estimates=dict.fromkeys(SPACE[1:20], None))
    lab.search().run()
    assert not set(lab.order) & set(SPACE[1:20])


def test_what_the_model_has_no_time_for_is_measured_last() -> None:
    lab = Lab(estimates=dict.fromkeys(SPACE[1:20], None))
    lab.search(looks=0).run()
    assert set(lab.order) == {DEFAULT, *SPACE[20:]}  # what makes no schedule is never measured
    some = Lab(estimates={recipe: 1.0 / (i + 1) for i, recipe in enumerate(SPACE)}, budget=6)
    some.search(looks=4).run()
    first = some.order[1:5]
    assert first == sorted(some.estimated[:4], key=lambda r: some.estimates[r] or 0)
    assert some.order[5] == some.estimated[4]


def test_the_model_looks_ahead_while_candidates_are_compiled() -> None:
    estimates = {recipe: float((11 * i) % 25) for i, recipe in enumerate(SPACE)}
    lab = Lab(estimates=estimates, budget=5)
    search = lab.search(looks=2)
    assert not search.look_ahead()  # nothing is to be tried yet
    search.run_default()
    measure = search.measure

    def measure_meanwhile(recipe: Choice, incumbent: Measured | None) -> Measured:
        assert search.look_ahead()
        return measure(recipe, incumbent)

    search.measure = measure_meanwhile
    search.run()
    assert len(lab.estimated) == len(set(lab.estimated)) == 2 + 4
    looked = [sorted(lab.estimated[:n], key=lambda r: estimates[r]) for n in (2, 3, 4, 5)]
    for n, (recipe, known) in enumerate(zip(lab.order[1:], looked, strict=True)):
        assert recipe == next(r for r in known if r not in lab.order[1:1 + n])  # the best of those seen so far


def test_a_search_goes_on_where_it_paused() -> None:
    seconds = {SPACE[13]: 0.5, SPACE[3]: 0.8}
    whole = Lab(seconds)
    whole.search().run()
    bits = Lab(seconds, budget=0)
    search = bits.search()
    while not search.complete:
        bits.budget += 3
        search.run()
    assert bits.order == whole.order


def test_a_search_goes_on_from_what_is_recalled() -> None:
    whole = Lab({SPACE[13]: 0.5, SPACE[3]: 0.8}, failing={SPACE[7]: "wrong"})
    whole.search().run()
    for cut in range(1, len(whole.order) + 1):
        lab = Lab(whole.seconds, failing=whole.failing)
        search = lab.search()
        search.recall(map(whole.measured, whole.order[:cut]))
        best = search.run()
        assert best is not None
        assert best.choice == SPACE[13]
        assert search.complete
        assert not set(lab.order) & set(whole.order[:cut])
    assert lab.order == []
    assert set(lab.estimated) <= set(SPACE) - set(whole.order)


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
