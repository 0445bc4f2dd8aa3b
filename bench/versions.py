"""Two versions of convsched in one run: compile times and run times, layer by layer, in turn.

`python bench/versions.py OTHER_PYTHON` starts this Python and another, in whose environment another version is
installed, and asks both for the same layers: the distinct ones of the known networks, untuned, each compiled from an
empty object cache. Compile times are wall time from problem to callable, of the default choice, and for 3x3 layers at
stride 1 of F(4,3) too: the least over `--compilations` layers that differ in the height of the image, so that nothing
made for one serves another; and of the default from the object cache. Then both run the default kernel in turn,
`--rounds` times each. Ratios are this version's over the other's: below 1 this one is faster.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from convsched.networks.known import NETWORKS, network
from convsched.problem import Conv2d, Problem, parse_problem

# What each interpreter runs: it reads a JSON request a line and answers with one. Public names of all versions only.
CHILD = r"""
import json, os, sys, tempfile, time
os.environ["CONVSCHED_CACHE"] = sys.argv[1]
import numpy as np
import convsched as cs
from convsched.problem import parse_problem

call = None

def compiled(text, layout, algorithm, fresh):
    if fresh:
        os.environ["CONVSCHED_CACHE"] = tempfile.mkdtemp(dir=sys.argv[1])
    layer = parse_problem(text)
    start = time.perf_counter(), time.process_time()
    kernel = cs.compile(layer, layout=layout, algorithm=algorithm, threads=1, cache=False)
    return layer, kernel, time.perf_counter() - start[0], time.process_time() - start[1]

def answer(request):
    global call
    if request["do"] == "compile":
        _, kernel, wall, cpu = compiled(request["text"], request["layout"], request["algorithm"], request["fresh"])
        return {"wall": wall, "cpu": cpu, "algorithm": str(kernel.algorithm)}
    if request["do"] == "bind":
        layer, kernel, *_ = compiled(request["text"], request["layout"], None, False)
        random = np.random.default_rng(0)
        bias_shape = (layer.M,) if layer.bias else None
        shapes = (kernel.x_shape, layer.weight_shape, bias_shape, kernel.y_shape)
        x, weight, bias, residual = (None if s is None else random.standard_normal(s, np.float32) for s in shapes)
        bound, y = kernel.bind(weight, bias), np.zeros(kernel.y_shape, np.float32)
        call = (lambda: bound(x, out=y, residual=residual)) if layer.residual else (lambda: bound(x, out=y))
        call()
        return {"algorithm": str(kernel.algorithm)}
    best = float("inf")
    for _ in range(request["calls"]):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return {"seconds": best}

print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    try:
        reply = answer(json.loads(line))
    except cs.ConvschedError as error:
        reply = {"error": str(error).splitlines()[0]}
    print(json.dumps(reply), flush=True)
"""


class Version:
    """An interpreter with a version of convsched, in a process of its own."""

    def __init__(self, python: str, folder: Path) -> None:
        self._python = python
        self._process = subprocess.Popen([python, "-c", CHILD, str(folder)], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, text=True, cwd=folder)
        self._reply()

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise click.ClickException(f"the process of {self._python} has ended")
        return dict(json.loads(line))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


@contextmanager
def versions(pythons: Iterable[str]) -> Iterator[list[Version]]:
    """A process for each interpreter; they end with the block."""
    with tempfile.TemporaryDirectory() as folder:
        running: list[Version] = []
        try:
            for number, python in enumerate(pythons):
                own = Path(folder, str(number))
                own.mkdir()
                running.append(Version(python, own))
            yield running
        finally:
            for version in running:
                version.close()


@dataclass(frozen=True)
class Row:
    """A layer's figures, of this version and the other: seconds."""

    text: str
    algorithm: str
    other_algorithm: str
    run: tuple[float, float]
    default: tuple[float, float]
    winograd: tuple[float, float] | None
    cached: tuple[float, float]


def best_compile(pair: list[Version], layers: list[Problem], layout: str, algorithm: str | None,
                 fresh: bool = True) -> tuple[float, float] | None:
    """The least wall time of each version over some layers, in turn; None where the algorithm does not apply."""
    least = [math.inf, math.inf]
    for layer in layers:
        for side, version in enumerate(pair):
            made = version.ask(do="compile", text=layer.text, layout=layout, algorithm=algorithm, fresh=fresh)
            if "error" in made:
                return None
            least[side] = min(least[side], made["wall"])
    return least[0], least[1]


