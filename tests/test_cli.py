"""The command line: what it prints, writes and returns, on a small network."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
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
from convsched import cli
from convsched.baseline import gemm_baseline
from convsched.errors import ModelError, ScheduleError
from convsched.explain.bench import Settings, run_layers, total
from convsched.explain.bench_report import Report
from convsched.explain.cases import (
    Case,
    fit_image,
    make_arrays,
    read_image,
    relative_error,
    table_case,
)
from convsched.kernels.arrays import from_layout, to_layout
from convsched.problem import Conv2d, Problem

QUICK = ["--seconds", "0.001"]
SMALL = Conv2d(3, 20, 3, padding=1, input_size=(5, 6), activation="relu")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, list(arguments))


class FakeKernel:
    """A kernel that is the NumPy baseline, times `factor`: right for 1."""

    algorithm = "fake"
    schedule = "no steps"

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


@pytest.mark.parametrize("layout", cli.LAYOUTS)
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
    assert result.exit_code == cli.INTERRUPTED
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuchnet"], "network 'nosuchnet' is not known; use one of lenet5, alexnet"),
        (["missing.onnx"], "missing.onnx: there is no such file"),
        (["lenet5", "--layer", "c=5000"], "no layer of lenet5 has 'c=5000' in its name or text"),
        (["lenet5", "--input-size", "8x8"], "a built-in network has a fixed size"),
        (["x.onnx", "--input-size", "8by8"], "'8by8' is not a size such as 224x224"),
        (["x.onnx", "--input-size", "0x8"], "'0x8' is not a size such as 224x224"),
        (["lenet5", "--threads", "0"], "--threads"),
        (["lenet5", "--seconds", "0"], "--seconds"),
        (["lenet5", "--layout", "chwn"], "--layout"),
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


def test_info() -> None:
    result = run("info")
    assert result.exit_code == 0
    names = [line.split()[0] for line in result.output.splitlines()]
    assert names[:4] == ["machine", "cores", "cache", "python"]


def test_info_explains_a_wrong_setting() -> None:
    code = "from convsched.cli import main; main(['info'])"
    command, setting = [sys.executable, "-c", code], {"CONVSCHED_ISA": "mmx"}
    process = subprocess.run(command, env=setting, capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert process.stderr.startswith("Error: CONVSCHED_ISA=mmx")


def test_help_needs_neither_onnx_nor_rich() -> None:
    heavy = ("onnx", "rich", "skimage", "numba", "convsched.autotune.measure")
    code = f"import sys, convsched.cli; print([name for name in {heavy} if name in sys.modules])"
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


@pytest.mark.parametrize("layout", cli.LAYOUTS)
@pytest.mark.parametrize("channels", [1, 16, 20])
def test_layouts_round_trip(layout: str, channels: int) -> None:
    array = np.arange(2 * channels * 3 * 5, dtype=np.float32).reshape(2, channels, 3, 5)
    there = to_layout(array, layout)
    np.testing.assert_array_equal(from_layout(there, array.shape, layout), array)
    shapes = {"nchw": (2, channels, 3, 5), "nhwc": (2, 3, 5, channels)}
    shapes["nchw16c"] = (2, -(-channels // 16), 3, 5, 16)
    assert there.shape == shapes[layout]
    assert there.sum() == array.sum()  # the tail is zero


def test_arrays_are_the_same_for_the_same_seed() -> None:
    case = Case("a", Conv2d(8, 4, 3, input_size=5, residual=True))
    one, two = make_arrays(case), make_arrays(case)
    np.testing.assert_array_equal(one.x, two.x)
    np.testing.assert_array_equal(one.weight, two.weight)
    assert one.residual is not None
    assert one.x.min() == 0  # as after a ReLU
    assert make_arrays(table_case("a", SMALL, 1)).x.min() < 0  # as an image is


def test_relative_error() -> None:
    expected = np.array([3.0, -4.0])
    assert relative_error(np.float32([3, -4]), expected) == 0
    assert relative_error(np.float32([3, -3.5]), expected) == pytest.approx(0.5 / math.sqrt(12.5))
    assert relative_error(np.float32([np.nan, 0]), expected) == math.inf
    assert relative_error(np.float32([np.inf, 0]), expected) == math.inf
    assert relative_error(np.float32([0.5]), np.zeros(1)) == 0.5


@pytest.mark.parametrize("shape", [(9, 7, 3), (3, 9, 7), (1, 9, 7, 3), (9, 7, 4)])
def test_images_as_arrays(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "image.npy", np.ones(shape))
    image = read_image(tmp_path / "image.npy")
    assert (image.shape, image.dtype) == ((9, 7, 3), np.float32)


def test_an_image_is_cut_around_its_middle() -> None:
    image = np.repeat(np.arange(8 * 12, dtype=np.float32).reshape(8, 12, 1), 3, axis=2)
    same = fit_image(image, Conv2d(3, 1, 1, input_size=(8, 12)))
    np.testing.assert_array_equal(same, image.transpose(2, 0, 1))
    square = fit_image(image, Conv2d(3, 1, 1, input_size=8))
    np.testing.assert_array_equal(square, image[:, 2:10].transpose(2, 0, 1))
    grey = fit_image(image, Conv2d(1, 1, 1, input_size=(4, 6)))
    assert grey.shape == (1, 4, 6)


def test_an_image_file_is_scaled(tmp_path: Path) -> None:
    io_module: Any = pytest.importorskip("skimage.io")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    io_module.imsave(tmp_path / "image.png", pixels, check_contrast=False)
    image = read_image(tmp_path / "image.png")
    assert image.shape == (16, 16, 3)
    assert abs(image.mean()) < 1e-3
    assert image.std() == pytest.approx(1, abs=1e-3)


def test_files_that_are_no_images(tmp_path: Path) -> None:
    np.save(tmp_path / "vector.npy", np.ones(5))
    with pytest.raises(ModelError, match=r"an array of shape \(5,\) is no image"):
        read_image(tmp_path / "vector.npy")
    (tmp_path / "broken.npy").write_bytes(b"not an array")
    with pytest.raises(ModelError, match="cannot be read as an array"):
        read_image(tmp_path / "broken.npy")
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(ModelError, match="cannot be read as an image"):
        read_image(tmp_path / "broken.png")
