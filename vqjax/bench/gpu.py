# SPDX-License-Identifier: Apache-2.0
"""`bench gpu`, also `bench --gpu`: all that is timed on a GPU, by one command, within some minutes.

Each part is a process of its own. One that fails, or has more to do than there is time, costs the
others nothing, and none finds memory that another took. A signal that ends this process ends its
part.
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from vqjax.errors import VqjaxError
from vqjax.io import native
from vqjax.settings import BenchGpuSettings, command_line

LEAST = 20.0  # seconds in which a part could show something
_ASK = "import jax; print(jax.default_backend())"


class Part(NamedTuple):
    """One process: the name of its results, and the command."""

    name: str
    words: tuple[str, ...]


def run(wanted: BenchGpuSettings) -> None:
    """Runs the parts, most wanted first, and writes summary.json.

    Raises:
      VqjaxError: without a GPU, or if a part failed.
    """
    if not wanted.minutes > 0:
        raise VqjaxError(f"--minutes {wanted.minutes:g}: expected a number above 0")
    asked = subprocess.run(
        [sys.executable, "-c", _ASK], capture_output=True, text=True, check=False
    )
    backend = asked.stdout.strip() or "none"
    if backend != "gpu":
        raise VqjaxError(
            f"bench --gpu: expected a GPU, found JAX's backend {backend!r}; install the extra "
            "cuda12 or cuda13, and see python -m vqjax.doctor"
        )
    wanted.out.mkdir(parents=True, exist_ok=True)
    records = []
    with _told_to_end():
        for record in each(parts(wanted), wanted.minutes * 60):
            records.append(record)
            found = {"command": command_line("vqjax.bench", wanted, "gpu"), "parts": records}
            text = json.dumps(found, indent=2) + "\n"
            native.write_atomically(wanted.out / "summary.json", text.encode())
    show(records, wanted.out)
    failed = [record["part"] for record in records if record["state"] == "failed"]
    if failed:
        raise VqjaxError(f"bench --gpu: {', '.join(failed)} failed, as shown above")


@contextlib.contextmanager
def _told_to_end() -> Iterator[None]:
    """Signals that would end this process at once, and reach no part, become an exception."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def parts(wanted: BenchGpuSettings) -> list[Part]:
    """Commands of this package, each with a file of its own in `wanted.out`.

    Layers have the codes of the model's plan at two bits. The table of choices is of what `sample`
    asks for without options, one image and sixteen, both branches of guidance counted.
    """
    shapes = ("kernels", "--model", wanted.model, "--bits", "2")
    table = str(wanted.out / "tuned.json")
    scoring = ("--pictures", "2048", "--samples", "10000", "--reference", "50000")
    paths = ("--paths", "load", "auto")
    every = {
        "kernels": (*shapes, "--dtype", "bfloat16", "--batch", "1", "2"),
        "sample": (
            "sample",
            wanted.model,
            "--dtype",
            "bfloat16",
            "--batch",
            "1",
            "4",
            "16",
            *paths,
        ),
        "tune": ("tune", "--model", wanted.model, "--tuning.batch", "8"),
        "evaluate": ("evaluate", *scoring),
        "kernels_tuned": (*shapes, "--batch", "2", "32", "--tune", "--table", table),
    }
    module, seed = (sys.executable, "-m", "vqjax.bench"), ("--seed", str(wanted.seed))
    return [
        Part(name, (*module, *words, *seed, "--json", str(wanted.out / f"{name}.json")))
        for name, words in every.items()
        if name in wanted.parts
    ]


def each(parts: Sequence[Part], seconds: float) -> Iterator[dict[str, Any]]:
    """Runs parts one after the other, all within `seconds`; yields what became of each.

    A part has at most twice its share of the time that is left, so that one which is slow leaves
    some to the others; what it does not use is theirs. "state" is "done", "failed", "ended" (it had
    no more time; what it had measured is in its file) or "left out".
    """
    end = time.monotonic() + seconds
    for place, part in enumerate(parts):
        begun = time.monotonic()
        left = end - begun
        record: dict[str, Any] = {"part": part.name, "command": list(part.words[1:])}
        if left < min(LEAST, seconds):
            yield record | {"state": "left out", "seconds": 0.0}
            continue
        share = 2 * left / (len(parts) - place + 1)
        code = _exit_code(part.words, min(left, max(share, LEAST)))
        state = {None: "ended", 0: "done"}.get(code, "failed")
        taken = round(time.monotonic() - begun, 1)
        yield record | {"state": state, "exit_code": code, "seconds": taken}


def _exit_code(words: Sequence[str], seconds: float) -> int | None:
    """Of a process, or None where it was ended with all that it started."""
    with subprocess.Popen(words, start_new_session=True) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):  # that is how it should be
                os.killpg(process.pid, signal.SIGKILL)


def show(records: Sequence[Mapping[str, Any]], out: pathlib.Path) -> None:
    """Prints what became of each part."""
    table = Table(title=f"Results in {out}", title_justify="left")
    for name in ("part", "state", "s"):
        table.add_column(name, justify="right" if name == "s" else "left")
    for record in records:
        table.add_row(record["part"], record["state"], f"{record['seconds']:.0f}")
    Console(highlight=False).print(table)
