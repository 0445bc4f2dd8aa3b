"""Kernels of bare programs, such as a nest written by hand: called by the names of their tensors.

A program has any number of inputs, weights and outputs; ``code.interface`` tells them. An array of a tensor has one
axis for each entry of its storage order, so that a tensor "stored n c/16 h w c%16" takes (N, C/16, H, W, 16).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod

import numpy as np

from convsched.errors import LoweringError
from convsched.ir import Program, Tensor, loop_names
from convsched.kernels.run.arrays import check_named, check_outputs
from convsched.kernels.run.bound import Bound
from convsched.kernels.run.code import Code
from convsched.kernels.run.compiled import Compiled
from convsched.plan.plan import ProgramPlan
from convsched.problem.layout import Array

Arrays = Mapping[str, Array]


class ProgramKernel(Compiled[ProgramPlan]):
    """A program's code: ``kernel.bind(w=..., b=...)`` packs weights once, ``kernel(x=..., w=..., b=...)`` at each call.

    Arrays are float32, of the shapes in ``kernel.code.interface``. One output gives an array, several a dict by name;
    ``out`` likewise. Raises ArrayError for arrays that do not fit, LoweringError for a program that has no interface.
    """

    def __init__(self, plan: ProgramPlan, backend: type[Code] = Code) -> None:
        _check(plan.source)
        super().__init__(plan, backend)

    def bind(self, /, **weights: Array) -> BoundProgram:
        """Pack the weights, each by the name of its tensor. Denormals in them become zero."""
        return BoundProgram(self, self.pack(check_named("weight", self.code.interface.weights, weights)))

    def __call__(self, /, *, out: Array | Arrays | None = None, **arrays: Array) -> Array | dict[str, Array]:
        """The outputs for inputs and unbound weights."""
        weights = {name: arrays.pop(name) for name in self.code.interface.weights if name in arrays}
        return self.bind(**weights)(out=out, **arrays)

    def explain(self) -> str:
        """What is compiled: its arrays, the schedule and the nest."""
        interface, lines = self.code.interface, [f"program    {self.plan.source.name}"]
        for kind in ("inputs", "weights", "outputs"):
            shapes = getattr(interface, kind).items()
            lines.append(f"{kind:10} {', '.join(f'{name} {shape}' for name, shape in shapes) or 'none'}")
        lines += [f"machine    {self.plan.target.machine.text}",
                  f"threads    {self.threads}, workspace {self.workspace_bytes / 1024:.0f} KiB",
                  f"schedule   {self.schedule.text or 'none: the loops as they stand'}", "", self.nest]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"ProgramKernel({self.plan.source.name!r}, threads={self.threads})"


class BoundProgram(Bound[ProgramKernel]):
    """A program with its packed weights: ``y = kernel(x=...)``."""

    def __call__(self, /, *, out: Array | Arrays | None = None, **inputs: Array) -> Array | dict[str, Array]:
        """The outputs for the inputs, each by the name of its tensor; written into ``out`` if given.

        Outputs that the nest reads or adds to start as zeros. Safe to call from several threads.
        """
        interface = self.code.interface
        given = check_named("input", interface.inputs, inputs)
        if out is None:
            outputs = {name: np.zeros(shape, np.float32) for name, shape in interface.outputs.items()}
        else:
            outputs = check_outputs(interface.outputs, out, given)
            for name in interface.cleared:
                outputs[name].fill(0)
        self.run({**given, **outputs})
        if len(outputs) == 1:
            (only,) = outputs.values()
            return only
        return outputs

    def __repr__(self) -> str:
        return f"BoundProgram({self.kernel!r})"


def _check(program: Program) -> None:
    """Raises LoweringError for a program whose arrays could not be passed by name, or with names that cannot stand in
    code."""
    if not any(tensor.role == "output" for tensor in program.tensors):
        raise LoweringError(f"program {program.name!r} has no output: give a tensor the role \"output\"")
    for tensor in program.tensors:
        if not _is_name(tensor.name) or tensor.name == "out":
            raise LoweringError(f"program {program.name!r}: a tensor is called {tensor.name!r}; use a name of letters, "
                                'digits, "_" and ".", but not "out", which is the argument for outputs')
        if tensor.role in ("input", "weight", "output") and (why := _unlike_an_array(tensor)):
            raise LoweringError(f"program {program.name!r}: {tensor.role} {tensor.name} {why}")
    for stage in program.stages:
        for kind, name in (("stage", stage.name), *(("loop", name) for name in loop_names(stage.body))):
            if not _is_name(name):
                raise LoweringError(f"program {program.name!r}: a {kind} is called {name!r}; use a name of letters, "
                                    'digits, "_" and "."')
    if not program.name.isprintable() or set(program.name) & set("\"\\"):
        raise LoweringError(f"program {program.name!r}: use a name of one line, without quotes and backslashes")


def _is_name(name: str) -> bool:
    """Whether a name can stand in a nest, a schedule and code."""
    return re.fullmatch(r"[A-Za-z_][\w.]*", name, re.ASCII) is not None


def _unlike_an_array(tensor: Tensor) -> str | None:
    """Why a tensor's storage is not that of an array, and what to do."""
    if tensor.elements != prod(part.size for part in tensor.storage):
        return "is stored with gaps; store it densely, and let a `stage` step copy it"
    if tensor.role == "weight" and tuple(part.axis for part in tensor.storage) != tuple(range(len(tensor.shape))):
        return "is not stored in the order of its axes; store it so, and let a `layout` step pack it"
    return None
