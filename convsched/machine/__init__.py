"""This CPU: the only package that reads the CPU's description, its state and the environment."""

from convsched.machine.counters import CpuCounters, cpu_counters, governors, load_average
from convsched.machine.host import (
    SETTING_DIGITS, affinity_cores, available_cores, cache_folder,
    default_threads, detect, has_schedules, machine_cores, quota_cores)
from convsched.machine.key import MachineKey, Tier, machine_key
from convsched.machine.machine import Isa, Machine

__all__ = [
    "CpuCounters", "Isa", "Machine", "MachineKey", "SETTING_DIGITS", "Tier", "affinity_cores",
    "available_cores", "cache_folder", "cpu_counters", "default_threads", "detect", "governors", "has_schedules",
    "load_average", "machine_cores", "machine_key", "quota_cores",
]
