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

from rich.table import Table

from vqjax import progress
from vqjax.errors import VqjaxError
from vqjax.io import native
from vqjax.settings import BenchGpuSettings, command_line

LEAST = 20.0  # seconds in which a part could show something
_ASK = "import json; from vqjax.bench import gpu; print(json.dumps(gpu.here()))"
_FAST_BFLOAT16 = (8, 0)
"""Compute capability from which GPUs have bfloat16; those before imitate it."""


class Here(NamedTuple):
    """What decides how this machine is measured.

    Attributes:
      platform: as JAX names it.
      dtype: half precision that its GPU multiplies in.
      path: how `bench sample` is asked for, beside dense weights.
    """

    platform: str
    dtype: str
    path: str


class Part(NamedTuple):
    """One process.

    Attributes:
      name: of its results.
      share: of the time, relative to the other parts'.
      words: the command.
    """

    name: str
    share: float
    words: tuple[str, ...]


def run(wanted: BenchGpuSettings) -> None:
    """Runs the parts, most wanted first, and writes summary.json.

    Raises:
      VqjaxError: without a GPU, or if a part failed.
    """
    if not wanted.minutes > 0:
        raise VqjaxError(f"--minutes {wanted.minutes:g}: expected a number above 0")
    found = _asked()
    if found.platform != "gpu":
        raise VqjaxError(
            f"bench --gpu: expected a GPU, found JAX's backend {found.platform!r}; install the "
            "extra cuda12 or cuda13, and see python -m vqjax.doctor"
        )
    wanted.out.mkdir(parents=True, exist_ok=True)
    records = []
    with _told_to_end():
        for record in each(parts(wanted, found), wanted.minutes * 60):
            records.append(record)
            content = {"command": command_line("vqjax.bench", wanted, "gpu"), "parts": records}
            text = json.dumps(content, indent=2) + "\n"
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


def here() -> Here:
    """Asks this process's JAX."""
    from vqjax.bench import sample
    from vqjax.kernels import device

    found = device.current()
    halves = found.capability is None or found.capability >= _FAST_BFLOAT16
    # What is decoded at load runs the program of dense weights.
    path = "load" if "auto" in sample.absent() else "auto"
    return Here(found.platform, "bfloat16" if halves else "float16", path)


def _asked() -> Here:
    """The same in a process of its own, or no backend where that cannot tell."""
    words = [sys.executable, "-c", _ASK]
    asked = subprocess.run(words, capture_output=True, text=True, check=False)
    try:
        return Here(*json.loads(asked.stdout))
    except (ValueError, TypeError):
        return Here("none", "", "")


def parts(wanted: BenchGpuSettings, found: Here) -> list[Part]:
    """Commands of this package, each with a file of its own in `wanted.out`.

    Layers have the codes of the model's plan at two bits. One image under guidance is two latents,
    of which the embedding's layers see a row each; what `sample` then takes is what was tuned. The
    seconds are of nine minutes on an H200 that has compiled nothing before, most of them for
    layers; those of sampling and tuning are programs that take a minute to compile.
    """
    plan = ("kernels", "--model", wanted.model, "--bits", "2")
    layers = (*plan, "--dtype", found.dtype)
    rows = ("--batch", "1", "2", "4", "8", "16", "--most-rows", "16")
    images = ("--batch", "1", "16", "4", "64", "--repeat", "3")
    paths = ("--dtype", found.dtype, "--paths", found.path)
    integers = ("--batch", "16", "64", "--repeat", "3", "--act-bits", "8", *paths[:-1], "integer")
    scoring = ("--pictures", "2048", "--samples", "10000", "--reference", "50000", "--repeat", "1")
    every = {
        "kernels": (115, (*layers, "--batch", "2", "1")),
        "kernels_rows": (35, (*layers, *rows)),
        "kernels_tuned": (105, (*layers, "--batch", "2", "32", "--tune")),
        "kernels_int8": (35, (*plan, "--dtype", "int8", "--batch", "32", "--tune")),
        "sample": (110, ("sample", wanted.model, *images, *paths)),
        "sample_int8": (50, ("sample", wanted.model, *integers)),
        "evaluate": (45, ("evaluate", *scoring)),
        "tune": (45, ("tune", "--model", wanted.model, "--tuning.batch", "8", "--repeat", "3")),
    }
    module, seed = (sys.executable, "-m", "vqjax.bench"), ("--seed", str(wanted.seed))
    return [
        Part(name, share, (*module, *words, *seed, "--json", str(wanted.out / f"{name}.json")))
        for name, (share, words) in every.items()
        if name in wanted.parts
    ]


def each(parts: Sequence[Part], seconds: float) -> Iterator[dict[str, Any]]:
    """Runs parts one after the other, all within `seconds`; yields what became of each.

    A part has its share of the time that is left; what it does not use is the others'. "state" is
    "done", "failed", "ended" (it had no more time; what it had measured is in its file) or "left
    out".
    """
    end = time.monotonic() + seconds
    for place, part in enumerate(parts):
        begun = time.monotonic()
        left = end - begun
        record: dict[str, Any] = {"part": part.name, "command": list(part.words[1:])}
        if left < min(LEAST, seconds):
            yield record | {"state": "left out", "seconds": 0.0}
            continue
        share = left * part.share / sum(other.share for other in parts[place:])
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
    progress.console().print(table)
