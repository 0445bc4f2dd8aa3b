"""The callable: a compiled program with its buffers, weights packed when they are bound.

``Kernel`` is compiled code for a problem; ``BoundKernel`` adds weights. A call takes the addresses of x, y
and z, fills the table of tensors and runs the stages. Local tensors live in a workspace that the call
borrows from the kernel: concurrent calls get one each, and a warm call allocates nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from convsched.algebra.accuracy import BOUNDS, Prediction
from convsched.ir import Program
from convsched.ir.text import print_nest
from convsched.kernels import jit, objects
from convsched.kernels.emit.llvm import emit
from convsched.kernels.run import binding
from convsched.kernels.run.arrays import check_weights
from convsched.kernels.run.bound import BoundKernel
from convsched.kernels.run.code import _StageFunction
from convsched.kernels.run.packing import plain
from convsched.kernels.signature import Interface
from convsched.lazy import cached_property
from convsched.machine import Machine, host
from convsched.options import Accuracy
from convsched.plan.families import named
from convsched.problem import Problem
from convsched.problem.layout import Array, activation_shape
from convsched.schedule import Schedule, apply, parse_schedule

if TYPE_CHECKING:
    from convsched.recipes.recipe import Recipe


class Kernel:
    """Compiled code for one problem, layout and number of threads.

    ``kernel(x, weight, bias)`` packs the weights at each call; ``kernel.bind(weight, bias)`` packs them
    once. Arrays are float32 in the kernel's layout; weights are (M, C/groups, R, S). Raises ArrayError for
    arrays that do not fit. A copy, or a kernel read from a pickle, is compiled anew from problem and schedule
    (or comes from the object cache), for the machine that reads it. ``recipe`` made the schedule, if known;
    ``origin`` says where another schedule comes from.
    """

    def __init__(self, problem: Problem, schedule: Schedule, *, layout: str, threads: int, machine: Machine,
                 algorithm: str = "direct", recipe: Recipe | None = None, accuracy: Accuracy = "normal",
                 origin: str = "") -> None:
        self.problem = problem
        self.algorithm = algorithm
        self.schedule = schedule
        self.layout = layout
        self.threads = threads
        self.machine = machine
        self.recipe = recipe
        self.accuracy = accuracy
        self.origin = origin
        self.x_shape = activation_shape(problem.input_shape, layout)
        self.y_shape = activation_shape(problem.output_shape, layout)
        self.interface, self.stages = self._load()

    def _load(self) -> tuple[Interface, tuple[Callable[..., None], ...]]:
        """The interface, and one callable(table of tensor addresses, thread, threads) a stage."""
        key = objects.object_key((repr(self.problem), self.algorithm, self.schedule.text, self.layout), self.machine)
        interface, code = self._cached(key) or self._compiled(key)
        self._code = code  # held: the addresses are valid as long as it lives
        self.addresses = tuple(code.address(s) for s in interface.stages)
        return interface, tuple(_StageFunction(address) for address in self.addresses)

    def _cached(self, key: str) -> tuple[Interface, jit.Loaded] | None:
        """From the object cache; None if it holds no entry that makes sense."""
        entry = objects.read_entry(key)
        if entry is None:
            return None
        try:
            interface = Interface.from_json(entry[0])
            return interface, jit.link(entry[1], interface.stages)
        except (KeyError, TypeError, ValueError, RuntimeError):
            return None

    def _compiled(self, key: str) -> tuple[Interface, jit.Loaded]:
        """Compiled, and put into the object cache."""
        interface = Interface.of(self.program)
        code = jit.compile_object(self.llvm, self.machine)
        objects.write_entry(key, interface.to_json(), code)
        return interface, jit.link(code, interface.stages)

    @cached_property
    def program(self) -> Program:
        """The scheduled program."""
        return apply(named(self.algorithm, self.problem).lower(self.layout), self.schedule)

    @property
    def nest(self) -> str:
        """The scheduled loop nest, as text."""
        return print_nest(self.program)

    @property
    def llvm(self) -> str:
        """The LLVM IR."""
        return emit(self.program, self.machine)

    @property
    def assembly(self) -> str:
        """The machine code, as the assembler would read it."""
        return jit.assembly(self.llvm, self.machine)

    @property
    def source(self) -> str:
        """The scheduled nest as Python source that Numba compiles."""
        from convsched.kernels.source.printer import source
        return source(self.program)

    @property
    def workspace_bytes(self) -> int:
        """Memory that a call uses beside its arrays and the packed weights."""
        shared, sizes = self.interface.shared, self.interface.local_elements
        return 4 * sum(size if name in shared else size * self.threads for name, size in sizes.items())

    @property
    def predicted_error(self) -> Prediction:
        """What to expect of max |error| / rms(output) against exact arithmetic, from the algorithm's matrices, in some
        milliseconds: its ``expected`` is what classes of accuracy bound. Bias, residual and activation add little."""
        return named(self.algorithm, self.problem).prediction

    def explain(self) -> str:
        """Why this kernel: the problem, its size, the error to expect, the recipe, the schedule and the nest."""
        p, error = self.problem, self.predicted_error
        lines = [
            f"problem    {p.text}",
            f"work       {p.macs / 1e6:.1f} M multiply-adds, {p.bytes / 1e6:.2f} MB moved at least, "
            f"{p.flops / p.bytes:.1f} flop a byte",
            f"machine    {self.machine.text}",
            f"algorithm  {self.algorithm}, layout {self.layout}, {self.threads} thread{'s' * (self.threads != 1)}, "
            f"workspace {self.workspace_bytes / 1024:.0f} KiB",
            f"error      {error.expected:.1e} of the output's rms expected, {error.adverse:.1e} where one channel "
            f"outweighs all others, {error.worst:.1e} at worst; accuracy "
            f"{self.accuracy} allows {BOUNDS[self.accuracy]:.0e}",
            f"recipe     {self.recipe if self.recipe is not None else self.origin or 'written by hand'}",
            f"schedule   {self.schedule.text or 'none: the loops as they stand'}",
            "", self.nest]
        return "\n".join(lines)

    def bind(self, weight: Array, bias: Array | None = None) -> BoundKernel:
        """Pack the weights: (M, C/groups, R, S) float32, bias (M,). Denormals in the weights become zero."""
        given = check_weights(self.problem, weight, bias)
        made = binding.run(self.interface.bindings, given)
        packed = {name: array for name, array in made.items() if name in self.interface.names}
        as_given = {n: plain(n, a).run(a) for n, a in given.items() if n in self.interface.names}
        return BoundKernel(self, {**packed, **as_given}, (weight, bias))

    def __call__(self, x: Array, weight: Array, bias: Array | None = None, *, out: Array | None = None,
                 residual: Array | None = None) -> Array:
        """The layer's output for unbound weights."""
        return self.bind(weight, bias)(x, out=out, residual=residual)

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake, (type(self), self.problem, self.schedule.text, self.layout, self.threads, self.algorithm,
                         self.recipe, self.accuracy, self.origin)

    def __repr__(self) -> str:
        return f"Kernel({self.problem.text!r}, {self.algorithm}, {self.layout}, threads={self.threads})"


def _remake(kind: type[Kernel], problem: Problem, schedule: str, layout: str, threads: int,
            algorithm: str, recipe: Recipe | None, accuracy: Accuracy, origin: str) -> Kernel:
    """A kernel from what its pickle holds, compiled for this machine."""
    return kind(problem, parse_schedule(schedule), layout=layout, threads=threads, machine=host.machine(),
                algorithm=algorithm, recipe=recipe, accuracy=accuracy, origin=origin)
