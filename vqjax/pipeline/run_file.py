# SPDX-License-Identifier: Apache-2.0
"""Runs as files: the settings of a quantization and of the evaluation that follows it.

A file in `eval/runs/`, or a record of a finished run, which holds the same and its results.
"""

import dataclasses
import importlib.resources
import json
import os
import pathlib
import shlex
from collections.abc import Mapping
from typing import Any

from vqjax import settings as lib
from vqjax.errors import VqjaxError, gathered
from vqjax.io import published, tfds_images
from vqjax.pipeline import run_results
from vqjax.pipeline.journal import STATUS_RUNNING
from vqjax.pipeline.sources import EMBEDDED

RECORD = "reproduction.json"
_FILES = ("source", "against", "reference", "inception")  # settings that name files


@dataclasses.dataclass(frozen=True)
class Run:
    """What is to be done.

    Attributes:
      name: for people.
      quantize, evaluate: None where the run has no such part. An evaluation that follows a
        quantization samples its model, against the model it was made from.
      recorded: results to compare with, flat; empty for a run file.
      environment: that they were measured in.
      notes: `doubts` of the files that they were measured with.
      inputs: SHA-256 of what they were measured with (`run_results.inputs`), and of the code;
        records of earlier versions have some or none.
    """

    name: str
    quantize: lib.QuantizeSettings | None
    evaluate: lib.EvaluateSettings | None
    recorded: dict[str, Any]
    environment: dict[str, str]
    notes: tuple[str, ...] = ()
    inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def seeded(self, seed: int) -> "Run":
        """The same with other seeds, so with no results to compare with."""
        quantize = self.quantize and dataclasses.replace(self.quantize, seed=seed)
        evaluate = self.evaluate and dataclasses.replace(self.evaluate, seed=seed)
        return dataclasses.replace(
            self, quantize=quantize, evaluate=evaluate, recorded={}, notes=()
        )

    def limited(self, memory: float) -> "Run":
        """The same within another limit of memory, GB: sums are taken in other parts, so numbers
        agree within tolerances, where bits need not.

        Raises:
          VqjaxError: if it has no quantization, which is what has the limit.
        """
        if self.quantize is None:
            raise VqjaxError(
                f"--memory {memory:g}: it limits a quantization, and {self.name} has none; leave "
                "it out"
            )
        quantize = dataclasses.replace(self.quantize, memory=memory)
        return dataclasses.replace(self, quantize=quantize)

    def to_dict(self) -> dict[str, Any]:
        """What a run file holds."""
        parts = {"quantize": self.quantize, "evaluate": self.evaluate}
        return {"name": self.name} | {
            part: lib.plain(wanted) for part, wanted in parts.items() if wanted is not None
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Content:
    """A run file."""

    name: str
    quantize: lib.QuantizeSettings | None = None
    evaluate: lib.EvaluateSettings | None = None


def packaged() -> dict[str, Any]:
    """Run files in the package, by name."""
    folder = importlib.resources.files("vqjax.eval") / "runs"
    files = (file for file in folder.iterdir() if file.name.endswith(".json"))
    return {file.name.removesuffix(".json"): file for file in sorted(files, key=lambda f: f.name)}


def load(where: str) -> Run:
    """Reads a run file, a record, or the run.json of a command.

    Args:
      where: a path, of a folder that holds a record or a run.json, too, or the name of a run in the
        package.

    Raises:
      VqjaxError: if there is no such run, or it is no run.
    """
    path, known = pathlib.Path(where), packaged()
    if path.is_dir() and where not in known:  # a run of the package may have a folder of its name
        path = _in_folder(path)
    if path.exists() and not path.is_dir():
        return parse(_json(path.read_bytes(), str(path)), path)
    if where in known:
        return parse(_json(known[where].read_bytes(), where), path)
    raise VqjaxError(f"{where}: no such file, nor a run in the package: {', '.join(known)}")


def parse(content: Any, path: pathlib.Path) -> Run:
    """A run from the content of its file.

    Args:
      path: of the file; the results of a run.json stand beside it.

    Raises:
      VqjaxError: if it is no run, or settings are unknown or of another kind.
    """
    where = str(path)
    if not isinstance(content, dict):
        raise VqjaxError(f"{where}: expected a run file (a JSON object), found a list or a value")
    for part in ("settings", "results", "environment", "inputs", "sha256"):
        if not isinstance(content.get(part, {}), dict):
            raise VqjaxError(f"{where}: {part}: found {content[part]!r}, expected a JSON object")
    if "run" in content:
        run = parse(content["run"], path)
        recorded, there = content.get("results", {}), content.get("environment", {})
        run_results.check(recorded, f"{where}: results")
        notes = content.get("notes", [])
        if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
            raise VqjaxError(f"{where}: notes: found {notes!r}, expected a list of texts")
        return dataclasses.replace(
            run,
            recorded=recorded,
            environment=there,
            notes=tuple(notes),
            inputs=content.get("inputs", {}),
        )
    if "settings" in content and "fingerprint" in content:
        return _of_command(content, path)
    given = {name for name, value in content.items() if value is not None}
    if "name" not in given or not given & {"quantize", "evaluate"}:
        raise VqjaxError(
            f"{where}: holds {sorted(content)}, expected a run: name, and quantize or evaluate"
        )
    asked = lib.from_plain(_Content, content, where)
    return Run(asked.name, asked.quantize, asked.evaluate, {}, {})


def resolved(run: Run, files: pathlib.Path) -> Run:
    """The run with its files found, in `files` or where they are named.

    Raises:
      VqjaxError: naming every file that is not there, where people get it, its size and hash.
    """
    problems: list[str] = []

    def place(wanted: Any) -> Any:
        changes = {}
        for field in _FILES:
            named = getattr(wanted, field, None)
            if named is None or (field in ("source", "against") and str(named) == EMBEDDED):
                continue
            if not str(named):
                raise VqjaxError(
                    f"{run.name}: {field}: found an empty text, expected a file's name"
                )
            if str(named).startswith(tfds_images.PREFIX):  # a dataset: what reads it finds it
                continue
            path = next((p for p in (files / named, pathlib.Path(named)) if p.exists()), None)
            if path is None:
                problems.append(_where_from(str(named)))
            else:
                changes[field] = str(path) if isinstance(named, str) else path
        if isinstance(wanted, lib.EvaluateSettings) and wanted.lpips is not None:
            found = [_found(files, path, problems) for path in wanted.lpips]
            changes["lpips"] = tuple(found)
        return dataclasses.replace(wanted, **changes)

    quantize = run.quantize and place(run.quantize)
    evaluate = run.evaluate
    if evaluate is not None:
        # What follows a quantization samples its model: its sources are no files of the user.
        kept = {"source": EMBEDDED, "against": None} if quantize is not None else {}
        evaluate = place(dataclasses.replace(evaluate, **kept))
    if problems:
        heading = f"{run.name}: files are missing; put them into {files} (--files):"
        raise gathered(list(dict.fromkeys(problems)), heading)
    return dataclasses.replace(run, quantize=quantize, evaluate=evaluate)


def doubts(run: Run) -> list[str]:
    """Where a resolved run's file is not the published one of its name, a sentence each."""
    found = []
    wanted = run.quantize or run.evaluate
    if wanted is not None and wanted.config == "cin256-v2":  # others are named model.ckpt, too
        found.append(wanted.source)
    if run.evaluate is not None:
        found += [run.evaluate.reference, run.evaluate.inception, *(run.evaluate.lpips or ())]
    return published.doubts(path for path in found if path is not None)


def _found(files: pathlib.Path, named: pathlib.Path, problems: list[str]) -> pathlib.Path:
    for path in (files / named, named):
        if path.exists():
            return path
    problems.append(_where_from(str(named)))
    return named


def _where_from(named: str) -> str:
    known = published.FILES.get(os.path.basename(named))
    return known.describe() if known is not None else f"{named}: no such file or folder"


def _in_folder(folder: pathlib.Path) -> pathlib.Path:
    for name in (RECORD, "run.json"):
        if (folder / name).is_file():
            return folder / name
    raise VqjaxError(
        f"{folder}: holds neither {RECORD} nor run.json; give the folder of a finished run, or a "
        "run file"
    )


def _of_command(content: Mapping[str, Any], path: pathlib.Path) -> Run:
    """The run that a run.json of `vqjax.quantize` or `vqjax.evaluate` tells of."""
    command, folder = str(content.get("command")), path.parent
    if content.get("status") == STATUS_RUNNING:  # a report there may be of settings before these
        raise VqjaxError(f"{path}: the run is not complete; go on with it first: {command}")
    # Not the command itself, which may be longer than a folder's name can be.
    which = f"{folder.resolve().name} {str(content['fingerprint'])[:8]}"
    wanted = {name: value for name, value in content["settings"].items() if name != "out"}
    there = content.get("environment", {})
    module = _module(command)  # not a word anywhere in it: files are named as people like
    if module == "vqjax.quantize":
        wanted.pop("export", None)
        if wanted.get("plan") is not None:  # the folder carries a copy
            wanted["plan"] = str(folder / "plan.json")
        quantize = lib.from_plain(lib.QuantizeSettings, wanted, str(path))
        recorded, inputs = run_results.of_quantization(folder), run_results.inputs(content, None)
        return Run(f"quantize {which}", quantize, None, recorded, there, inputs=inputs)
    if module == "vqjax.evaluate":
        wanted.pop("export_npz", None)
        evaluate = lib.from_plain(lib.EvaluateSettings, wanted, str(path))
        recorded, inputs = run_results.of_evaluation(folder), run_results.inputs(None, content)
        return Run(f"evaluate {which}", None, evaluate, recorded, there, inputs=inputs)
    raise VqjaxError(f"{path}: the run of {command!r} cannot be repeated")


def _module(command: str) -> str:
    """What `python -m MODULE ...` runs; "" where a command has another form."""
    try:
        words = shlex.split(command)
    except ValueError:  # a quotation without an end
        return ""
    return words[2] if len(words) > 2 and words[1] == "-m" else ""


def _json(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise VqjaxError(f"{where}: not JSON ({error})") from error
