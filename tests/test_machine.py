"""Machines as read from fake /proc and /sys trees, the environment, and this host."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convsched.errors import MachineError
from convsched.machine import (
    Isa,
    Machine,
    MachineKey,
    available_cores,
    cache_folder,
    default_threads,
    detect,
    host,
    machine_key,
)

AVX2 = "fpu sse2 avx fma avx2"
AVX512 = f"{AVX2} avx512f avx512dq avx512bw avx512vl"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def cpu(flags: str) -> dict[str, str]:
    """Two CPUs, of which only the first counts."""
    return {
        "proc/cpuinfo": f"processor\t: 0\nmodel name\t: Some CPU: 3 GHz\nflags\t\t: {flags}\n\n"
        "processor\t: 1\nmodel name\t: Other\nflags\t\t: fpu\n"
    }


def caches(*entries: tuple[str, str, str]) -> dict[str, str]:
    folder = "sys/devices/system/cpu/cpu0/cache"
    return {
        f"{folder}/index{i}/{name}": f"{value}\n"
        for i, entry in enumerate(entries)
        for name, value in zip(("level", "type", "size", "coherency_line_size"), (*entry, "128"), strict=True)
    }


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4, 5}, raising=False)


@pytest.mark.parametrize(
    ("architecture", "flags", "isa", "vector_bytes", "registers"),
    [
        ("x86_64", AVX512, "avx512", 64, 32),
        ("x86_64", AVX512.replace("avx512vl", ""), "avx2", 32, 16),
        ("x86_64", AVX2, "avx2", 32, 16),
        ("AMD64", "fpu sse2 avx avx2", "sse", 16, 16),  # AVX2 without FMA
        ("aarch64", "", "neon", 16, 32),
        ("arm64", "", "neon", 16, 32),
        ("riscv64", "", "generic", 16, 16),
        ("", "", "generic", 16, 16),
    ],
)
def test_instruction_set(
    tmp_path: Path, architecture: str, flags: str, isa: str, vector_bytes: int, registers: int
) -> None:
    machine = detect(write(tmp_path, cpu(flags)), architecture, {})
    assert (machine.isa, machine.vector_bytes, machine.registers) == (isa, vector_bytes, registers)
    assert machine.lanes == vector_bytes // 4
    assert machine.name == "Some CPU: 3 GHz"


def test_caches(tmp_path: Path) -> None:
    first = (("1", "Data", "48K"), ("1", "Instruction", "64K"))
    entries = caches(*first, ("2", "Unified", "1M"), ("3", "Unified", "32768K"))
    machine = detect(write(tmp_path, entries), "x86_64", {})
    assert (machine.l1, machine.l2, machine.l3, machine.line) == (48 << 10, 1 << 20, 32 << 20, 128)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (32 << 10, 512 << 10, 8 << 20, 64)),
        (caches(("1", "Data", "")), (32 << 10, 512 << 10, 8 << 20, 64)),
        (caches(("one", "Data", "48K")), (32 << 10, 512 << 10, 8 << 20, 64)),
        (caches(("1", "Data", "many K")), (32 << 10, 512 << 10, 8 << 20, 64)),
        (caches(("1", "Data", "64K"), ("2", "Unified", "2M")), (64 << 10, 2 << 20, 2 << 20, 128)),  # no L3
    ],
)
def test_missing_or_garbled_caches_fall_back(
    tmp_path: Path, files: dict[str, str], expected: tuple[int, ...]
) -> None:
    machine = detect(write(tmp_path, files), "x86_64", {})
    assert (machine.l1, machine.l2, machine.l3, machine.line) == expected
    assert machine.name == "x86_64"


@pytest.mark.usefixtures("four_cores")
@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 4),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 4),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "300000 100000\n"}, 3),  # a parent's
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "300000 100000\n",
                "sys/fs/cgroup/a/cpu.max": "200000 100000\n",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/docker/1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
        ({"proc/self/cgroup": "garbage\n\n", "sys/fs/cgroup/cpu.max": "x y z"}, 4),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 0\n"}, 4),
    ],
)
def test_cores_are_the_least_of_affinity_and_quota(tmp_path: Path, files: dict[str, str], cores: int) -> None:
    assert available_cores(write(tmp_path, files)) == cores


@pytest.mark.parametrize("isa", ["avx512", "avx2", "sse", "generic"])
def test_a_lower_instruction_set_can_be_forced(tmp_path: Path, isa: str) -> None:
    assert detect(write(tmp_path, cpu(AVX512)), "x86_64", {"CONVSCHED_ISA": isa}).isa == isa


@pytest.mark.parametrize(
    ("architecture", "isa", "message"),
    [
        ("x86_64", "avx512", r"CONVSCHED_ISA='avx512': this CPU \(avx2\) can run one of avx2, sse, generic"),
        ("x86_64", "neon", "CONVSCHED_ISA='neon'"),
        ("x86_64", "AVX2", "CONVSCHED_ISA='AVX2'"),
        ("aarch64", "sse", r"this CPU \(neon\) can run one of neon, generic"),
    ],
)
def test_an_instruction_set_the_host_lacks_is_refused(
    tmp_path: Path, architecture: str, isa: str, message: str
) -> None:
    with pytest.raises(MachineError, match=message):
        detect(write(tmp_path, cpu(AVX2)), architecture, {"CONVSCHED_ISA": isa})


def test_host_is_cached_and_sane() -> None:
    here = host.machine()
    assert host.machine() is here
    assert 0 < here.line <= here.l1 <= here.l2 <= here.l3
    assert 1 <= here.cores <= (os.cpu_count() or 1)
    assert here.isa in here.text


def test_examples() -> None:
    assert [Machine.example(isa).lanes for isa in ("avx512", "avx2", "sse", "neon")] == [16, 8, 4, 4]
    with pytest.raises(MachineError, match="use one of avx512, avx2, sse, neon"):
        Machine.example("sve")  # type: ignore[arg-type]


X86 = "vendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\nstepping\t: 1"
ARM = "CPU implementer\t: 0x41\nCPU variant\t: 0x3\nCPU part\t: 0xd0c\nCPU revision\t: 1"


@pytest.mark.parametrize(
    ("lines", "architecture", "text"),
    [
        (X86, "x86_64", "AuthenticAMD family 26 model 2 [sse stepping=1 "),
        (ARM, "aarch64", "implementer 0x41 part 0xd0c [neon stepping=0x3.1 "),
        ("model name\t: Some CPU\nvendor_id\t: AuthenticAMD", "x86_64", "Some CPU [sse "),  # not enough
        ("", "riscv64", "riscv64 [generic "),
    ],
)
def test_the_key_of_a_machine(tmp_path: Path, lines: str, architecture: str, text: str) -> None:
    machine = detect(write(tmp_path, {"proc/cpuinfo": f"{lines}\n"}), architecture, {})
    key = machine_key(machine)
    assert key == f"{text}l1=32K l2=512K l3=8192K line=64 cores={machine.cores}]"
    assert MachineKey.parse(key) == MachineKey.of(machine)
    assert MachineKey.parse(key).stepping == machine.stepping


def test_the_name_is_no_part_of_a_known_design(tmp_path: Path) -> None:
    files = {"proc/cpuinfo": f"model name\t: {{}}\n{X86}\n"}
    keys = {machine_key(detect(write(tmp_path, {k: v.format(name) for k, v in files.items()}), "x86_64", {}))
            for name in ("EPYC 9R45", "AMD EPYC Processor")}  # fmt: skip
    assert len(keys) == 1


def test_tiers() -> None:
    here = replace(MachineKey.of(Machine.example("avx512")), stepping="1")
    tiers = {
        "exact": [here],
        "same microarchitecture": [replace(here, cores=64, l3=2 * here.l3), replace(here, stepping="2")],
        "same isa": [replace(here, design="other")],
        "none": [replace(here, isa="avx2")],
    }
    assert {name: {here.tier(other) for other in others} for name, others in tiers.items()} == {
        name: {name} for name in tiers
    }
    assert here.distance(here) == 0
    assert here.distance(tiers["same microarchitecture"][0]) == 1 + 5


WORDS = st.text(st.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=20)


@given(WORDS, st.just("") | WORDS, st.integers(0, 2**40), st.integers(1, 999))
def test_a_key_survives_its_text(name: str, stepping: str, size: int, cores: int) -> None:
    machine = Machine.example("avx512")
    key = MachineKey.of(replace(machine, name=f"{name} [avx2 l1=1K]", stepping=stepping, l3=size, cores=cores))
    assert MachineKey.parse(key.text) == key


def test_a_strange_cpu_name_is_one_line() -> None:
    machine = replace(Machine.example("avx512"), name=" A\xa0CPU \x00\n(R) ")
    assert MachineKey.of(machine).design == "A CPU (R)"


@pytest.mark.parametrize("change", [("avx512", "avx1024"), ("48K", "048K"), ("48K", "49152"), (" line=64", "")])
def test_a_text_that_is_no_key(change: tuple[str, str]) -> None:
    with pytest.raises(MachineError, match=r"write it like 'example \[avx2"):
        MachineKey.parse(machine_key(Machine.example("avx512")).replace(*change))


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONVSCHED_THREADS", raising=False)
    cores = default_threads()
    assert cores >= 1
    monkeypatch.setenv("CONVSCHED_THREADS", "1")
    assert default_threads() == 1
    monkeypatch.setenv("CONVSCHED_THREADS", "1000000")
    assert default_threads() == cores


def test_threads_of_5000_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVSCHED_THREADS", "9" * 5000)
    with pytest.raises(MachineError, match=r"CONVSCHED_THREADS=.9+\.\.\.9+.: must have at most 9 digits"):
        default_threads()
    monkeypatch.setenv("CONVSCHED_THREADS", "0" * 5000)
    with pytest.raises(MachineError, match="must be a positive integer"):
        default_threads()


@pytest.mark.parametrize("setting", ["0", "-1", "two", "1.5", "²"])
def test_bad_threads_are_named(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    monkeypatch.setenv("CONVSCHED_THREADS", setting)
    with pytest.raises(MachineError, match=f"CONVSCHED_THREADS='{setting}': must be a positive integer"):
        default_threads()


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CONVSCHED_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("CONVSCHED_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "convsched"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / "home" / ".cache" / "convsched"
    assert not any(tmp_path.iterdir())  # asking creates nothing


def test_no_home_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError

    monkeypatch.delenv("CONVSCHED_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(MachineError, match="set CONVSCHED_CACHE"):
        cache_folder()


@pytest.mark.parametrize(("isa", "fma", "masks", "broadcasts"), [
    ("avx512", True, True, True), ("avx2", True, False, False), ("sse", False, False, False),
    ("neon", True, False, False)])
def test_capabilities_follow_the_instruction_set(isa: Isa, fma: bool, masks: bool, broadcasts: bool) -> None:
    machine = Machine.example(isa)
    assert (machine.fma, machine.masks, machine.broadcasts) == (fma, masks, broadcasts)


def test_lanes_are_counted_by_type() -> None:
    machine = Machine.example("avx2")
    assert machine.lanes == machine.lanes_of("float32") == 8
    assert (machine.lanes_of("bfloat16"), machine.lanes_of("int8")) == (16, 32)
    with pytest.raises(MachineError, match=r"lanes_of\('float128'\): use one of float32"):
        machine.lanes_of("float128")
