"""Schedules as data: text and JSON forms, and what is refused in either."""

from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convsched.errors import ScheduleError
from convsched.ir.examples import nests, product
from convsched.schedule import (
    Attach,
    Fuse,
    Layout,
    Parallel,
    Peel,
    Reorder,
    Schedule,
    Split,
    StageAt,
    Step,
    Unroll,
    Vectorize,
    apply,
    parse_schedule,
)

NAMES = st.from_regex(r"[a-z_][a-z0-9_.]{0,5}", fullmatch=True)
SEVERAL = st.lists(NAMES, min_size=1, max_size=4).map(tuple)
ENTRIES = NAMES | st.builds("{}{}{}".format, st.sampled_from("nchw"), st.sampled_from("/%"),
                            st.integers(1, 64))
ALIGNS = st.lists(st.tuples(ENTRIES, st.integers(0, 512)), max_size=2, unique_by=lambda pair: pair[0]).map(tuple)
STEPS: st.SearchStrategy[Step] = st.one_of(
    st.builds(Split, NAMES, st.integers(0, 999), NAMES, NAMES,
              st.sampled_from(["none", "mask", "peel", "overlap"])),
    st.builds(Reorder, SEVERAL),
    st.builds(Fuse, NAMES, NAMES, NAMES),
    st.builds(Unroll, SEVERAL),
    st.builds(Vectorize, SEVERAL),
    st.builds(Parallel, NAMES),
    st.builds(StageAt, NAMES, NAMES, st.sampled_from(["registers", "window", "packed"]),
              st.lists(ENTRIES, max_size=4).map(tuple), ALIGNS),
    st.builds(Layout, NAMES, SEVERAL),
    st.builds(Attach, NAMES, NAMES),
    st.builds(Peel, NAMES, st.sampled_from(["first", "last", "overlap"])),
)


@given(st.lists(STEPS, max_size=6))
def test_text_and_json_round_trip(steps: list[Step]) -> None:
    schedule = Schedule(tuple(steps))
    assert parse_schedule(schedule.text) == schedule
    assert parse_schedule(schedule.text.replace("; ", "\n").replace(" ", "  ")) == schedule
    assert Schedule.from_json(json.loads(json.dumps(schedule.to_json()))) == schedule
    assert hash(pickle.loads(pickle.dumps(schedule))) == hash(schedule)


@given(st.text(alphabet="split reorder unroll m0 c->=;\n.%/:,tail=mask 12", max_size=40))
def test_any_text_is_a_schedule_or_an_error(text: str) -> None:
    try:
        schedule = parse_schedule(text)
    except ScheduleError:
        return
    assert parse_schedule(schedule.text) == schedule


VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
                          ["step", "loop", "loops", "factor", "outer", "inner", "tail"]), inner, max_size=5))


FIELDS = ("loop", "loops", "factor", "outer", "inner", "tail", "which")
ALMOST = st.fixed_dictionaries({"step": st.sampled_from(["Split", "Reorder", "Peel"])},
                               optional=dict.fromkeys(FIELDS, VALUES))


@given(st.lists(ALMOST | VALUES) | VALUES)
def test_any_json_is_a_schedule_or_an_error(value: object) -> None:
    try:
        schedule = Schedule.from_json(value)  # type: ignore[arg-type]
    except ScheduleError:
        return
    assert Schedule.from_json(schedule.to_json()) == schedule == parse_schedule(schedule.text)


def test_text_forms() -> None:
    text = ("split m 32 -> m0 m1 tail=mask; reorder m0 e c m1; fuse e f -> p; unroll m1; vectorize m2; "
            "parallel m0; stage x at e window n c/16 h w c%16 align=h:16,w:2; stage t at e registers; "
            "layout w m0 c r s m1; attach epilogue at e; peel m0 last; peel m0 overlap")
    schedule = parse_schedule(text)
    assert schedule.text == text == str(schedule)
    assert len(schedule.steps) == 12
    assert parse_schedule("peel m0").steps == (Peel("m0", "last"),)
    assert parse_schedule(" ;\n; ") == Schedule()


