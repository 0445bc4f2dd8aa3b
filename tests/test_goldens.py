"""Goldens: the nests of small layers by all algorithms, and digests of the code generated for them.

A refactor that changes what is generated shows here. ``pytest tests/test_goldens.py --update-goldens``
rewrites them; read the diff of the nests before committing it. Of a nest with more than ``LONGEST`` lines only the
digest is kept. Machines are described, so the goldens are the same wherever the tests run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from convsched.ir import Program
from convsched.ir.text import print_nest
from convsched.kernels.emit.llvm import emit
from convsched.machine import Isa, Machine
from convsched.plan.families import FAMILIES, named
from convsched.problem import Conv2d, Linear, Problem
from convsched.schedule import Schedule, apply

FOLDER = Path(__file__).parent / "goldens"
DIGESTS = FOLDER / "digests.json"
LONGEST = 150  # lines of a nest that is kept as text


@dataclass(frozen=True)
class Case:
    """A layer and how it is computed: the default recipe of an algorithm, with some parameters replaced."""

    problem: Problem
    isa: Isa = "avx512"
    layout: str = "nchw"
    algorithm: str = "direct"
    changed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def machine(self) -> Machine:
        """What the code is generated for, on any host."""
        return Machine.example(self.isa)

    def schedule(self) -> Schedule:
        """The recipe's steps."""
        recipe = named(self.algorithm, self.problem).default(self.machine, self.layout, 1)
        return replace(recipe, **self.changed).schedule(self.problem, self.layout)

    def program(self, schedule: Schedule) -> Program:
        """The scheduled nest, lowered anew."""
        return apply(named(self.algorithm, self.problem).lower(self.layout), schedule)


SQUARE = Conv2d(16, 32, 3, padding=1, input_size=8)
RAGGED = Conv2d(12, 20, 3, padding=1, input_size=(9, 10), batch_size=2, bias=False, activation="relu", residual=True)
STRIDED = Conv2d(16, 32, 3, 2, padding=1, input_size=14, activation="relu")
DILATED = Conv2d(16, 16, 3, padding=2, dilation=2, input_size=14)
GROUPED = Conv2d(32, 32, 3, padding=1, groups=2, input_size=8)
DEPTHWISE = Conv2d(32, 32, 3, padding=1, groups=32, input_size=14, activation="relu")
DEPTHWISE_S2 = Conv2d(32, 32, 3, 2, padding=1, groups=32, input_size=14, activation="relu")
POINTWISE = Conv2d(64, 64, 1, input_size=8, bias=False, residual=True)
CASES: dict[str, Case] = {
    # direct
    "conv3x3-avx512": Case(Conv2d(256, 256, 3, padding=1, input_size=14, activation="relu")),
    "conv3x3-blocked-avx512": Case(Conv2d(256, 256, 3, padding=1, input_size=14), layout="nchw16c"),
    "conv3x3-avx2": Case(Conv2d(64, 64, 3, padding=1, input_size=28, activation="relu"), "avx2"),
    "conv1x1-avx512": Case(Conv2d(256, 512, 1, input_size=28, bias=False, residual=True)),
    "depthwise-avx512": Case(Conv2d(96, 96, 3, padding=1, groups=96, input_size=28)),
    "depthwise-nhwc-avx512": Case(Conv2d(96, 96, 3, padding=1, groups=96, input_size=28), layout="nhwc"),
    "grouped-avx512": Case(Conv2d(240, 60, 3, padding=1, groups=3, input_size=28)),
    "stem7x7-avx512": Case(Conv2d(3, 64, 7, stride=2, padding=3, input_size=112)),
    "linear-avx512": Case(Linear(512, 1000)),
    "direct-ragged-nchw-avx512": Case(RAGGED),
    "direct-ragged-nhwc-avx512": Case(RAGGED, layout="nhwc"),
    "direct-ragged-blocked-avx2": Case(RAGGED, "avx2", "nchw16c"),
    "direct-skip-nhwc-avx512": Case(SQUARE, layout="nhwc", changed={"pack": "none", "skip": "hw"}),
    "direct-overlap-avx512": Case(
        Conv2d(16, 32, 3, input_size=10), changed={"tail": "overlap", "pixels": 5, "prefetch": 4}),
    "direct-strided-nchw-avx512": Case(STRIDED),
    "direct-strided-nhwc-avx2": Case(STRIDED, "avx2", "nhwc"),
    "direct-strided-blocked-avx512": Case(STRIDED, layout="nchw16c"),
    "direct-dilated-avx512": Case(DILATED),
    "direct-1x1-strided-nhwc-avx512": Case(Conv2d(32, 32, 1, 2, input_size=14), layout="nhwc"),
    "direct-few-maps-avx512": Case(Conv2d(32, 6, 3, padding=1, groups=2, input_size=14)),
    "direct-stem3x3-nhwc-avx2": Case(Conv2d(3, 32, 3, 2, padding=1, input_size=28, activation="relu"), "avx2", "nhwc"),
    "depthwise-strided-avx512": Case(DEPTHWISE_S2),
    "depthwise-strided-avx2": Case(DEPTHWISE_S2, "avx2"),
    "depthwise-strided-blocked-avx512": Case(DEPTHWISE_S2, layout="nchw16c"),
    "depthwise-blocked-avx2": Case(DEPTHWISE, "avx2", "nchw16c"),
    "linear-batch-avx2": Case(Linear(60, 50, batch_size=7, activation="relu"), "avx2"),
    # im2col: the whole matrix, one of each block of rows, none
    "im2col-whole-avx512": Case(SQUARE, algorithm="im2col", changed={"indirect": False, "block": 8}),
    "im2col-blocks-nhwc-avx512": Case(
        STRIDED, layout="nhwc", algorithm="im2col", changed={"indirect": False, "block": 1}),
    "im2col-indirect-avx512": Case(SQUARE, algorithm="im2col", changed={"indirect": True, "prefetch": 4}),
    "im2col-indirect-blocked-avx2": Case(GROUPED, "avx2", "nchw16c", "im2col", {"indirect": True, "block": 4}),
    # Winograd along both sides, along one, mixed
    "winograd23-avx512": Case(SQUARE, algorithm="winograd(2,3)"),
    "winograd23-ragged-blocked-avx2": Case(RAGGED, "avx2", "nchw16c", "winograd(2,3)"),
    "winograd43-avx512": Case(SQUARE, algorithm="winograd(4,3)"),
    "winograd43-lines-nhwc-avx512": Case(
        SQUARE, layout="nhwc", algorithm="winograd(4,3)", changed={"by_lines": True, "prefetch": 2}),
    "winograd25-avx512": Case(Conv2d(16, 16, 5, padding=2, input_size=10), algorithm="winograd(2,5)"),
    "winograd-row-avx512": Case(
        Conv2d(16, 32, (1, 3), padding=(0, 1), input_size=12, activation="relu"), algorithm="winograd(4,3)"),
    "winograd-column-nhwc-avx2": Case(
        Conv2d(16, 16, (5, 1), padding=(2, 0), input_size=12), "avx2", "nhwc", "winograd(2,5)"),
    "winograd-mixed-avx512": Case(
        Conv2d(16, 16, (3, 5), padding=(1, 2), input_size=12), algorithm="winograd(4,3)x(2,5)"),
    "winograd-strided-avx512": Case(STRIDED, algorithm="winograd(2,3)"),
    "winograd-dilated-avx512": Case(DILATED, algorithm="winograd(2,3)"),
    "winograd-grouped-blocked-avx512": Case(GROUPED, layout="nchw16c", algorithm="winograd(4,3)"),
    # FFT: a plane, a line, a folded plane
    "fft8-avx512": Case(SQUARE, algorithm="fft(8)"),
    "fft8-ragged-nhwc-avx2": Case(RAGGED, "avx2", "nhwc", "fft(8)"),
    "fft16-row-avx512": Case(Conv2d(16, 16, (1, 7), padding=(0, 3), input_size=14), algorithm="fft(16)"),
    "fft-folded-avx512": Case(Conv2d(16, 16, (1, 40), padding=(0, 20), input_size=(2, 48)), algorithm="fft(8)x(16)"),
    # Strassen: one and two levels
    "strassen1-1x1-avx512": Case(POINTWISE, algorithm="strassen(1)"),
    "strassen2-1x1-nhwc-avx512": Case(POINTWISE, layout="nhwc", algorithm="strassen(2)"),
    "strassen1-3x3-blocked-avx512": Case(SQUARE, layout="nchw16c", algorithm="strassen(1)"),
    "strassen2-3x3-avx2": Case(Conv2d(32, 32, 3, padding=1, input_size=8, activation="relu"), "avx2",
                               algorithm="strassen(2)"),
    "strassen1-linear-avx512": Case(Linear(64, 64, batch_size=8), algorithm="strassen(1)"),
    "strassen2-linear-avx2": Case(Linear(64, 48, batch_size=12, activation="relu"), "avx2", algorithm="strassen(2)"),
}


