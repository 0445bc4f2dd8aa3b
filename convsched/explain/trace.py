"""A compilation told again, stage by stage: problem, algorithm, lowering, each schedule step, simplification,
verification, LLVM's text, machine code; each with what it makes of the nest."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from convsched.ir.simplify import simplify
from convsched.ir.text import print_nest
from convsched.ir.verify import verify
from convsched.kernels import jit
from convsched.kernels.emit.llvm import emit
from convsched.plan.choice import AccuracyWarning, choices
from convsched.plan.plan import Plan
from convsched.problem import Problem

UNCHANGED = "(unchanged)"


@dataclass(frozen=True)
class Stage:
    """One stage of a compilation: its name, and the nest after it, ``UNCHANGED``, or facts."""

    name: str
    text: str

    def __str__(self) -> str:
        return f"== {self.name}\n{self.text}"


def trace(plan: Plan) -> Iterator[Stage]:
    """The stages from the plan's problem to its code, in their order; all are run again."""
    target = plan.target
    yield Stage("problem", _problem(plan.problem))
    yield Stage(f"algorithm {plan.algorithm.name}", _algorithms(plan))
    program = plan.algorithm.lower(target.layout)
    nest = print_nest(program)
    yield Stage(f"lower to {target.layout}", nest)
    for name, change in (*((str(step), step.apply) for step in plan.schedule.steps), ("simplify", simplify)):
        program = change(program)
        before, nest = nest, print_nest(program)
        yield Stage(name, nest if nest != before else UNCHANGED)
    verify(program)
    yield Stage("verify", UNCHANGED)
    text = emit(program, target.machine)
    yield Stage("emit LLVM IR", f"{len(text.splitlines())} lines, {len(text)} bytes")
    instructions = _instructions(jit.assembly(text, target.machine))
    size = len(jit.compile_object(text, target.machine))
    yield Stage("compile", f"{instructions} instructions, an object file of {size} bytes")


def _problem(p: Problem) -> str:
    shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in (
        ("input", p.input_shape), ("weight", p.weight_shape), ("output", p.output_shape)))
    return f"{p.text}\n{shapes}; {p.macs / 1e6:.1f} M multiply-adds, {p.bytes / 1e6:.2f} MB"


def _algorithms(plan: Plan) -> str:
    """Those that fit the class of accuracy with their estimates, the fastest first; the one taken is marked."""
    target = plan.target
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AccuracyWarning)  # said when the plan was made
        found = list(choices(plan.problem, target))
    lines = []
    for one in found:
        products = one.estimate(target.machine, target.layout, target.threads)
        time = f"the time of {products:,.0f} vector FMAs estimated" if math.isfinite(products) else "not estimated"
        mark = "*" if one.name == plan.algorithm.name else " "
        lines.append(f"{mark} {one.name}: {time}, error {one.prediction.expected:.1e} of the output's rms")
    schedule = plan.recipe if plan.recipe is not None else plan.origin or "written by hand"
    return "\n".join((*lines, f"target: {target.text}; schedule: {schedule}"))


def _instructions(assembly: str) -> int:
    """Lines that are neither labels nor directives nor comments."""
    return sum(line.startswith("\t") and line.strip()[:1] not in (".", "#", "") for line in assembly.splitlines())