@pytest.mark.parametrize(("text", "usage"), [
    ("split m", "write split LOOP FACTOR -> OUTER INNER"),
    ("split m x -> a b", "write split"),
    ("split m 4 -> a b tail=cut", "tail=mask|peel|overlap"),
    ("split m -4 -> a b", "write split"),
    ("reorder", "write reorder LOOP"),
    ("reorder m, c", "write reorder"),
    ("fuse a b", "write fuse FIRST SECOND -> FUSED"),
    ("unroll", "write unroll LOOP"),
    ("vectorize", "write vectorize"),
    ("parallel a b", "write parallel LOOP"),
    ("stage x at e somewhere", "registers|buffer|window|packed"),
    ("stage x at e window align=h", "align=ENTRY:MULTIPLE"),
    ("layout w", "write layout TENSOR ENTRY ..."),
    ("attach init", "write attach STAGE at LOOP"),
    ("peel m middle", "first|last|guarded|overlap"),
        ("skip x", "write skip TENSOR AXIS"),
    ("tile m 4", "use one of split, reorder, fuse"),
    ("Split m 4 -> a b", "use one of split"),
])
def test_text_that_is_no_step(text: str, usage: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        parse_schedule(f"unroll m; {text}")
    assert caught.value.step == text
    assert usage in caught.value.fix


@pytest.mark.parametrize(("value", "why"), [
    ({"step": "Peel", "loop": "m"}, "is not a schedule"),
    ("peel m", "is not a schedule"),
    (None, "is not a schedule"),
    (["peel m"], "is not a schedule"),
    ([{}], "is not a step"),
    ([{"step": "Tile", "loop": "m"}], "is not a step"),
    ([{"step": "Peel"}], "is not a step"),
    ([{"step": "Peel", "loop": "m", "depth": 2}], "is not a step"),
    ([{"step": "Peel", "loop": "m", "which": "middle"}], "is not a step"),
    ([{"step": "Peel", "loop": 3}], "is not a step"),
    ([{"step": "Parallel", "loop": "m; parallel n"}], "is not a step"),
    ([{"step": "Reorder", "loops": "mc"}], "is not a step"),
    ([{"step": "Reorder", "loops": []}], "is not a step"),
    ([{"step": "Split", "loop": "m", "factor": True, "outer": "a", "inner": "b"}], "is not a step"),
    ([{"step": "Split", "loop": "m", "factor": 2.0, "outer": "a", "inner": "b"}], "is not a step"),
    ([{"step": "StageAt", "tensor": "x", "at": "e", "where": "window", "align": [["h"]]}], "is not a step"),
])
def test_json_that_is_no_schedule(value: object, why: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        Schedule.from_json(value)  # type: ignore[arg-type]
    assert why in caught.value.why
    assert caught.value.fix


def test_apply_names_the_step_that_fails() -> None:
    with pytest.raises(ScheduleError) as caught:
        apply(product(8, 4), parse_schedule("split m 4 -> m0 m1; vectorize m0; unroll m1"))
    assert str(caught.value).splitlines() == [
        "vectorize m0: m0 is not innermost; reorder it to the end first",
        "product",
        "  input x[c < 4]",
        "  weight w[m < 8, c < 4]",
        "  output y[m < 8]",
        "",
        "conv:",
        "  for m0 < 2: for m1 < 4: for c < 4: <--",
        "    y[4 m0 + m1] += x[c] * w[4 m0 + m1, c]",
    ]


def test_apply_leaves_its_argument_alone() -> None:
    program = product(8, 4)
    before = nests(program)
    scheduled = apply(program, parse_schedule("reorder c m; vectorize m"))
    assert nests(program) == before != nests(scheduled)


def test_equal_schedules_have_equal_hashes() -> None:
    one, other = (parse_schedule("split m 4 -> m0 m1; unroll m1") for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert len({one, other, Schedule()}) == 2
