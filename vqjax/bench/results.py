# SPDX-License-Identifier: Apache-2.0
"""The JSON file of a bench: written whole after every record, read again by the same command."""

import dataclasses
import hashlib
import json
import pathlib
import types
from collections.abc import Iterable
from typing import Any

from vqjax import core
from vqjax.core.compress import Effort
from vqjax.errors import VqjaxError
from vqjax.io import native
from vqjax.pipeline import environment
from vqjax.settings import BenchAqSettings, command_line

REDUCED = Effort(start_steps=20, feedback_rounds=4, descent_rounds=0, store_rounds=1)
"""Few rounds: what a first look at a large model on a small machine can afford."""

Record = dict[str, Any]


def effort_of(settings: BenchAqSettings) -> Effort:
    """The search effort that was asked for by name."""
    return REDUCED if settings.effort == "reduced" else Effort()


def identity(settings: BenchAqSettings) -> list[Any]:
    """What all records depend on: versions, device, the quantizer's source, effort, seed."""
    return [*here(), source_digest(core), repr(effort_of(settings)), settings.seed]


def here() -> list[Any]:
    """Versions and device."""
    described = environment.describe()
    return [environment.versions(), [described[n] for n in ("device", "backend", "devices")]]


def source_digest(*modules: types.ModuleType) -> str:
    """SHA-256 of the source of modules and packages: results of other code are not continued."""
    digest = hashlib.sha256()
    for module in modules:
        path = pathlib.Path(str(module.__file__))
        for file in sorted(path.parent.glob("*.py")) if path.name == "__init__.py" else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def about(settings: BenchAqSettings) -> dict[str, Any]:
    """What the file of `bench aq` says beside its records."""
    return {
        "command": command_line("vqjax.bench", settings, "aq"),
        "seed": settings.seed,
        "effort": {"name": settings.effort, **dataclasses.asdict(effort_of(settings))},
        "environment": environment.describe(),
    }


class Results:
    """Records by fingerprint, in the order of the work, kept in a file where one is given.

    Attributes:
      content: everything in the file but the records.
    """

    def __init__(
        self, path: pathlib.Path | None, content: dict[str, Any], wanted: Iterable[str]
    ) -> None:
        """Takes over the finished records of an earlier run.

        Args:
          path: of the file; None keeps nothing.
          content: what the file says beside the records.
          wanted: fingerprints of all records of this run, in order. Others are dropped.

        Raises:
          VqjaxError: if the file holds something else, or cannot be written.
        """
        self._path, self._order, self.content = path, list(wanted), content
        known = _load(path) if path is not None else {}
        self._records = {key: known[key] for key in self._order if key in known}
        self.save()  # before hours of work: is the place writable?

    def get(self, key: str) -> Record | None:
        """A finished record."""
        return self._records.get(key)

    def add(self, key: str, record: Record) -> Record:
        """Keeps a record, on disk where a file was given."""
        self._records[key] = record | {"fingerprint": key}
        self.save()
        return self._records[key]

    @property
    def records(self) -> list[Record]:
        """All finished records, in the order of the work."""
        return [self._records[key] for key in self._order if key in self._records]

    def save(self) -> None:
        """Writes the file, whole or not at all."""
        if self._path is not None:
            text = json.dumps({**self.content, "records": self.records}, indent=1)
            native.write_atomically(self._path, text.encode() + b"\n")


def _load(path: pathlib.Path) -> dict[str, Record]:
    if not path.exists():
        if not path.parent.is_dir():
            raise VqjaxError(f"--json {path}: no folder {path.parent}; make it first")
        return {}
    try:
        records = json.loads(path.read_text(encoding="utf-8"))["records"]
        return {record["fingerprint"]: record for record in records if "fingerprint" in record}
    except (ValueError, KeyError, TypeError, OSError):
        raise VqjaxError(
            f"--json {path}: found something other than results of this command; "
            "choose another file or delete it"
        ) from None
