"""Hot and cold choices among records, with times that are given and none measured."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import hot_cold

from convsched.autotune.store.cache import ScheduleCache
from convsched.autotune.store.record import Key, Record
from convsched.machine import host
from convsched.plan.plan import Target
from convsched.problem import Conv2d

LAYER = Conv2d(8, 8, 3, padding=1, input_size=8)


def record(schedule: str, hot: float | None, cold: float | None, **fields: Any) -> Record:
    key = Key.of(LAYER, Target(host.machine()))
    return Record(**{**vars(key), "algorithm": "direct", "schedule": schedule, "status": "ok", "hot": hot, "cold": cold,
                     "time": 1.0, **fields})


FAST, COOL, SLOW = record("unroll c", 1.0, 5.0), record("unroll r", 1.5, 4.0), record("unroll s", 2.0, None)


@dataclass
class Times:
    """Times by schedule, as a Timer gives them; `asked` keeps which were timed in turn."""

    times: dict[str, tuple[float, float]]
    asked: list[tuple[str, ...]] = field(default_factory=list)
    layout: str = "nchw"
    threads: int = 1

    def prepare(self, found: Record) -> str:
        return found.schedule

    def hot(self, *names: str) -> list[float]:
        self.asked.append(names)
        return [self.times[name][0] for name in names]

    def cold(self, *names: str) -> list[float]:
        self.asked.append(names)
        return [self.times[name][1] for name in names]


def test_losses_are_of_the_times_taken_in_turn() -> None:
    timer: Any = Times({"unroll c": (2.0, 9.0), "unroll r": (3.0, 6.0)})
    found = hot_cold.compare([FAST, COOL, SLOW], timer)
    assert found is not None
    assert (found.by_hot.schedule, found.by_cold.schedule) == ("unroll c", "unroll r")
    assert (found.hot_loss, found.cold_loss) == (0.5, 0.5)
    assert (found.timed_hot, found.timed_cold, found.is_same) == (3, 2, False)
    assert timer.asked == [("unroll c", "unroll r")] * 2


def test_one_winner_is_timed_once_and_loses_nothing() -> None:
    timer: Any = Times({"unroll c": (2.0, 9.0)})
    found = hot_cold.compare([FAST, replace(COOL, cold=6.0)], timer)
    assert found is not None
    assert found.is_same
    assert (found.hot_loss, found.cold_loss) == (0, 0)
    assert timer.asked == [("unroll c",)] * 2


@pytest.mark.parametrize("records", [[], [SLOW], [replace(FAST, status="wrong")]])
def test_nothing_is_chosen_without_both_times(records: list[Record]) -> None:
    timer: Any = Times({})
    assert hot_cold.compare(records, timer) is None


def test_the_fastest_without_a_cold_time_are_timed_with_the_hot_winner() -> None:
    slower = replace(SLOW, schedule="unroll e", hot=3.0)
    wrong = replace(SLOW, schedule="unroll f", hot=0.5, status="wrong")
    timer: Any = Times({"unroll c": (math.nan, 10.0), "unroll s": (math.nan, 2.0)})
    found = hot_cold.timed_cold_too([FAST, slower, wrong, SLOW], 1, timer)
    assert [one.cold for one in found] == [5.0, None, None, 1.0]  # a fifth of the hot winner's
    assert timer.asked == [("unroll s", "unroll c")]
    assert hot_cold.timed_cold_too([FAST, SLOW], 0, timer) == [FAST, SLOW]
    assert hot_cold.timed_cold_too([SLOW], 1, timer) == [SLOW]


def test_records_are_those_of_the_layer_and_the_algorithm(tmp_path: Path) -> None:
    cache = ScheduleCache(tmp_path / "schedules.sqlite")
    tiles = replace(COOL, algorithm="winograd(4,3)")
    for one in (FAST, tiles, replace(SLOW, threads=2)):
        cache.put(one)
    timer = hot_cold.Timer("nchw", 1, 1.0)
    assert hot_cold.records_of(cache, LAYER, timer, "direct") == [FAST]
    assert set(hot_cold.records_of(cache, LAYER, timer, None)) == {FAST, tiles}


def test_layers_are_those_of_a_network_with_a_text() -> None:
    assert [problem.C for problem in hot_cold.layers_of("resnet50", "k=3x3")] == [64, 128, 256, 512]
    with pytest.raises(click.UsageError, match="no layer of resnet50 has 'k=5x5'"):
        hot_cold.layers_of("resnet50", "k=5x5")
    with pytest.raises(click.UsageError, match="network 'resnet5' is not known"):
        hot_cold.layers_of("resnet5", "")


def test_the_table_and_json_tell_both_choices() -> None:
    timer = hot_cold.Timer("nchw", 1, 1.0)
    first, second = (hot_cold.Winner("direct", "", name, hot, cold)
                     for name, hot, cold in (("unroll c", 0.002, 0.009), ("unroll r", 0.003, 0.006)))
    choices = [hot_cold.Choice(LAYER.text, first, second, 3, 2), hot_cold.Choice(LAYER.text, first, first, 1, 1)]
    console = Console(width=200)
    with console.capture() as capture:
        console.print(hot_cold.table(choices, timer))
    assert [capture.get().count(word) for word in (" both ", " 50.0", " 25.0")] == [1, 2, 2]
    told = json.loads(json.dumps(hot_cold.to_json(choices, timer)))
    assert [layer["is_same"] for layer in told["layers"]] == [False, True]
    assert [layer["cold_loss"] for layer in told["layers"]] == [pytest.approx(0.5), 0]
