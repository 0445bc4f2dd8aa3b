"""What all kernels share: a plan's code, its texts, and how weights are packed for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from convsched.ir.text import print_nest
from convsched.kernels.run import binding
from convsched.kernels.run.code import Code
from convsched.kernels.run.packing import plain
from convsched.machine import host
from convsched.plan.plan import Plan, ProgramPlan
from convsched.problem.layout import Array
from convsched.schedule import Schedule

P = TypeVar("P", bound=Plan | ProgramPlan)


class Compiled(Generic[P]):
    """A plan and its code, which ``backend`` makes.

    A copy, or one read from a pickle, is compiled anew from its plan (or comes from the object cache), for the machine
    that reads it.
    """

    def __init__(self, plan: P, backend: type[Code] = Code) -> None:
        self.plan = plan
        self.code = backend(plan)

    @property
    def schedule(self) -> Schedule:
        """The schedule."""
        return self.plan.schedule

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

    def pack(self, weights: Mapping[str, Array]) -> dict[str, Array]:
        """What a call reads of the weights, given by the names of their tensors: transformed, in the order of use, or
        as they are; aligned, and denormals made zero."""
        interface = self.code.interface
        made = binding.run(interface.bindings, weights)
        made |= {name: plain(name, array).run(array) for name, array in weights.items() if name in interface.names}
        return {name: array for name, array in made.items() if name in interface.names}

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake, (type(self), self.plan, type(self.code))


def _remake(kind: Callable[[Any, type[Code]], Compiled[Any]], plan: Plan | ProgramPlan,
            backend: type[Code]) -> Compiled[Any]:
    """A kernel from what its pickle holds, compiled for this machine."""
    return kind(plan.on(host.machine()), backend)
