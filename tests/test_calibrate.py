"""Calibration: its logic on fake works and clocks, its cache, its kernels, and one short run of all."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from convsched.autotune.measure import calibrate as module
from convsched.autotune.measure.calibrate import (
    LEVELS,
    Calibration,
    Work,
    calibrate,
    calibration,
    current_conditions,
    rates,
    working_sets,
)
from convsched.cli import main as cli
from convsched.kernels.jit import load
from convsched.kernels.probes.stream import (
    COPY,
    READ,
    StreamKernel,
    copy_loop,
    read_loop,
    stream_buffer,
    stream_kernel,
)
from convsched.machine import Machine, host, machine_key

RATES = dict(zip(LEVELS, (200e9, 100e9, 50e9, 20e9), strict=True))
KEY = machine_key(host.machine())
KNOWN = Calibration(KEY, 1e11, RATES, RATES, 2e-5, 1.7e9, ("the load average is 9.0 on 4 available cores",))


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("CONVSCHED_CACHE", str(tmp_path))
    return tmp_path / "calibration"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Calibration]:
    """What fake measurements have found so far: each a little more than the one before."""
    found: list[Calibration] = []

    def measure() -> Calibration:
        found.append(dataclasses.replace(KNOWN, peak=1e11 + len(found)))
        return found[-1]

    monkeypatch.setattr(module, "calibrate", measure)
    return found


def file_of(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def test_rates_are_those_of_the_fastest_round_and_what_prepares_does_not_count() -> None:
    now, log = 0, []

    def passing(name: str, *microseconds: int) -> Callable[[], None]:
        times = list(microseconds)

        def call() -> None:
            nonlocal now
            log.append(name)
            now += 1000 * (times.pop(0) if len(times) > 1 else times[0])

        return call

    work = {
        "a": Work(passing("a", 900, 300, 200, 400), 2000.0, passing("p", 5000)),
        "b": Work(passing("b", 100), 10.0),
    }
    found = rates(work, 16e-3, clock=lambda: now)
    assert "".join(log) == "ab" + "pab" + "bpa" + "pab"
    assert found == pytest.approx({"a": 2000 / 200e-6, "b": 10 / 100e-6})


@pytest.mark.parametrize("isa", ["avx512", "avx2", "sse", "neon"])
def test_working_sets_fit_their_level_and_not_the_one_above(isa: Any) -> None:
    machine = Machine.example(isa)
    sets = working_sets(machine)
    assert sets["l1"] < machine.l1 < sets["l2"] < machine.l2 < sets["l3"] < machine.l3 < sets["dram"]


@pytest.mark.parametrize(("l3", "dram"), [(1, 4), (32, 128), (96, 256), (480, 960)])
def test_the_buffer_is_bounded_but_never_fits_the_last_level(l3: int, dram: int) -> None:
    machine = dataclasses.replace(Machine.example("avx512"), l2=1 << 20, l3=l3 << 20)
    assert working_sets(machine)["dram"] == dram << 20
    assert working_sets(machine)["l3"] <= machine.l3 // 2


def test_json_round_trip() -> None:
    assert Calibration.from_json(json.loads(json.dumps(KNOWN.to_json()))) == KNOWN


def test_the_second_call_measures_nothing(folder: Path, measured: list[Calibration]) -> None:
    first = calibration()
    assert calibration() == first == measured[0]
    assert len(measured) == 1
    assert calibration(refresh=True) == calibration() == measured[1]
    assert len(measured) == 2
    assert [path.suffix for path in folder.iterdir()] == [".json"]  # no temporary file is left


def changed(**values: Any) -> str:
    return json.dumps({**KNOWN.to_json(), **values})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        "{}",
        changed(format=module.FORMAT + 1),
        changed(machine_key=KEY.replace("cores=", "cores=1")),
        changed(peak=0),
        changed(peak="fast"),
        changed(peak=True),
        changed(peak=math.inf),
        changed(launch_seconds=-1.0),
        changed(time=None),
        changed(bandwidth=[1, 2, 3, 4]),
        changed(bandwidth={"l1": 1.0}),
        changed(copy_bandwidth={**RATES, "l2": -1.0}),
        changed(conditions="none"),
        changed(conditions=[1]),
        changed(pipes=2),
    ],
    ids=lambda text: text[:60],
)
def test_a_corrupt_or_foreign_file_is_measured_anew(
    folder: Path, measured: list[Calibration], text: str
) -> None:
    calibration()
    file_of(folder).write_text(text)
    assert calibration() == measured[1]
    assert calibration() == measured[1]  # and the file is whole again
    assert len(measured) == 2


def test_bytes_that_are_no_text(folder: Path, measured: list[Calibration]) -> None:
    calibration()
    file_of(folder).write_bytes(b"\xff\xfe\x00\x80")
    assert calibration() == measured[1]


def test_machines_that_share_a_folder_do_not_share_figures(
    folder: Path, measured: list[Calibration], monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration()
    monkeypatch.setattr(module, "machine_key", lambda machine: "another")
    calibration()
    assert len(measured) == 2
    assert len(list(folder.iterdir())) == 2


def test_a_disk_that_cannot_be_written_means_no_cache(folder: Path, measured: list[Calibration]) -> None:
    folder.parent.chmod(stat.S_IRUSR | stat.S_IXUSR)
    if os.access(folder.parent, os.W_OK):  # root may write anywhere: a file in the way stops it
        folder.touch()
    assert calibration() == measured[0]
    assert calibration() == measured[1]
    folder.parent.chmod(stat.S_IRWXU)


def test_no_folder_means_no_cache(measured: list[Calibration], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError

    for name in ("CONVSCHED_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert calibration() == measured[0]


@pytest.mark.parametrize(
    ("peak", "reason"),
    [(0.95e11, ""), (1.05e11, ""), (0.8e11, "80 GFLOP/s, 80% of the"), (1.3e11, "130 GFLOP/s, 130% of the")],
)
def test_a_peak_that_differs_is_told(monkeypatch: pytest.MonkeyPatch, peak: float, reason: str) -> None:
    monkeypatch.setattr(module, "measure_peak", lambda seconds: peak)
    monkeypatch.setattr(module, "timing_conditions", lambda before: ("some reason",))
    first, *rest = current_conditions(KNOWN)
    assert first == "some reason"
    assert len(rest) == bool(reason)
    assert all(reason in text for text in rest)


@pytest.mark.parametrize(("lanes", "sums"), [(4, 1), (4, 12), (8, 5), (16, 16), (16, 28)])
def test_the_stream_kernels_read_and_copy_everything(lanes: int, sums: int) -> None:
    kernel = StreamKernel(load(read_loop(lanes, sums) + copy_loop(lanes), (READ, COPY)), lanes)
    size = 6 * kernel.step
    buffer = stream_buffer(4 * size)
    buffer[:] = np.arange(size) % 61
    assert kernel.read_bytes(buffer) == kernel.copy_bytes(buffer) == 4 * size
    assert kernel.read(buffer, 3) == 3 * buffer.sum(dtype=np.float64)  # exact in float32
    kernel.copy(buffer, 2)
    np.testing.assert_array_equal(buffer[: size // 2], np.arange(size // 2) % 61)
    np.testing.assert_array_equal(buffer[size // 2 :], buffer[: size // 2])


@pytest.mark.parametrize("extra", [0, 1, 100])
def test_only_whole_iterations_are_streamed(extra: int) -> None:
    kernel = stream_kernel(host.machine())
    buffer = stream_buffer(4 * (3 * kernel.step + extra))
    assert kernel.read(buffer) == 3 * kernel.step
    buffer[:] = np.arange(buffer.size)
    kernel.copy(buffer)
    start = kernel.step
    np.testing.assert_array_equal(buffer[start : 2 * start], buffer[:start])
    np.testing.assert_array_equal(buffer[2 * start :], np.arange(2 * start, buffer.size))
    assert kernel.copy_bytes(buffer) == 8 * kernel.step


def test_a_buffer_below_one_iteration_is_left_alone() -> None:
    kernel = stream_kernel(host.machine())
    assert kernel.read(stream_buffer(64)) == 0
    kernel.copy(stream_buffer(64))
    assert kernel.read(stream_buffer(1 << 16), passes=0) == 0


def test_the_stream_buffer_lies_on_a_cache_line() -> None:
    buffer = stream_buffer(1 << 14)
    assert buffer.nbytes == 1 << 14
    assert buffer.ctypes.data % 64 == 0
    assert buffer.min() == buffer.max() == 1


def test_a_short_calibration_of_this_machine() -> None:
    found = calibrate(seconds=0.1)
    assert found.machine_key == KEY
    assert 1e9 < found.peak < 1e13
    for measured in (found.bandwidth, found.copy_bandwidth):
        assert tuple(measured) == LEVELS
        assert all(1e8 < rate < 1e13 for rate in measured.values())
        assert measured["l1"] > measured["dram"]
    assert 0 <= found.launch_seconds < 0.1
    assert Calibration.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_info_shows_the_figures_and_measures_only_when_asked(
    folder: Path, measured: list[Calibration], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "measure_peak", lambda seconds: KNOWN.peak)
    result = CliRunner().invoke(cli.main, ["info"])
    assert result.exit_code == 0, result.output
    lines = {line.split()[0]: line for line in result.output.splitlines()}
    assert "in the machine" in lines["cores"]
    assert "by affinity" in lines["cores"]
    assert "100.0 GFLOP/s on one core" in lines["peak"]
    assert "L1 200, L2 100, L3 50.0, memory 20.0 GB/s" in lines["read"]
    assert "20 us" in lines["launch"]
    assert "the load average is 9.0" in lines["while"]
    assert "timing" in lines
    CliRunner().invoke(cli.main, ["info"])
    assert len(measured) == 1
    CliRunner().invoke(cli.main, ["info", "--refresh"])
    assert len(measured) == 2
