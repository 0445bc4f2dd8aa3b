"""Cold caches: reading through a buffer of at least twice the last-level cache, as read from the machine.

A smaller walk leaves part of the operands where they were: replacement is not strictly oldest first, and a
last level that holds only what the level above gave up is filled by both. The buffer is only read: lines
written would be written back within the time measured next.
"""

from __future__ import annotations

from functools import lru_cache, partial

from convsched.kernels.probes.stream import Array, stream_buffer, stream_kernel
from convsched.kernels.run.pool import run_all
from convsched.machine import Machine


def evict(machine: Machine, threads: int = 1) -> None:
    """Fills the shared cache, and those of this core, with a buffer that nobody else uses.

    With several threads each reads the whole buffer, so that the private caches of as many cores are filled.
    Takes some 2 ms for a last level of 32 MiB; the buffer is made at the first call and kept.
    """
    buffer = _buffer(eviction_bytes(machine))
    run_all([partial(stream_kernel(machine).read, buffer)] * threads)


def eviction_bytes(machine: Machine) -> int:
    """The size of the walk: twice the last level and the private caches besides."""
    return 2 * max(machine.l1, machine.l2, machine.l3) + machine.l2 + machine.l1


@lru_cache(maxsize=1)
def _buffer(size: int) -> Array:
    return stream_buffer(size)
