"""A layer's kernel: a plan's code with its buffers; ``bind`` packs weights for it.

``Kernel`` is compiled code for a problem; what ``bind`` gives, a ``BoundKernel``, has the weights too. A call takes the
addresses of x, y and z, fills the table of tensors and runs the stages. Local tensors live in a workspace that the call
borrows from the kernel: concurrent calls get one each, and a warm call allocates nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from convsched.algebra.accuracy import BOUNDS, Prediction
from convsched.kernels.run.arrays import check_weights
from convsched.kernels.run.bound import BoundKernel
from convsched.kernels.run.code import Code
from convsched.kernels.run.compiled import Compiled
from convsched.plan.plan import Plan
from convsched.problem import Problem
from convsched.problem.layout import Array, activation_shape

if TYPE_CHECKING:
    from convsched.recipes.recipe import Recipe


class Kernel(Compiled[Plan]):
    """A layer's plan and its code, for one layout and number of threads.

    ``kernel(x, weight, bias)`` packs the weights at each call; ``kernel.bind(weight, bias)`` packs them
    once. Arrays are float32 in the kernel's layout; weights are (M, C/groups, R, S). Raises ArrayError for
    arrays that do not fit.
    """

    def __init__(self, plan: Plan, backend: type[Code] = Code) -> None:
        super().__init__(plan, backend)
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
    def recipe(self) -> Recipe | None:
        """What made the schedule, if known."""
        return self.plan.recipe

    @property
    def layout(self) -> str:
        """The layout of activations."""
        return self.plan.target.layout

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
        return BoundKernel(self, self.pack(given), (weight, bias))

    def __call__(self, x: Array, weight: Array, bias: Array | None = None, *, out: Array | None = None,
                 residual: Array | None = None) -> Array:
        """The layer's output for unbound weights."""
        return self.bind(weight, bias)(x, out=out, residual=residual)

    def __repr__(self) -> str:
        return f"Kernel({self.problem.text!r}, {self.algorithm}, {self.layout}, threads={self.threads})"
