"""The schedule cache on a sound disk: what is kept, found, explained, carried and removed."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from convsched.autotune.store.cache import ScheduleCache
from convsched.autotune.store.record import CacheError, Key, Record
from convsched.errors import CacheWarning, ScheduleError
from convsched.machine import Machine, MachineKey
from convsched.plan.plan import Target
from convsched.problem import Conv2d

PROBLEM = Conv2d(8, 16, 3, padding=1, input_size=14)
MACHINE = Machine.example("avx512")
KEY = Key.of(PROBLEM, Target(MACHINE))


def make(schedule: str = "unroll c", hot: float | None = 1.0, key: Key = KEY, **values: Any) -> Record:
    given = {**vars(key), "algorithm": "direct", "status": "ok", "time": 1.0, **values}
    return Record(schedule=schedule, hot=hot, **given)


@pytest.fixture
def cache(tmp_path: Path) -> ScheduleCache:
    return ScheduleCache(tmp_path / "some" / "folder" / "schedules.sqlite")


def told_once(why: str, *calls: Callable[[], object]) -> list[object]:
    """The calls' results; there is one warning in all, which says this."""
    with pytest.warns(CacheWarning, match=re.escape(why)) as caught:
        results = [call() for call in calls]
    assert len(caught) == 1
    return results


def machine(**changes: Any) -> str:
    return replace(MachineKey.of(MACHINE), **changes).text


def test_nothing_is_made_by_reading(cache: ScheduleCache) -> None:
    assert cache.best(KEY) is None
    assert cache.records(KEY) == cache.entries() == ()
    assert cache.run_of(KEY) is None
    assert cache.prune() == (0, 0, 0)
    assert not cache.path.parent.exists()


def test_the_default_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVSCHED_CACHE", str(tmp_path))
    assert ScheduleCache().path == tmp_path / "schedules.sqlite"


def test_what_is_put_is_found_by_another(cache: ScheduleCache) -> None:
    records = [make("unroll c", 2.0), make("unroll m", 1.0, time=2.0), make("unroll s", None, status="crashed")]
    assert all(cache.put(record) for record in records)
    other = ScheduleCache(cache.path)
    assert set(other.records(KEY)) == set(records)
    assert other.best(KEY) == (records[1], "exact")


def test_a_newer_measurement_replaces(cache: ScheduleCache) -> None:
    for record in (make(hot=1.0, time=5.0), make(hot=3.0, time=6.0), make(hot=2.0, time=4.0)):
        cache.put(record)
    assert [record.hot for record in cache.records(KEY)] == [3.0]
    cache.put(make(hot=4.0, time=6.0))
    assert [record.hot for record in cache.records(KEY)] == [4.0]


def test_a_candidate_is_its_algorithm_and_schedule(cache: ScheduleCache) -> None:
    for algorithm in ("direct", "winograd(4,3)"):
        cache.put(make(algorithm=algorithm))
    assert len(cache.records(KEY)) == 2


@pytest.mark.parametrize(
    "change",
    [{"layout": "nhwc"}, {"threads": 2}, {"accuracy": "strict"}, {"problem": "linear c=8 m=4"}],
    ids=str,
)  # fmt: skip
def test_another_key_finds_nothing(cache: ScheduleCache, change: dict[str, Any]) -> None:
    cache.put(make())
    other = replace(KEY, **change)
    assert cache.best(other) is None
    assert cache.records(other) == ()


def test_a_record_that_would_not_read_back_is_refused(cache: ScheduleCache) -> None:
    with pytest.raises(CacheError, match="schedule 'hurry' cannot be used"):
        cache.put(make("hurry"))


def test_the_regime(cache: ScheduleCache) -> None:
    cache.put(make("unroll c", 1.0))
    assert cache.best(KEY, regime="cold") is None
    cache.put(make("unroll m", 2.0, cold=3.0))
    hit = cache.best(KEY, regime="cold")
    assert hit is not None
    assert hit.record.schedule == "unroll m"


def test_the_nearest_machine_is_asked_first(cache: ScheduleCache) -> None:
    machines = {
        "same isa": machine(design="other"),
        "far": machine(cores=64),
        "same microarchitecture": machine(cores=4),
        "exact": machine(),
    }
    cache.put(make("unroll r", 0.1, machine=machine(isa="avx2")))
    assert cache.best(KEY) is None  # other instructions are no help
    for i, (name, text) in enumerate(machines.items()):
        cache.put(make(f"unroll c{i}", 0.5 + i, machine=text))  # the nearer, the slower: times do not compare
        hit = cache.best(KEY)
        assert hit is not None
        assert (hit.record.machine, hit.tier) == (text, name.replace("far", "same microarchitecture"))
    away = replace(KEY, machine=machine(cores=8))
    assert cache.best(away, furthest="exact") is None
    hit = cache.best(replace(KEY, machine=machine(design="third")), furthest="same isa")
    assert hit is not None
    assert hit.tier == "same isa"
    assert cache.best(replace(KEY, machine=machine(design="third")), furthest="same microarchitecture") is None


