"""From which size Strassen's algorithm wins: `python bench/crossover.py`.

Square products of matrices, n output channels by n input channels by n pixels, as 1x1 layers and as fully connected
ones: strassen(1) and strassen(2) against our own direct convolution, by its default recipe and by the best of a few
others, which pack the input or do not, with the register tiles of known matrix libraries, and with one of whole squares
of vectors by pixels, which nchw stores without masks. Answers are checked against
the float64 oracle first. All are timed in turn; the least times count. A level wins from the least n at which, and at
all greater ones, it is faster.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import click
from rich import box
from rich.console import Console
from rich.table import Table

from convsched.autotune.measure.measure import CLOCK, Timing, interleave, peak_call
from convsched.benchmark.cases import Arrays, Case, make_arrays, relative_error
from convsched.benchmark.run import bound_call
from convsched.errors import ConvschedError
from convsched.kernels.run.kernel import Kernel
from convsched.machine import Machine, host
from convsched.plan.defaults import default_recipe
from convsched.plan.families import named
from convsched.plan.plan import Plan, Target
from convsched.problem import Conv2d, Linear, Problem
from convsched.problem.layout import LAYOUTS, from_layout
from convsched.problem.reference import convolve
from convsched.recipes.direct import Channels
from convsched.recipes.recipe import Recipe

SIZES = "128,192,256,384,512,768,1024,1536,2048"
STRASSEN = ("strassen(1)", "strassen(2)")
DEFAULT = "default"  # of direct convolution
TILES = {16: ((2, 6), (3, 4), (1, 8)), 32: ((2, 14), (4, 6), (1, 16))}  # registers -> (vectors of channels, pixels)
ERROR_LIMIT = 2e-4  # of max |error| / rms(output): the loosest accuracy class

Call = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One product of matrices: times by name of the recipe or algorithm, and the peak of the same rounds."""

    kind: str
    n: int
    problem: Problem
    timings: Mapping[str, Timing]
    peak: float

    @property
    def best(self) -> str:
        """The name of the fastest direct recipe."""
        return min(self.timings.keys() - set(STRASSEN), key=lambda name: self.timings[name].minimum)

    def rate(self, name: str) -> float:
        """GFLOP/s of the definition."""
        return self.problem.flops / self.timings[name].minimum * 1e-9

    def ratio(self, name: str, other: str) -> float:
        """The speed of one over that of the other."""
        return self.timings[other].minimum / self.timings[name].minimum


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--sizes", default=SIZES, show_default=True, help="Each n.")
@click.option("--kinds", default="1x1,linear", show_default=True, help="1x1 layers, fully connected ones, or both.")
@click.option("--layout", type=click.Choice([*LAYOUTS]), default="nchw", show_default=True, help="Of 1x1 layers.")
@click.option("--repeats", type=click.IntRange(min=1), default=9, show_default=True, help="Rounds.")
@click.option("--sample", default=20.0, show_default=True, help="Milliseconds of each in one round, at least.")
@click.option("--cpu-time", is_flag=True, help="Count the time of the core, not that in which others have it.")
def main(sizes: str, kinds: str, layout: str, repeats: int, sample: float, cpu_time: bool) -> None:
    """Strassen's algorithm against direct convolution on square products of matrices, on one thread."""
    if unknown := set(kinds.split(",")) - {"1x1", "linear"}:
        raise click.UsageError(f"--kinds {','.join(sorted(unknown))}: use 1x1, linear, or both")
    try:
        counts = sorted({int(word) for word in sizes.split(",")})
    except ValueError as error:
        raise click.UsageError(f"--sizes {sizes}: write numbers such as 128,256") from error
    if counts[0] < 4:
        raise click.UsageError(f"--sizes {sizes}: two levels cut each side in 4")
    clock = time.thread_time_ns if cpu_time else CLOCK
    rows: list[Row] = []
    for kind in kinds.split(","):
        for n in counts:
            rows.append(measured(kind, n, layout if kind == "1x1" else "nchw", repeats, sample * 1e-3, clock))
            click.echo(f"{rows[-1].problem.text}: " + "  ".join(
                f"{name} {rows[-1].rate(name):.1f}" for name in rows[-1].timings) + " GFLOP/s")
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table(rows, layout))
    for kind in kinds.split(","):
        for level in STRASSEN:
            click.echo(f"{kind}: {level} wins over " + ", ".join(
                f"the {what} direct recipe {crossover([row for row in rows if row.kind == kind], level, what)}"
                for what in (DEFAULT, "best")))


