"""Records and keys: their rules, their JSON lines, and the choice of the best."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import permutations
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convsched.autotune.store.record import FORMAT, SCHEDULE_FORMAT, CacheError, Key, Record, Run, Status, parse_line
from convsched.autotune.store.winner import Contender, choose, winner
from convsched.machine import Machine
from convsched.plan.plan import Target
from convsched.problem import Conv2d

PROBLEM = Conv2d(8, 16, 3, padding=1, input_size=14)
MACHINE = Machine.example("avx512")
KEY = Key.of(PROBLEM, Target(MACHINE))


def make(schedule: str = "unroll c", hot: float | None = 1.0, **values: Any) -> Record:
    given = {**vars(KEY), "algorithm": "direct", "status": "ok", "time": 1.0, **values}
    return Record(schedule=schedule, hot=hot, **given)


WORDS = st.text(st.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=20)
COUNTS = st.integers(0, 2**63 - 1)
SECONDS = st.none() | st.floats(min_value=0, exclude_min=True, allow_infinity=False)
RECORDS = st.builds(
    Record,
    problem=WORDS, layout=WORDS, threads=st.integers(1, 2**63 - 1), accuracy=WORDS, machine=WORDS,
    compiler=WORDS, algorithm=WORDS, recipe=st.text(), schedule=st.just("") | WORDS,
    status=st.sampled_from(get_args(Status)), message=st.text(), hot=SECONDS, cold=SECONDS,
    spread=st.none() | st.floats(0, 1e300), error=st.none() | st.floats(min_value=0) | st.just(math.nan),
    workspace=COUNTS, samples=COUNTS, flags=st.lists(WORDS).map(tuple), is_default=st.booleans(),
    tries=st.integers(1, 99), time=st.floats(0, 1e12),
)  # fmt: skip


@given(RECORDS)
def test_a_record_survives_its_json(record: Record) -> None:
    line = record.to_json()
    assert "\n" not in line
    assert Record.from_json(line) == record
    assert Key.from_json(record.key.to_json()) == record.key
    assert hash(record) == hash(Record.from_json(line))
    json.loads(line, parse_constant=pytest.fail)  # no NaN, no Infinity: every JSON reader takes it


@given(RECORDS, st.booleans(), WORDS)
def test_a_run_survives_its_json(record: Record, complete: bool, budget: str) -> None:
    run = Run(**vars(record.key), complete=complete, budget=budget, tried=3, time=2.0)
    assert Run.from_json(run.to_json()) == run
    assert run.key == record.key


def test_a_line_names_its_fields() -> None:
    fields = json.loads(make(flags=("throttled",)).to_json())
    assert fields["kind"] == "candidate"
    assert fields["problem"] == "conv2d c=8 m=16 k=3x3 in=14x14 pad=1,1,1,1 bias"
    assert fields["machine"] == "example [avx512 l1=48K l2=1024K l3=32768K line=64 cores=2]"
    assert (fields["cold"], fields["flags"]) == (None, ["throttled"])


def test_values_are_made_equal() -> None:
    record = make(hot=math.nan, error=math.inf, spread=math.nan, message="  first \n second")
    assert (record.hot, record.error, record.spread, record.message) == (None, math.inf, None, "first")
    assert len(make(message="x" * 9999).message) == 300
    assert make(message="\ud800").message == "?"  # a lone surrogate, as in an undecodable file name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hot": 0.0}, "Record(hot=0.0): must be above 0"),
        ({"hot": -1.0}, "must not be negative"),
        ({"hot": math.inf}, "must be finite"),
        ({"cold": "fast"}, "must be a number"),
        ({"cold": True}, "must be a number"),
        ({"error": -1.0}, "must not be negative"),
        ({"threads": 0}, "must be an integer from 1"),
        ({"threads": True}, "must be an integer"),
        ({"threads": 1.0}, "must be an integer"),
        ({"workspace": -1}, "must be an integer from 0"),
        ({"workspace": 2**63}, "must be an integer from 0"),
        ({"status": "fine"}, "must be one of ok, wrong, crashed, timed out, failed"),
        ({"status": []}, "must be one of ok"),
        ({"flags": "throttled"}, "must be a list of texts"),
        ({"flags": ["a\nb"]}, "must be one line of text"),
        ({"flags": [1]}, "must be a list of texts"),
        ({"is_default": 1}, "must be true or false"),
        ({"tries": 0}, "must be an integer from 1"),
        ({"time": math.nan}, "must be Unix seconds"),
        ({"time": 10**400}, "must be finite"),
        ({"problem": ""}, "must be one line of text"),
        ({"machine": "a\nb"}, "must be one line of text"),
        ({"schedule": None}, "must be a text"),
        ({"recipe": None}, "must be a text"),
    ],
    ids=str,
)
def test_rules(values: dict[str, Any], message: str) -> None:
    with pytest.raises(CacheError) as raised:
        make(**values)
    assert message in str(raised.value)


GOOD = json.loads(make().to_json())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("7", "is not a JSON object"),
        ('["kind"]', "is not a JSON object"),
        ("[]", 'has no "kind": "candidate"'),
        ("{}", 'has no "kind": "candidate"'),
        (KEY.to_json(), 'has no "kind": "candidate"'),
        (make().to_json().replace("{", '{"layout": "nchw", ', 1), "has a field twice"),
        (json.dumps(GOOD | {"format": 0}), "has format 0; this convsched uses 2"),
        (json.dumps(GOOD | {"format": True}), "has format True"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "hot"}), "has no hot"),
        (json.dumps(GOOD | {"speed": 1}), "has unknown fields speed"),
        (json.dumps(GOOD | {"hot": "inf"}), "must be a number"),
        (json.dumps(GOOD).replace('"hot": 1.0', '"hot": 1e999'), "must be finite"),
        (json.dumps(GOOD | {"flags": {"a": "b"}}), "must be a list of texts"),
    ],
    ids=lambda text: text[:40],
)
def test_lines_that_are_no_record(line: str, message: str) -> None:
    with pytest.raises(CacheError) as raised:
        Record.from_json(line)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"problem": "conv2d c=8"}, "problem 'conv2d c=8' cannot be used"),
        ({"problem": "linear m=4 c=8"}, "is not as convsched writes it: 'linear c=8 m=4'"),
        ({"schedule": "hurry up"}, "schedule 'hurry up' cannot be used"),
        ({"schedule": "unroll  c"}, "is not as convsched writes it: 'unroll c'"),
        ({"machine": "my laptop"}, "'my laptop' is not a machine's key: write"),
        ({"layout": "nchw8c"}, "layout 'nchw8c' is not known: use one of nchw, nhwc, nchw16c"),
        ({"accuracy": "sloppy"}, "accuracy 'sloppy' is not known: use one of strict, normal, fast"),
        ({"algorithm": "magic"}, "algorithm 'magic' cannot be used: algorithm='magic': use one of direct, winograd"),
        ({"algorithm": "winograd(4,5)"}, "algorithm 'winograd(4,5)' cannot be used"),
        ({"algorithm": "winograd"}, "algorithm 'winograd' is not as convsched writes it: 'winograd(4,3)'"),
        ({"compiler": "schedule 0"}, "made with format 2 and schedule 0"),
        ({"format": 0}, "made with format 0"),
    ],
)
def test_check_refuses_what_would_not_read_back(values: dict[str, Any], message: str) -> None:
    make().check()
    with pytest.raises(CacheError) as raised:
        make(**values).check()
    assert message in str(raised.value)


@pytest.mark.parametrize("values", [
    {"layout": "nchw8c"}, {"accuracy": "sloppy"}, {"problem": "conv2d c=8"}, {"machine": "my laptop"},
    {"compiler": "schedule 0"},
])  # fmt: skip
def test_a_line_of_a_run_is_refused_where_one_of_a_candidate_is(values: dict[str, Any]) -> None:
    def line(**given: Any) -> str:
        key = replace(KEY, **given)
        return Run(**vars(key), complete=True, budget="10s", tried=3, time=2.0).to_json()

    assert parse_line(line()) == Run.from_json(line())
    with pytest.raises(CacheError, match=next(iter(values.values()))):
        parse_line(line(**values))


def test_the_formats_are_part_of_the_key() -> None:
    assert (KEY.format, KEY.compiler) == (FORMAT, SCHEDULE_FORMAT)
    assert make().key == KEY != replace(KEY, compiler="schedule 0")


def test_choose_takes_the_least_time() -> None:
    fast, slow = make("unroll c", 1.0, cold=9.0), make("unroll m", 2.0, cold=3.0)
    assert choose([slow, fast]) == fast
    assert choose([slow, fast], "cold") == slow
    assert choose([]) is None
    with pytest.raises(CacheError, match="use one of hot, cold"):
        choose([fast], "warm")  # type: ignore[arg-type]


@pytest.mark.parametrize("status", ["wrong", "crashed", "timed out", "failed"])
def test_choose_takes_no_failure(status: str) -> None:
    right = make("unroll m", 2.0)
    assert choose([make(hot=1.0, status=status), right]) == right
    assert choose([make(hot=1.0, status=status)]) is None
    assert choose([make(hot=None)]) is None


def test_ties_go_to_less_workspace_then_to_the_simpler_schedule() -> None:
    fast = make("unroll c", 1.0, workspace=100)
    small, far = make("unroll s", 1.015, workspace=10), make("unroll r", 1.03, workspace=0)
    same = make("unroll m", 1.01, workspace=10)
    longer = make("unroll c; unroll m", 1.0, workspace=10)
    for order in permutations([fast, small, far, same, longer]):
        assert choose(order) == same


def test_the_order_of_the_rows_does_not_matter() -> None:
    equal = [make(algorithm=algorithm) for algorithm in ("direct", "im2col", "winograd(4,3)")]
    assert {choose(order) for order in permutations(equal)} == {equal[0]}


def test_never_slower_than_the_default() -> None:
    default = make("unroll m", 1.005, workspace=50, is_default=True)
    tied = make("unroll c", 1.01, workspace=10)  # less workspace, but slower than the default
    fast = make("unroll s", 1.0, workspace=100)
    assert choose([tied, default, fast]) == default
    assert choose([tied, replace(default, status="crashed"), fast]) == tied


@given(st.lists(st.builds(Contender, st.floats(0.97, 1.05), st.integers(0, 3), WORDS), min_size=1),
       st.floats(0.9, 1.1))  # fmt: skip
def test_the_winner_is_among_the_fastest_and_does_not_depend_on_the_order(
    contenders: list[Contender], default: float
) -> None:
    best = contenders[winner(contenders, default)]
    least = min(contender.seconds for contender in contenders)
    assert best.seconds <= least * 1.02
    assert best.seconds <= max(least, default)
    there = contenders[::-1]
    assert there[winner(there, default)][1:] == best[1:]


@pytest.mark.parametrize(
    ("status", "tries", "settled"),
    [("ok", 1, True), ("wrong", 1, True), ("failed", 1, True), ("crashed", 1, False), ("timed out", 1, False),
     ("crashed", 2, True), ("timed out", 2, True)],
)  # fmt: skip
def test_a_crash_or_a_time_out_is_tried_once_more(status: str, tries: int, settled: bool) -> None:
    assert make(status=status, tries=tries).is_settled == settled
