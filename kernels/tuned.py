# SPDX-License-Identifier: Apache-2.0
"""Tables of measured choices: data, by kind of device, operation and problem.

    {"version": 1, "devices": {KIND: {OP: {KEY: ENTRY}}}}

KIND is that of `device.Device`, KEY comes from `key`. An ENTRY is {"path": "xla"}, where a weight
that is decoded at load was fastest, or a path with its schedule:
{"path": "pallas", "kind": "fused", "tiles": {"rows": 16, ...}}. On a CPU it may be
{"path": "native"}, or {"path": "xla", "packed": "native"}: for a weight that has to stay packed,
native code is faster than decoding in every call. Only measurements on that device belong into it.

`COMMAND` writes the user's own table, in the cache. Another one, `tiles.json`, is in the package.
"""

import dataclasses
import functools
import hashlib
import importlib.resources
import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import platformdirs

from vqjax.errors import VqjaxError, gathered
from vqjax.kernels.problem import Problem, power_of_two
from vqjax.kernels.schedule import Schedule, Tiles

VERSION = 1
COMMAND = "python -m vqjax.bench kernels --tune"
PATHS = ("xla", "native", "pallas", "triton")
WITHOUT_SCHEDULE = ("xla", "native")
KINDS = ("fused", "staged")


class Entry(NamedTuple):
    """What was measured to be fastest.

    Attributes:
      path: "xla" is a weight that is decoded at load.
      schedule: of a GPU kernel; None for others.
      packed: path of a weight that is not decoded at load all the same, where that was measured.
    """

    path: str
    schedule: Schedule | None = None
    packed: str | None = None


DECODED = Entry("xla")
"""Weights that are decoded at load: what every kernel has to beat."""


def key(problem: Problem) -> str:
    """Returns what problems share that are measured as one: rows count up to a power of two.

    What a usual layer has is left out, windows of 3x3 among it: tables that were written before
    keys told windows apart are of such layers, and are read as they are.
    """
    rows = power_of_two(max(problem.rows, 1))
    sizes = f"{rows}x{problem.inputs}x{problem.outputs}"
    code = f"{problem.books}x{problem.entries}x{problem.group}"
    stride = "" if problem.strides == (1, 1) else " stride {}x{}".format(*problem.strides)
    usual = 3 if problem.op == "vq_conv" else 1
    window = "" if problem.window == usual else f" window {problem.window}x{problem.window}"
    return f"{sizes} {problem.dtype} {code} {problem.codebook_dtype}{stride}{window}"


def find(device_kind: str, problem: Problem) -> Entry | None:
    """Returns the measured path of a problem and its schedule, if any, or None: no measurement."""
    return _tables().get((device_kind, problem.op, key(problem)))


def knows(device_kind: str) -> bool:
    """Returns whether anything was measured on a kind of device."""
    return bool(found_on(device_kind))


def found_on(device_kind: str) -> list[Entry]:
    """Returns all that was measured on a kind of device."""
    return [entry for (kind, _, _), entry in _tables().items() if kind == device_kind]


def digest(device_kind: str) -> str:
    """Returns what tells the measurements of a kind of device from others; empty without any."""
    mine = sorted(
        (op, name, plain(e)) for (k, op, name), e in _tables().items() if k == device_kind
    )
    return hashlib.sha256(json.dumps(mine).encode()).hexdigest()[:12] if mine else ""


def own_file() -> pathlib.Path:
    """Returns where the user's own table is, if there is one."""
    return platformdirs.user_cache_path("vqjax") / "tiles.json"


@functools.cache
def _tables() -> dict[tuple[str, str, str], Entry]:
    shipped = importlib.resources.files("vqjax.kernels") / "tiles.json"
    table, own = read(shipped.read_text(encoding="utf-8")), own_file()
    if own.exists():
        try:
            table |= read(own.read_text(encoding="utf-8"))
        except (VqjaxError, ValueError, AttributeError) as error:
            raise VqjaxError(f"{own}: {error}; delete it, and measure again: {COMMAND}") from None
    return table


def read(text: str) -> dict[tuple[str, str, str], Entry]:
    """Returns the entries of a table by (device kind, op, key).

    Raises:
      VqjaxError: lists everything that is wrong with it.
    """
    data = json.loads(text)
    if data.get("version") != VERSION:
        raise gathered([f"version {data.get('version')!r}, expected {VERSION}"], _HEADING)
    if not isinstance(data.get("devices"), dict):
        raise gathered(['no "devices", expected choices by kind of device'], _HEADING)
    problems: list[str] = []
    table = {
        (kind, op, name): _entry(fields, f"{kind}: {op} {name}", problems)
        for kind, ops in data["devices"].items()
        for op, entries in ops.items()
        for name, fields in entries.items()
    }
    if problems:
        raise gathered(problems, _HEADING)
    return table


def merged(text: str, device_kind: str, found: Mapping[tuple[str, str], Entry]) -> str:
    """Returns a table with the entries of a device, by (op, key), added or replaced.

    Raises:
      VqjaxError: if the table was not valid.
    """
    read(text)
    data = json.loads(text)
    ops = data["devices"].setdefault(device_kind, {})
    for (op, name), entry in found.items():
        ops.setdefault(op, {})[name] = plain(entry)
    return json.dumps(data, indent=1, sort_keys=True) + "\n"


def plain(entry: Entry) -> dict[str, Any]:
    """Returns an entry as a table has it."""
    path, made, packed = entry
    fields = {} if packed is None else {"packed": packed}
    if made is not None:
        fields |= {"kind": made.kind, "tiles": dataclasses.asdict(made.tiles)}
    return {"path": path} | fields


EMPTY = json.dumps({"version": VERSION, "devices": {}})
"""A table without measurements."""

_HEADING = "the table of measured tiles cannot be used:"


def _entry(fields: dict[str, Any], where: str, problems: list[str]) -> Entry:
    path, kind, packed = str(fields.get("path")), str(fields.get("kind")), fields.get("packed")
    if path not in PATHS:
        problems.append(f"{where}: path {path!r}, expected one of {', '.join(PATHS)}")
    if packed not in (None, "native") or (packed and path != "xla"):
        problems.append(f"{where}: packed {packed!r} with path {path!r}, expected native with xla")
    if path in WITHOUT_SCHEDULE:
        return Entry(path, packed=packed)
    if kind not in KINDS:
        problems.append(f"{where}: kind {kind!r}, expected {' or '.join(KINDS)}")
    try:
        tiles = Tiles(**fields.get("tiles", {}))
    except TypeError as error:
        problems.append(f"{where}: tiles {fields.get('tiles')!r}: {error}")
        return Entry(path)
    problems += [f"{where}: {problem}" for problem in tiles.problems()]
    return Entry(path, Schedule(kind, tiles))
