"""A progress bar for long work, silent when nobody watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress(title: str, total: int, visible: bool = True) -> Iterator[Callable[[str], None]]:
    """A bar on standard error while the context lasts; nothing at all when that is not a terminal
    or the bar is not visible.

    Yields
    ------
    callable
        ``advance(what)``: one step is done; ``what`` is shown beside the bar.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns,
        TextColumn("{task.fields[what]}"),
        console=console,
        disable=not (visible and console.is_terminal),
    ) as bar:
        task = bar.add_task(title, total=total, what="")
        yield lambda what: bar.update(task, advance=1, what=what)
