# SPDX-License-Identifier: Apache-2.0
"""A run folder that can be killed at any moment: every file appears whole or not at all.

`run.json` says what the run is and how far it got; `work/` holds finished pieces until the run is
complete. A folder continues only the run that it belongs to, told by a fingerprint of the input.
"""

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import pathlib
import re
import resource
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from vqjax.errors import VqjaxError
from vqjax.io import native
from vqjax.pipeline import processes
from vqjax.pipeline.processes import Team

STATUS_RUNNING, STATUS_DONE = "running", "done"
_KEPT = "started", "status", "seconds", "peak_memory_after"  # of earlier attempts
_DECIDES_NOTHING = "devices", "processor", "platform", "cores"  # of `environment.describe`
_TEMPORARY = re.compile(r"\.(\d+)\.part")  # the process that writes stands in the name


def fingerprint(*parts: Any) -> str:
    """SHA-256 of JSON values; equal runs have equal fingerprints."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def check_folder(out: pathlib.Path) -> None:
    """Raises VqjaxError where a run folder cannot be, since something else is there."""
    if out.exists() and not out.is_dir():
        raise VqjaxError(f"{out} is a file, expected a folder; choose another --out")


@contextlib.contextmanager
def alone(folder: pathlib.Path) -> Iterator[None]:
    """Keeps other processes out of a run folder, made if needed, as long as the block runs.

    Where the file system has no locks, a line on stderr says so.

    Raises:
      VqjaxError: if another process works there, or the folder cannot be.
    """
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise VqjaxError(
            f"{folder}: another process works there; wait for it, end it, or choose another --out"
        ) from None
    except OSError as error:
        print(f"{folder}: not locked against other processes ({error})", file=sys.stderr)
    try:
        yield
    finally:
        os.close(handle)  # and with it the lock


class Journal:
    """The folder of one run.

    Attributes:
      folder: the run folder.
      record: content of `run.json`.
      team: the processes that work on the run; all but the first only add pieces of work.
    """

    def __init__(
        self, folder: pathlib.Path, record: dict[str, Any], team: Team | None = None
    ) -> None:
        self.folder, self.record, self.team = folder, record, team or Team()

    @classmethod
    def open(
        cls, folder: pathlib.Path, record: dict[str, Any], team: Team | None = None
    ) -> "Journal":
        """Starts a run, or continues the one in `folder`.

        Args:
          record: must hold "fingerprint". Timings and peaks of memory of an earlier part of the
            run are kept. "parts" holds fingerprints, by option, of what a run may do without: those
            of earlier attempts stay, as what they left in the folder does. "last_stages" is a
            fingerprint of what decides the last stages alone: until the run is complete it may
            change, and names of those stages' pieces have to hold it.
          team: the processes of the run; all but the first wait until that one has opened it.

        Raises:
          VqjaxError: if the folder holds another run, another part or something else.
        """
        team = team or Team()
        path = folder / "run.json"
        check_folder(folder)
        if team.leads:
            _clear_leftovers(
                folder.glob(".run.json.*.part")
            )  # of one killed before its first record
        else:
            team.wait_for_leader(folder, lambda: is_done(path))
        if path.exists():
            try:
                found = json.loads(path.read_text())
                known = found["fingerprint"] == record["fingerprint"]
                earlier = dict(found.get("parts", {}))
            except (ValueError, KeyError, TypeError):
                raise VqjaxError(f"{path}: unreadable; choose another --out or delete it") from None
            other = found.get("last_stages") != record.get("last_stages")
            if not known or (other and found.get("status") == STATUS_DONE):
                raise VqjaxError(
                    f"{folder} holds a run of another model or with other settings "
                    f"({found.get('command', 'unknown command')})"
                    f"{_other_environment(found, record)}; choose another --out or delete it"
                )
            parts = earlier | record.get("parts", {})
            for name in earlier:
                if parts[name] != earlier[name]:
                    raise VqjaxError(
                        f"{folder} holds work for another --{name}; choose another --out or delete "
                        "it"
                    )
            record = {**record, **{name: found[name] for name in _KEPT if name in found}}
            if team.leads:
                _clear_leftovers(folder.rglob(".*.part*"))
                processes.clear(folder)
            journal = cls(folder, record | ({"parts": parts} if parts else {}), team)
            if journal.done and team.leads:
                journal.drop_pieces()  # which one killed at its very end left
            if parts != earlier or other:  # before work for a new one, which a killed run may leave
                journal.save()
            return journal
        if folder.exists() and any(folder.iterdir()):
            raise VqjaxError(f"{folder} is not empty and holds no run; choose another --out")
        folder.mkdir(parents=True, exist_ok=True)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        record = {**record, "started": now, "seconds": {}, "status": STATUS_RUNNING}
        journal = cls(folder, record, team)
        journal.save()
        return journal

    @property
    def done(self) -> bool:
        """Whether the run is complete."""
        return self.record["status"] == STATUS_DONE

    def begin(self) -> None:
        """Marks a run, also a complete one, as one that is being made."""
        self.record["status"] = STATUS_RUNNING
        self.save()

    def save(self) -> None:
        """Writes `run.json`, which belongs to the leading process."""
        if not self.team.leads:
            return
        self.write("run.json", json.dumps(self.record, indent=2).encode() + b"\n")

    def write(self, name: str, data: bytes) -> None:
        """Writes one file of the run folder."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        native.write_atomically(path, data)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to `seconds[name]`, also over several attempts.

        What an attempt spent that was killed inside is not known. `peak_memory_after[name]` is the
        largest resident size of this process so far, or what an earlier attempt came to by then.
        """
        start = time.monotonic()
        try:
            yield
        finally:
            self._passed(name, time.monotonic() - start)

    def _passed(self, name: str, elapsed: float) -> None:
        seconds = self.record["seconds"]
        seconds[name] = round(seconds.get(name, 0.0) + elapsed, 3)
        after = self.record.setdefault("peak_memory_after", {})
        after[name] = max(after.get(name, 0), peak_memory_bytes())
        self.save()

    @property
    def peak_memory_bytes(self) -> int:
        """The largest resident size of the run so far, over all attempts."""
        return max(peak_memory_bytes(), *self.record.get("peak_memory_after", {}).values(), 0)

    def load(self, name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """A finished piece of work and its JSON notes, or None if there is none yet."""
        path = self._work(name)
        if not path.exists():
            return None
        with safetensors.safe_open(path, framework="numpy") as file:
            arrays = {key: file.get_tensor(key) for key in sorted(file.keys())}
            return arrays, json.loads((file.metadata() or {})["notes"])

    def shared(self, name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """The same for a piece that the leading process makes: the others wait for it."""
        if not self.team.leads:
            self.wait_for(name, (0,))
        return self.load(name)

    def wait_for(self, name: str, others: Iterable[int]) -> None:
        """Returns once a piece is there that other processes are working on.

        Raises:
          VqjaxError: if one of them died.
        """
        self.team.wait(self.folder, self._work(name).exists, others, name)

    def wait_until_done(self) -> None:
        """Returns once the leading process has completed the run.

        Raises:
          VqjaxError: if it died.
        """
        path = self.folder / "run.json"
        self.team.wait(self.folder, lambda: is_done(path), (0,), "the end of the run")

    def store(self, name: str, arrays: Mapping[str, np.ndarray], notes: dict[str, Any]) -> None:
        """Keeps a finished piece of work until the run is complete."""
        # Not ascontiguousarray, which makes a vector of a scalar.
        contiguous = {key: np.asarray(value, order="C") for key, value in arrays.items()}
        data = safetensors.numpy.save(contiguous, metadata={"notes": json.dumps(notes)})
        self._work(name).parent.mkdir(parents=True, exist_ok=True)
        native.write_atomically(self._work(name), data)

    def finish(self) -> None:
        """Marks the run complete and drops the pieces."""
        self.record["status"] = STATUS_DONE
        self.record["peak_memory_bytes"] = self.peak_memory_bytes
        self.save()
        self.drop_pieces()

    def drop_pieces(self) -> None:
        """Removes the finished pieces of a complete run."""
        shutil.rmtree(self.folder / "work", ignore_errors=True)

    def _work(self, name: str) -> pathlib.Path:
        return self.folder / "work" / f"{name}.safetensors"


def is_done(path: pathlib.Path) -> bool:
    """Whether a run.json is there and tells of a complete run."""
    try:
        return json.loads(path.read_text())["status"] == STATUS_DONE
    except (OSError, ValueError, KeyError, TypeError):
        return False  # not there, or no run: who leads says what is wrong


def _other_environment(found: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """What a run was made with that is another here, and that results depend on."""
    before, now = found.get("environment"), record.get("environment")
    if not isinstance(before, dict) or not isinstance(now, dict):
        return ""
    changed = [
        f"{name} {before[name]}, here {now[name]}"
        for name in now
        if name in before and before[name] != now[name] and name not in _DECIDES_NOTHING
    ]
    return f", made with {'; '.join(changed)}" if changed else ""


def _clear_leftovers(begun: Iterable[pathlib.Path]) -> None:
    """Removes what killed processes had begun to write under temporary names."""
    for path in list(begun):
        owner = _TEMPORARY.search(path.name)
        if owner is None or _lives(int(owner.group(1))):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    if process == os.getpid():
        return False  # this one is not writing: it opens the folder
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # another user's
    return True


def peak_memory_bytes() -> int:
    """The largest resident size of this process so far."""
    with contextlib.suppress(OSError, AttributeError):
        # Not ru_maxrss, which a process inherits from the one that started it.
        status = pathlib.Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1))  # type: ignore[union-attr]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
