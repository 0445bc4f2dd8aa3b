"""`convsched cache`: what it prints and returns; the group stands alone, as `main` adds it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from convsched.autotune.store.cache import ScheduleCache
from convsched.autotune.store.record import FORMAT, Key, MachineKey, Record
from convsched.cli.cache import cache
from convsched.machine import host
from convsched.networks.known import network
from convsched.plan.plan import Target
from convsched.problem import Conv2d

PROBLEM = Conv2d(8, 16, 3, padding=1, input_size=14)
HOST = host.machine()
KEY = Key.of(PROBLEM, Target(HOST))


def make(schedule: str = "unroll c", hot: float | None = 1e-3, key: Key = KEY, status: str = "ok",
         message: str = "", is_default: bool = False, time: float = 1.0) -> Record:  # fmt: skip
    return Record(**vars(key), algorithm="direct", recipe="channels [2 x 14]", schedule=schedule, hot=hot,
                  status=status, message=message, is_default=is_default, time=time,  # type: ignore[arg-type]
                  flags=("loaded",), cold=hot, spread=0.01, error=0.0, workspace=2048)  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A cache of two keys: a tuned one with a failure, and one of LeNet-5's layers, half tuned."""
    store = ScheduleCache(tmp_path / "schedules.sqlite")
    store.put(make("unroll m", 2e-3, is_default=True))
    store.put(make("unroll c", 1e-3, time=86400.0 * 365))
    store.put(make("unroll s", None, status="crashed", message="the process ended with [-11]"))
    store.mark_run(KEY, True, "10s", 3, 1.0)
    layer = Key.of(network("lenet5").layers[0].problem, Target(HOST))
    store.put(make("unroll e", 3e-3, layer))
    store.mark_run(layer, False, "10s", 1, 1.0)
    return store.path


def run(command: str, *arguments: str | Path, file: Path) -> Result:
    return CliRunner().invoke(cache, [command, *map(str, arguments), "--cache", str(file)])


def test_list(file: Path) -> None:
    result = run("list", file=file)
    assert result.exit_code == 0, result.output
    (tuned,) = [line for line in result.output.splitlines() if PROBLEM.text in line]
    rest = tuned.replace(PROBLEM.text, "").replace(KEY.machine, "").split()
    assert rest == ["nchw", "1", "normal", "direct", "1", "2", "2.00", "3", "1", "complete"]
    assert KEY.machine in tuned  # its brackets are no markup
    (half,) = [line for line in result.output.splitlines() if "c=1 m=6 k=5x5" in line]
    assert "partial" in half


@pytest.mark.parametrize(("wanted", "rows"), [("lenet5", 1), ("lenet", 1), ("c=8 m=16", 1), ("conv2d", 2)])
def test_list_some(file: Path, wanted: str, rows: int) -> None:
    assert run("list", wanted, file=file).output.count("conv2d") == rows


def test_list_nothing(file: Path, tmp_path: Path) -> None:
    assert "is for 'c=99'" in run("list", "c=99", file=file).output
    result = run("list", file=tmp_path / "none.sqlite")
    assert (result.exit_code, result.output) == (0, f"{tmp_path / 'none.sqlite'} has no entries\n")


def test_show(file: Path) -> None:
    result = run("show", "c=8", file=file)
    assert result.exit_code == 0, result.output
    assert KEY.text in result.output
    assert "2 of 3 candidates; latest run: 10s, 3 tried" in result.output
    best, default = (line.split() for line in result.output.splitlines() if "loaded" in line)
    assert best[:7] == ["best", "1", "1", "1.0%", "2", "0.0e+00", "ok"]
    assert default[:2] == ["default", "2"]
    assert "best: direct, channels [2 x 14]\n  unroll c\n" in result.output
    assert "crashed" not in result.output
    everything = run("show", "c=8", "--all", file=file).output
    assert "crashed: the process ended with [-11]" in everything
    assert "3 of 3 candidates" in everything


def test_show_nothing(file: Path) -> None:
    result = run("show", "vgg", file=file)
    assert (result.exit_code, "is for 'vgg'" in result.output) == (1, True)


def test_explain_miss(file: Path) -> None:
    hit = run("explain-miss", PROBLEM.text, "--threads", "1", file=file)
    assert hit.output == "a hit, from exact machine: direct, unroll c\n"
    miss = run("explain-miss", PROBLEM.text, "--threads", "1", "--layout", "nhwc", file=file)
    assert miss.exit_code == 0
    assert "other layout (nchw)" in miss.output.splitlines()[1]
    bad = run("explain-miss", "conv2d c=8", file=file)
    assert (bad.exit_code, "m= k= in= is missing" in bad.output) == (1, True)


def test_prune(file: Path) -> None:
    assert "1 removed, 3 kept" in run("prune", file=file).output
    assert "2 removed, 1 kept" in run("prune", "--older-than", "1970-06-01", file=file).output
    assert "1 removed, 0 kept" in run("prune", "--max-size", "0K", file=file).output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "some"], "'some' is not one of"),
        (["--max-size", "10x"], "'10x' is not a size such as 500K, 100M or 2G"),
        (["--max-size", "K"], "is not a size"),
        (["--older-than", "30d"], "does not match"),
    ],
)
def test_prune_options(file: Path, arguments: list[str], message: str) -> None:
    result = run("prune", *arguments, file=file)
    assert (result.exit_code, message in result.output) == (2, True)


