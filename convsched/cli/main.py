"""The command line: `convsched bench`, `tune`, `explain`, `cache` and `info`.

A command imports what it needs when it runs, so that `convsched --help` answers at once.
"""

from __future__ import annotations

import errno
import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from convsched.cli.cache import cache
from convsched.cli.explain import explain
from convsched.cli.verify import verify
from convsched.errors import shortened
from convsched.options import ACCURACIES, INTERRUPTED_EXIT_CODE, MAX_THREADS, Accuracy
from convsched.problem.layout import LAYOUTS

if TYPE_CHECKING:
    from rich.console import Console

    from convsched.benchmark.cases import Case
    from convsched.benchmark.report import Report

PATH = click.Path(path_type=Path, dir_okay=False)
THREADS = click.IntRange(min=1, max=MAX_THREADS)
SIDE_DIGITS = 9  # of a side of an image


def _size(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """HxW, such as 224x224, or one number for both sides."""
    if value is None:
        return None
    sides = value.lower().split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() and side.strip("0") for side in sides):
        raise click.BadParameter(f"{shortened(value)} is not a size such as 224x224")
    if any(len(side) > SIDE_DIGITS for side in sides):
        raise click.BadParameter(f"{shortened(value)} has a side of more than {SIDE_DIGITS} digits")
    return int(sides[0]), int(sides[-1])


def _seconds(context: click.Context, parameter: click.Parameter, value: float) -> float:
    """A positive, finite number."""
    if not 0 < value < math.inf:
        raise click.BadParameter(f"{value:g} is not a positive number of seconds")
    return value


