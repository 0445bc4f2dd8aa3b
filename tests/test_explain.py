"""``convsched explain``: what a layer's kernel is, and the stages it came through."""

from __future__ import annotations

import pytest
from click.testing import CliRunner, Result

import convsched as cs
from convsched.cli.main import main
from convsched.explain.trace import UNCHANGED, trace

LAYER = cs.Conv2d(16, 32, 3, padding=1, input_size=(14, 14))
STEPS = "split m 16 -> m0 m1; reorder m0 m1; unroll s; parallel m0"


def explain(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["explain", *arguments])


def test_a_trace_has_each_stage_with_the_nest_after_it() -> None:
    kernel = cs.compile(LAYER, schedule=STEPS, threads=1)
    stages = list(trace(kernel.plan))
    assert [stage.name for stage in stages] == [
        "problem", "algorithm direct", "lower to nchw", *STEPS.split("; "), "simplify", "verify", "emit LLVM IR",
        "compile"]
    texts = {stage.name: stage.text for stage in stages}
    assert LAYER.text in texts["problem"]
    assert "* direct: the time of " in texts["algorithm direct"]
    assert "  winograd(4,3): " in texts["algorithm direct"]
    assert "for m < 32:" in texts["lower to nchw"]
    assert "for m0 < 2: for m1 < 16:" in texts["split m 16 -> m0 m1"]
    assert texts["reorder m0 m1"] == texts["simplify"] == texts["verify"] == UNCHANGED
    assert texts["parallel m0"] == kernel.nest
    assert texts["emit LLVM IR"].startswith(f"{len(kernel.llvm.splitlines())} lines, ")


@pytest.mark.parametrize("algorithm", ["winograd(2,3)", "im2col", "fft(8)", "strassen(1)"])
@pytest.mark.parametrize("layout", ["nchw", "nchw16c"])
def test_the_last_nest_is_the_kernels(algorithm: str, layout: str) -> None:
    kernel = cs.compile(LAYER, algorithm=algorithm, layout=layout, threads=1)  # type: ignore[call-overload]
    stages = list(trace(kernel.plan))
    nests = [stage.text for stage in stages[2:-2] if stage.text != UNCHANGED]
    assert nests[-1] == kernel.nest
    assert len(stages) == len(kernel.schedule.steps) + 7


def test_the_command() -> None:
    plain = explain(LAYER.text, "--threads", "2", "--schedule", STEPS)
    assert plain.exit_code == 0, plain.output
    assert plain.output == cs.compile(LAYER, threads=2, schedule=STEPS).explain() + "\n"
    traced = explain(LAYER.text, "--trace", "--layout", "nhwc", "--algorithm", "direct", "--accuracy", "strict")
    assert traced.exit_code == 0, traced.output
    heads = [line for line in traced.output.splitlines() if line.startswith("== ")]
    assert heads[:3] == ["== problem", "== algorithm direct", "== lower to nhwc"]
    assert heads[-1] == "== compile"


@pytest.mark.parametrize(("arguments", "message"), [
    (["conv2d c=16"], "conv2d c=16"),
    ([LAYER.text, "--schedule", "split m 5 -> m0 m1"], "Error: split m 5 -> m0 m1: 32 is not a multiple of 5"),
    ([LAYER.text, "--algorithm", "magic"], "Error: algorithm='magic': use one of direct"),
    ([LAYER.text, "--threads", "0"], "0 is not in the range"),
])
def test_what_is_wrong_is_one_message(arguments: list[str], message: str) -> None:
    result = explain(*arguments)
    assert result.exit_code in (1, 2)
    assert message in result.output
    assert "Traceback" not in result.output
