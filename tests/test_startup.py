"""What a process imports before it needs it: Numba takes longer to import than everything else together."""

import subprocess
import sys
from pathlib import Path

import pytest


def loaded_after(code: str, cache: Path, *modules: str) -> set[str]:
    """Those of the modules that a new process has imported after running the code."""
    report = f"import sys; print(' '.join(m for m in {modules!r} if m in sys.modules))"
    environment = {"CONVSCHED_CACHE": str(cache), "PATH": ""}
    done = subprocess.run([sys.executable, "-I", "-c", f"{code}\n{report}"], env=environment, check=True,
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    return set(done.stdout.split())


COMPILE = "import convsched as cs; kernel = cs.compile(cs.Conv2d(4, 8, 3, input_size=6), threads=1)"
CALL = (f"{COMPILE}; import numpy as np; "
        "kernel(*(np.ones(s, np.float32) for s in ((1, 4, 6, 6), (8, 4, 3, 3), 8)))")  # fmt: skip


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import convsched", {"numba", "llvmlite", "onnx", "click", "rich"}),
        ("import convsched.cli.main", {"numba", "llvmlite", "onnx"}),
        ("import convsched as cs; print(cs.Conv2d(4, 8, 3, input_size=6).text, file=sys.stderr)"
         .replace("import ", "import sys; import ", 1), {"numba", "llvmlite"}),
        (COMPILE, {"numba", "onnx"}),
        (CALL, {"numba", "onnx"}),
    ],
)  # fmt: skip
def test_imports_are_late(code: str, absent: set[str], tmp_path: Path) -> None:
    assert loaded_after(code, tmp_path, *sorted(absent), "convsched") == {"convsched"}


def test_compile_imports_llvmlite_and_call_imports_numba(tmp_path: Path) -> None:
    assert loaded_after(COMPILE, tmp_path, "llvmlite") == {"llvmlite"}
    assert loaded_after("import convsched; convsched.call", tmp_path, "numba") == {"numba"}
