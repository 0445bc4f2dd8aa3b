"""Records, keys and machine keys: their rules, their JSON lines, the tiers, and the choice of the best."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convsched.autotune.record import (
    FORMAT,
    SCHEDULE_FORMAT,
    CacheError,
    Key,
    MachineKey,
    Record,
    Run,
    Status,
    choose,
    parse_line,
)
from convsched.machine import Machine
from convsched.problem import Conv2d

PROBLEM = Conv2d(8, 16, 3, padding=1, input_size=14)
MACHINE = Machine.example("avx512")
KEY = Key.of(PROBLEM, MACHINE)


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
    time=st.floats(0, 1e12),
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
    assert Run.from_json(run.to_json()) == parse_line(run.to_json()) == run
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
        ("", "is no JSON"),
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("7", "is no JSON object"),
        ('["kind"]', "is no JSON object"),
        ("[]", 'has no "kind": "candidate"'),
        ("{}", 'has no "kind": "candidate"'),
        (KEY.to_json(), 'has no "kind": "candidate"'),
        (make().to_json().replace("{", '{"layout": "nchw", ', 1), "has a field twice"),
        (json.dumps(GOOD | {"format": 0}), "has format 0; this convsched uses 1"),
        (json.dumps(GOOD | {"format": True}), "must be an integer"),
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
        ({"problem": "conv2d c=8"}, "problem 'conv2d c=8' is none"),
        ({"problem": "linear m=4 c=8"}, "is not as convsched writes it: 'linear c=8 m=4'"),
        ({"schedule": "hurry up"}, "schedule 'hurry up' is none"),
        ({"schedule": "unroll  c"}, "is not as convsched writes it: 'unroll c'"),
        ({"machine": "my laptop"}, "machine 'my laptop' is none: write"),
        ({"compiler": "schedule 0"}, "made with format 1 and schedule 0"),
        ({"format": 0}, "made with format 0"),
    ],
)
def test_check_refuses_what_would_not_read_back(values: dict[str, Any], message: str) -> None:
    make().check()
    with pytest.raises(CacheError) as raised:
        make(**values).check()
    assert message in str(raised.value)


def test_tiers() -> None:
    here = MachineKey.of(MACHINE)
    tiers = {
        "exact": here,
        "same microarchitecture": replace(here, cores=64, l3=2 * here.l3),
        "same isa": replace(here, name="other"),
        "none": MachineKey.of(Machine.example("avx2")),
    }
    assert {name: here.tier(other) for name, other in tiers.items()} == {name: name for name in tiers}
    assert here.distance(here) == 0
    assert here.distance(tiers["same microarchitecture"]) == 1 + 5


@given(WORDS, st.integers(0, 2**40), st.integers(1, 999))
def test_a_machine_survives_its_text(name: str, size: int, cores: int) -> None:
    key = MachineKey.of(replace(MACHINE, name=f"{name} [avx2 l1=1K]", l3=size, cores=cores))
    assert MachineKey.parse(key.text) == key


def test_a_strange_cpu_name_is_one_line() -> None:
    assert MachineKey.of(replace(MACHINE, name=" A\xa0CPU \x00\n(R) ")).name == "A CPU (R)"


@pytest.mark.parametrize("change", [("avx512", "avx1024"), ("48K", "048K"), ("48K", "49152"), (" line=64", "")])
def test_a_text_that_is_no_machine(change: tuple[str, str]) -> None:
    with pytest.raises(CacheError, match=r"write 'example \[avx2"):
        MachineKey.parse(MachineKey.of(MACHINE).text.replace(*change))


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


def test_ties_go_to_less_workspace_then_to_the_smaller_text() -> None:
    fast = make("unroll c", 1.0, workspace=100)
    small, far = make("unroll s", 1.015, workspace=10), make("unroll r", 1.03, workspace=0)
    same = make("unroll m", 1.01, workspace=10)
    for order in ([fast, small, far, same], [same, far, small, fast]):
        assert choose(order) == same


def test_never_slower_than_the_default() -> None:
    default = make("unroll m", 1.005, workspace=50, is_default=True)
    tied = make("unroll c", 1.01, workspace=10)  # less workspace, but slower than the default
    fast = make("unroll s", 1.0, workspace=100)
    assert choose([tied, default, fast]) == default
    assert choose([tied, replace(default, status="crashed"), fast]) == tied
