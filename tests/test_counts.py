"""The model's counts of instructions against the machine code of twenty kernels: what it counts is what is written.

Whole functions are counted, the body of each run-time loop once. The code generator moves loads out of loops, folds and
repeats some: hence the tolerances.
"""

import re
from dataclasses import dataclass

import pytest

from convsched.ir import Program
from convsched.kernels import jit
from convsched.kernels.emit.llvm import emit
from convsched.machine import Isa, Machine, host
from convsched.model.issue import Code, Issue
from convsched.plan.families import named
from convsched.problem import Conv2d, Linear, Problem
from convsched.schedule import apply

pytestmark = pytest.mark.skipif(host.machine().isa not in ("avx512", "avx2", "sse"), reason="not an x86-64")

KERNELS: dict[str, tuple[Problem, str, str]] = {
    "3x3": (Conv2d(64, 64, 3, padding=1, input_size=14), "nchw", "direct"),
    "3x3 nhwc": (Conv2d(64, 64, 3, padding=1, input_size=14), "nhwc", "direct"),
    "3x3 blocked": (Conv2d(64, 64, 3, padding=1, input_size=14), "nchw16c", "direct"),
    "1x1": (Conv2d(64, 128, 1, input_size=28), "nchw", "direct"),
    "1x1 nhwc": (Conv2d(64, 128, 1, input_size=28), "nhwc", "direct"),
    "depthwise": (Conv2d(32, 32, 3, padding=1, groups=32, input_size=32), "nchw", "direct"),
    "depthwise stride 2": (Conv2d(32, 32, 3, stride=2, groups=32, input_size=33), "nchw", "direct"),
    "depthwise nhwc": (Conv2d(32, 32, 3, groups=32, input_size=16), "nhwc", "direct"),
    "linear": (Linear(256, 128), "nchw", "direct"),
    "winograd": (Conv2d(32, 32, 3, padding=1, input_size=28), "nhwc", "winograd(2,3)"),
}


@dataclass(frozen=True)
class Counts:
    """Vector instructions: sums and products, loads (also as operands) and shuffles."""

    arithmetic: float
    loads: float
    shuffles: float


def in_machine_code(program: Program, machine: Machine) -> Counts:
    """What the assembly has; constants and spills are not loads of data."""
    arithmetic = loads = shuffles = 0
    for line in jit.assembly(emit(program, machine), machine).splitlines():
        match = re.match(r"\s+(v\w+)\s+(.*)", line.split("#")[0])
        if match is None:
            continue
        name, operands = match[1], re.split(r", (?![^(]*\))", match[2].strip())
        arithmetic += bool(re.match(r"v(fn?m(add|sub)|add|sub|mul|max|min)", name))
        shuffles += bool(re.match(r"v(unpck|shuf|perm|insert|extract|blend|movddup|movlh|movhl)", name))
        memory = [at for at in operands[:-1] if "(" in at]
        loads += bool(memory) and "%rsp" not in memory[0] and "%rip" not in memory[0]
    return Counts(arithmetic, loads, shuffles)


def in_model(program: Program, machine: Machine) -> Counts:
    total = Code()
    issue = Issue(program, machine.lanes, 1.0)
    for stage in program.stages:
        if stage.when == "run":
            total.add(issue.written(stage.body))
    return Counts(total.arithmetic, total.loads, total.shuffles + total.square_shuffles)


@pytest.mark.parametrize("isa", ["avx512", "avx2"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_model_counts_what_is_written(kernel: str, isa: Isa) -> None:
    problem, layout, name = KERNELS[kernel]
    machine = Machine.example(isa)
    algorithm = named(name, problem)
    program = apply(algorithm.lower(layout), algorithm.default(machine, layout, 1).schedule(problem, layout))
    counted, written = in_model(program, machine), in_machine_code(program, machine)
    assert counted.arithmetic == pytest.approx(written.arithmetic, rel=0.13)
    assert counted.loads == pytest.approx(written.loads, rel=0.25)
    assert counted.shuffles == pytest.approx(written.shuffles, rel=0.25)
