"""Cold caches: reading through a buffer of at least twice the last-level cache, as read from the machine.

A smaller walk leaves part of the operands where they were: replacement is not strictly oldest first, and a
last level that holds only what the level above gave up is filled by both. The buffer is only read: lines
written would be written back within the time measured next.
"""

from __future__ import annotations

from functools import lru_cache

from convsched.kernels.stream import Array, stream_buffer, stream_kernel
from convsched.machine import Machine


def evict(machine: Machine) -> float:
    """Fills the caches of this core, and the shared one, with a buffer that nobody else uses.

    Returns the sum of what was read: the number of float32 read, as long as it is below 2^24 a lane. Takes
    some 2 ms for a last level of 32 MiB; the buffer is made at the first call and kept.
    """
    return stream_kernel(machine).read(_buffer(eviction_bytes(machine)))


def eviction_bytes(machine: Machine) -> int:
    """The size of the walk: twice the last level and the private caches besides."""
    return 2 * max(machine.l1, machine.l2, machine.l3) + machine.l2 + machine.l1


@lru_cache(maxsize=1)
def _buffer(size: int) -> Array:
    return stream_buffer(size)
