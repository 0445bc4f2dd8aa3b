"""The object cache and the linker: hits, misses, damage, sharing between processes, memory given back."""

import gc
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import convsched as cs
from convsched.kernels import jit, objects
from convsched.kernels.run.kernel import Kernel
from convsched.machine import Machine, host
from convsched.plan.families import named
from convsched.plan.plan import Plan, Target
from convsched.problem import Conv2d
from convsched.problem.reference import convolve

LAYER = Conv2d(5, 20, 3, padding=1, input_size=(6, 9), activation="relu")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of cache entries."""
    monkeypatch.setenv("CONVSCHED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "objects"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modules that were compiled from now on."""
    texts: list[str] = []
    original = jit.compile_object

    def compile_object(text: str, machine: Machine) -> bytes:
        texts.append(text)
        return original(text, machine)

    monkeypatch.setattr(jit, "compile_object", compile_object)
    return texts


def check(kernel: Kernel) -> None:
    problem = kernel.problem
    rng = np.random.default_rng(0)
    shapes = (problem.input_shape, problem.weight_shape, problem.bias_shape)
    data = [rng.integers(-3, 4, shape).astype(np.float32) for shape in shapes]
    np.testing.assert_array_equal(kernel(*data), convolve(problem, *data))


def only(folder: Path) -> Path:
    """The one entry in the folder; temporary files would be more."""
    (path,) = folder.iterdir()
    return path


# Hits and misses

def test_a_hit_compiles_nothing_and_gives_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cs.compile(LAYER, threads=1)
    check(first)
    assert only(folder).is_file()

    def refuse(*_: object) -> bytes:
        raise AssertionError("compiled in spite of the cache")

    monkeypatch.setattr(jit, "compile_object", refuse)
    monkeypatch.setattr("convsched.plan.plan.apply", refuse)
    for threads in (1, 2):
        second = cs.compile(LAYER, schedule=first.schedule, threads=threads)
        check(second)
        assert second.code.interface == first.code.interface


