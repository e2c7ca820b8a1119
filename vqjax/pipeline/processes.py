# SPDX-License-Identifier: Apache-2.0
"""Several processes at one run: who leads, who is still alive, and waiting with an end.

Processes learn their numbers from `jax.distributed` and leave it again; all else goes through files
of the run folder, which they share. Nothing is computed across processes, so any two machines of
one kind will do.
"""

import contextlib
import dataclasses
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.extend.backend

from vqjax.errors import VqjaxError

BEAT_SECONDS = 2.0  # between signs of life
SILENCE_SECONDS = 60.0  # without one, a process counts as dead
START_SECONDS = 300.0  # before its first one; models load at different speeds
_POLL_SECONDS = 0.2
_STOPPED = "stopped"

_joined: "Team | None" = None  # by `initialize`, after which jax itself knows of one process


def initialize() -> None:
    """Joins the other processes where the environment names them; call before other jax calls.

    `JAX_COORDINATOR_ADDRESS` (host:port of process 0), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`;
    under Slurm, Open MPI and other launchers that JAX knows, the first alone is enough.

    Raises:
      VqjaxError: if the numbers make no sense or the others cannot be reached.
    """
    global _joined
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address is None or _joined is not None or jax.distributed.is_initialized():
        return
    names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    found = [os.environ.get(name) for name in names]
    if not all(text is None or text.isdecimal() for text in found):
        raise VqjaxError(f"{names[0]}={found[0]} {names[1]}={found[1]}: expected whole numbers")
    if ":" not in address:
        raise VqjaxError(
            f"JAX_COORDINATOR_ADDRESS={address}: expected host:port of the first process"
        )
    count, index = (None if text is None else int(text) for text in found)
    # Nothing is computed across processes: what tried to would fail at once instead of waiting.
    jax.config.update("jax_cpu_collectives_implementation", None)
    try:
        jax.distributed.initialize(address, num_processes=count, process_id=index)
        _joined = Team(jax.process_index(), jax.process_count())
        # JAX's service aborts all processes when one dies, and those that end after process 0.
        # `Team` says which one it was instead, and where. They leave the service together.
        jax.distributed.shutdown()
        jax.extend.backend.clear_backends()  # the next one has the devices of this process alone
    except (ValueError, RuntimeError) as error:
        raise VqjaxError(
            f"JAX_COORDINATOR_ADDRESS={address} {names[0]}={found[0]} {names[1]}={found[1]}: "
            f"the processes did not find each other ({error}); start all of them with the same "
            f"address and number of processes, and with ids from 0 on"
        ) from error


@dataclasses.dataclass(frozen=True)
class Team:
    """The processes of one run, seen from one of them.

    Attributes:
      index: of this process; 0 leads: it writes what is no piece of work, and reports.
      count: of processes.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> "Team":
        """All processes that `jax.distributed` connects, or did; this one alone without it."""
        return _joined or cls(jax.process_index(), jax.process_count())

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.index == 0

    @contextlib.contextmanager
    def beating(self, folder: pathlib.Path) -> Iterator[None]:
        """Gives signs of life in the run folder for as long as the block runs."""
        if self.count == 1:
            yield
            return
        end = threading.Event()
        path = _beat_file(folder, self.index)
        path.parent.mkdir(parents=True, exist_ok=True)

        def beat() -> None:
            while True:
                _write(path, f"{os.getpid()} {time.monotonic_ns()}")
                if end.wait(BEAT_SECONDS):
                    return

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            end.set()
            thread.join()
            _write(path, _STOPPED)
            raise
        end.set()
        thread.join()

    def wait(
        self,
        folder: pathlib.Path,
        ready: Callable[[], bool],
        processes: Iterable[int],
        what: str,
    ) -> None:
        """Returns once `ready()` holds, which `processes` are working on.

        Args:
          folder: the run folder.
          what: is waited for, for the message.

        Raises:
          VqjaxError: if one of them stops or gives no sign of life.
        """
        self._wait(folder, ready, {i: _Watch(_beat_file(folder, i)) for i in processes}, what)

    def _wait(self, folder, ready, watches: "dict[int, _Watch]", what: str) -> None:
        while not ready():
            for index, watch in watches.items():
                if (problem := watch.problem()) and not ready():
                    raise VqjaxError(
                        f"process {index} of {self.count} {problem} while process {self.index} "
                        f"waited for {what}; look at its output and start all processes again: "
                        f"finished layers in {folder} are kept"
                    )
            time.sleep(_POLL_SECONDS)

    def wait_for_leader(self, folder: pathlib.Path, done: Callable[[], bool]) -> None:
        """Returns once process 0 has opened the run folder and lives, or the run is `done`."""
        watch = _Watch(_beat_file(folder, 0), heard=False)
        self._wait(folder, lambda: done() or watch.alive(), {0: watch}, "the run folder")


class _Watch:
    """Signs of life of one process. Only changes are told by this clock, not when they were made.

    `heard`: whether what lies there now is of this run. The leading process clears older ones, but
    who waits for that process may find one.
    """

    def __init__(self, path: pathlib.Path, heard: bool = True) -> None:
        self._path, self._last, self._since = path, _read(path), time.monotonic()
        self._heard = heard and self._last is not None

    def _look(self) -> None:
        found = _read(self._path)
        if found != self._last and found is not None:
            self._last, self._heard, self._since = found, True, time.monotonic()

    def alive(self) -> bool:
        self._look()
        return self._heard and self._last != _STOPPED

    def problem(self) -> str | None:
        self._look()
        silent = time.monotonic() - self._since
        if self._heard and self._last == _STOPPED:
            return "stopped with an error"
        if silent > (SILENCE_SECONDS if self._heard else START_SECONDS):
            return f"has given no sign of life for {silent:.0f} s"
        return None


def clear(folder: pathlib.Path) -> None:
    """Removes the signs of life of an earlier attempt at the run."""
    for path in (folder / "work").glob("process-*"):
        path.unlink(missing_ok=True)


def _beat_file(folder: pathlib.Path, index: int) -> pathlib.Path:
    return folder / "work" / f"process-{index}"


def _read(path: pathlib.Path) -> str | None:
    try:
        return path.read_text() or None
    except OSError:
        return None


def _write(path: pathlib.Path, text: str) -> None:
    temporary = path.with_suffix(".part")
    # The folder is gone once the run is complete: nobody listens any more.
    with contextlib.suppress(OSError):
        temporary.write_text(text)
        os.replace(temporary, path)
