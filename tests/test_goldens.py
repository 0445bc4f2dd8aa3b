"""Goldens: the default nests of some layers, and a digest of the code generated for them.

A refactor that changes what is generated shows here. ``pytest tests/test_goldens.py --update-goldens``
rewrites them; read the diff of the nests before committing it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from convsched.analytic import default_recipe
from convsched.kernels.llvm import emit
from convsched.lower.direct import lower_direct
from convsched.machine import Isa, Machine
from convsched.problem import Conv2d, Linear, Problem
from convsched.schedule import apply
from convsched.text import print_nest

FOLDER = Path(__file__).parent / "goldens"
DIGESTS = FOLDER / "digests.json"
CASES: dict[str, tuple[Problem, Isa, str]] = {
    "conv3x3-avx512": (Conv2d(256, 256, 3, padding=1, input_size=14, activation="relu"), "avx512", "nchw"),
    "conv3x3-blocked-avx512": (Conv2d(256, 256, 3, padding=1, input_size=14), "avx512", "nchw16c"),
    "conv3x3-avx2": (Conv2d(64, 64, 3, padding=1, input_size=28, activation="relu"), "avx2", "nchw"),
    "conv1x1-avx512": (Conv2d(256, 512, 1, input_size=28, bias=False, residual=True), "avx512", "nchw"),
    "depthwise-avx512": (Conv2d(96, 96, 3, padding=1, groups=96, input_size=28), "avx512", "nchw"),
    "depthwise-nhwc-avx512": (Conv2d(96, 96, 3, padding=1, groups=96, input_size=28), "avx512", "nhwc"),
    "grouped-avx512": (Conv2d(240, 60, 3, padding=1, groups=3, input_size=28), "avx512", "nchw"),
    "stem7x7-avx512": (Conv2d(3, 64, 7, stride=2, padding=3, input_size=112), "avx512", "nchw"),
    "linear-avx512": (Linear(512, 1000), "avx512", "nchw"),
}


def nest(name: str) -> tuple[str, str]:
    """The schedule with its nest, and the digest of the generated code."""
    problem, isa, layout = CASES[name]
    machine = Machine.example(isa)
    schedule = default_recipe(problem, machine, layout).schedule(problem, layout)
    program = apply(lower_direct(problem, layout), schedule)
    steps = "\n".join(schedule.text.split("; "))
    code = emit(program, machine)
    assert code == emit(apply(lower_direct(problem, layout), schedule), machine)
    return f"{steps}\n\n{print_nest(program)}\n", hashlib.sha256(code.encode()).hexdigest()


@pytest.mark.parametrize("name", CASES)
def test_nest_and_code_are_as_recorded(name: str, update_goldens: bool) -> None:
    text, digest = nest(name)
    digests = json.loads(DIGESTS.read_text()) if DIGESTS.exists() else {}
    path = FOLDER / f"{name}.txt"
    if update_goldens:
        kept = {n: digests[n] for n in CASES if n in digests}
        path.write_text(text)
        DIGESTS.write_text(json.dumps({**kept, name: digest}, indent=1, sort_keys=True) + "\n")
        return
    assert path.exists(), f"{name} has no golden; run pytest tests/test_goldens.py --update-goldens"
    assert text == path.read_text()
    assert digest == digests.get(name), f"{name}: the nest is the same, but its code is not"


def test_every_golden_has_a_case() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(CASES)
    assert set(json.loads(DIGESTS.read_text())) == set(CASES)
