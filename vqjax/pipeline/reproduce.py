# SPDX-License-Identifier: Apache-2.0
"""A run from its file: quantize, evaluate, record, compare; and the table of all runs."""

import dataclasses
import importlib.resources
import itertools
import json
import pathlib
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table

from vqjax import progress, settings
from vqjax.config import PRESETS
from vqjax.errors import QualityGateError, VqjaxError
from vqjax.eval import literature, report
from vqjax.io import native, tfds_images
from vqjax.pipeline import (
    environment,
    evaluate,
    journal,
    quantize,
    refusals,
    run_cost,
    run_file,
    run_results,
)
from vqjax.pipeline.processes import Team
from vqjax.pipeline.run_file import RECORD, Run

QUANTIZED, EVALUATION = "quantized", "evaluation"
_FOLDER = pathlib.Path("vqjax-runs")
_MACHINE = "device", "backend", "processor", "kernels"  # of `environment.describe`


def main(wanted: settings.ReproduceSettings) -> None:
    """Runs what the command asks for.

    Raises:
      VqjaxError: if it asks for nothing, or as `run` says.
    """
    if wanted.table and wanted.run is not None:
        raise VqjaxError(
            f"--table beside {wanted.run}: --table runs nothing, and a run prints its table at the "
            "end; leave one of them out"
        )
    if wanted.table:
        print(table_text(_shown(wanted)))
    elif wanted.run is None:
        raise VqjaxError(
            f"give a run file, or the name of a run in the package "
            f"({', '.join(run_file.packaged())}), or --table"
        )
    else:
        run(wanted)


def run(wanted: settings.ReproduceSettings) -> dict[str, Any]:
    """Makes or continues a run, writes its record and returns it.

    Raises:
      VqjaxError: if it is no run, files are missing (all are named), or what its evaluation needs
        is unusable.
      QualityGateError: if a number is farther from the recorded one than its tolerance.
    """
    assert wanted.run is not None
    _check_folders(wanted.results)
    asked = given = run_file.load(wanted.run)
    if wanted.seed is not None:
        asked = asked.seeded(wanted.seed)
    if wanted.memory is not None:
        asked = asked.limited(wanted.memory)
    if asked.quantize is not None:
        refusals.check(asked.quantize)
    if asked.evaluate is not None and Team.current().count > 1:
        raise VqjaxError("a run with an evaluation is made by one process, on all of its devices")
    out = wanted.out or _FOLDER / _slug(asked, wanted)
    journal.check_folder(out)
    if asked.recorded:
        _check_elsewhere(pathlib.Path(wanted.run), out)
    cost = run_cost.predict(asked)
    # Before files are looked for: who lacks them will want to know whether to get them.
    told = "unknown: the run does not name its model" if cost is None else cost.describe()
    console = progress.console(stderr=True)
    console.print(f"{asked.name}: {told}", soft_wrap=True)
    here = run_file.resolved(asked, wanted.files)
    doubts = run_file.doubts(here)
    for sentence in doubts:  # before the work: it takes hours
        console.print(f"note: {sentence}", soft_wrap=True)
    if here.quantize is not None and here.evaluate is not None:
        evaluate.check_ahead(here.evaluate, run_cost.config_of(here.quantize))
    results = _made(here, out)
    record = {
        "name": asked.name,
        "command": _command(wanted),
        "run": asked.to_dict(),
        "results": results,
        "notes": doubts,
        "inputs": _inputs(here, out),
        "environment": environment.describe(),
    }
    native.write_atomically(out / RECORD, (json.dumps(record, indent=2) + "\n").encode())
    print(f"record: {out / RECORD}")
    if asked.quantize is not None and asked.evaluate is not None:
        print(f"\n{table_text((out, *_shown(wanted)), own=out / RECORD)}\n")
    if asked.recorded:
        limits = [run.quantize and run.quantize.memory for run in (given, asked)]
        _judge(asked, record, ["memory"] if limits[0] != limits[1] else [])
    return record


