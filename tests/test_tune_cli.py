"""`convsched tune`: its lines, its exit codes, and what a terminal shows meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from convsched.autotune.measure.calibrate import LEVELS, Calibration
from convsched.autotune.search import tuner as tuning
from convsched.autotune.search.budget import Budget, Progress, Tuned
from convsched.autotune.search.network import TunedLayer, TunedNetwork
from convsched.autotune.workers.candidate import Job, Outcome
from convsched.cli import tune as tune_cli
from convsched.cli.main import main
from convsched.problem import Conv2d
from convsched.schedule import Schedule

LAYER = Conv2d(16, 16, 1, input_size=6)
TUNED = Tuned(LAYER, Schedule(), "", 1.25, 2e-3, 17, {"crashed: the process ended with 3": 2}, complete=False)


class Lab:
    """A worker in which every candidate takes as long, but for what a test says."""

    answer: Callable[[Job], Outcome | None] = staticmethod(lambda job: None)

    def start(self) -> None: ...

    def close(self) -> None: ...

    def run(self, job: Job, timeout: float | None, meanwhile: Callable[[], bool]) -> Outcome:
        return self.answer(job) or Outcome("ok", hot=1e-3, incumbent=1e-3 if job.incumbent else float("nan"))


@pytest.fixture
def tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    rates = dict.fromkeys(LEVELS, 50e9)
    known = Calibration("test", 100e9, rates, rates, 1e-5, 0.0, ())
    monkeypatch.setattr(tuning, "calibration", lambda: known)
    monkeypatch.setattr(tuning, "Worker", Lab)

    def run(budget: str = "9 candidates", answer: Callable[[Job], Outcome | None] = lambda job: None) -> Result:
        monkeypatch.setattr(Lab, "answer", staticmethod(answer))
        path = str(tmp_path / "schedules.sqlite")
        return CliRunner().invoke(main, ["tune", "lenet5", "--layer", "linear", "--budget", budget, "--cache", path])

    return run


def test_a_line_a_layer_and_a_total(tune: Callable[..., Result]) -> None:
    done = tune()
    assert done.exit_code == 0, done.output
    *lines, total = done.output.splitlines()
    assert len(lines) == 3
    assert all(" x1  " in line and "1.000x the default" in line for line in lines)
    assert total == "3 layers: 3.000 ms with the defaults, 3.000 ms tuned, 1.000x"


def test_a_layer_that_fails(tune: Callable[..., Result]) -> None:
    wrong = Outcome("wrong", "max |error| / rms is 1")
    done = tune(answer=lambda job: wrong if job.plan.problem.M == 84 else None)
    assert done.exit_code == 1
    assert "m=84 bias act=tanh: the default of linear" in done.output
    assert "wrong: max |error| / rms is 1" in done.output
    assert "2 layers: 2.000 ms" in done.output


def test_ctrl_c(tune: Callable[..., Result]) -> None:
    def press(job: Job) -> Outcome | None:
        if job.incumbent:
            raise KeyboardInterrupt
        return None

    done = tune(answer=press)
    assert done.exit_code == tune_cli.INTERRUPTED_EXIT_CODE
    assert done.output == "interrupted; what was measured is kept, and the next run goes on from there\n"


def test_a_budget_that_is_none(tune: Callable[..., Result]) -> None:
    done = tune(budget="soon")
    assert done.exit_code == 1
    assert "write a time such as 10s" in done.output


def test_a_terminal_sees_where_it_stands(tune: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    status = tune_cli.status
    monkeypatch.setattr(tune_cli, "status", lambda *given: seen.append(status(*given)) or seen[-1])
    monkeypatch.setattr(Console, "is_terminal", property(lambda self: True))
    done = tune()
    assert done.exit_code == 0, done.output
    assert len(seen) == 9
    assert seen[0].startswith("8 candidates left  fc 400>120  ")
    assert seen[-1].startswith("0 candidates left  fc ")
    assert all(text.endswith("0 failed") for text in seen)


def test_status_and_line() -> None:
    progress = Progress(LAYER, Outcome("ok"), 1.0625, 12, 3, Budget(seconds=41.7))
    assert tune_cli.status(progress, 200) == (
        f"42 s left  {LAYER.text}  1.062x the default, 12 tried, 3 failed")
    assert tune_cli.line(TunedLayer(3, TUNED)) == (
        f"{LAYER.text}  x3  1.600 ms  {LAYER.flops / 1.6e-3 * 1e-9:.1f} GFLOP/s  1.250x the default  "
        "17 tried (budget spent); 2 x crashed: the process ended with 3")
    network = TunedNetwork((TunedLayer(3, TUNED), TunedLayer(1, TUNED)), {}, interrupted=False)
    assert tune_cli.total(network) == "2 layers: 8.000 ms with the defaults, 6.400 ms tuned, 1.250x"


@pytest.mark.parametrize("columns", [60, 80, 95, 110, 200])
def test_lines_of_a_terminal_are_broken_between_words(columns: int) -> None:
    layer = Conv2d(256, 512, (3, 5), 2, 1, groups=2, input_size=(112, 96), activation="relu")
    tuned = TunedLayer(3, replace(TUNED, problem=layer))
    whole, shown = tune_cli.line(tuned), tune_cli.line(tuned, columns).splitlines()
    assert all(len(line) <= columns for line in shown)
    name = layer.text if columns == 200 else layer.short
    assert shown[0].startswith(f"{name}  x3  1.600 ms")
    assert " ".join(shown).split() == [*name.split(), *whole.removeprefix(layer.text).split()]
    progress = Progress(layer, Outcome("ok"), 1.0625, 12, 3, Budget(seconds=41.7))
    status = tune_cli.status(progress, columns)
    assert f"  {name}  " in status
    assert len(status) <= max(columns, 75)


@pytest.mark.parametrize(("whole", "left", "share"), [
    (Budget(seconds=10), Budget(seconds=4), 0.6), (Budget(seconds=10), Budget(seconds=-1), 1.0),
    (Budget(candidates=8), Budget(candidates=8), 0.0), (Budget(), Budget(), 0.0),
    (Budget(10, 8), Budget(9, 2), 0.75), (Budget(seconds=0), Budget(seconds=-1), 0.0)])
def test_how_much_is_spent(whole: Budget, left: Budget, share: float) -> None:
    assert tune_cli.used(whole, left) == pytest.approx(share)
