"""Streams through memory: the rates at which a core reads, and copies, a buffer that lies in some cache.

Reading sums the buffer, so that no load can be left out. It is cut into STREAMS runs that are read side by
side, UNROLL vectors of each an iteration: several runs keep several prefetchers busy. A core that starts p
loads a cycle and adds in t cycles is busy with p t sums: 3 * 4 = 12 on current cores, 2 * 4 = 8 with
AVX-512. There are as many sums as loads an iteration, or as many as the registers hold, which take turns.

Copying reads one half of a buffer and writes the other, in one run each: both count as bytes moved.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from convsched.kernels.jit import Loaded, load
from convsched.kernels.run.packing import aligned_zeros

if TYPE_CHECKING:
    from convsched.machine import Machine

Array = npt.NDArray[np.float32]

READ, COPY = "convsched_read", "convsched_copy"
STREAMS = 4
UNROLL = 4  # vectors of a stream an iteration
_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)


@dataclass(frozen=True)
class StreamKernel:
    """Both compiled loops; buffers are float32, aligned to a cache line (see `stream_buffer`)."""

    loaded: Loaded
    lanes: int

    @property
    def step(self) -> int:
        """Elements read by an iteration: a buffer's size is rounded down to a multiple of it."""
        return STREAMS * UNROLL * self.lanes

    def read(self, buffer: Array, passes: int = 1) -> float:
        """Reads the whole buffer so many times; returns the sum of all that was read."""
        steps = buffer.size // self.step
        sums = np.zeros(self.lanes, dtype=np.float32)
        if steps and passes > 0:
            function = _FUNCTION(self.loaded.address(READ))
            function(passes, steps, buffer.ctypes.data, sums.ctypes.data)
        return float(sums.sum())

    def copy(self, buffer: Array, passes: int = 1) -> None:
        """Copies the first half of the buffer into the second, so many times."""
        steps = buffer.size // 2 // self.step
        target = buffer[steps * self.step :]
        if steps and passes > 0:
            function = _FUNCTION(self.loaded.address(COPY))
            function(passes, steps, buffer.ctypes.data, target.ctypes.data)

    def read_bytes(self, buffer: Array) -> int:
        """Bytes that one pass of `read` moves."""
        return buffer.size // self.step * self.step * 4

    def copy_bytes(self, buffer: Array) -> int:
        """Bytes that one pass of `copy` moves, those read and those written."""
        return buffer.size // 2 // self.step * self.step * 8


@cache
def stream_kernel(machine: Machine) -> StreamKernel:
    """Both loops for this machine's vectors, with four registers to spare: loads are operands of the adds."""
    text = read_loop(machine.lanes, machine.registers - 4) + copy_loop(machine.lanes)
    return StreamKernel(load(text, (READ, COPY), machine), machine.lanes)