def table_text(folders: Iterable[pathlib.Path], own: pathlib.Path | None = None) -> str:
    """Our runs beside the literature, as Markdown. Unreadable records are named below it.

    Args:
      folders: of finished runs, looked through with all folders below.
      own: a record in one of them: shows the tables that it has a row in and, if its model is that
        of the papers, the one that papers are compared in; None: all tables.

    Raises:
      VqjaxError: if a folder is not there.
    """
    _check_folders(folders)
    ours, unreadable = _ours(folders)
    tables = literature.tables(ours)
    published = own is None or any(
        run["where"] == str(own) and run["model"] == literature.MODEL for run in ours
    )
    if own is not None:
        held = [any(row[-1] == str(own) for row in table.rows) for table in tables]
        held[0] = held[0] or published
        tables = list(itertools.compress(tables, held))
    parts = []
    for table in tables:
        rows = report.markdown_rows(table.columns, table.rows)
        parts += [f"## {table.heading}", *([table.note] if table.note else []), rows]
    lists = {
        "Sources": literature.sources() if published else [],
        "Left out, since they are unreadable": unreadable,
    }
    for heading, lines in lists.items():
        if lines:
            parts.append("\n".join([f"{heading}:", *(f"- {line}" for line in lines)]))
    return "\n\n".join(parts)


def _made(wanted: Run, out: pathlib.Path) -> dict[str, Any]:
    """Does the work, as far as it is not done yet; returns all numbers, flat."""
    results: dict[str, Any] = {}
    out.mkdir(parents=True, exist_ok=True)
    if wanted.quantize is not None:
        folder = out / QUANTIZED
        quantize.run(dataclasses.replace(wanted.quantize, out=folder))
        results |= run_results.of_quantization(folder)
    if wanted.evaluate is not None:
        asked = dataclasses.replace(wanted.evaluate, out=out / EVALUATION)
        if wanted.quantize is not None:
            source, against = str(out / QUANTIZED), wanted.quantize.source
            preset = wanted.quantize.config
            asked = dataclasses.replace(asked, source=source, against=against, config=preset)
        evaluate.run(asked)
        results |= run_results.of_evaluation(asked.out)
    return results


def _inputs(made: Run, out: pathlib.Path) -> dict[str, str]:
    """SHA-256 of what the finished run in `out` was made of, and of the code."""
    parts = (QUANTIZED, made.quantize), (EVALUATION, made.evaluate)
    about = [wanted and json.loads((out / part / "run.json").read_text()) for part, wanted in parts]
    return run_results.inputs(*about) | {"code": environment.code()}


def _judge(asked: Run, record: Mapping[str, Any], changed: list[str]) -> None:
    """Prints every number beside the recorded one; raises QualityGateError if one is too far.

    Args:
      changed: what is another than in the recorded run, beside its environment.
    """
    found = run_results.compare(asked.recorded, record["results"])
    table = Table(title="Recorded and repeated", title_justify="left")
    for column in ("", "recorded", "repeated", "verdict"):
        table.add_column(column)
    for row in found:
        table.add_row(row.name, _short(row.before), _short(row.after), row.verdict)
    console = progress.console()
    console.print(table)
    if all(row.verdict == "equal" for row in found):
        print("all numbers and bits are equal")
        return
    kind = (*_MACHINE, *environment.PACKAGES, "vqjax", "python")
    before = {_input(asked, name): value for name, value in asked.inputs.items()}
    before |= {name: asked.environment[name] for name in kind if name in asked.environment}
    now = {_input(asked, name): value for name, value in record["inputs"].items()}
    now |= {name: record["environment"][name] for name in kind}
    changed = changed + [name for name in now if name in before and before[name] != now[name]]
    why = (
        f"other {', '.join(changed)}" if changed else "the same files, kind of device and versions"
    )
    if unknown := [name for name in now if name not in before]:
        why += f" (not recorded: {', '.join(unknown)})"
    print(f"not all bits are equal, on {why}; tolerances: vqjax.pipeline.run_results.TOLERANCES")
    far = [row.name for row in found if row.verdict in ("outside", "absent")]
    if far:
        raise QualityGateError(f"outside of the tolerance or absent: {', '.join(far)}")
    print("every number is within its tolerance")


def _input(asked: Run, name: str) -> str:
    """An input as people know it: with the name of its file."""
    made_from = name == "source" and asked.quantize is not None
    file = getattr(asked.quantize if made_from else asked.evaluate, name, None)
    return f"{name} {_base_name(file)}" if file is not None else name


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)[:16]


