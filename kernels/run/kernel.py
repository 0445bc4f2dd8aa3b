"""The callable: a plan's code with its buffers, weights packed when they are bound.

``Kernel`` is compiled code for a problem; ``BoundKernel`` adds weights. A call takes the addresses of x, y
and z, fills the table of tensors and runs the stages. Local tensors live in a workspace that the call
borrows from the kernel: concurrent calls get one each, and a warm call allocates nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convsched.algebra.accuracy import BOUNDS, Prediction
from convsched.ir.text import print_nest
from convsched.kernels.run import binding
from convsched.kernels.run.arrays import check_weights
from convsched.kernels.run.bound import BoundKernel
from convsched.kernels.run.code import Code
from convsched.kernels.run.packing import plain
from convsched.machine import host
from convsched.plan.plan import Plan
from convsched.problem import Problem
from convsched.problem.layout import Array, activation_shape
from convsched.schedule import Schedule

if TYPE_CHECKING:
    from convsched.recipes.recipe import Recipe


class Kernel:
    """A plan's code, made by ``backend``: compiled for one problem, layout and number of threads.

    ``kernel(x, weight, bias)`` packs the weights at each call; ``kernel.bind(weight, bias)`` packs them
    once. Arrays are float32 in the kernel's layout; weights are (M, C/groups, R, S). Raises ArrayError for
    arrays that do not fit. A copy, or a kernel read from a pickle, is compiled anew from its plan
    (or comes from the object cache), for the machine that reads it.
    """

    def __init__(self, plan: Plan, backend: type[Code] = Code) -> None:
        self.plan = plan
        self.code = backend(plan)
        self.x_shape = activation_shape(plan.problem.input_shape, plan.target.layout)
        self.y_shape = activation_shape(plan.problem.output_shape, plan.target.layout)

    @property
    def problem(self) -> Problem:
        """The layer."""
        return self.plan.problem

    @property
    def algorithm(self) -> str:
        """The algorithm's full name."""
        return self.plan.algorithm.name

    @property
    def schedule(self) -> Schedule:
        """The schedule."""
        return self.plan.schedule

    @property
    def recipe(self) -> Recipe | None:
        """What made the schedule, if known."""
        return self.plan.recipe

    @property
    def layout(self) -> str:
        """The layout of activations."""
        return self.plan.target.layout

    @property
    def threads(self) -> int:
        """How many threads run a call."""
        return self.plan.target.threads

    @property
    def nest(self) -> str:
        """The scheduled loop nest, as text."""
        return print_nest(self.plan.program)

    @property
    def llvm(self) -> str:
        """The LLVM IR."""
        return self.code.llvm

    @property
    def assembly(self) -> str:
        """The machine code, as the assembler would read it."""
        return self.code.assembly

    @property
    def source(self) -> str:
        """The scheduled nest as Python source that Numba compiles."""
        from convsched.kernels.source.printer import source
        return source(self.plan.program)

    @property
    def workspace_bytes(self) -> int:
        """Memory that a call uses beside its arrays and the packed weights."""
        shared, sizes = self.code.interface.shared, self.code.interface.local_elements
        return 4 * sum(size if name in shared else size * self.threads for name, size in sizes.items())

    @property
    def predicted_error(self) -> Prediction:
        """What to expect of max |error| / rms(output) against exact arithmetic, from the algorithm's matrices, in some
        milliseconds: its ``expected`` is what classes of accuracy bound. Bias, residual and activation add little."""
        return self.plan.algorithm.prediction

    def explain(self) -> str:
        """Why this kernel: the problem, its size, the error to expect, the recipe, the schedule and the nest."""
        p, target, error = self.problem, self.plan.target, self.predicted_error
        lines = [
            f"problem    {p.text}",
            f"work       {p.macs / 1e6:.1f} M multiply-adds, {p.bytes / 1e6:.2f} MB moved at least, "
            f"{p.flops / p.bytes:.1f} flop a byte",
            f"machine    {target.machine.text}",
            f"algorithm  {self.algorithm}, layout {self.layout}, {self.threads} thread{'s' * (self.threads != 1)}, "
            f"workspace {self.workspace_bytes / 1024:.0f} KiB",
            f"error      {error.expected:.1e} of the output's rms expected, {error.adverse:.1e} where one channel "
            f"outweighs all others, {error.worst:.1e} at worst; accuracy "
            f"{target.accuracy} allows {BOUNDS[target.accuracy]:.0e}",
            f"recipe     {self.recipe if self.recipe is not None else self.plan.origin or 'written by hand'}",
            f"schedule   {self.schedule.text or 'none: the loops as they stand'}",
            "", self.nest]
        return "\n".join(lines)

    def bind(self, weight: Array, bias: Array | None = None) -> BoundKernel:
        """Pack the weights: (M, C/groups, R, S) float32, bias (M,). Denormals in the weights become zero."""
        given = check_weights(self.problem, weight, bias)
        interface = self.code.interface
        made = binding.run(interface.bindings, given)
        packed = {name: array for name, array in made.items() if name in interface.names}
        as_given = {n: plain(n, a).run(a) for n, a in given.items() if n in interface.names}
        return BoundKernel(self, {**packed, **as_given}, (weight, bias))

    def __call__(self, x: Array, weight: Array, bias: Array | None = None, *, out: Array | None = None,
                 residual: Array | None = None) -> Array:
        """The layer's output for unbound weights."""
        return self.bind(weight, bias)(x, out=out, residual=residual)

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake, (type(self), self.plan, type(self.code))

    def __repr__(self) -> str:
        return f"Kernel({self.problem.text!r}, {self.algorithm}, {self.layout}, threads={self.threads})"


def _remake(kind: type[Kernel], plan: Plan, backend: type[Code]) -> Kernel:
    """A kernel from what its pickle holds, compiled for this machine."""
    return kind(plan.on(host.machine()), backend)
