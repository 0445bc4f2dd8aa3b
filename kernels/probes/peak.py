"""The FMA peak: a loop of independent vector multiply-adds and nothing else.

With A accumulators of L lanes, an iteration does 2 A L flops. A core that starts p FMAs a cycle, each of
latency t, is busy when A >= p t: 2 * 4 = 8 on current x86-64 cores, 4 * 4 = 16 on large Arm cores. A fills
the registers that the two operands leave, so that any core is covered. The sums are stored at the end, so
that the loop cannot be deleted; the operands come from memory, so that it cannot be computed in advance.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from convsched.kernels.jit import Loaded, load

if TYPE_CHECKING:
    from convsched.machine import Machine

SYMBOL = "convsched_peak"


@dataclass(frozen=True)
class PeakKernel:
    """The compiled loop, for vectors of `lanes` float32."""

    loaded: Loaded
    lanes: int
    accumulators: int

    @property
    def flops(self) -> int:
        """Of one iteration: a multiplication and an addition for each lane of each accumulator."""
        return 2 * self.accumulators * self.lanes

    def run(self, iterations: int) -> float:
        """Runs the loop; returns a sum that depends on every accumulator."""
        operands = np.full(2 * self.lanes, 0.5, dtype=np.float32)
        sums = np.zeros(self.lanes, dtype=np.float32)
        function = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)
        function(self.loaded.address(SYMBOL))(iterations, operands.ctypes.data, sums.ctypes.data)
        return float(sums.sum())


def peak_kernel(machine: Machine) -> PeakKernel:
    """The loop for this machine's vectors, with two registers kept for the operands and two to spare."""
    accumulators = machine.registers - 4
    ir_text = fma_loop(machine.lanes, accumulators)
    return PeakKernel(load(ir_text, (SYMBOL,), machine), machine.lanes, accumulators)


def fma_loop(lanes: int, accumulators: int) -> str:
    """LLVM IR of `convsched_peak(iterations, operands[2 lanes], sums[lanes])`, with at least 2 accumulators.

    for i < iterations: for a < accumulators: sum[a] = fmuladd(x, y, sum[a])

    `fmuladd` is one instruction where the machine has it, and a multiplication and an addition where not.
    """
    vector = f"<{lanes} x float>"
    fma = f"@llvm.fmuladd.v{lanes}f32"
    every = range(accumulators)
    phis = [f"  %s{a} = phi {vector} [zeroinitializer, %entry], [%t{a}, %loop]" for a in every]
    fmas = [f"  %t{a} = call {vector} {fma}({vector} %x, {vector} %y, {vector} %s{a})" for a in every]
    totals = [
        f"  %u{a} = fadd {vector} %{'t0' if a == 1 else f'u{a - 1}'}, %t{a}" for a in range(1, accumulators)
    ]
    lines = [
        f"declare {vector} {fma}({vector}, {vector}, {vector})",
        f"define void @{SYMBOL}(i64 %iterations, ptr %operands, ptr %sums) {{",
        "entry:",
        f"  %x = load {vector}, ptr %operands, align 4",
        f"  %second = getelementptr float, ptr %operands, i64 {lanes}",
        f"  %y = load {vector}, ptr %second, align 4",
        "  br label %loop",
        "loop:",
        "  %i = phi i64 [0, %entry], [%next, %loop]",
        *phis,
        *fmas,
        "  %next = add i64 %i, 1",
        "  %more = icmp slt i64 %next, %iterations",
        "  br i1 %more, label %loop, label %exit",
        "exit:",
        *totals,
        f"  store {vector} %u{accumulators - 1}, ptr %sums, align 4",
        "  ret void",
        "}",
    ]
    return "\n".join(lines) + "\n"