def _command(wanted: settings.ReproduceSettings) -> str:
    """What repeats the run, without what only this machine has: --files and --out."""
    words = ["python", "-m", "vqjax.reproduce", str(wanted.run)]
    for name in ("seed", "memory"):
        if (value := getattr(wanted, name)) is not None:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def _slug(asked: Run, wanted: settings.ReproduceSettings) -> str:
    name = re.sub(r"[^a-z0-9.]+", "_", asked.name.lower()).strip("_.")
    if not asked.name.isascii() or not name:  # of such names too little is left to tell them apart
        name = f"{name or 'run'}_{journal.fingerprint(asked.name)[:8]}"
    seed = "" if wanted.seed is None else f"_seed{wanted.seed}"
    # A folder of its own, since the folder of a quantization refuses one within another limit.
    memory = "" if wanted.memory is None else f"_memory{wanted.memory:g}"
    return name + seed + memory + ("_again" if asked.recorded else "")


def _check_elsewhere(record: pathlib.Path, out: pathlib.Path) -> None:
    """A run in the folder of its own record would find everything done and repeat nothing."""
    folder = record if record.is_dir() else record.parent
    if folder.resolve() in [place.resolve() for place in (out, out / QUANTIZED, out / EVALUATION)]:
        raise VqjaxError(f"{out} holds the run to be repeated; choose another --out")


def _shown(wanted: settings.ReproduceSettings) -> list[pathlib.Path]:
    """Folders of finished runs that a table shows: those asked for, and where runs go."""
    return [*wanted.results, *([_FOLDER] if _FOLDER.is_dir() else [])]


def _check_folders(results: Iterable[pathlib.Path]) -> None:
    for folder in results:
        if not folder.is_dir():
            raise VqjaxError(f"--results {folder}: no such folder")


def _ours(folders: Iterable[pathlib.Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """Finished runs, and the package's runs that nobody finished, without results; and what is
    wrong with records that are unreadable."""
    records, unreadable = _records(folders)
    # Only quantized models have a place beside the literature.
    finished = [_row(run, where) for run, where in records if run.quantize is not None]
    names = {row["name"] for row in finished}
    for name, file in run_file.packaged().items():
        run = run_file.parse(json.loads(file.read_text()), pathlib.Path(name))
        if run.name not in names:
            finished.append(_row(run, f"`python -m vqjax.reproduce {name}`"))
    return finished, unreadable


def _records(folders: Iterable[pathlib.Path]) -> tuple[list[tuple[Run, str]], list[str]]:
    """Records with where they are, each once, and what is wrong with those that are unreadable."""
    found, unreadable = [], []
    results = importlib.resources.files("vqjax.eval") / "results"
    packaged = list(results.iterdir()) if results.is_dir() else []
    for file in sorted(packaged, key=lambda f: f.name):
        content = json.loads(file.read_text()) if file.name.endswith(".json") else None
        if isinstance(content, dict) and {"run", "results"} <= content.keys():
            run = run_file.parse(content, pathlib.Path(file.name))
            found.append((run, f"eval/results/{file.name}"))
    files: dict[pathlib.Path, pathlib.Path] = {}
    for path in (path for folder in folders for path in sorted(folder.rglob(RECORD))):
        files.setdefault(path.resolve(), path)  # folders may overlap
    for path in files.values():
        try:
            found.append((run_file.load(str(path)), str(path)))
        except (VqjaxError, OSError) as error:  # perhaps of another version: no reason to show none
            unreadable.append(str(error))
    return found, unreadable


def _row(run: Run, where: str) -> dict[str, Any]:
    quantized, evaluated = run.quantize, run.evaluate
    name = None if quantized is None else quantized.config or quantized.source
    own = PRESETS[name]().guidance if name in PRESETS else None
    protocol = {"count": 0, "steps": 0, "guidance": own, "eta": 0.0}
    if evaluated is not None:
        protocol = {
            "count": run.recorded.get("n") or evaluated.count or 0,
            "steps": evaluated.steps,
            "guidance": own if evaluated.guidance is None else evaluated.guidance,
            "eta": evaluated.eta,
        }
    return {
        "name": run.name,
        "model": name,
        "weights": 0.0 if quantized is None else quantized.bits,
        "activations": 0 if quantized is None else quantized.act_bits,
        "protocol": protocol,
        "files": {
            "model": None if quantized is None else _base_name(quantized.source),
            "reference": None if evaluated is None else _base_name(evaluated.reference),
            "inception": None if evaluated is None else _base_name(evaluated.inception),
        },
        "notes": run.notes,
        "results": run.recorded,
        "where": where,
    }


def _base_name(file: str | pathlib.Path | None) -> str | None:
    if file is None:
        return None
    named = str(file)
    # The name of a dataset may hold slashes, but is no path.
    return named if named.startswith(tfds_images.PREFIX) else pathlib.PurePath(named).name
