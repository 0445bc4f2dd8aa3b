"""Machine code of a plan, ready to be called: from the object cache, or compiled and put there."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from convsched.kernels import jit, objects
from convsched.kernels.emit.llvm import emit
from convsched.kernels.signature import Interface
from convsched.plan.plan import Plan, ProgramPlan

_StageFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


class Code:
    """The code of a plan: its ``interface``, and in ``stages`` one callable(table of tensor addresses, thread, threads)
    a run stage. It is held by all that calls it: ``addresses`` are valid as long as it lives."""

    def __init__(self, plan: Plan | ProgramPlan) -> None:
        self.plan = plan
        self.interface, self.stages = self._load()

    def _load(self) -> tuple[Interface, tuple[Callable[..., None], ...]]:
        key = objects.object_key(self.plan)
        interface, self._loaded = self._cached(key) or self._compiled(key)
        return interface, tuple(_StageFunction(self._loaded.address(symbol)) for symbol in interface.stages)

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
        interface = Interface.of(self.plan.program)
        code = jit.compile_object(self.llvm, self.plan.target.machine)
        objects.write_entry(key, interface.to_json(), code)
        return interface, jit.link(code, interface.stages)

    @property
    def addresses(self) -> tuple[int, ...]:
        """The address of each stage's function."""
        return tuple(map(self._loaded.address, self.interface.stages))

    @property
    def llvm(self) -> str:
        """The LLVM IR."""
        return emit(self.plan.program, self.plan.target.machine)

    @property
    def assembly(self) -> str:
        """The machine code, as the assembler would read it."""
        return jit.assembly(self.llvm, self.plan.target.machine)
