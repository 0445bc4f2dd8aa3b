"""The callable: a compiled program with its buffers, weights packed when they are bound.

``Kernel`` is compiled code for a problem; ``BoundKernel`` adds weights. A call takes the addresses of x, y
and z, fills the table of tensors and runs the stages. Local tensors live in a workspace that the call
borrows from the kernel: concurrent calls get one each, and a warm call allocates nothing.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from convsched.accuracy import BOUNDS, Prediction
from convsched.algorithms import named
from convsched.errors import ArrayError
from convsched.ir import Program, leaves
from convsched.kernels import binding, jit
from convsched.kernels.arrays import (
    Array,
    activation_shape,
    check_input,
    check_output,
    check_weights,
    clear_tail,
    from_layout,
)
from convsched.kernels.llvm import arguments, emit, names, symbols
from convsched.kernels.packing import aligned_zeros, plain
from convsched.kernels.pool import run_all
from convsched.lazy import cached_property
from convsched.machine import Machine
from convsched.names import Accuracy
from convsched.problem import Problem
from convsched.reference import convolve
from convsched.schedule import Schedule, apply, parse_schedule
from convsched.text import print_nest

if TYPE_CHECKING:
    from convsched.recipes import Recipe

_StageFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


@dataclass(frozen=True)
class Interface:
    """What a caller must know of compiled code: its tensors, its stages and how weights are packed.

    ``local_elements`` are the sizes of local tensors; those in ``shared`` carry values from stage to stage
    and are one for all threads, the others are private to a thread.
    """

    names: tuple[str, ...]
    local_elements: Mapping[str, int]
    stages: tuple[str, ...]
    is_parallel: tuple[bool, ...]
    shared: frozenset[str]
    bindings: tuple[binding.Binding, ...]

    @staticmethod
    def of(program: Program) -> Interface:
        """The interface of a scheduled program."""
        tensors = arguments(program)
        bound = binding.bindings(program)
        packed = binding.targets(bound)
        run = [s for s in program.stages if s.when == "run"]
        parallel = [any(lp.kind == "parallel" for around, _ in leaves(s.body) for lp in around) for s in run]
        touched = [{n for _, leaf in leaves(s.body) for n in names(leaf)} for s in run]
        local = {t.name: t.elements for t in tensors if t.role == "local" and t.name not in packed}
        crossing = {n for n in local if sum(n in used for used in touched) > 1}
        return Interface(tuple(t.name for t in tensors), local, symbols(program), tuple(parallel),
                         frozenset(crossing), bound)

    def to_json(self) -> dict[str, Any]:
        """A JSON value; ``from_json`` is its inverse."""
        return {"names": self.names, "local": self.local_elements, "stages": self.stages,
                "parallel": self.is_parallel, "shared": sorted(self.shared),
                "bindings": [bound.to_json() for bound in self.bindings]}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Interface:
        """The interface of a JSON value."""
        return Interface(tuple(value["names"]), dict(value["local"]), tuple(value["stages"]),
                         tuple(value["parallel"]), frozenset(value["shared"]),
                         tuple(binding.from_json(b) for b in value["bindings"]))


class Workspace:
    """Local tensors of one call, and the table of tensor addresses of each thread."""

    def __init__(self, interface: Interface, threads: int) -> None:
        shared = {n: aligned_zeros(interface.local_elements[n]) for n in interface.shared}
        self.buffers = [shared]
        self.tables: list[Any] = []
        for _ in range(threads):
            own = {n: aligned_zeros(size) for n, size in interface.local_elements.items() if n not in shared}
            self.buffers.append(own)
            locals_ = {**shared, **own}
            self.tables.append((ctypes.c_void_p * len(interface.names))(
                *(locals_[n].ctypes.data if n in locals_ else None for n in interface.names)))


class Native(NamedTuple):
    """A bound kernel as plain data, for ``convsched.call`` inside ``@numba.njit`` functions.

    It holds addresses of this process, and only its own ``table`` keeps what they point to alive: it cannot be
    copied or pickled.
    """

    stages: Any
    table: Any
    x_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    x_slot: int
    y_slot: int
    z_slot: int
    last_block: int  # channels in the last block of a blocked output

    def __reduce__(self) -> NoReturn:
        raise TypeError("native holds addresses of this process; copy or pickle the bound kernel, "
                        "and take the copy's native")


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
        key = jit.object_key((repr(self.problem), self.algorithm, self.schedule.text, self.layout), self.machine)
        interface, code = self._cached(key) or self._compiled(key)
        self._code = code  # held: the addresses are valid as long as it lives
        self.addresses = tuple(code.address(s) for s in interface.stages)
        return interface, tuple(_StageFunction(address) for address in self.addresses)

    def _cached(self, key: str) -> tuple[Interface, jit.Loaded] | None:
        """From the object cache; None if it holds no entry that makes sense."""
        entry = jit.read_entry(key)
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
        jit.write_entry(key, interface.to_json(), code)
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
        from convsched.kernels.source import source
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


class BoundKernel:
    """A kernel with its packed ``weights``: ``y = conv(x)``, ``conv(x, out=y)``, ``conv(x, residual=r)``.

    It also refers to the arrays that were bound, ``given``, for ``measured_error``. Copies and pickles hold the
    packed weights only, and the kernel as its own copies do.
    """

    def __init__(self, kernel: Kernel, weights: Mapping[str, Array],
                 given: tuple[Array, Array | None] | None = None) -> None:
        self.kernel = kernel
        self.weights = weights
        self.given = given
        self._slots = {n: i for i, n in enumerate(kernel.interface.names)}
        self._idle: list[Workspace] = []

    def __call__(self, x: Array, *, out: Array | None = None, residual: Array | None = None) -> Array:
        """The layer's output for ``x``; written into ``out`` if given. Safe to call from several threads."""
        kernel, problem = self.kernel, self.kernel.problem
        inputs = {"x": check_input("x", x, kernel.x_shape)}
        if problem.residual:
            if residual is None:
                raise ArrayError(f"residual is missing; the layer has residual=True: give {kernel.y_shape}")
            inputs["residual"] = check_input("residual", residual, kernel.y_shape)
        elif residual is not None:
            raise ArrayError("residual is given but the layer has residual=False")
        y = np.empty(kernel.y_shape, np.float32) if out is None else check_output(out, kernel.y_shape, inputs)
        workspace = self._borrow()
        try:
            self._run(workspace, inputs, y)
        finally:
            self._idle.append(workspace)
        clear_tail(problem, kernel.layout, y)
        return y

    def measured_error(self, x: Array, residual: Array | None = None) -> float:
        """max |error| / rms(output) of a call on data of your own, against float64; compare ``predicted_error``.

        Arrays are as for a call. The truth is that of the weights and bias as they are now in the arrays given to
        ``bind``, which must not have changed since; it takes a slow, float64 convolution. Raises ArrayError for a
        copy or an unpickled kernel, which has no such arrays. nan where data or outputs are not finite.
        """
        if self.given is None:
            raise ArrayError("measured_error: a copy or an unpickled kernel holds packed weights only; bind the "
                             "weights again: conv.kernel.bind(weight, bias)")
        kernel, problem = self.kernel, self.kernel.problem
        y = from_layout(self(x, residual=residual), problem.output_shape, kernel.layout)
        known = None if residual is None else from_layout(residual, problem.output_shape, kernel.layout)
        truth = convolve(problem, from_layout(x, problem.input_shape, kernel.layout), *self.given, known)
        with np.errstate(invalid="ignore"):
            error, rms = float(np.abs(y - truth).max()), float(np.sqrt(np.mean(np.square(truth))))
        return error / rms if rms else error and inf

    def _borrow(self) -> Workspace:
        """An idle workspace, else a new one; ``pop`` is atomic, so that of two threads each gets its own."""
        try:
            return self._idle.pop()
        except IndexError:
            return self._workspace(self.kernel.threads)

    def _workspace(self, threads: int) -> Workspace:
        """A workspace whose tables hold the weights; x, y and z are still to be set."""
        workspace = Workspace(self.kernel.interface, threads)
        for table in workspace.tables:
            for name, array in self.weights.items():
                table[self._slots[name]] = array.ctypes.data
        return workspace

    def _run(self, workspace: Workspace, inputs: Mapping[str, Array], y: Array) -> None:
        slots, threads = self._slots, self.kernel.threads
        for table in workspace.tables:
            table[slots["x"]] = inputs["x"].ctypes.data
            table[slots["y"]] = y.ctypes.data
            if "residual" in inputs:
                table[slots["z"]] = inputs["residual"].ctypes.data
        for function, parallel in zip(self.kernel.stages, self.kernel.interface.is_parallel, strict=True):
            if threads == 1 or not parallel:
                function(workspace.tables[0], 0, 1)
            else:
                run_all([partial(function, table, i, threads) for i, table in enumerate(workspace.tables)])

    @property
    def native(self) -> Native:
        """Addresses and shapes for ``convsched.call(conv.native, x, y)`` in ``@numba.njit`` code.

        Each has a workspace of its own, for one caller at a time; its table keeps code and weights alive.
        """
        workspace = self._workspace(1)
        table = np.array([address or 0 for address in workspace.tables[0]], np.int64)
        weakref.finalize(table, _release, (self, workspace))
        stages = np.array(self.kernel.addresses, np.int64)
        return Native(stages, table, self.kernel.x_shape, self.kernel.y_shape, self._slots["x"],
                      self._slots["y"], self._slots.get("z", -1), (self.kernel.problem.M - 1) % 16 + 1)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebind, (type(self), self.kernel, self.kernel.interface.bindings, self.weights)

    def __repr__(self) -> str:
        return f"BoundKernel({self.kernel!r})"


def _remake(kind: type[Kernel], problem: Problem, schedule: str, layout: str, threads: int,
            algorithm: str, recipe: Recipe | None, accuracy: Accuracy, origin: str) -> Kernel:
    """A kernel from what its pickle holds, compiled for this machine."""
    return kind(problem, parse_schedule(schedule), layout=layout, threads=threads, machine=Machine.host(),
                algorithm=algorithm, recipe=recipe, accuracy=accuracy, origin=origin)


def _rebind(kind: type[BoundKernel], kernel: Kernel, packing: tuple[binding.Binding, ...],
            weights: Mapping[str, Array]) -> BoundKernel:
    """A bound kernel from what its pickle holds; unpickled arrays are not aligned."""
    if kernel.interface.bindings != packing:
        raise ArrayError("the weights were packed by another version of convsched; bind them again")
    return kind(kernel, {name: plain(name, packed).run(packed) for name, packed in weights.items()})


def _release(held: object) -> None:
    """What a native table kept alive goes with it."""
