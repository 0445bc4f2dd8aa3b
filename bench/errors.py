"""Predicted errors against measured ones, for every algorithm and several kinds of data: `python bench/errors.py`.

Layers are small, without bias, so that the truth in float64 takes no time. Errors are over rms(output):

- expected, worst: as `kernel.predicted_error` has them. `worst` is for data whose filters and tiles all have the same
  norm, which independent data nearly has: it must hold for normal data and behind a ReLU.
- bound: `norm_bound` times the greatest norms of a filter and of a tile of this data. It must hold for all data.
- x direct: the error's root mean square, and its greatest, over those of direct convolution on the same data.

Data: `normal`, N(0, 1); `relu`, max(0, N(0, 1)); `mean`, N(10, 1); `huge`, normal with one channel a thousand times
more. Filters are normal. What no class of accuracy takes has a note in place of numbers. The exit status is 1 if an
error is beyond what must hold.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import click
import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

import convsched
from convsched.algebra.accuracy import Prediction
from convsched.errors import LoweringError
from convsched.lower.plane import Fold
from convsched.machine import host
from convsched.plan.families import fft, parse_name
from convsched.problem import Conv2d
from convsched.problem.layout import LAYOUTS, Layout, from_layout, to_layout
from convsched.problem.reference import convolve
from convsched.problem.rules import Pair

Array: TypeAlias = NDArray[np.float32]

KINDS = ("normal", "relu", "mean", "huge")
EQUAL_NORMS = ("normal", "relu")  # the data that `worst` is for
MAPS = 64  # output channels
PATH = click.Path(path_type=Path, dir_okay=False)

# Filter, image, and the algorithms beside direct; padding keeps the size of all but the long filters.
LAYERS: dict[str, tuple[tuple[int, int], Pair, tuple[str, ...]]] = {
    "3x3": ((3, 3), 14, ("im2col", "winograd(2,3)", "winograd(4,3)", "winograd(6,3)", "fft(8)", "fft(16)")),
    "5x5": ((5, 5), 14, ("im2col", "winograd(2,5)", "winograd(4,5)", "fft(16)")),
    "7x7": ((7, 7), 14, ("im2col", "winograd(2,7)", "winograd(4,7)", "fft(16)")),
    "1x7": ((1, 7), 14, ("im2col", "winograd(2,7)", "winograd(4,7)", "winograd(6,7)", "fft(16)")),
    "1x256": ((1, 256), (1, 512), ("im2col", "fft(32)x(32)", "fft(64)x(16)")),
    "1x1": ((1, 1), 14, ("strassen(1)", "strassen(2)")),
}


@dataclass(frozen=True)
class Row:
    """A layer's errors by one algorithm on one kind of data, all over rms(output); ratios are over direct's."""

    layer: str
    algorithm: str
    kind: str
    accuracy: str = ""
    expected: float = math.nan
    worst: float = math.nan
    bound: float = math.nan
    measured: float = math.nan
    rms_ratio: float = math.nan
    ratio: float = math.nan
    note: str = ""

    @property
    def holds(self) -> bool:
        """Whether the error is within the bound, and within the worst case where that is one."""
        if self.note:
            return True
        return self.measured <= self.bound and (self.kind not in EQUAL_NORMS or self.measured <= self.worst)


@dataclass(frozen=True)
class Tiles:
    """The tiles of an algorithm on the image with its borders: `outputs` of a tile along the rows and the columns, what
    it `reads` of each. Of a folded axis, tile row i has the elements from i times the outputs along a row."""

    outputs: tuple[int, int]
    reads: tuple[int, int]
    fold: Fold = ""

    def greatest_norm(self, problem: Conv2d, x: Array) -> float:
        """The greatest 2-norm of a tile of NCHW data over all input channels."""
        top, left, bottom, right = problem.padding
        squares = np.square(x, dtype=np.float64).sum(1)
        (high, wide), (rows, columns) = self.outputs, self.reads
        end = rows * columns  # more than any tile reaches beyond the image
        squares = np.pad(squares, ((0, 0), (top, bottom + end), (left, right + end)))
        if not self.fold:
            windows = np.lib.stride_tricks.sliding_window_view(squares, self.reads, (1, 2))
            sums = windows[:, :problem.E:high, :problem.F:wide].sum((-2, -1))
        else:
            lines = squares if self.fold == "w" else squares.swapaxes(1, 2)
            starts = np.arange(0, problem.F if self.fold == "w" else problem.E, high * wide)
            tile = np.arange(rows)[:, np.newaxis] * wide + np.arange(columns)
            sums = lines[:, :, starts[:, np.newaxis, np.newaxis] + tile].sum((-2, -1))
        return float(np.sqrt(sums.max()))


def tiles_of(problem: Conv2d, algorithm: str) -> Tiles:
    """The tiles of a member by its full name: what one output reads, for sums of products."""
    family, sizes = parse_name(algorithm)
    if family == "winograd":
        taps = (problem.R, problem.S)
        left = iter(sizes if len(sizes) > 1 else sizes * 2)
        outputs = [next(left)[0] if r > 1 else 1 for r in taps]
        return Tiles((outputs[0], outputs[1]), (outputs[0] + taps[0] - 1, outputs[1] + taps[1] - 1))
    if family == "fft":
        made = fft(problem, tuple(n for n, in sizes))
        return Tiles((made.column.outputs, made.row.outputs), (made.column.reads, made.row.reads), made.fold)
    return Tiles((1, 1), (problem.R, problem.S))


def bound(problem: Conv2d, algorithm: str, prediction: Prediction, x: Array, weight: Array) -> float:
    """The greatest error of data by its norms: norm_bound |w| |x|.

    Strassen's filter and tile are of all blocks: 2^levels outputs and 2^levels pixels, or tiles, each with all input
    channels.
    """
    family, sizes = parse_name(algorithm)
    blocks = 2 ** sizes[0][0] if family == "strassen" else 1
    filters = float(np.sqrt(np.square(weight, dtype=np.float64).sum((1, 2, 3)).max()))
    return blocks * prediction.norm_bound * filters * tiles_of(problem, algorithm).greatest_norm(problem, x)


def data(problem: Conv2d, kind: str, seed: int) -> tuple[Array, Array]:
    """x and the weights."""
    random = np.random.default_rng(seed)
    x, weight = (random.standard_normal(shape, np.float32) for shape in (problem.input_shape, problem.weight_shape))
    match kind:
        case "relu":
            x = np.maximum(x, 0)
        case "mean":
            x += 10
        case "huge":
            x[:, problem.C // 3] *= 1000
    return x, weight


def layer_of(name: str, channels: int) -> Conv2d:
    """A layer of the table."""
    kernel, image, _ = LAYERS[name]
    padding = (0, 0) if max(kernel) > 16 else (kernel[0] // 2, kernel[1] // 2)
    return Conv2d(channels, MAPS, kernel, padding=padding, bias=False, input_size=image)


def measure(problem: Conv2d, algorithms: Sequence[str], kinds: Sequence[str], layout: Layout,
            seed: int) -> Iterator[Row]:
    """Direct and the algorithms on each kind of data."""
    samples = {kind: data(problem, kind, seed) for kind in kinds}
    truths = {kind: convolve(problem, x, weight) for kind, (x, weight) in samples.items()}
    direct: dict[str, tuple[float, float]] = {}
    for algorithm in ("direct", *algorithms):
        try:
            kernel = convsched.compile(problem, algorithm=algorithm, accuracy="fast", threads=1, layout=layout,
                                       cache=False)
        except LoweringError as error:
            yield Row(problem.text, algorithm, "all", note=str(error))
            continue
        prediction = kernel.predicted_error
        for kind, (x, weight) in samples.items():
            truth = truths[kind]
            y = from_layout(kernel(to_layout(x, layout), weight), problem.output_shape, layout)
            errors, scale = y - truth, _rms(truth)
            found = (_rms(errors), float(np.abs(errors).max()))
            base = direct.setdefault(kind, found if algorithm == "direct" else (math.nan, math.nan))
            yield Row(problem.text, kernel.algorithm, kind, prediction.accuracy or "", prediction.expected,
                      prediction.worst, bound(problem, kernel.algorithm, prediction, x, weight) / scale,
                      found[1] / scale, found[0] / base[0], found[1] / base[1])


def _rms(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


@click.command()
@click.option("--only", "names", multiple=True, type=click.Choice(list(LAYERS)), help="Only layers of this filter.")
@click.option("--channels", default="64,512", show_default=True, help="Input channels.")
@click.option("--data", "kinds", multiple=True, type=click.Choice(KINDS), help="Only this kind of data.")
@click.option("--layout", type=click.Choice([*LAYOUTS]), default="nchw", show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the data.")
@click.option("--json", "json_file", type=PATH, help="Write results here.")
def main(names: tuple[str, ...], channels: str, kinds: tuple[str, ...], layout: Layout, seed: int,
         json_file: Path | None) -> None:
    """Predicted against measured errors."""
    rows: list[Row] = []
    for name in names or LAYERS:
        for count in map(int, channels.split(",")):
            rows += measure(layer_of(name, count), LAYERS[name][2], kinds or KINDS, layout, seed)
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table(rows))
    if json_file is not None:
        json_file.write_text(json.dumps(to_json(rows, layout, seed), indent=1) + "\n")
    broken = [row for row in rows if not row.holds]
    for row in broken:
        click.echo(f"{row.layer}, {row.algorithm}, {row.kind}: the error is {row.measured:.2e}", err=True)
    sys.exit(1 if broken else 0)


def table(rows: Sequence[Row]) -> Table:
    """A row for each kind of data; layer, algorithm and predictions once for all. Notes come last."""
    notes = "".join(f"\n{row.layer}, {row.algorithm}: {row.note}" for row in rows if row.note)
    view = Table(title="max |error| / rms(output)", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False,
                 caption=f"!: beyond worst, for normal and relu, or beyond the bound of this data's norms.{notes}",
                 caption_justify="left")
    for column in ("layer", "algorithm", "class", "expected", "worst", "data", "measured", "", "bound", "rms x direct",
                   "max x direct"):
        words = column in ("layer", "algorithm", "class", "data")
        view.add_column(column, justify="left" if words else "right", no_wrap=True)
    last = Row("", "", "")
    for row in rows:
        if last.layer and row.layer != last.layer:
            view.add_section()
        layer = row.layer.removeprefix("conv2d ") if row.layer != last.layer else ""
        if row.note:
            view.add_row(layer, row.algorithm, "none")
        else:
            new = (row.layer, row.algorithm) != (last.layer, last.algorithm)
            predicted = (row.algorithm, row.accuracy, f"{row.expected:.1e}", f"{row.worst:.1e}")
            view.add_row(layer, *(predicted if new else [""] * 4), row.kind, f"{row.measured:.1e}",
                         "" if row.holds else "!", f"{row.bound:.1e}", f"{row.rms_ratio:.2f}", f"{row.ratio:.2f}")
        last = row
    return view


def to_json(rows: Sequence[Row], layout: str, seed: int) -> dict[str, Any]:
    """Everything in plain types."""
    plain = [{name: None if value != value else value for name, value in asdict(row).items()} for row in rows]
    return {"machine": host.machine().text, "layout": layout, "seed": seed,
            "rows": [{**values, "holds": row.holds} for values, row in zip(plain, rows, strict=True)]}


if __name__ == "__main__":
    main()
