# SPDX-License-Identifier: Apache-2.0
"""The command in processes of its own, and what a run folder holds."""

import contextlib
import hashlib
import os
import pathlib
import socket
import subprocess
import sys
import time

from tests import xla_flags

ROOT = pathlib.Path(__file__).parents[2]

# Signs of life follow each other faster here, so that the loss of a process shows in seconds, and
# searches have few rounds.
_HASTY = """
import sys
from tests import quick
from vqjax.pipeline import processes
from vqjax.quantize.__main__ import main
quick.search()
processes.BEAT_SECONDS, processes.SILENCE_SECONDS = 0.5, 8.0
sys.exit(main())
"""


def contents(folder: pathlib.Path) -> dict[str, str]:
    """Hash of every file that must not depend on interruptions; timings are elsewhere."""
    files = [*(folder / "model").rglob("*"), folder / "plan.json", folder / "samples.png"]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.is_file()
    }


def start(*words: object, devices: int = 1, **environment: str) -> subprocess.Popen:
    """`python -m vqjax.quantize` with simulated devices; output and errors in one pipe."""
    flags = xla_flags.simulated(devices)
    settings = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    return subprocess.Popen(
        [sys.executable, "-c", _HASTY, *map(str, words)],
        env={**os.environ, **settings, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_pair(*words: object, devices: int = 1) -> list[subprocess.Popen]:
    """Two processes of one run on this machine, each with so many devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        start(
            *words,
            devices=devices,
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(index),
        )
        for index in range(2)
    ]


def end(process: subprocess.Popen) -> str:
    """Waits until a process is done, which must be well; returns what it printed."""
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def wait_for_pieces(process: subprocess.Popen, folder: pathlib.Path, count: int) -> None:
    """Returns once a run has so many pieces of work in its journal, or is done."""
    while process.poll() is None and pieces(folder) < count:
        time.sleep(0.01)


def wait_for_life(process: subprocess.Popen, folder: pathlib.Path, index: int) -> None:
    """Returns once process `index` of a run has given a sign of life, or is done.

    One that is lost before is waited for much longer.
    """
    sign = folder / "work" / f"process-{index}"
    while process.poll() is None:
        with contextlib.suppress(OSError):
            if sign.read_text().startswith(f"{process.pid} "):
                return
        time.sleep(0.01)


def pieces(folder: pathlib.Path) -> int:
    """Finished pieces in the journal of a run."""
    return len(list((folder / "work").rglob("*.safetensors")))
