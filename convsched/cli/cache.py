"""`convsched cache`: what has been measured, why there is none, and moving it between machines."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from convsched.cli.output import PATH, _console, _file, _opened, _print, _width
from convsched.errors import shortened
from convsched.machine import host
from convsched.options import ACCURACIES, MAX_THREADS, Accuracy
from convsched.problem.layout import LAYOUTS

if TYPE_CHECKING:
    from convsched.autotune.store.cache import Entry
    from convsched.autotune.store.record import Record

LIST_COLUMNS = ("problem", "layout", "threads", "accuracy", "algorithm", "ms", "default", "speed-up", "tried",
               "failed", "tuning", "machine")  # fmt: skip
SHOW_COLUMNS = ("", "ms", "cold ms", "spread", "KiB", "error", "status", "flags", "algorithm", "recipe or schedule")
SHOWN_CANDIDATES = 10  # candidates of a key, unless all are asked for
SIZE_DIGITS = 15  # of a size in bytes
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def _size(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """Bytes, such as 500K, 100M or 2G."""
    if value is None:
        return None
    digits, unit = (value[:-1], value[-1].upper()) if value[-1:].isalpha() else (value, "")
    if not (digits.isascii() and digits.isdigit()) or unit not in _UNITS:
        raise click.BadParameter(f"{shortened(value)} is not a size such as 500K, 100M or 2G")
    if len(digits) > SIZE_DIGITS:
        raise click.BadParameter(f"{shortened(value)} has more than {SIZE_DIGITS} digits")
    return int(digits) * _UNITS[unit]


def _day(context: click.Context, parameter: click.Parameter, value: datetime | None) -> float | None:
    """Unix seconds of a date, in UTC."""
    return None if value is None else value.replace(tzinfo=UTC).timestamp()


@click.group()
def cache() -> None:
    """The schedule cache: list, show, explain, prune, and carry to another machine."""


@cache.command("list")
@click.argument("wanted", default="", metavar="[PROBLEM|NETWORK]")
@_file
def list_(wanted: str, file: Path | None) -> None:
    """List all tuned layers with their best time, or those of part of a PROBLEM's text or of a NETWORK."""
    with _opened(file) as store:
        entries = _matching(store.entries(), wanted)
        if not entries:
            click.echo(_none(store.path, wanted))
            return
        click.echo(f"{len(entries)} keys")
        _print_list([_list_row(entry) for entry in entries])


@cache.command()
@click.argument("wanted", metavar="PROBLEM|NETWORK")
@click.option("--all", "everything", is_flag=True, help="All candidates, failures too.")
@_file
@click.pass_context
def show(context: click.Context, wanted: str, everything: bool, file: Path | None) -> None:
    """Show the candidates measured for layers, the best first.

    Layers are given by part of a PROBLEM's text, or of the name of a known NETWORK, or as an .onnx file.
    """
    with _opened(file) as store:
        entries = _matching(store.entries(), wanted)
        for entry in entries:
            records = store.records(entry.key)
            shown = _shown(entry, records, everything)
            run = f"; latest run: {entry.run.budget}, {entry.run.tried} tried" if entry.run else ""
            click.echo(f"{entry.key.text}\n{len(shown)} of {len(records)} candidates{run}")
            _print(SHOW_COLUMNS, [_show_row(record, record == entry.winner) for record in shown])
            if entry.winner is not None:
                recipe = entry.winner.recipe or "no recipe"
                click.echo(f"best: {entry.winner.algorithm}, {recipe}\n  {entry.winner.schedule}\n")
        if not entries:
            click.echo(_none(store.path, wanted))
            context.exit(1)


@cache.command("explain-miss")
@click.argument("problem")
@click.option("--layout", type=click.Choice([*LAYOUTS]), default="nchw", show_default=True)
@click.option("--threads", type=click.IntRange(min=1, max=MAX_THREADS),
              help="Default: as many as a compilation would use.")  # fmt: skip
@click.option("--accuracy", type=click.Choice(ACCURACIES), default="normal", show_default=True)
@_file
def explain_miss(problem: str, layout: str, threads: int | None, accuracy: Accuracy, file: Path | None) -> None:
    """Say why a PROBLEM (its text, as `cache list` prints it) has no schedule on this machine."""
    with _opened(file) as store:
        from convsched.autotune.store.record import Key
        from convsched.machine import default_threads
        from convsched.plan.plan import Target
        from convsched.problem import parse_problem

        target = Target(host.machine(), layout, threads or default_threads(), accuracy)
        click.echo(store.explain_miss(Key.of(parse_problem(problem), target)))


@cache.command()
@click.option("--keep", type=click.Choice(["winners", "ok", "all"]), default="winners", show_default=True,
              help="The winners and defaults, all but failures, or all.")  # fmt: skip
@click.option("--older-than", type=click.DateTime(["%Y-%m-%d"]), callback=_day, metavar="YYYY-MM-DD",
              help="Remove all that was measured before this day (UTC).")  # fmt: skip
@click.option("--max-size", callback=_size, metavar="SIZE",
              help="Then the oldest, until the file is as small: 500K, 100M.")  # fmt: skip
