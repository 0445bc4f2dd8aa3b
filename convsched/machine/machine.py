"""A CPU as schedules see it: instruction set, vector registers, caches and cores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from convsched.errors import MachineError

Isa: TypeAlias = Literal["avx512", "avx2", "sse", "neon", "generic"]

# Bytes of a vector register, and how many registers there are.
_VECTORS: dict[Isa, tuple[int, int]] = {
    "avx512": (64, 32),
    "avx2": (32, 16),
    "sse": (16, 16),
    "neon": (16, 32),
    "generic": (16, 16),
}

# Bytes of an element in memory.
_ITEM_BYTES = {"float32": 4, "int32": 4, "bfloat16": 2, "float16": 2, "int16": 2, "int8": 1, "uint8": 1}

_KIB = 1024
_MIB = 1024 * _KIB


@dataclass(frozen=True)
class Machine:
    """A CPU as schedules see it.

    `vector_bytes` of a register, `registers` of vectors; `l1` (data), `l2`, `l3` caches and their `line` in
    bytes (`l3` equals `l2` where there is none); `cores` that this process may use. `design` tells the CPU's
    vendor, family and model (its `name` may not: a hypervisor may give several generations one), "" where
    the system does not.
    """

    name: str
    isa: Isa
    vector_bytes: int
    registers: int
    l1: int
    l2: int
    l3: int
    line: int
    cores: int
    design: str = ""
    stepping: str = ""

    @property
    def lanes(self) -> int:
        """float32 numbers in a vector register."""
        return self.vector_bytes // 4

    def lanes_of(self, dtype: str) -> int:
        """Elements of a type in a vector register; raises MachineError for a type that is not known.

        >>> [Machine.example("avx512").lanes_of(dtype) for dtype in ("float32", "bfloat16", "int8")]
        [16, 32, 64]
        """
        if dtype not in _ITEM_BYTES:
            raise MachineError(f"lanes_of({dtype!r}): use one of {', '.join(_ITEM_BYTES)}")
        return self.vector_bytes // _ITEM_BYTES[dtype]

    @property
    def fma(self) -> bool:
        """Whether it multiplies and adds in one instruction, with one rounding."""
        return self.isa != "sse"

    @property
    def masks(self) -> bool:
        """Whether it has registers for masks: a load or store of some lanes is one instruction, and quick."""
        return self.isa == "avx512"

    @property
    def broadcasts(self) -> bool:
        """Whether an FMA takes one element of memory for all lanes, so that a broadcast needs no register."""
        return self.isa == "avx512"

    @property
    def text(self) -> str:
        """One line for people.

        >>> Machine.example("avx2").text
        'example avx2: 16 registers of 32 B, L1 32 KiB, L2 256 KiB, L3 8192 KiB, line 64 B, 4 cores'
        """
        l1, l2, l3 = (f"{size // _KIB} KiB" for size in (self.l1, self.l2, self.l3))
        vectors = f"{self.registers} registers of {self.vector_bytes} B"
        caches = f"L1 {l1}, L2 {l2}, L3 {l3}, line {self.line} B"
        return f"{self.name} {self.isa}: {vectors}, {caches}, {self.cores} cores"

    def __str__(self) -> str:
        return self.text

    @staticmethod
    def example(isa: Isa) -> Machine:
        """A fixed machine with an instruction set, for tests and for schedules made elsewhere."""
        if isa not in _EXAMPLES:
            raise MachineError(f"Machine.example({isa!r}): use one of {', '.join(_EXAMPLES)}")
        return Machine("example", isa, *_VECTORS[isa], *_EXAMPLES[isa])


# (l1, l2, l3, line, cores): AMD Zen 5, Intel Haswell, Intel Nehalem, ARM Neoverse N1.
_EXAMPLES: dict[Isa, tuple[int, int, int, int, int]] = {
    "avx512": (48 * _KIB, 1 * _MIB, 32 * _MIB, 64, 2),
    "avx2": (32 * _KIB, 256 * _KIB, 8 * _MIB, 64, 4),
    "sse": (32 * _KIB, 256 * _KIB, 8 * _MIB, 64, 4),
    "neon": (64 * _KIB, 1 * _MIB, 32 * _MIB, 64, 4),
}
