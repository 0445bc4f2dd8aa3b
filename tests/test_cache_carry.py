"""Moving the schedule cache to another machine, and making it smaller."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from convsched.autotune.store.cache import Counts, ScheduleCache
from convsched.autotune.store.record import CacheError, Key, Record
from convsched.machine import Machine, MachineKey, host
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


def machine(**changes: Any) -> str:
    return replace(MachineKey.of(MACHINE), **changes).text


def edit(cache: ScheduleCache, statement: str, *values: object) -> None:
    with sqlite3.connect(cache.path) as db:
        db.execute(statement, values)
    db.close()


def fill(cache: ScheduleCache, keys: int = 3, candidates: int = 20) -> list[Record]:
    records = [
        make(f"unroll c{j}", 1.0 + j, replace(KEY, threads=i + 1), time=100.0 * i + j, is_default=j == 9,
             status="crashed" if j == 5 else "ok", cold=100.0 - j)
        for i in range(keys) for j in range(candidates)
    ]  # fmt: skip
    file = cache.path.parents[2] / "filling"
    file.write_text("".join(f"{record.to_json()}\n" for record in records))
    cache.import_(file)
    return records


def test_export_and_import_carry_everything(cache: ScheduleCache, tmp_path: Path) -> None:
    records = fill(cache)
    cache.mark_run(KEY, True, "10s", 20, 1.0)
    cache.put(make("unroll r", 1.0, replace(KEY, layout="nhwc")))
    older_row = "UPDATE candidates SET format = 0 WHERE layout = 'nhwc'"
    edit(cache, older_row)
    file = tmp_path / "schedules.jsonl"
    file.write_text("an older export")
    assert cache.export(file) == len(records)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert len(file.read_text().splitlines()) == len(records) + 1

    other = ScheduleCache(tmp_path / "other.sqlite")
    assert other.import_(file) == Counts(len(records) + 1, 0, 0)
    assert other.import_(file) == Counts(0, 0, len(records) + 1)
    assert set(other.records(KEY)) == set(cache.records(KEY))
    assert other.run_of(KEY) == cache.run_of(KEY)
    away = replace(KEY, machine=machine(cores=96))  # a machine of the same kind: nothing is to be measured
    hit, here = other.best(away), cache.best(KEY)
    assert hit is not None
    assert here is not None
    assert (hit.record, hit.tier) == (here.record, "same microarchitecture")


# What compile imports, and finds, where only a cache from another machine of the kind is known.
COMPILES = """
import sys
from pathlib import Path
import convsched as cs
from convsched.autotune.store.cache import ScheduleCache
layer = cs.Conv2d(8, 16, 3, padding=1, input_size=14)
kernel = cs.compile(layer, threads=1, cache=ScheduleCache(Path(sys.argv[1])))
print(kernel.schedule.text, "convsched.autotune.measure.measure" in sys.modules)
"""


def test_a_carried_cache_compiles_without_a_measurement(cache: ScheduleCache, tmp_path: Path) -> None:
    there = replace(MachineKey.of(host.machine()), cores=96).text
    cache.put(make("unroll s", key=replace(KEY, machine=there)))
    cache.export(tmp_path / "schedules.jsonl")
    other = ScheduleCache(tmp_path / "other.sqlite")
    other.import_(tmp_path / "schedules.jsonl")
    command = [sys.executable, "-W", "error::UserWarning", "-c", COMPILES, str(other.path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout == "unroll s False\n"


def test_import_keeps_the_newer(cache: ScheduleCache, tmp_path: Path) -> None:
    for record in (make("unroll c", 1.0, time=5.0), make("unroll m", 1.0, time=5.0)):
        cache.put(record)
    newer, stale, new = make("unroll c", 2.0, time=6.0), make("unroll m", 2.0, time=4.0), make("unroll s")
    file = tmp_path / "x.jsonl"
    file.write_text("".join(f"{record.to_json()}\n" for record in (newer, stale, new)))
    assert cache.import_(file) == Counts(added=1, updated=1, skipped=1)
    assert {r.schedule: r.hot for r in cache.records(KEY)} == {"unroll c": 2, "unroll m": 1, "unroll s": 1}


def test_export_to_no_folder(cache: ScheduleCache, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="No such file or directory"):
        cache.export(tmp_path / "none" / "x.jsonl")


def test_prune_keeps_winners_and_defaults(cache: ScheduleCache) -> None:
    fill(cache)
    before = [cache.best(replace(KEY, threads=i), regime=r) for i in (1, 2, 3) for r in ("hot", "cold")]
    cache.mark_run(KEY, True, "10s", 20, 1.0)
    removed, kept, size = cache.prune()
    assert (removed, kept, size) == (51, 9, cache.path.stat().st_size)
    after = [cache.best(replace(KEY, threads=i), regime=r) for i in (1, 2, 3) for r in ("hot", "cold")]
    assert before == after
    assert cache.run_of(KEY) is not None


@pytest.mark.parametrize(
    ("prune", "kept"),
    [
        (lambda cache: cache.prune("all"), 60),
        (lambda cache: cache.prune("ok"), 57),
        (lambda cache: cache.prune("all", older_than=110.0), 30),
        (lambda cache: cache.prune("winners", older_than=1e6), 0),
    ],
)
def test_prune(cache: ScheduleCache, prune: Callable[[ScheduleCache], Any], kept: int) -> None:
    fill(cache)
    cache.mark_run(KEY, True, "10s", 20, 1.0)
    assert prune(cache)[:2] == (60 - kept, kept)
    assert sum(entry.candidates for entry in cache.entries()) == kept
    assert (cache.run_of(KEY) is None) == (len(cache.records(KEY)) == 0)


def test_prune_to_a_size_keeps_winners_longest(cache: ScheduleCache) -> None:
    fill(cache, keys=5, candidates=60)
    full = cache.path.stat().st_size
    pruned = cache.prune("all", max_bytes=full // 4)
    assert 0 < pruned.bytes == cache.path.stat().st_size <= full // 4
    assert pruned.kept > 15  # as few as need be
    for i in range(5):
        hit = cache.best(replace(KEY, threads=i + 1))
        assert hit is not None
        assert hit.record.hot == 1.0
    assert cache.prune("all", max_bytes=0).kept == 0


def test_prune_removes_what_cannot_be_read(cache: ScheduleCache) -> None:
    for schedule in ("unroll c", "unroll m", "unroll s"):
        cache.put(make(schedule))
    edit(cache, "UPDATE candidates SET record = 'x' WHERE schedule = 'unroll c'")
    edit(cache, "UPDATE candidates SET format = 0 WHERE schedule = 'unroll m'")
    assert cache.prune("all")[:2] == (2, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [record.schedule for record in cache.records(KEY)] == ["unroll s"]


def test_prune_of_an_unknown_kind(cache: ScheduleCache) -> None:
    with pytest.raises(CacheError, match="use one of winners, ok, all"):
        cache.prune("some")  # type: ignore[arg-type]
