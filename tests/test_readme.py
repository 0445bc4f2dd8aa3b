"""Every command and code block of the README runs, and prints what the README says it prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import onnx
import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """The shell commands, ``&&`` chains taken apart."""
    lines = [line for kind, body in BLOCKS if kind == "bash" for line in body.splitlines()]
    return [part.strip() for line in lines for part in line.split("&&")]


def write_model(path: Path) -> None:
    """A small ONNX file for the commands that take one."""
    weight = onnx.numpy_helper.from_array(np.ones((8, 3, 3, 3), np.float32), "w")
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])
    sides = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, c, "h", "w_"])
             for name, c in (("x", 3), ("y", 8))]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", sides[:1], sides[1:], [weight])), path)


def test_code_blocks_run_and_print_what_is_shown(capsys: pytest.CaptureFixture[str],
                                                 tmp_path: Path) -> None:
    program = "\n".join(body for kind, body in BLOCKS if kind == "python")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shown = [body for kind, body in BLOCKS if kind == "text" and "pack w (bind)" in body]
    assert len(shown) == 1
    assert shown[0].strip() in done.stdout
    assert "24" in done.stdout.split(shown[0].strip())[1]  # the error of the last block


def brief(command: str) -> str:
    """The command, measuring for a moment: what it does is tested, not what it finds."""
    command = re.sub(r"--budget \S+", "--budget 1s", command)
    return f"{command} --seconds 0.01" if command.startswith("convsched bench") else command


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("convsched")])
def test_commands_run(command: str, tmp_path: Path) -> None:
    write_model(tmp_path / "model.onnx")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(brief(command), shell=True, capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "PATH": path})
    assert done.returncode == 0, done.stdout + done.stderr
    assert all((tmp_path / name).exists() for name in re.findall(r"--json (\S+)", command))


def test_install_commands_name_extras_that_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"pip install [^\n`]*\[(\w+)\]", TEXT)
    assert set(named) <= set(extras)
    assert "test" in named


def test_ci_runs_the_test_command() -> None:
    chained = [line for kind, body in BLOCKS if kind == "bash" for line in body.splitlines() if "&&" in line]
    assert [line.split("&&")[1].split()[0] for line in chained] == ["convsched", "pytest"]
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_files_of_the_table_exist() -> None:
    for cell in re.findall(r"^\| (`.*?) \|", TEXT, re.MULTILINE):
        names = re.findall(r"`([\w./]+)`", cell)
        folder = (ROOT / names[0]).parent
        assert all((ROOT / n).exists() or (folder / n).exists() for n in names), cell
