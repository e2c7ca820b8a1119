# SPDX-License-Identifier: Apache-2.0
"""Progress of long work: a live bar on a terminal, plain lines elsewhere, both with an ETA."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Advance = Callable[..., None]
"""`advance(count=1, note="")`: `count` more units are done; `note` is shown beside them."""

LINE_INTERVAL = 10.0  # seconds between plain lines, so that a log of hours stays readable


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
    if quiet:
        yield lambda count=1, note="": None
    elif sys.stderr.isatty():
        with _bar(name, total, done) as advance:
            yield advance
    else:
        yield _lines(name, total, done)


@contextlib.contextmanager
def _bar(name: str, total: int, done: int) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
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