def test_a_machine_with_failures_only_gives_way(cache: ScheduleCache) -> None:
    cache.put(make(hot=None, status="crashed"))
    cache.put(make(machine=machine(cores=4)))
    hit = cache.best(KEY)
    assert hit is not None
    assert hit.tier == "same microarchitecture"


def test_a_record_that_no_longer_fits_is_a_miss_with_one_warning(cache: ScheduleCache) -> None:
    for schedule, hot in (("unroll c", 1.0), ("unroll m", 2.0), ("unroll s", 3.0)):
        cache.put(make(schedule, hot))

    def accept(record: Record) -> bool:
        if record.schedule != "unroll s":
            raise ScheduleError(record.schedule, "there is no such loop", "use n")
        return True

    find = partial(cache.best, KEY, accept=accept)
    why = "unroll c: there is no such loop; use n (and 1 more)"
    assert told_once(why, find, find) == 2 * [(make("unroll s", 3.0), "exact")]


def test_what_is_forgotten_is_a_miss(cache: ScheduleCache) -> None:
    first, second, third = make("unroll c", 1.0), make("unroll m", 2.0), make("unroll s", 3.0)
    for record in (first, second, third):
        cache.put(record)
    assert cache.forget([first, third, make("unroll r")])
    assert cache.best(KEY) == (second, "exact")
    assert cache.forget([second])
    assert cache.best(KEY) is None


def test_runs(cache: ScheduleCache) -> None:
    assert cache.mark_run(KEY, False, "10s", 30, 1.0)
    run = cache.run_of(KEY)
    assert run is not None
    assert (run.key, run.complete, run.budget, run.tried, run.time) == (KEY, False, "10s", 30, 1.0)
    cache.mark_run(KEY, True, "60s", 200, 2.0)
    run = cache.run_of(KEY)
    assert run is not None
    assert run.complete
    assert cache.run_of(replace(KEY, threads=2)) is None


def test_entries(cache: ScheduleCache) -> None:
    cache.put(make("unroll m", 2.0, is_default=True))
    cache.put(make("unroll c", 1.0))
    cache.put(make("unroll s", None, status="crashed"))
    other = replace(KEY, threads=2)
    cache.put(make("unroll s", None, other, status="wrong"))
    cache.mark_run(KEY, True, "10s", 3, 1.0)
    first, second = cache.entries()
    assert (first.key, second.key) == (KEY, other)
    assert first.winner is not None
    assert (first.winner.schedule, first.default, first.candidates) == ("unroll c", 2.0, 3)
    assert (first.statuses, first.complete) == ({"ok": 2, "crashed": 1}, True)
    assert (second.winner, second.default, second.complete) == (None, None, None)


def test_explain_a_hit_and_an_empty_cache(cache: ScheduleCache) -> None:
    assert cache.explain_miss(KEY) == f"no schedule for {KEY.text}\n  {cache.path} has no entries"
    cache.put(make())
    assert cache.explain_miss(KEY) == "a hit, from exact machine: direct, unroll c"


@pytest.mark.parametrize(
    ("stored", "text"),
    [
        ({"layout": "nhwc"}, "other layout (nhwc)"),
        ({"threads": 2}, "other threads (2)"),
        ({"accuracy": "fast"}, "other accuracy (fast)"),
        ({"machine": machine(isa="avx2")}, "other machine (example [avx2 l1=48K"),
        ({"problem": "conv2d c=8 m=16 k=3x3 in=28x28 bias"}, "other problem (conv2d c=8 m=16 k=3x3 in=28x28"),
        ({"hot": None, "status": "crashed"}, "only 1 crashed"),
        ({"hot": None, "status": "wrong", "threads": 2}, "other threads (2); only 1 wrong"),
    ],
    ids=str,
)
def test_explain_a_miss(cache: ScheduleCache, stored: dict[str, Any], text: str) -> None:
    cache.put(make(**stored))
    lines = cache.explain_miss(KEY).splitlines()
    assert lines[0] == f"no schedule for {KEY.text}"
    assert lines[1].strip().startswith(text)


