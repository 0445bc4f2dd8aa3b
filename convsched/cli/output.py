"""What the commands share: opening the schedule cache, files and tables."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from convsched.problem.parse import names_within

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from convsched.autotune.store.cache import ScheduleCache
    from convsched.problem import Problem

PATH = click.Path(path_type=Path, dir_okay=False)
NUMBERS = ("threads", "ms", "cold ms", "default", "speed-up", "tried", "failed", "spread", "KiB", "error")
LOG_COLUMNS = 240  # a log has no width: no line is to be cut

F = TypeVar("F", bound=Callable[..., Any])


def _file(command: F) -> F:
    text = "The cache (default: schedules.sqlite in the folder of the caches)."
    return click.option("--cache", "file", type=PATH, help=text)(command)


@contextmanager
def _opened(file: Path | None) -> Iterator[ScheduleCache]:
    """The cache; its warnings become lines, and errors raised on purpose messages, without a traceback."""
    from convsched.autotune.store.cache import ScheduleCache
    from convsched.errors import CacheWarning, ConvschedError

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CacheWarning)
        try:
            yield ScheduleCache(file)
        except ConvschedError as error:
            raise click.ClickException(str(error)) from error
        finally:
            for warning in caught:
                click.echo(f"warning: {warning.message}", err=True)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> Table:
    """A table for so many columns of a terminal; where it is too wide, layers have their short names."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if columns[0] == "problem":
        others = _width(columns, rows) - max(len(row[0]) for row in rows)
        names = names_within([_problem(row[0]) for row in rows], width - others)
        rows = [(name, *row[1:]) for name, row in zip(names, rows, strict=True)]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.padding, table.pad_edge = (0, 1 if _width(columns, rows) <= width else 0, 0, 0), False
    for column in columns:
        whole = column == "problem" or column in NUMBERS
        table.add_column(column, justify="right" if column in NUMBERS else "left", overflow="fold", no_wrap=whole)
    for row in rows:
        table.add_row(*map(Text, row))  # brackets are not markup
    return table


def _width(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """The columns of a terminal that a table needs: what is in it, and two between its columns."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    return sum(widths) + 2 * (len(widths) - 1)


def _problem(text: str) -> Problem | str:
    """The problem of a text, or the text itself where another version of convsched wrote it."""
    from convsched.errors import ProblemError
    from convsched.problem import parse_problem

    try:
        return parse_problem(text)
    except ProblemError:
        return text


def _console() -> Console:
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=LOG_COLUMNS)


def _print(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    console = _console()
    console.print(_table(columns, rows, console.width))
