"""A progress bar on a terminal, none in a pipe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fewbits.selection.progress import Progress as Tell
from fewbits.selection.progress import Step, no_progress


@contextmanager
def progress_bar() -> Iterator[Tell]:
    """A `fewbits.selection.progress.Progress` that draws on standard error, if that is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield no_progress
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, transient=True) as bar:

        def show(step: Step) -> None:
            if step.activity not in tasks:
                tasks[step.activity] = bar.add_task(step.activity, total=step.total)
            bar.update(tasks[step.activity], completed=step.done, description=f"{step.activity} {escape(step.name)}")

        yield show
