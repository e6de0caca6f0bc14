"""A progress bar on a terminal, none in a pipe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from fewbits.selection.ledger import LedgerRow, no_progress
from fewbits.selection.ledger import Progress as RowProgress


@contextmanager
def progress_bar() -> Iterator[RowProgress]:
    """A `fewbits.selection.ledger.Progress` that draws on standard error, if that is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield no_progress
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:

        def show(activity: str, rows: Sequence[LedgerRow]) -> Iterable[LedgerRow]:
            task = bar.add_task(activity, total=sum(row.bytes_before for row in rows))
            for row in rows:
                bar.update(task, description=f"{activity} {row.name}")
                yield row
                bar.advance(task, row.bytes_before)

        yield show
