"""The cost model: a lower bound on a scheduled nest's time in one of many calls, counted from the nest itself.

    seconds >= max(issue, L2 bytes / L2 bandwidth, L3 bytes / ..., DRAM bytes / ...)

`issue` is the time of the instructions (`issue.py`); bytes are those that move into each cache from the
next (`traffic.py`), nothing where all data fit. The rates are calibrated. A share of the smaller parts shows
beside the greatest, since what a core waits for is seldom all hidden. The bound orders candidates;
measurement decides.

Source: Williams, Waterman, Patterson, "Roofline" (CACM 52, 2009).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from convsched.ir import Block, Body, Program
from convsched.machine import Machine
from convsched.model.constants import CORE
from convsched.model.issue import Issue
from convsched.model.traffic import Traffic

if TYPE_CHECKING:
    from convsched.autotune.measure.calibrate import Calibration


@dataclass(frozen=True)
class Rates:
    """What one core does in a second: FLOPs, and bytes read from each level of the memory.

    ``l1`` is what the core reads from L1; 0 stands for a vector in the time of each vector FMA.
    """

    peak: float
    l2: float
    l3: float
    dram: float
    l1: float = 0.0

    @staticmethod
    def of(known: Calibration) -> Rates:
        """The calibrated rates of a machine."""
        return Rates(known.peak, **{level: known.bandwidth[level] for level in ("l1", "l2", "l3", "dram")})

    def load(self, machine: Machine) -> float:
        """FMAs in the time of a vector load."""
        return machine.vector_bytes / self.l1 / self.fma(machine) if self.l1 else 1.0

    def fma(self, machine: Machine) -> float:
        """Seconds of a vector FMA."""
        return 2 * machine.lanes / self.peak


@dataclass(frozen=True)
class Cost:
    """The parts of the bound, seconds; ``seconds`` is the bound that orders candidates."""

    issue: float
    l2: float
    l3: float
    dram: float

    @property
    def seconds(self) -> float:
        parts = (self.issue, self.l2, self.l3, self.dram)
        return max(parts) + CORE.overlap * (sum(parts) - max(parts))


def cost(program: Program, machine: Machine, rates: Rates, threads: int = 1) -> Cost:
    """The bound for a scheduled program: the time of the thread that has the most to do."""
    own = replace(program, stages=tuple(replace(stage, body=_share(stage.body, threads))
                                        for stage in program.stages if stage.when == "run"))
    issue = Issue(own, machine.lanes, rates.load(machine))
    operations = sum(issue.time(stage.body) for stage in own.stages)
    traffic = Traffic(own)
    l2, l3, dram = traffic.into(machine.l1, CORE.way), traffic.into(machine.l2), traffic.into(machine.l3)
    return Cost(operations * rates.fma(machine), l2 / rates.l2, l3 / rates.l3, threads * dram / rates.dram)


def _share(body: Body, threads: int) -> Body:
    """What the first of so many threads runs: its part of each parallel loop, the greatest there is."""
    if threads == 1:
        return body
    return tuple(replace(statement, body=_share(statement.body, threads),
                         extent=-(-statement.extent // threads) if statement.kind == "parallel"
                         else statement.extent) if isinstance(statement, Block) else statement
                 for statement in body)
