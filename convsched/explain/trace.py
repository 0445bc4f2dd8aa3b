"""A compilation told again, stage by stage: problem, algorithm, lowering, each schedule step, simplification,
verification, LLVM's text, machine code; each with what it makes of the nest."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convsched.ir.simplify import simplify
from convsched.ir.text import print_nest
from convsched.ir.verify import verify
from convsched.kernels import jit
from convsched.plan.choice import AccuracyWarning, choices

if TYPE_CHECKING:
    from convsched.kernels.run.kernel import Kernel
    from convsched.plan.plan import Plan

UNCHANGED = "(unchanged)"


@dataclass(frozen=True)
class Stage:
    """One stage of a compilation: its name, and the nest after it, ``UNCHANGED``, or facts."""

    name: str
    text: str

    def __str__(self) -> str:
        return f"== {self.name}\n{self.text}"


def trace(kernel: Kernel) -> Iterator[Stage]:
    """The stages that the kernel's code came through, in their order; all are run again."""
    yield Stage("problem", _problem(kernel))
    yield Stage(f"algorithm {kernel.algorithm}", _algorithms(kernel.plan))
    plan = kernel.plan
    program = plan.algorithm.lower(plan.target.layout)
    nest = print_nest(program)
    yield Stage(f"lower to {plan.target.layout}", nest)
    for name, change in (*((str(step), step.apply) for step in plan.schedule.steps), ("simplify", simplify)):
        program = change(program)
        before, nest = nest, print_nest(program)
        yield Stage(name, nest if nest != before else UNCHANGED)
    verify(program)
    yield Stage("verify", UNCHANGED)
    text = kernel.llvm
    yield Stage("emit LLVM IR", f"{len(text.splitlines())} lines, {len(text)} bytes")
    yield Stage("compile", f"{_instructions(kernel)} instructions, an object file of "
                           f"{len(jit.compile_object(text, plan.target.machine))} bytes")


def _problem(kernel: Kernel) -> str:
    p = kernel.problem
    shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in (
        ("input", p.input_shape), ("weight", p.weight_shape), ("output", p.output_shape)))
    return f"{p.text}\n{shapes}; {p.macs / 1e6:.1f} M multiply-adds, {p.bytes / 1e6:.2f} MB"


def _algorithms(plan: Plan) -> str:
    """Those that fit the class of accuracy with their estimates, the fastest first; the one taken is marked."""
    target = plan.target
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AccuracyWarning)  # said when the kernel was compiled
        found = list(choices(plan.problem, target))
    lines = []
    for one in found:
        products = one.estimate(target.machine, target.layout, target.threads)
        time = f"the time of {products:,.0f} vector FMAs estimated" if math.isfinite(products) else "not estimated"
        mark = "*" if one == plan.algorithm else " "
        lines.append(f"{mark} {one.name}: {time}, error {one.prediction.expected:.1e} of the output's rms")
    schedule = plan.recipe if plan.recipe is not None else plan.origin or "written by hand"
    return "\n".join((*lines, f"{target.text}, schedule: {schedule}"))


def _instructions(kernel: Kernel) -> int:
    """Lines of the assembly that are neither labels nor directives nor comments."""
    return sum(line.startswith("\t") and line.strip()[:1] not in (".", "#", "") for line in
               kernel.assembly.splitlines())