def problem_of(kind: str, n: int) -> Problem:
    """The layer that is a square product of matrices."""
    if kind == "linear":
        return Linear(n, n, batch_size=n, activation="relu")
    height = max(size for size in range(1, math.isqrt(n) + 1) if n % size == 0)
    return Conv2d(n, n, 1, input_size=(height, n // height), activation="relu")


def direct_recipes(problem: Problem, machine: Machine, layout: str) -> Iterator[tuple[str, Recipe]]:
    """The default, and others around it by name."""
    default = default_recipe(problem, machine, layout)
    yield DEFAULT, default
    if not isinstance(default, Channels):
        return
    for vectors, pixels in TILES[machine.registers]:
        tiles = max(1, machine.l2 // 2 // (4 * problem.C * pixels))  # of packed input, that stay in half of L2
        tiled = replace(default, vectors=vectors, pixels=pixels, block=tiles, unroll=4, pack="none")
        yield f"{vectors}x{pixels}", tiled
        yield f"{vectors}x{pixels} packed", replace(tiled, pack="packed")


def measured(kind: str, n: int, layout: str, repeats: int, sample: float, clock: Callable[[], int]) -> Row:
    """All recipes of one product, checked and timed in turn. One that makes no legal schedule is left out."""
    problem, machine = problem_of(kind, n), host.machine()
    arrays = make_arrays(Case("", problem))
    expected = convolve(problem, arrays.x, arrays.weight, arrays.bias)
    recipes = [(name, "direct", recipe) for name, recipe in direct_recipes(problem, machine, layout)]
    recipes += [(name, name, named(name, problem).default(machine, layout, 1)) for name in STRASSEN]
    calls: dict[str, Call] = {}
    for name, algorithm, recipe in recipes:
        try:
            kernel = Kernel(Plan.of(named(algorithm, problem), Target(machine, layout), recipe))
        except ConvschedError:
            if name == DEFAULT or name in STRASSEN:
                raise
            continue
        calls[name] = checked(kernel, problem, arrays, layout, expected)
    peak, flops = peak_call()
    timings = interleave({**calls, "peak": peak}, repeats=repeats, min_seconds=sample, clock=clock)
    return Row(kind, n, problem, {name: timings[name] for name in calls}, flops / timings["peak"].minimum)


def checked(kernel: Kernel, problem: Problem, arrays: Arrays, layout: str, expected: object) -> Call:
    """The call of a kernel, if its answer is right."""
    call, output = bound_call(kernel, problem, arrays, layout)
    call()
    error = relative_error(from_layout(output, problem.output_shape, layout), expected)  # type: ignore[arg-type]
    if error > ERROR_LIMIT:
        sys.exit(f"{problem.text} is wrong by {kernel.algorithm}, {kernel.recipe}: error {error:.1e}")
    return call


def crossover(rows: Sequence[Row], level: str, what: str) -> str:
    """The least n from which a level is faster, in words."""
    wins = [row.ratio(level, row.best if what == "best" else DEFAULT) > 1 for row in rows]
    first = len(wins) - next((i for i, won in enumerate(reversed(wins)) if not won), len(wins))
    return f"from n={rows[first].n}" if first < len(rows) else f"at no n up to {rows[-1].n}"


def table(rows: Sequence[Row], layout: str) -> Table:
    """GFLOP/s, and the speed of each level over that of direct convolution."""
    view = Table(title=f"GFLOP/s of square products, 1 thread, {layout}", title_justify="left", box=box.SIMPLE_HEAD,
                 show_edge=False, caption="Ratios: the speed over that of direct convolution.", caption_justify="left")
    view.add_column("")
    for column in ("n", "peak", DEFAULT, "best", "", *STRASSEN, *(f"{level[8:]} / {what}" for level in STRASSEN
                                                                  for what in (DEFAULT, "best"))):
        view.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for row in rows:
        rates = (row.peak * 1e-9, row.rate(DEFAULT), row.rate(row.best))
        ratios = [row.ratio(level, other) for level in STRASSEN for other in (DEFAULT, row.best)]
        view.add_row(row.kind, str(row.n), *(f"{rate:.1f}" for rate in rates), row.best,
                     *(f"{row.rate(level):.1f}" for level in STRASSEN), *(f"{ratio:.2f}" for ratio in ratios))
    return view


if __name__ == "__main__":
    main()