def generated(name: str) -> tuple[str, dict[str, str]]:
    """The schedule with its nest, and the digests of both and of the generated code."""
    case = CASES[name]
    schedule = case.schedule()
    program = case.program(schedule)
    text = "\n".join(schedule.text.split("; ")) + f"\n\n{print_nest(program)}\n"
    return text, {"nest": digest(text), "code": digest(emit(program, case.machine))}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def recorded() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = json.loads(DIGESTS.read_text()) if DIGESTS.exists() else {}
    return found


@pytest.mark.parametrize("name", CASES)
def test_nest_and_code_are_as_recorded(name: str, update_goldens: bool) -> None:
    text, digests = generated(name)
    known, path = recorded(), FOLDER / f"{name}.txt"
    if update_goldens:
        kept = {n: known[n] for n in CASES if n in known}
        DIGESTS.write_text(json.dumps({**kept, name: digests}, indent=1, sort_keys=True) + "\n")
        path.write_text(text) if text.count("\n") <= LONGEST else path.unlink(missing_ok=True)
        return
    assert name in known, f"{name} has no golden; run pytest tests/test_goldens.py --update-goldens"
    if path.exists():
        assert text == path.read_text()
    assert digests["nest"] == known[name]["nest"], f"{name}: the nest, {text.count(chr(10))} lines, is not as recorded"
    assert digests["code"] == known[name]["code"], f"{name}: the nest is the same, but its code is not"


@pytest.mark.parametrize("name", ["conv3x3-avx2", "winograd23-avx512", "strassen1-1x1-avx512"])
def test_the_same_program_gives_the_same_code(name: str) -> None:
    case = CASES[name]
    assert emit(case.program(case.schedule()), case.machine) == emit(case.program(case.schedule()), case.machine)


def test_every_golden_has_a_case() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} <= set(CASES)
    assert set(recorded()) == set(CASES)


def test_there_are_goldens_of_every_family() -> None:
    assert {case.algorithm.split("(")[0] for case in CASES.values()} >= set(FAMILIES) - {"nested"}
    assert {case.layout for case in CASES.values()} == {"nchw", "nhwc", "nchw16c"}