def neighbours(layer: Problem, count: int) -> list[Problem]:
    """The layer, and others like it: taller images, so that nothing made for one serves another."""
    if not isinstance(layer, Conv2d):
        return [layer]
    return [layer, *(parse_problem(re.sub(r"in=\d+x", f"in={layer.H + 4 * more * layer.stride[0]}x", layer.text))
                     for more in range(1, count))]


def measure(pair: list[Version], layer: Problem, layout: str, rounds: int, compilations: int) -> Row:
    """One layer by both versions."""
    near = neighbours(layer, compilations)
    default = best_compile(pair, near, layout, None)
    square = isinstance(layer, Conv2d) and (layer.R, layer.S, layer.stride) == (3, 3, (1, 1)) and layer.groups == 1
    winograd = best_compile(pair, near, layout, "winograd(4,3)") if square else None
    assert default is not None
    bound = [version.ask(do="bind", text=layer.text, layout=layout) for version in pair]
    cached = best_compile(pair, [layer] * 3, layout, None, fresh=False)
    assert cached is not None
    first = pair[0].ask(do="time", calls=2)["seconds"]
    calls = max(1, min(50, int(0.01 / first)))
    least = [math.inf, math.inf]
    for number in range(rounds):
        for side in (0, 1) if number % 2 else (1, 0):
            least[side] = min(least[side], pair[side].ask(do="time", calls=calls)["seconds"])
    if wrong := [side["error"] for side in bound if "error" in side]:
        raise click.ClickException(f"{layer.text}: {wrong[0]}")
    names = [side["algorithm"] for side in bound]
    return Row(layer.text, names[0], names[1], (least[0], least[1]), default, winograd, cached)


def geometric(ratios: Iterable[float]) -> float:
    """The geometric mean; nan of none."""
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(statistics.fmean(logs)) if logs else math.nan


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table."""
    pairs = (row.run, row.default, row.winograd, row.cached)
    numbers = [f"{1e3 * ours:.3f}/{1e3 * theirs:.3f} = {ours / theirs:.2f}" if pair else ""
               for pair in pairs for ours, theirs in [pair or (1.0, 1.0)]]
    algorithm = row.algorithm if row.algorithm == row.other_algorithm else f"{row.algorithm} < {row.other_algorithm}"
    return (row.text, algorithm, *numbers)


@click.command()
@click.argument("other", type=click.Path(exists=True, dir_okay=False))
@click.option("--networks", default=",".join(NETWORKS), show_default=True, help="Known networks.")
@click.option("--layout", default="nchw", show_default=True)
@click.option("--rounds", default=10, show_default=True, help="Of timing, each version in turn.")
@click.option("--compilations", default=2, show_default=True, help="Layers like it that are compiled too.")
@click.option("--part", default="1/1", show_default=True, help="Every n-th layer, from the k-th: k/n.")
def main_command(other: str, networks: str, layout: str, rounds: int, compilations: int, part: str) -> None:
    """This version beside the one that the interpreter OTHER has."""
    layers = list(dict.fromkeys(layer.problem for name in networks.split(",") for layer in network(name).layers))
    first, step = map(int, part.split("/"))
    rows: list[Row] = []
    with versions([sys.executable, other]) as pair:
        for version in pair:
            version.ask(do="compile", text="conv2d c=4 m=8 k=3x3 in=6x6", layout=layout, algorithm=None, fresh=True)
        for layer in layers[first - 1::step]:
            rows.append(measure(pair, layer, layout, rounds, compilations))
            print("  ".join(cells(rows[-1])), flush=True)
    Console().print(summary(rows))


def summary(rows: list[Row]) -> Table:
    """The ratios of all layers."""
    view = Table("of both versions", "layers", "ratio, geometric mean", "least to greatest", "median ms, this / other")
    for name, found in (("run", [row.run for row in rows]), ("compile, default", [row.default for row in rows]),
                        ("compile, F(4,3)", [row.winograd for row in rows]),
                        ("compile, cached", [row.cached for row in rows])):
        pairs = [pair for pair in found if pair is not None]
        if pairs:
            ratios = sorted(ours / theirs for ours, theirs in pairs)
            ours, theirs = (1e3 * statistics.median(side) for side in zip(*pairs, strict=True))
            view.add_row(name, str(len(pairs)), f"{geometric(ratios):.3f}", f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
                         f"{ours:.2f} / {theirs:.2f}")
    return view


if __name__ == "__main__":
    main_command()