def test_export_and_import(file: Path, tmp_path: Path) -> None:
    lines, other = tmp_path / "x.jsonl", tmp_path / "other.sqlite"
    assert run("export", lines, file=file).output == f"4 candidates written to {lines}\n"
    assert run("import", lines, file=other).output == "6 added, 0 updated, 0 there already\n"
    assert run("import", lines, file=other).output == "0 added, 0 updated, 6 there already\n"
    assert ScheduleCache(other).best(KEY) == ScheduleCache(file).best(KEY)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", ", line 2: is not JSON"),
        ("{'a': 1}", ", line 2: is not JSON"),
        (make().to_json()[:-9], ", line 2: is not JSON"),
        (make("hurry").to_json(), ", line 2: schedule 'hurry' cannot be used"),
        (replace(make(), layout="nchw8c").to_json(), ", line 2: layout 'nchw8c' is not known: use one of nchw, nhwc"),
        (replace(make(), accuracy="sloppy").to_json(), ", line 2: accuracy 'sloppy' is not known: use one of strict"),
        (replace(make(), algorithm="magic").to_json(), ", line 2: algorithm 'magic' cannot be used: algorithm='magic'"),
        (replace(make(), format=0).to_json(), f", line 2: has format 0; this convsched uses {FORMAT}"),
        (replace(make(), compiler="schedule 0").to_json(), f", line 2: made with format {FORMAT} and schedule 0"),
        (json.dumps({"kind": "run", "complete": True}), ", line 2: has no problem, layout"),
        (KEY.to_json(), ', line 2: has no "kind": "candidate"'),
        (b"\xff\xfe", "can't decode byte"),
        (None, "No such file or directory"),
    ],
    ids=lambda text: str(text)[:30],
)
def test_import_is_all_or_nothing(tmp_path: Path, line: str | bytes | None, message: str) -> None:
    source, file = tmp_path / "x.jsonl", tmp_path / "schedules.sqlite"
    around = f"{make().to_json()}\n".encode()
    if line is not None:
        source.write_bytes(around + (line.encode() if isinstance(line, str) else line) + b"\n" + around)
    result = run("import", source, file=file)
    assert result.exit_code == 1
    assert "x.jsonl" in result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert not file.exists()


def test_warnings_are_lines(file: Path) -> None:
    file.write_bytes(b"rubbish" * 999)
    result = run("list", file=file)
    assert result.exit_code == 0
    assert f"warning: {file} was corrupt" in result.stderr
    assert "has no entries" in result.stdout


@pytest.mark.parametrize("columns", [80, 100, 110, 150, 260])
def test_a_list_has_a_line_for_each_layer(file: Path, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """In a terminal too narrow for the machine's name, that stands above its layers, which have short names."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(Console, "is_terminal", property(lambda self: True))
    lines = [" ".join(line.split()) for line in run("list", file=file).output.splitlines()]
    name = PROBLEM.short if columns < 150 else PROBLEM.text
    (tuned,) = [line for line in lines if line.startswith(f"{name} nchw ")]
    assert tuned.endswith(KEY.machine) == (columns == 260)
    if columns >= 100:
        numbers = tuned.removesuffix(KEY.machine).removeprefix(name).split()
        assert numbers == ["nchw", "1", "normal", "direct", "1", "2", "2.00", "3", "1", "complete"]


def test_all_machines_are_listed(file: Path) -> None:
    away = replace(KEY, machine=replace(MachineKey.of(HOST), cores=96).text)
    ScheduleCache(file).put(make(key=away))
    assert "cores=96]" in run("list", "c=8", file=file).output


def test_help_needs_no_compiler() -> None:
    code = ("import sys, convsched.cli.cache, convsched.autotune.store.cache; "
            "print([m for m in ('numba', 'llvmlite', 'rich', 'onnx') if m in sys.modules])")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n"


# Compiled kernels

@pytest.fixture
def objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An object cache of three entries of 1 KiB, "b" the one not used for longest, then "c" and "a"."""
    monkeypatch.setenv("CONVSCHED_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "objects"
    folder.mkdir(parents=True)
    for name, time in (("a", 300), ("b", 100), ("c", 200)):
        (folder / name).write_bytes(bytes(1024))
        os.utime(folder / name, (time, time))
    return folder


def prune_objects(*arguments: str) -> Result:
    return CliRunner().invoke(cache, ["prune", "--objects", *arguments])


def test_prune_objects_empties_the_cache(objects: Path) -> None:
    result = prune_objects()
    assert (result.exit_code, result.output) == (0, "3 removed, 0 kept, 0 KiB\n")
    assert list(objects.iterdir()) == []
    objects.rmdir()
    assert prune_objects().output == "0 removed, 0 kept, 0 KiB\n"


def test_prune_objects_to_a_size_keeps_those_used_last(objects: Path) -> None:
    assert prune_objects("--max-size", "3K").output == "1 removed, 2 kept, 2 KiB\n"
    assert {path.name for path in objects.iterdir()} == {"a", "c"}


@pytest.mark.parametrize("option", [("--keep", "all"), ("--older-than", "2020-01-01"), ("--cache", "x.sqlite")])
def test_prune_objects_takes_no_option_of_schedules(option: tuple[str, str], objects: Path) -> None:
    result = prune_objects(*option)
    assert result.exit_code == 2
    assert "--objects goes alone or with --max-size" in result.output
    assert len(list(objects.iterdir())) == 3
