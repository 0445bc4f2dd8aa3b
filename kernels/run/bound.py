"""A kernel with packed weights: the inference path."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, NoReturn, TypeVar

import numpy as np

from convsched.errors import ArrayError
from convsched.kernels.run import binding
from convsched.kernels.run.arrays import check_input, check_output
from convsched.kernels.run.packing import aligned_zeros, plain
from convsched.kernels.run.pool import run_all
from convsched.kernels.signature import Interface
from convsched.problem.layout import Array, clear_tail, from_layout, has_tail
from convsched.problem.reference import convolve

if TYPE_CHECKING:
    from convsched.kernels.run.compiled import Compiled
    from convsched.kernels.run.kernel import Kernel


class Workspace:
    """Local tensors of one call, and the table of tensor addresses of each thread.

    No result needs the zeros: they are for speed. Lanes past the end of a tail are calculated with and not kept, and a
    denormal that happened to be there would slow them (1.8 times in all for a 3x3 layer of 20 channels by Winograd).
    """

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


K = TypeVar("K", bound="Compiled[Any]")


class Bound(Generic[K]):
    """A kernel with its packed ``weights``, by tensor; ``run`` calls its code.

    Copies and pickles hold the packed weights, and the kernel as its own copies do.
    """

    def __init__(self, kernel: K, weights: Mapping[str, Array]) -> None:
        self.kernel = kernel
        self.code = kernel.code
        self.weights = weights
        self._slots = {n: i for i, n in enumerate(self.code.interface.names)}
        self._threads = kernel.threads
        self._stages = tuple(zip(self.code.stages, self.code.interface.is_parallel, strict=True))
        self._idle: list[Workspace] = []

    def run(self, arrays: Mapping[str, Array]) -> None:
        """Run the stages on inputs and outputs, by tensor, which are checked. Safe to call from several threads."""
        workspace = self._borrow()
        try:
            self._run(workspace.tables, arrays)
        finally:
            self._idle.append(workspace)

    def _run(self, tables: list[Any], arrays: Mapping[str, Array]) -> None:
        slots, threads = self._slots, self._threads
        for name, array in arrays.items():
            if name in slots:
                slot, address = slots[name], array.ctypes.data
                for table in tables:
                    table[slot] = address
        for function, parallel in self._stages:
            if threads == 1 or not parallel:
                function(tables[0], 0, 1)
            else:
                run_all([partial(function, table, i, threads) for i, table in enumerate(tables)])

    def _borrow(self) -> Workspace:
        """An idle workspace, else a new one; ``pop`` is atomic, so that of two threads each gets its own."""
        try:
            return self._idle.pop()
        except IndexError:
            return self._workspace(self._threads)

    def _workspace(self, threads: int) -> Workspace:
        """A workspace whose tables hold the weights; inputs and outputs are still to be set."""
        workspace = Workspace(self.code.interface, threads)
        for table in workspace.tables:
            for name, array in self.weights.items():
                table[self._slots[name]] = array.ctypes.data
        return workspace

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebind, (type(self), self.kernel, self.code.interface.bindings, self.weights)


class BoundKernel(Bound["Kernel"]):
    """A layer's kernel with its packed weights: ``y = conv(x)``, ``conv(x, out=y)``, ``conv(x, residual=r)``.

    It also refers to the arrays that were bound, ``given``, for ``measured_error``; copies do not.
    """

    def __init__(self, kernel: Kernel, weights: Mapping[str, Array],
                 given: tuple[Array, Array | None] | None = None) -> None:
        super().__init__(kernel, weights)
        self.given = given
        self._problem, self._has_tail = kernel.problem, has_tail(kernel.problem, kernel.layout)

    def __call__(self, x: Array, *, out: Array | None = None, residual: Array | None = None) -> Array:
        """The layer's output for ``x``; written into ``out`` if given. Safe to call from several threads."""
        kernel = self.kernel
        inputs = {"x": check_input("x", x, kernel.x_shape)}
        if self._problem.residual:
            if residual is None:
                raise ArrayError(f"residual is missing; the layer has residual=True: give {kernel.y_shape}")
            inputs["residual"] = check_input("residual", residual, kernel.y_shape)
        elif residual is not None:
            raise ArrayError("residual is given but the layer has residual=False; leave it out")
        y = np.empty(kernel.y_shape, np.float32) if out is None else check_output(out, kernel.y_shape, inputs)
        arrays = {"x": inputs["x"], "y": y}
        if residual is not None:
            arrays["z"] = inputs["residual"]
        self.run(arrays)
        if self._has_tail:
            clear_tail(self._problem, y)
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

    @property
    def native(self) -> Native:
        """Addresses and shapes for ``convsched.call(conv.native, x, y)`` in ``@numba.njit`` code.

        Each has a workspace of its own, for one caller at a time; its table keeps code and weights alive.
        """
        workspace = self._workspace(1)
        table = np.array([address or 0 for address in workspace.tables[0]], np.int64)
        weakref.finalize(table, _release, (self, workspace))
        stages = np.array(self.code.addresses, np.int64)
        return Native(stages, table, self.kernel.x_shape, self.kernel.y_shape, self._slots["x"],
                      self._slots["y"], self._slots.get("z", -1), (self.kernel.problem.M - 1) % 16 + 1)

    def __repr__(self) -> str:
        return f"BoundKernel({self.kernel!r})"


def _rebind(kind: Callable[[K, Mapping[str, Array]], Bound[K]], kernel: K, packing: tuple[binding.Binding, ...],
            weights: Mapping[str, Array]) -> Bound[K]:
    """A bound kernel from what its pickle holds; unpickled arrays are not aligned."""
    if kernel.code.interface.bindings != packing:
        raise ArrayError("the weights were packed by another version of convsched; bind them again")
    return kind(kernel, {name: plain(name, packed).run(packed) for name, packed in weights.items()})


def _release(held: object) -> None:
    """What a native table kept alive goes with it."""
