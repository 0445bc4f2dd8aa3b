"""The command line: what it prints, writes and returns, on a small network."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

import convsched
from convsched.autotune.measure.calibrate import LEVELS, Calibration
from convsched.benchmark.baseline import gemm_baseline
from convsched.benchmark.cases import table_case
from convsched.benchmark.report import Report, table
from convsched.benchmark.run import Settings, run_layers, total
from convsched.cli import main as cli
from convsched.errors import ScheduleError
from convsched.machine import host
from convsched.plan.plan import Target
from convsched.problem import Conv2d, Problem
from convsched.problem.layout import LAYOUTS

QUICK = ["--seconds", "0.001"]
SMALL = Conv2d(3, 20, 3, padding=1, input_size=(5, 6), activation="relu")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, list(arguments))


class FakeKernel:
    """A kernel that is the NumPy baseline, times `factor`: right for 1."""

    algorithm = "fake"
    schedule = "no steps"
    recipe = "no recipe"

    def __init__(self, problem: Problem, factor: float = 1.0) -> None:
        self.problem, self.factor = problem, factor

    def bind(self, weight: np.ndarray, bias: np.ndarray | None) -> Callable[..., np.ndarray]:
        def conv(x: np.ndarray, out: np.ndarray, residual: np.ndarray | None = None) -> np.ndarray:
            out[...] = gemm_baseline(self.problem, x, weight, bias, residual) * np.float32(self.factor)
            return out

        return conv


def fake(monkeypatch: pytest.MonkeyPatch, make: Callable[[Problem], FakeKernel]) -> None:
    monkeypatch.setattr(convsched, "compile", lambda problem, **options: make(problem))


def test_bench_prints_every_layer_and_the_total() -> None:
    result = run("bench", "lenet5", *QUICK)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert "conv2d c=1 m=6 k=5x5" in lines[0]
    assert sum("linear c=" in line for line in lines) == 2 * 3  # as they come, and in the table
    assert any(line.strip().startswith("all, each as often as it occurs") for line in lines)
    assert "5 of 5" not in result.output


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bench_in_every_layout(layout: str) -> None:
    result = run("bench", "lenet5", "--layer", "c=6 m=16", "--layout", layout, *QUICK)
    assert result.exit_code == 0, result.output
    assert layout in result.output


def test_bench_writes_everything_as_json(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    file.write_text("an older result")
    assert run("bench", "lenet5", "--json", str(file), *QUICK).exit_code == 0
    data = json.loads(file.read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert data["complete"] is True
    assert data["versions"].keys() >= {"python", "numpy", "numba", "llvmlite", "convsched"}
    assert data["total"]["layers"] == sum(layer["count"] for layer in data["layers"]) == 5
    first = data["layers"][0]
    assert first["problem"].startswith("conv2d c=1 m=6")
    assert first["status"] == "ok"
    assert first["error"] < 1e-5
    assert first["schedule"]
    assert first["kernel"]["minimum"] <= first["kernel"]["median"]
    weighted = sum(layer["count"] * layer["kernel"]["minimum"] for layer in data["layers"])
    assert math.isclose(data["total"]["seconds"], weighted)


def test_a_wrong_answer_fails_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake(monkeypatch, lambda problem: FakeKernel(problem, 1.001 if problem.M == 16 else 1.0))
    file = tmp_path / "result.json"
    result = run("bench", "lenet5", "--json", str(file), *QUICK)
    assert result.exit_code == 1
    assert result.output.count("WRONG") == 2  # in its line and in the table
    assert "1 bad" in result.output
    wrong = [layer for layer in json.loads(file.read_text())["layers"] if layer["status"] == "WRONG"]
    assert [layer["kernel"] for layer in wrong] == [None]


def test_nan_is_a_wrong_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake(monkeypatch, lambda problem: FakeKernel(problem, math.nan))
    file = tmp_path / "result.json"
    assert run("bench", "lenet5", "--json", str(file), *QUICK).exit_code == 1
    assert {layer["status"] for layer in json.loads(file.read_text())["layers"]} == {"WRONG"}


def test_a_layer_that_does_not_compile_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(problem: Problem) -> FakeKernel:
        if problem.M == 16:
            raise ScheduleError("split m by 7", "16 is not a multiple", "use 8")
        return FakeKernel(problem)

    fake(monkeypatch, make)
    result = run("bench", "lenet5", *QUICK)
    assert result.exit_code == 1
    assert "split m by 7: 16 is not a multiple; use 8" in result.output
    assert "linear c=84 m=10" in result.output


def test_ctrl_c_prints_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def make(problem: Problem) -> FakeKernel:
        if problem.C == 400:
            raise KeyboardInterrupt
        return FakeKernel(problem)

    fake(monkeypatch, make)
    file = tmp_path / "result.json"
    result = run("bench", "lenet5", "--json", str(file), *QUICK)
    assert result.exit_code == cli.INTERRUPTED_EXIT_CODE
    assert "2 of 5 layers so far" in result.output
    data = json.loads(file.read_text())
    assert (data["complete"], len(data["layers"])) == (False, 2)


def test_the_live_table_fits_a_small_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, FakeKernel)
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, height=24)
    cases = [table_case("a", SMALL, 2), table_case("b", SMALL, 1)]
    report = cli._run_live(cases, Report("net", Settings(seconds=0.001), 1e11, planned=2), console)
    assert report.complete
    assert "1 of 2 layers so far" in screen.getvalue()


@pytest.mark.parametrize("columns", [90, 110, 160])
def test_the_table_has_a_line_for_each_layer(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    fake(monkeypatch, FakeKernel)
    grouped = Conv2d(64, 96, (3, 5), 2, 1, groups=32, input_size=(12, 11), activation="hardswish", residual=True)
    cases = [table_case("layer", layer, 1) for layer in (SMALL, grouped)]
    rows = tuple(run_layers(cases, convsched.compile, Settings(seconds=0.001)))
    screen = io.StringIO()
    Console(file=screen, width=columns).print(table(Report("net", Settings(), 1e11, planned=2, rows=rows), columns))
    lines = [line.split() for line in screen.getvalue().splitlines()]
    for row in rows:
        name = row.problem.text if columns == 160 else row.problem.short
        assert sum(line[: len(name.split())] == name.split() and "fake" in line for line in lines) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuchnet"], "network 'nosuchnet' is not known; use one of lenet5, alexnet"),
        (["missing.onnx"], "missing.onnx: there is no such file"),
        (["lenet5", "--layer", "c=5000"], "no layer of lenet5 has 'c=5000' in its name or text"),
        (["lenet5", "--input-size", "8x8"], "a built-in network has a fixed input size"),
        (["x.onnx", "--input-size", "8by8"], "'8by8' is not a size such as 224x224"),
        (["x.onnx", "--input-size", "0x8"], "'0x8' is not a size such as 224x224"),
        (["lenet5", "--threads", "0"], "--threads"),
        (["lenet5", "--seconds", "0"], "--seconds"),
        (["lenet5", "--threads", "100000"], "'--threads': 100000 is not in the range 1<=x<=1024"),
        (["lenet5", "--seconds", "nan"], "nan is not a positive number of seconds"),
        (["lenet5", "--seconds", "inf"], "inf is not a positive number of seconds"),
        (["lenet5", "--layout", "chwn"], "--layout"),
        (["x.onnx", "--input-size", "9" * 5000], "a side of more than 9 digits"),
        (["lenet5", "--json"], "Option '--json' requires an argument"),
        (["lenet5", "--json", "/dev/null"], "/dev/null is not a regular file"),
        (["."], "network '.' is not known"),
        (["lenet5", "--json", "no/such/folder/x.json"], "the folder of no/such/folder/x.json does not exist"),
        (["lenet5", "--image", "none.png"], "none.png: there is no such file"),
    ],
    ids=str,
)
def test_errors_are_explained(arguments: list[str], message: str) -> None:
    result = run("bench", *arguments)
    assert result.exit_code in (1, 2)
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize("content", [b"", b"\x08\x08\x12", b"not a model"], ids=["empty", "cut", "text"])
def test_a_file_that_is_no_model(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    result = run("bench", str(path))
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
    assert result.output.startswith(f"Error: {path}: cannot be read as an ONNX model")


def test_a_folder_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").mkdir()
    result = run("bench", str(tmp_path / "m.onnx"))
    assert (result.exit_code, result.output) == (1, f"Error: {tmp_path / 'm.onnx'}: is a folder, not a file\n")


def test_a_layer_without_enough_memory_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    huge = Conv2d(3, 8, 3, input_size=10**6)
    rows = list(run_layers([table_case("huge", huge, 1), table_case("small", SMALL, 1)],
                           lambda problem, **options: FakeKernel(problem), Settings(seconds=0.001)))  # fmt: skip
    assert [row.status for row in rows] == ["FAILED", "ok"]
    assert rows[0].failure.startswith("there is not enough memory: Unable to allocate 10.9 TiB")


def test_a_lack_of_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Any:
        raise MemoryError("Unable to allocate 1 TiB")

    monkeypatch.setattr(cli, "_read_cases", refuse)
    result = run("bench", "lenet5")
    assert (result.exit_code, result.output) == (1, "Error: there is not enough memory: Unable to allocate 1 TiB\n")


@pytest.mark.parametrize("arguments", [
    ["cache", "explain-miss", "linear c={} m=1"], ["cache", "prune", "--max-size", "{}"], ["cache", "list", "{}"],
    ["bench", "{}"], ["bench", "lenet5", "--input-size", "{}"], ["bench", "lenet5", "--threads", "{}"],
    ["bench", "lenet5", "--algorithm", "{}"], ["tune", "lenet5", "--budget", "{}"],
], ids=lambda words: " ".join(words))  # fmt: skip
def test_a_word_of_5000_digits_is_no_traceback(arguments: list[str], tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("CONVSCHED_CACHE", str(tmp_path))
    result = run(*(word.format("9" * 5000) for word in arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_json_is_known_to_be_writable_before_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> Any:
        raise PermissionError(13, "Permission denied")

    def no_run(*_: object, **__: object) -> Any:
        raise AssertionError("a layer was compiled")

    fake(monkeypatch, no_run)
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    file = tmp_path / "result.json"
    result = run("bench", "lenet5", "--json", str(file), *QUICK)
    assert result.exit_code == 2
    assert "result.json cannot be written: Permission denied" in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())


def test_a_run_that_fails_leaves_no_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def break_down(*_: object, **__: object) -> Any:
        raise ZeroDivisionError

    fake(monkeypatch, break_down)
    result = run("bench", "lenet5", "--json", str(tmp_path / "result.json"), *QUICK)
    assert isinstance(result.exception, ZeroDivisionError)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_during_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> Any:
        raise OSError(28, "No space left on device")

    fake(monkeypatch, FakeKernel)
    monkeypatch.setattr(Path, "replace", refuse)
    result = run("bench", "lenet5", "--json", str(tmp_path / "result.json"), *QUICK)
    assert result.exit_code == 1
    assert result.output.endswith("Error: [Errno 28] No space left on device\n")
    assert "all, each as often as it occurs" in result.output  # the result is not lost
    assert not list(tmp_path.iterdir())


MAIN = [sys.executable, "-c", "from convsched.cli.main import main; main()"]


@pytest.mark.parametrize("arguments", [["bench", "lenet5", *QUICK], ["info"], ["bench", "--help"]], ids=str)
def test_a_closed_pipe_ends_it_silently(arguments: list[str]) -> None:
    with subprocess.Popen([*MAIN, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="writes to /dev/full")
def test_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*MAIN, "bench", "lenet5", *QUICK], stdout=full, stderr=subprocess.PIPE, text=True,
                              check=False)  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "Error: [Errno 28] No space left on device\n")


def test_ctrl_c_between_layers_ends_a_process() -> None:
    command = [*MAIN, "bench", "vgg16", "--layer", "conv", "--seconds", "0.001"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "conv2d c=3 m=64" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (cli.INTERRUPTED_EXIT_CODE, "stopped\n")
    assert "of 9 layers so far" in output


def test_tuned_schedules_are_used_without_a_search(tmp_path: Path) -> None:
    """In a process of its own, to see what it imports: nothing that searches or measures candidates."""
    from convsched.autotune.store.cache import ScheduleCache
    from convsched.autotune.store.record import Key, Record
    from convsched.networks.known import network

    problem = network("lenet5").layers[1].problem
    key = Key.of(problem, Target(host.machine()))
    schedule = "unroll s"
    cache = ScheduleCache(tmp_path / "schedules.sqlite")
    cache.put(Record(**vars(key), algorithm="direct", schedule=schedule, status="ok", hot=1e-3, time=1.0))
    code = ("import sys, convsched.cli.main; convsched.cli.main.main(sys.argv[1:], standalone_mode=False); "
            "print([n for n in ('tune', 'search', 'space', 'worker') if f'convsched.autotune.{n}' in sys.modules])")
    file = tmp_path / "result.json"
    command = [sys.executable, "-c", code, "bench", "lenet5", "--json", str(file), *QUICK]
    environment = {**os.environ, "CONVSCHED_CACHE": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    assert done.stdout.count("direct, tuned") == 2  # in its line and in the table
    assert "Schedules: 1 from tuning, 4 analytic defaults." in done.stdout
    layers = json.loads(file.read_text())["layers"]
    assert [layer["tuned"] for layer in layers] == [False, True, False, False, False]
    assert layers[1]["schedule"] == schedule


def test_warnings_are_lines(tmp_path: Path) -> None:
    (tmp_path / "schedules.sqlite").write_bytes(b"no database" * 1000)
    environment = {**os.environ, "CONVSCHED_CACHE": str(tmp_path)}
    done = subprocess.run([*MAIN, "bench", "lenet5", *QUICK], env=environment, capture_output=True, text=True,
                          check=True)  # fmt: skip
    assert all(line.startswith("warning: ") for line in done.stderr.splitlines()), done.stderr
    assert "schedules.sqlite" in done.stderr


def test_bench_of_a_model_file(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["t"]),
        helper.make_node("Relu", ["t"], ["u"]),
        helper.make_node("ConvTranspose", ["u", "v"], ["y"]),
    ]
    weights = {"w": random.standard_normal((8, 3, 3, 3)), "v": random.standard_normal((8, 2, 3, 3))}
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 3, None, None))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "m.onnx")
    np.save(tmp_path / "image.npy", random.standard_normal((30, 20, 3)).astype(np.float32))
    options = ["--image", str(tmp_path / "image.npy"), "--input-size", "12x10", *QUICK]
    result = run("bench", str(tmp_path / "m.onnx"), *options)
    assert result.exit_code == 0, result.output
    assert "conv2d c=3 m=8 k=3x3 in=12x10 act=relu" in result.output
    assert "passed over: ConvTranspose y: transposed convolution is not supported" in result.output
    assert "has the open shape" in run("bench", str(tmp_path / "m.onnx"), *QUICK).output


def test_info(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = dict.fromkeys(LEVELS, 50e9)
    known = Calibration("a", 1e11, rates, rates, 1e-5, 0.0)
    monkeypatch.setattr("convsched.cli.info.calibration", lambda refresh: known)
    result = run("info")
    assert result.exit_code == 0
    names = [line.split()[0] for line in result.output.splitlines()]
    assert names[:5] == ["machine", "cores", "cache", "objects", "python"]


def test_info_explains_a_wrong_setting() -> None:
    code = "from convsched.cli.main import main; main(['info'])"
    command, setting = [sys.executable, "-c", code], {"CONVSCHED_ISA": "mmx"}
    process = subprocess.run(command, env=setting, capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert process.stderr.startswith("Error: CONVSCHED_ISA='mmx'")


def test_help_needs_neither_onnx_nor_rich() -> None:
    heavy = ("onnx", "rich", "skimage", "numba", "convsched.autotune.measure.measure")
    code = f"import sys, convsched.cli.main; print([name for name in {heavy} if name in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"
    assert "bench" in run("--help").output


def test_the_total_weighs_layers_by_their_count(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [table_case("a", SMALL, 3), table_case("b", Conv2d(3, 4, 1, input_size=4), 1)]
    settings = Settings(seconds=0.001)
    rows = list(run_layers(cases, lambda problem, **options: FakeKernel(problem), settings))
    sums = total(rows)
    assert all(row.kernel for row in rows)
    assert sums.layers == 4
    assert sums.flops == 3 * SMALL.flops + cases[1].problem.flops
    assert sums.seconds == pytest.approx(sum(row.count * row.kernel.minimum for row in rows if row.kernel))


@pytest.mark.parametrize("command", ["bench", "tune"])
@pytest.mark.parametrize("name", ["wino", "winograd(", ""])
def test_what_is_no_algorithm_is_refused_before_the_work(command: str, name: str) -> None:
    done = CliRunner().invoke(cli.main, [command, "lenet5", "--algorithm", name])
    assert done.exit_code == 2
    assert "use one of direct" in done.output


def test_an_algorithm_that_applies_to_no_layer_is_no_failure() -> None:
    done = CliRunner().invoke(cli.main, ["bench", "lenet5", "--layer", "linear", "--algorithm", "winograd", *QUICK])
    assert done.exit_code == 0
    assert done.output.count("n/a") >= 3
    assert "fully connected" in done.output
