"""What all tests share: how many examples a property is tried on, the flag that rewrites goldens, and the refusal
to test another checkout.

The tests have two lanes. ``pytest -n auto`` tries properties on few examples. The long lane,
``pytest -n auto -m "slow or hypothesis" --hypothesis-profile wide``, tries them on many, and runs what is marked slow.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The examples of a cheap property; a dear one takes a share of them, ``settings().max_examples // 8``.
EXAMPLES = {"quick": 40, "wide": 300}
for name, count in EXAMPLES.items():
    settings.register_profile(name, max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile("quick")

PACKAGES = {"convsched": "convsched", "convsched.kernels": "kernels", "convsched.autotune": "autotune"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="rewrite tests/goldens from this code")


def foreign_packages(root: Path) -> list[str]:
    """The packages that are not imported from the checkout at ``root``, with where they are from."""
    wrong = []
    for package, folder in PACKAGES.items():
        spec = find_spec(package)
        origin = "nowhere" if spec is None or spec.origin is None else spec.origin
        if Path(origin).resolve() != (root / folder / "__init__.py").resolve():
            wrong.append(f"{package} is imported from {origin}")
    return wrong


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts what runs in the background with Ctrl-C ignored, and the processes under test would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = tempfile.mkdtemp(prefix="convsched-tests-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ["CONVSCHED_CACHE"] = folder  # neither the user's tuned schedules nor files left behind
    wrong = foreign_packages(config.rootpath)
    if wrong:
        raise pytest.UsageError(f"these tests are of {config.rootpath}, but {'; '.join(wrong)}. Run "
                                f"pip install -e '{config.rootpath}[test]' in this environment.")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is slow begins first, so that short tests fill the cores while the last of it runs."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture
def update_goldens(request: pytest.FixtureRequest) -> bool:
    """Whether to rewrite goldens instead of comparing."""
    return bool(request.config.getoption("--update-goldens"))