def stream_buffer(size: int) -> Array:
    """A buffer of so many bytes, all ones, on a cache line; writing them gives it memory of its own."""
    buffer = aligned_zeros(max(1, size // 4))
    buffer.fill(1.0)
    return buffer


def read_loop(lanes: int, sums: int) -> str:
    """LLVM IR of `convsched_read(passes, steps, buffer[steps STREAMS UNROLL lanes], sums[lanes])`.

    for p < passes: for i < steps: for u < UNROLL: for k < STREAMS: sum[...] += buffer[k][i][u]
    """
    vector, size = f"<{lanes} x float>", 4 * lanes
    body, latest = _sums_of_loads(vector, size, min(sums, UNROLL * STREAMS))
    every = range(len(latest))
    lines = [
        f"define void @{READ}(i64 %passes, i64 %steps, ptr %buffer, ptr %sums) {{",
        "entry:",
        f"  %run = mul i64 %steps, {UNROLL * size}",
        "  %b0 = getelementptr i8, ptr %buffer, i64 0",
        *[f"  %b{k} = getelementptr i8, ptr %b{k - 1}, i64 %run" for k in range(1, STREAMS)],
        "  br label %pass",
        "pass:",
        "  %p = phi i64 [0, %entry], [%p.next, %turn]",
        *[f"  %q{a} = phi {vector} [zeroinitializer, %entry], [{latest[a]}, %turn]" for a in every],
        "  br label %loop",
        "loop:",
        "  %i = phi i64 [0, %pass], [%i.next, %loop]",
        *[f"  %s{a} = phi {vector} [%q{a}, %pass], [{latest[a]}, %loop]" for a in every],
        *[f"  %r{k} = getelementptr i8, ptr %b{k}, i64 %i" for k in range(STREAMS)],
        *body,
        f"  %i.next = add i64 %i, {UNROLL * size}",
        "  %more = icmp slt i64 %i.next, %run",
        "  br i1 %more, label %loop, label %turn",
        "turn:",
        "  %p.next = add i64 %p, 1",
        "  %again = icmp slt i64 %p.next, %passes",
        "  br i1 %again, label %pass, label %exit",
        "exit:",
        *[f"  %u{a} = fadd {vector} {f'%u{a - 1}' if a > 1 else latest[0]}, {latest[a]}" for a in every[1:]],
        f"  store {vector} {f'%u{every[-1]}' if len(every) > 1 else latest[0]}, ptr %sums, align 4",
        "  ret void",
        "}",
    ]
    return "\n".join(lines) + "\n"


def _sums_of_loads(vector: str, size: int, sums: int) -> tuple[list[str], list[str]]:
    """An iteration's loads of all streams, each added to one of the sums in turn; and the sums' last names."""
    latest = [f"%s{a}" for a in range(sums)]
    lines = []
    for n, (u, k) in enumerate(product(range(UNROLL), range(STREAMS))):
        lines += [
            f"  %a{n} = getelementptr i8, ptr %r{k}, i64 {u * size}",
            f"  %v{n} = load {vector}, ptr %a{n}, align {size}",
            f"  %t{n} = fadd {vector} {latest[n % sums]}, %v{n}",
        ]
        latest[n % sums] = f"%t{n}"
    return lines, latest


def copy_loop(lanes: int) -> str:
    """LLVM IR of `convsched_copy(passes, steps, source, target)`, buffers of steps STREAMS UNROLL lanes.

    for p < passes: for i < steps STREAMS: for u < UNROLL: target[i][u] = source[i][u]
    """
    vector, size = f"<{lanes} x float>", 4 * lanes
    every = range(UNROLL)
    lines = [
        f"define void @{COPY}(i64 %passes, i64 %steps, ptr %source, ptr %target) {{",
        "entry:",
        f"  %run = mul i64 %steps, {STREAMS * UNROLL * size}",
        "  br label %pass",
        "pass:",
        "  %p = phi i64 [0, %entry], [%p.next, %turn]",
        "  br label %loop",
        "loop:",
        "  %i = phi i64 [0, %pass], [%i.next, %loop]",
        "  %x = getelementptr i8, ptr %source, i64 %i",
        "  %y = getelementptr i8, ptr %target, i64 %i",
        *[f"  %x{u} = getelementptr i8, ptr %x, i64 {u * size}" for u in every],
        *[f"  %y{u} = getelementptr i8, ptr %y, i64 {u * size}" for u in every],
        *[f"  %v{u} = load {vector}, ptr %x{u}, align {size}" for u in every],
        *[f"  store {vector} %v{u}, ptr %y{u}, align {size}" for u in every],
        f"  %i.next = add i64 %i, {UNROLL * size}",
        "  %more = icmp slt i64 %i.next, %run",
        "  br i1 %more, label %loop, label %turn",
        "turn:",
        "  %p.next = add i64 %p, 1",
        "  %again = icmp slt i64 %p.next, %passes",
        "  br i1 %again, label %pass, label %exit",
        "exit:",
        "  ret void",
        "}",
    ]
    return "\n".join(lines) + "\n"
