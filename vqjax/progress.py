# SPDX-License-Identifier: Apache-2.0
"""Progress of long work: a live bar on a terminal, plain lines elsewhere, both with an ETA."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Advance = Callable[..., None]
"""`advance(count=1, note="")`: `count` more units are done; `note` is shown beside them."""

LINE_INTERVAL = 10.0  # seconds between plain lines, so that a log of hours stays readable

_watchers: list[Callable[[str], None]] = []


def console(**settings: Any) -> Console:
    """Returns a console that shows text as it is: paths and names may hold [brackets], which rich
    reads as markup.

    Args:
      settings: of `rich.console.Console`.
    """
    return Console(highlight=False, markup=False, emoji=False, **settings)


@contextlib.contextmanager
def watched(see: Callable[[str], None]) -> Iterator[None]:
    """Calls `see(name)`, from any thread, after each call of what a `stage` yields."""
    _watchers.append(see)
    try:
        yield
    finally:
        _watchers.remove(see)


@contextlib.contextmanager
def stage(name: str, total: int, *, done: int = 0, quiet: bool = False) -> Iterator[Advance]:
    """Shows the progress of one stage on stderr.

    Args:
      total: units of work in the stage.
      done: units that an interrupted run had finished before.
      quiet: show nothing.

    Yields:
      The function to call after each unit, from any thread.
    """
    with contextlib.ExitStack() as shown:
        if quiet:
            show: Advance = _silent
        elif sys.stderr.isatty():
            show = shown.enter_context(_bar(name, total, done))
        else:
            show = _lines(name, total, done)

        def advance(count: int = 1, note: str = "") -> None:
            show(count, note)
            for see in tuple(_watchers):
                see(name)

        yield advance


def _silent(count: int = 1, note: str = "") -> None:
    del count, note


@contextlib.contextmanager
def _bar(name: str, total: int, done: int) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description:<12}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console(stderr=True)) as progress:
        task = progress.add_task(name, total=total, completed=done, note="")
        yield lambda count=1, note="": progress.update(task, advance=count, note=note)


def _lines(name: str, total: int, done: int) -> Advance:
    start, first, printed = time.monotonic(), done, 0.0
    lock = threading.Lock()

    def advance(count: int = 1, note: str = "") -> None:
        nonlocal done, printed
        with lock:
            done += count
            now = time.monotonic()
            if done < total and now - printed < LINE_INTERVAL:
                return
            printed = now
            eta = (now - start) / max(done - first, 1) * (total - done)
            line = f"{name}: {done}/{total}  ETA {eta:.0f} s  {note}"
            print(line.rstrip(), file=sys.stderr, flush=True)

    return advance