def test_explain_names_the_nearest_three(cache: ScheduleCache) -> None:
    cache.put(make(threads=2))
    cache.put(make(threads=2, layout="nhwc"))
    cache.put(make(threads=2, layout="nhwc", accuracy="fast"))
    cache.put(make(problem="linear c=8 m=4"))
    lines = cache.explain_miss(KEY).splitlines()
    assert [line.count("other") for line in lines] == [0, 1, 2, 3]


def edit(cache: ScheduleCache, statement: str, *values: object) -> None:
    with sqlite3.connect(cache.path) as db:
        db.execute(statement, values)
    db.close()


def older(cache: ScheduleCache) -> None:
    line = make().to_json().replace('"format": 2', '"format": 0').replace('"hot"', '"seconds"')
    edit(cache, "UPDATE candidates SET format = 0, record = ?", line)


def test_rows_of_another_version_are_a_miss_with_one_warning(cache: ScheduleCache) -> None:
    cache.put(make())
    older(cache)
    find = partial(cache.best, KEY)
    assert told_once("made with format 0 and schedule 1; this convsched uses format 2", find, find) == [None, None]
    cache.put(make("unroll m"))
    edit(cache, "UPDATE candidates SET compiler = 'schedule 0' WHERE format = 2")
    fresh = ScheduleCache(cache.path)
    assert told_once("made with format 2 and schedule 0", partial(fresh.best, KEY)) == [None]
    assert fresh.best(replace(KEY, threads=2)) is None  # nothing is known of it: no warning
    cache.put(make("unroll m"))
    assert ScheduleCache(cache.path).best(KEY) is not None  # nor where there is a row to use


def test_rows_of_another_format_stay_but_are_not_used(cache: ScheduleCache) -> None:
    cache.put(make())
    older(cache)
    (entry,) = cache.entries()
    assert (entry.key, entry.winner, entry.candidates) == (replace(KEY, format=0), None, 1)
    assert "other format (0)" in cache.explain_miss(KEY)
    cache.put(make("unroll m"))
    assert len(cache.entries()) == 2


FOREIGN: dict[str, tuple[str, tuple[object, ...], str]] = {
    "no JSON": ("UPDATE candidates SET record = ?", ("what?",), "is not JSON"),
    "bytes": ("UPDATE candidates SET record = ?", (b"\xff\x00",), "is not JSON"),
    "bad text": ("UPDATE candidates SET record = CAST(? AS TEXT)", (b"\xff\xfe{",), "is not JSON"),
    "null": ("UPDATE candidates SET record = NULL", (), "is not JSON"),
    "a number": ("UPDATE candidates SET record = 7", (), "is not JSON"),
    "other columns": ("UPDATE candidates SET schedule = 'unroll s'", (), "its columns are not its record's"),
    "a bad schedule": ("UPDATE candidates SET schedule = 'x', record = replace(record, 'unroll c', 'x')", (),
                       "schedule 'x' cannot be used"),
    "a bad time": ("UPDATE candidates SET record = replace(record, '1.0', '-1')", (), "must not be negative"),
    "a bad machine": ("UPDATE candidates SET machine = 'mine', record = replace(record, ?, 'mine')",
                      (KEY.machine,), "'mine' is not a machine's key"),
}  # fmt: skip


@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_foreign_row_is_a_miss_with_one_warning(
    cache: ScheduleCache, change: tuple[str, tuple[object, ...], str]
) -> None:
    statement, values, why = change
    cache.put(make("unroll c"))
    edit(cache, statement, *values)
    find = partial(cache.best, KEY)
    assert told_once(why, find, find) == [None, None]
    assert why in cache.explain_miss(KEY)


def test_what_cannot_be_read_is_replaced(cache: ScheduleCache) -> None:
    cache.put(make(time=5.0))
    edit(cache, "UPDATE candidates SET record = 'x'")
    cache.put(make(hot=2.0, time=4.0))
    assert [record.hot for record in cache.records(KEY)] == [2.0]


def test_foreign_rows_do_not_hide_the_others(cache: ScheduleCache) -> None:
    for schedule in ("unroll c", "unroll m", "unroll s"):
        cache.put(make(schedule))
    edit(cache, "UPDATE candidates SET record = 'x' WHERE schedule <> 'unroll m'")
    with pytest.warns(CacheWarning, match="and 1 more"):
        hit = cache.best(KEY)
    assert hit is not None
    assert hit.record.schedule == "unroll m"