def _algorithm(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """The name of an algorithm; whether it applies is each layer's matter."""
    if value is not None:
        from convsched.errors import LoweringError
        from convsched.plan.families import parse_name

        try:
            parse_name(value)
        except LoweringError as error:
            raise click.BadParameter(str(error)) from error
    return value


def _writable(context: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    """A file in a folder that can be written, which is tried before the work and not after it."""
    if value is None:
        return None
    folder = value.absolute().parent
    if not folder.is_dir():
        raise click.BadParameter(f"the folder of {value} does not exist")
    if value.exists() and not value.is_file():
        raise click.BadParameter(f"{value} is not a regular file")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise click.BadParameter(f"{value} cannot be written: {error.strerror}") from error
    return value


class _Commands(click.Group):
    """Commands whose errors raised on purpose, and those of files, are messages without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        from convsched.errors import ConvschedError

        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except ConvschedError as error:
            raise click.ClickException(str(error)) from error
        except MemoryError as error:
            raise click.ClickException(f"there is not enough memory: {error}") from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # `| head`: click ends without a word
                raise
            raise click.ClickException(str(error)) from error


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int,
                  file: TextIO | None = None, line: str | None = None) -> None:  # fmt: skip
    """A warning as one line, without the place in the code."""
    click.echo(f"warning: {message}", err=True)


@click.group(cls=_Commands)
@click.version_option(package_name="convsched")
def main() -> None:
    """Convolution layers, compiled to CPU machine code."""


@main.command()
@click.option("--refresh", is_flag=True, help="Measure the machine again (about 2 s).")
def info(refresh: bool) -> None:
    """Print the machine, versions, measured speeds of cores and caches, and what disturbs timing now."""
    from convsched.cli.info import print_info

    print_info(click.echo, refresh)


@main.command()
@click.argument("network")
@click.option("--threads", type=THREADS, default=1, show_default=True, help="Threads a layer.")
@click.option("--layout", type=click.Choice([*LAYOUTS]), default="nchw", show_default=True)
@click.option("--layer", "wanted", default="", help="Only layers with this in their name or text.")
@click.option("--input-size", callback=_size, metavar="HxW", help="For a model file that leaves it open.")
@click.option("--image", type=PATH, help="What the first layers read: a picture, or a .npy array.")
@click.option("--seconds", type=float, callback=_seconds, default=0.5, show_default=True, help="Timing a layer.")
@click.option("--algorithm", callback=_algorithm, help="Only this, such as direct or winograd(2,3), where it applies.")
@click.option("--accuracy", type=click.Choice(ACCURACIES), default="normal", show_default=True)
@click.option("--json", "json_file", type=PATH, callback=_writable, help="Write all results to this file.")
@click.pass_context
def bench(
    context: click.Context,
    network: str,
    threads: int,
    layout: str,
    wanted: str,
    input_size: tuple[int, int] | None,
    image: Path | None,
    seconds: float,
    algorithm: str | None,
    accuracy: Accuracy,
    json_file: Path | None,
) -> None:
    """Compile, check and time every layer of NETWORK: a known network's name, or an .onnx file.

    The exit code is 1 if any layer's answer is wrong or missing. A layer whose weights, input or right answer are not
    finite is told as such, and is no failure.
    """
    from convsched.autotune.measure.measure import measure_peak
    from convsched.benchmark.cases import read_image
    from convsched.benchmark.report import Report, to_json
    from convsched.benchmark.run import Settings

    cases, skipped = _read_cases(network, input_size, wanted)
    pixels = read_image(image) if image is not None else None
    settings = Settings(threads, layout, seconds, pixels, accuracy, algorithm)
    report = _run(cases, Report(network, settings, measure_peak(), len(cases), skipped=skipped))
    if json_file is not None:
        _write_atomically(json_file, json.dumps(to_json(report), indent=1) + "\n")
    if not report.complete:
        context.exit(INTERRUPTED_EXIT_CODE)
    context.exit(1 if report.failures else 0)


@main.command()
@click.argument("network")
@click.option("--budget", default="60s", show_default=True, help="60s, 5m, or 500 candidates, in all.")
@click.option("--threads", type=THREADS, default=1, show_default=True, help="Threads a layer.")
@click.option("--layout", type=click.Choice([*LAYOUTS]), default="nchw", show_default=True)
@click.option("--layer", "wanted", default="", help="Only layers with this in their name or text.")
@click.option("--input-size", callback=_size, metavar="HxW", help="For a model file that leaves it open.")
@click.option("--algorithm", callback=_algorithm, help="Only this, such as direct or winograd(4,3), where it applies.")
@click.option("--accuracy", type=click.Choice(ACCURACIES), default="normal", show_default=True)
@click.option("--cache", "file", type=PATH, help="The schedule cache (default: in the cache folder).")
@click.pass_context
def tune(
    context: click.Context,
    network: str,
    budget: str,
    threads: int,
    layout: str,
    wanted: str,
    input_size: tuple[int, int] | None,
    algorithm: str | None,
    accuracy: Accuracy,
    file: Path | None,
) -> None:
    """Search the best schedule of every layer of NETWORK on this machine; `bench` then uses it.

    Equal layers are tuned once; the budget is spent where the work is. Ctrl-C keeps what was measured.
    """
    from convsched.cli.tune import run

    cases, _ = _read_cases(network, input_size, wanted)
    context.exit(run(cases, budget, threads, layout, file, accuracy, algorithm))


def _read_cases(
    network: str, input_size: tuple[int, int] | None, wanted: str
) -> tuple[list[Case], tuple[str, ...]]:
    """The layers of a model file or a built-in network, and what was passed over."""
    from convsched.benchmark.cases import model_case, table_case

    skipped: tuple[str, ...] = ()
    if network.lower().endswith(".onnx"):
        from convsched.graph.onnx.layers import read_model

        model = read_model(network, input_size=input_size)
        cases, skipped = [model_case(layer) for layer in model.layers], model.skipped
    elif input_size is not None:
        why = "a built-in network has a fixed input size; sizes are for .onnx files"
        raise click.BadParameter(why, param_hint="--input-size")
    else:
        from convsched.networks.known import network as known_network

        cases = [
            table_case(layer.name, layer.problem, layer.count) for layer in known_network(network).layers
        ]
    chosen = [case for case in cases if wanted in case.name or wanted in case.problem.text]
    if not chosen:
        why = f"no layer of {network} has {wanted!r} in its name or text; leave out --layer to see all"
        raise click.BadParameter(why, param_hint="--layer")
    return chosen, skipped


def _run(cases: list[Case], report: Report) -> Report:
    """Runs the layers and shows rows as they come; Ctrl-C ends it with the rows so far."""
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        report = _run_live(cases, report, console)
    else:
        console = Console(width=200)  # a log has no width: no line is to be cut
        report = _run_plain(cases, report)
    from convsched.benchmark.report import table

    console.print(table(report, console.width))
    return report


def _run_plain(cases: list[Case], report: Report) -> Report:
    from convsched.benchmark.report import line

    def show(report: Report) -> None:
        click.echo(line(report, report.rows[-1]))

    return _run_rows(cases, report, show)


def _run_live(cases: list[Case], report: Report, console: Console) -> Report:
    """The table on the screen, its latest rows as far as they fit; it goes when the run is over."""
    from rich.live import Live

    from convsched.benchmark.report import table

    def view(report: Report) -> Any:
        return table(report, console.width, last=max(1, console.height - 12))

    with Live(view(report), console=console, transient=True, auto_refresh=False) as live:
        return _run_rows(cases, report, lambda report: live.update(view(report), refresh=True))


def _run_rows(cases: list[Case], report: Report, show: Callable[[Report], None]) -> Report:
    from dataclasses import replace

    import convsched
    from convsched.benchmark.run import run_layers

    try:
        for row in run_layers(cases, convsched.compile, report.settings):
            report = replace(report, rows=(*report.rows, row))
            show(report)
    except KeyboardInterrupt:
        click.echo("stopped", err=True)
    return report


def _write_atomically(path: Path, text: str) -> None:
    """A reader sees the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


cache.add_command(verify)
main.add_command(cache)
main.add_command(explain)