def flip(data: bytes, position: int) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 0x10
    return bytes(changed)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "one byte": lambda data: data[:1],
    "digest only": lambda data: data[:32],
    "no header": lambda data: data[:40],
    "cut in the header": lambda data: data[:100],
    "cut in half": lambda data: data[:len(data) // 2],
    "last byte missing": lambda data: data[:-1],
    "byte too many": lambda data: data + b"\0",
    "zeros": lambda data: bytes(len(data)),
    "flip in the digest": lambda data: flip(data, 3),
    "flip in the length": lambda data: flip(data, 32),
    "flip in the header": lambda data: flip(data, 60),
    "flip in the code": lambda data: flip(data, len(data) // 2),
    "flip in the last byte": lambda data: flip(data, len(data) - 1),
    "text": lambda data: b"not an entry\n" * 100,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_a_miss_and_is_replaced(damage: str, folder: Path, compiled: list[str]) -> None:
    cs.compile(LAYER, threads=1)
    path = only(folder)
    good = path.read_bytes()
    path.write_bytes(DAMAGE[damage](good))
    check(cs.compile(LAYER, threads=1))
    assert len(compiled) == 2
    assert only(folder).read_bytes() == good


def sealed(key: str, header: bytes, code: bytes) -> bytes:
    """An entry whose digest is right."""
    payload = len(header).to_bytes(8, "little") + header + code
    return hashlib.sha256(key.encode() + payload).digest() + payload


@pytest.mark.parametrize(
    "header",
    [b"", b"{}", b"[]", b"null", b"{", b"\xff\xfe", b"1", b'{"names": 1}',
     b'{"names": ["x"], "local": "abc"}',
     b'{"names": [], "local": {}, "stages": ["a"], "parallel": [1], "shared": [], "copies": [1]}'],
)  # fmt: skip
def test_a_senseless_header_with_a_valid_digest_is_a_miss(
    header: bytes, folder: Path, compiled: list[str]
) -> None:
    cs.compile(LAYER, threads=1)
    path = only(folder)
    _, code = objects.read_entry(path.name) or ({}, b"")
    path.write_bytes(sealed(path.name, header, code))
    check(cs.compile(LAYER, threads=1))
    assert len(compiled) == 2


@pytest.mark.parametrize("code", [b"", b"\x7fELF", b"no object code" * 99])
def test_senseless_code_with_a_valid_digest_is_a_miss(code: bytes, folder: Path, compiled: list[str]) -> None:
    kernel = cs.compile(LAYER, threads=1)
    objects.write_entry(only(folder).name, kernel.code.interface.to_json(), code)
    check(cs.compile(LAYER, threads=1))
    assert len(compiled) == 2


def test_code_without_the_stages_is_a_miss(folder: Path, compiled: list[str]) -> None:
    kernel = cs.compile(LAYER, threads=1)
    other = jit.compile_object("define void @other() {\n  ret void\n}\n", host.machine())
    objects.write_entry(only(folder).name, kernel.code.interface.to_json(), other)
    check(cs.compile(LAYER, threads=1))
    assert len(compiled) == 3


# Keys

def test_the_key_depends_on_all_that_the_code_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[str] = []
    monkeypatch.setattr(objects, "read_entry", keys.append)
    monkeypatch.setattr(objects, "write_entry", lambda *_: None)
    here = host.machine()

    def key(layer: Conv2d = LAYER, schedule: str = "", layout: Any = "nchw", machine: Machine = here) -> str:
        Kernel(Plan(layer, Target(machine, layout), named("direct", layer), cs.parse_schedule(schedule)))
        return keys.pop()

    first = key()
    assert key() == first
    assert len(first) == 64
    others = [
        key(Conv2d(5, 20, 3, padding=1, input_size=(6, 9), activation="relu6")),
        key(Conv2d(5, 20, 3, padding=1, input_size=(9, 6), activation="relu")),
        key(schedule="unroll s"),
        key(schedule="unroll r"),
        key(layout="nhwc"),
        key(machine=replace(here, vector_bytes=here.vector_bytes * 2)),
        key(machine=replace(here, name=f"{here.name} II")),
        key(machine=replace(here, isa="sse" if here.isa != "sse" else "avx2")),
    ]
    monkeypatch.setattr(objects, "compiler_digest", lambda: "another compiler")
    others.append(key())
    monkeypatch.undo()
    monkeypatch.setattr(objects, "read_entry", keys.append)
    monkeypatch.setattr(objects, "target", lambda machine: ("another-cpu", ""))
    others.append(objects.object_key(Plan(LAYER, Target(here), named("direct", LAYER), cs.Schedule())))
    assert len({first, *others}) == 1 + len(others)


def test_the_compiler_digest_changes_with_the_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = objects.compiler_digest.__wrapped__()
    assert objects.compiler_digest() == original
    monkeypatch.setattr(objects.llvmlite, "__version__", "0.0")
    assert objects.compiler_digest.__wrapped__() != original
    monkeypatch.undo()
    monkeypatch.setattr(objects, "__file__", str(tmp_path / "objects.py"))
    (tmp_path / "objects.py").write_text("one")
    one = objects.compiler_digest.__wrapped__()
    (tmp_path / "objects.py").write_text("two")
    assert len({original, one, objects.compiler_digest.__wrapped__()}) == 3


def test_the_entry_of_another_machine_is_not_used(folder: Path, compiled: list[str]) -> None:
    here = cs.compile(LAYER, threads=1)
    Kernel(here.plan.on(replace(host.machine(), name="another CPU")))
    assert len(compiled) == len(list(folder.iterdir())) == 2


def test_an_entry_renamed_to_another_key_is_a_miss(folder: Path, compiled: list[str]) -> None:
    cs.compile(LAYER, threads=1)
    mine = only(folder)
    cs.compile(Conv2d(5, 20, 3, input_size=(6, 9)), threads=1)
    (other,) = set(folder.iterdir()) - {mine}
    os.replace(other, mine)
    check(cs.compile(LAYER, threads=1))
    assert len(compiled) == 3


# Folders

@pytest.mark.parametrize("place", ["file", "below a file", "file for objects", "folder for the entry"])
def test_a_folder_that_cannot_be_used_means_no_cache(
    place: str, tmp_path: Path, folder: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    match place:
        case "file":
            monkeypatch.setenv("CONVSCHED_CACHE", str(file))
        case "below a file":
            monkeypatch.setenv("CONVSCHED_CACHE", str(file / "cache"))
        case "file for objects":
            folder.parent.mkdir()
            folder.write_text("")
        case _:
            cs.compile(LAYER, threads=1)
            entry = only(folder)
            entry.unlink()
            entry.mkdir()
            (entry / "in the way").write_text("")
    before = len(compiled)
    for _ in range(2):
        check(cs.compile(LAYER, threads=1))
    assert len(compiled) == before + 2
    if folder.is_dir():
        assert len(list(folder.iterdir())) == 1  # no temporary files are left


def test_a_read_only_folder_means_no_cache(
    folder: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> Any:
        raise PermissionError(13, "Permission denied")

    folder.mkdir(parents=True)
    folder.chmod(0o500)  # which does not hold back root
    monkeypatch.setattr(objects.tempfile, "mkstemp", refuse)
    for _ in range(2):
        check(cs.compile(LAYER, threads=1))
    folder.chmod(0o700)
    assert len(compiled) == 2
    assert not list(folder.iterdir())


def test_a_full_disk_means_no_cache(
    folder: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jit.os, "replace", refuse)
    check(cs.compile(LAYER, threads=1))
    assert len(compiled) == 1
    assert not list(folder.iterdir())


def test_a_disk_that_cannot_be_written_still_gives_its_entries(
    folder: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    cs.compile(LAYER, threads=1)
    monkeypatch.setattr(jit.os, "utime", refuse)
    check(cs.compile(LAYER, threads=1))
    assert len(compiled) == 1


def test_no_home_means_no_cache(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv("CONVSCHED_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", refuse)
    check(cs.compile(LAYER, threads=1))
    assert len(compiled) == 1


# Processes and memory

MANY = """
import resource, sys, numpy as np, convsched as cs
def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS:"))
def run(i):
    layer = cs.Conv2d(1 + i % 7, 2 + i // 7 % 20, 1 + i % 2, input_size=(3, 3 + i // 140), bias=False)
    kernel = cs.compile(layer, threads=1)
    y = kernel(*(np.ones(shape, np.float32) for shape in (layer.input_shape, layer.weight_shape)))
    assert (y == layer.weights // layer.M).all()
"""


def python(code: str, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", MANY + code, *arguments], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)  # fmt: skip


def test_processes_share_a_folder(folder: Path) -> None:
    """All compile the same layers at once, so that some read what others are writing."""
    processes = [python("for i in range(20): run(i)\nprint('done')") for _ in range(4)]
    results = [(*process.communicate(timeout=120), process.returncode) for process in processes]
    assert results == [("done\n", "", 0)] * 4
    assert len(list(folder.iterdir())) == 20
    assert all(objects.read_entry(path.name) is not None for path in folder.iterdir())


def grown(count: int) -> float:
    """MB that a process grows by when it compiles ``count`` different kernels after the first 20."""
    code = "for i in range(20): run(i)\na = resident()\nfor i in range(20, 20 + int(sys.argv[1])): run(i)\n"
    out, errors = python(f"{code}print(resident() - a)", str(count)).communicate(timeout=600)
    assert errors == ""
    return int(out) / 1024


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")


@needs_proc
@pytest.mark.parametrize(("count", "most"), [
    (60, 19),  # the rate of 1,000 in 150 MB, and the slack of 200 in 40
    pytest.param(200, 40, marks=pytest.mark.slow),
    pytest.param(1000, 150, marks=pytest.mark.slow),
])  # fmt: skip
def test_many_kernels_cost_little_memory(count: int, most: int) -> None:
    assert grown(count) < most


def test_code_lives_as_long_as_its_kernel() -> None:
    layers = [Conv2d(2, 3, 3, input_size=(5, 5 + i)) for i in range(8)]
    kept = []
    for layer in layers:
        kernel = cs.compile(layer, threads=1)
        kept.append((kernel.bind(np.ones(layer.weight_shape, np.float32), np.zeros(3, np.float32)), layer))
        cs.compile(replace_width(layer), threads=1)
        del kernel
        gc.collect()
    for conv, layer in kept:
        assert (conv(np.ones(layer.input_shape, np.float32)) == 18).all()


def replace_width(layer: Conv2d) -> Conv2d:
    return Conv2d(2, 3, 3, input_size=(5, layer.W + 20))