@click.option("--objects", is_flag=True, help="Compiled kernels instead: all, or with --max-size the oldest used.")
@_file
@click.pass_context
def prune(context: click.Context, keep: Any, older_than: float | None, max_size: int | None, objects: bool,
          file: Path | None) -> None:  # fmt: skip
    """Remove candidates, and everything that this version cannot read.

    With --objects it is the cache of compiled kernels that is emptied or trimmed, and the schedules stay.
    """
    if objects:
        _prune_objects(context, max_size)
        return
    with _opened(file) as store:
        pruned = store.prune(keep, older_than, max_size)
        click.echo(f"{pruned.removed} removed, {pruned.kept} kept, {pruned.bytes / 1024:.0f} KiB")


def _prune_objects(context: click.Context, max_size: int | None) -> None:
    """Empty or trim the cache of compiled kernels; options that are about schedules are refused."""
    from convsched.kernels.objects import prune_entries

    for name in ("keep", "older_than", "file"):
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            raise click.UsageError("--objects goes alone or with --max-size: compiled kernels have no winners")
    pruned = prune_entries(max_size or 0)
    click.echo(f"{pruned.removed} removed, {pruned.kept} kept, {pruned.bytes / 1024:.0f} KiB")


@cache.command()
@click.argument("target", type=PATH)
@_file
def export(target: Path, file: Path | None) -> None:
    """Write all candidates to a file of JSON lines, for `cache import` on another machine."""
    with _opened(file) as store:
        click.echo(f"{store.export(target)} candidates written to {target}")


@cache.command("import")
@click.argument("source", type=PATH)
@_file
def import_(source: Path, file: Path | None) -> None:
    """Add the candidates of a file that `cache export` wrote: all of them, or none if a line is wrong."""
    with _opened(file) as store:
        counts = store.import_(source)
        click.echo(f"{counts.added} added, {counts.updated} updated, {counts.skipped} there already")


def _none(path: Path, wanted: str) -> str:
    return f"no entry of {path} is for {wanted!r}" if wanted else f"{path} has no entries"


def _matching(entries: Sequence[Entry], wanted: str) -> list[Entry]:
    """The entries with this in their problem's text, or whose problem is a layer of such a network."""
    if not wanted:
        return [*entries]
    layers = _layers(wanted)
    text = " ".join(wanted.split())
    return [entry for entry in entries if text in entry.key.problem or entry.key.problem in layers]


def _layers(wanted: str) -> set[str]:
    """The problems of the known networks with this in their name, or of a model file."""
    if wanted.lower().endswith(".onnx"):
        from convsched.graph.onnx.layers import read_model

        return {layer.problem.text for layer in read_model(wanted).layers}
    from convsched.networks.known import NETWORKS

    chosen = [wanted] if wanted in NETWORKS else [name for name in NETWORKS if wanted in name]
    return {layer.problem.text for name in chosen for layer in NETWORKS[name]().layers}


def _list_row(entry: Entry) -> tuple[str, ...]:
    from convsched.autotune.store.record import FORMAT

    key, winner = entry.key, entry.winner
    best = winner.hot if winner else None
    tuning = {None: "-", True: "complete", False: "partial"}[entry.complete]
    return (
        key.problem, key.layout, str(key.threads), key.accuracy, winner.algorithm if winner else "-",
        _milliseconds(best), _milliseconds(entry.default),
        f"{entry.default / best:.2f}" if best and entry.default else "-",
        str(entry.candidates), str(entry.candidates - entry.statuses.get("ok", 0)),
        tuning if key.format == FORMAT else f"format {key.format}", key.machine,
    )  # fmt: skip


def _shown(entry: Entry, records: Sequence[Record], everything: bool) -> list[Record]:
    """A key's candidates, the best first; without the failures and the slow ones, unless all are wanted."""
    ranked = sorted(records, key=lambda record: (record != entry.winner, record.hot or float("inf")))
    return ranked if everything else [record for record in ranked if record.status == "ok"][:SHOWN_CANDIDATES]


def _show_row(record: Record, is_best: bool) -> tuple[str, ...]:
    return (
        "best" if is_best else "default" if record.is_default else "",
        _milliseconds(record.hot), _milliseconds(record.cold),
        "-" if record.spread is None else f"{record.spread:.1%}", f"{record.workspace / 1024:.0f}",
        "-" if record.error is None else f"{record.error:.1e}",
        f"{record.status}: {record.message}" if record.message else record.status, " ".join(record.flags),
        record.algorithm, record.recipe or record.schedule,
    )  # fmt: skip


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.4g}"


def _print_list(rows: Sequence[Sequence[str]]) -> None:
    """The table of `cache list`; in a narrow terminal one for each machine, whose name stands above it."""
    console = _console()
    if _width(LIST_COLUMNS, rows) <= console.width:
        _print(LIST_COLUMNS, rows)
        return
    for machine in dict.fromkeys(row[-1] for row in rows):
        console.print(machine, markup=False, highlight=False)
        _print(LIST_COLUMNS[:-1], [row[:-1] for row in rows if row[-1] == machine])
