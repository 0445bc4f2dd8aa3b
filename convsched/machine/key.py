"""What measurements on a machine belong to, and how alike two machines are."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from convsched.errors import MachineError, shortened
from convsched.machine.host import _KEY_PATTERN, _bytes
from convsched.machine.machine import _KIB, Isa, Machine

Tier: TypeAlias = Literal["exact", "same microarchitecture", "same isa", "none"]


@dataclass(frozen=True)
class MachineKey:
    """What measurements on a machine belong to; caches in bytes.

    Two machines are alike in tiers, the nearest first: "exact"; "same microarchitecture", which is the same
    design and instruction set; "same isa"; "none".

    >>> print(MachineKey("AuthenticAMD family 26 model 2", "avx512", "1", 49152, 1048576, 33554432, 64, 2))
    AuthenticAMD family 26 model 2 [avx512 stepping=1 l1=48K l2=1024K l3=32768K line=64 cores=2]
    """

    design: str
    isa: Isa
    stepping: str
    l1: int
    l2: int
    l3: int
    line: int
    cores: int

    @staticmethod
    def of(machine: Machine) -> MachineKey:
        """The key of a machine; its name stands for a design that the system does not tell."""
        design = "".join(c if c.isprintable() else " " for c in machine.design or machine.name)
        caches = (machine.l1, machine.l2, machine.l3, machine.line)
        return MachineKey(" ".join(design.split()), machine.isa, machine.stepping, *caches, machine.cores)

    @staticmethod
    def parse(text: str) -> MachineKey:
        """The key of a text: parse(key.text) == key. Raises MachineError."""
        match = re.fullmatch(_KEY_PATTERN, text)
        if match and match["isa"] in get_args(Isa):
            design, isa, stepping, l1, l2, l3, line, cores = match.groups("")
            key = MachineKey(design, isa, stepping, _bytes(l1), _bytes(l2), _bytes(l3),  # type: ignore[arg-type]
                             int(line), int(cores))  # fmt: skip
            if key.text == text:
                return key
        example = MachineKey.of(Machine.example("avx2")).text
        raise MachineError(f"{shortened(text)} is not a machine's key: write it like {example!r}")

    @property
    def text(self) -> str:
        """The one-line text form."""
        l1, l2, l3 = (f"{size // _KIB}K" if size % _KIB == 0 else str(size) for size in (self.l1, self.l2, self.l3))
        stepping = f" stepping={self.stepping}" if self.stepping else ""
        return f"{self.design} [{self.isa}{stepping} l1={l1} l2={l2} l3={l3} line={self.line} cores={self.cores}]"

    def __str__(self) -> str:
        return self.text

    def tier(self, other: MachineKey) -> Tier:
        """How much of another machine's measurements holds here."""
        if self == other:
            return "exact"
        if self.isa != other.isa:
            return "none"
        return "same microarchitecture" if self.design == other.design else "same isa"

    def distance(self, other: MachineKey) -> float:
        """How far apart caches and cores are: the sum of |log2| of their ratios."""
        pairs = ((self.l1, other.l1), (self.l2, other.l2), (self.l3, other.l3), (self.cores, other.cores))
        return sum(abs(math.log2(max(1, a) / max(1, b))) for a, b in pairs)


def machine_key(machine: Machine) -> str:
    """What measurements on a machine belong to, as one line of text."""
    return MachineKey.of(machine).text
