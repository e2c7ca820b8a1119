# SPDX-License-Identifier: Apache-2.0
"""Our results beside the published ones, one table for each protocol.

Published numbers and their sources are data (`literature.json`); nothing is computed from them.
"""

import functools
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from typing import Any

from vqjax.eval.report import Table, number
from vqjax.io import published

NOT_FOUND, NOT_MEASURED = "not found", "not measured"
MODEL = "cin256-v2"
COMPARED = {"count": 50_000, "steps": 20, "guidance": 3.0, "eta": 0.0}
"""What our runs must have to stand in the table of the first protocol."""
FILES = {
    "model": published.CIN256_V2.name,
    "reference": published.IMAGENET_REFERENCE.name,
    "inception": published.INCEPTION.name,
}
"""What they must be made with, too: scores by other files are other scores."""
_COLUMNS = {"is": ("IS", 2), "fid": ("FID", 2), "sfid": ("sFID", 2)}
_SHARES = {"precision": ("Precision, %", 2), "recall": ("Recall, %", 2)}
_DIGITS = {
    "fd": ("digit-FD", 2),
    "accuracy": ("Accuracy", 3),
    "precision": ("Precision", 3),
    "recall": ("Recall", 3),
}
_TWINS = {"psnr": ("PSNR, dB", 2), "ssim": ("SSIM", 4)}


@functools.cache
def load() -> dict[str, Any]:
    """`about`, `sources` (tag to what it is) and `protocols` (each with its `rows`)."""
    text = importlib.resources.files("vqjax.eval").joinpath("literature.json").read_text()
    return json.loads(text)


def tables(ours: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Every protocol's table; ours stand in the first one, those of other protocols, or made with
    other files than the published ones, by themselves.

    Args:
      ours: one dict each: `name`, `model`, `weights` and `activations` (bits), `protocol` (count,
        steps, guidance, eta), `files` (base names, None for none, of those in `FILES`), `notes`
        (what speaks against their content), `results` (flat, as `vqjax.pipeline.run_results` names
        them; empty where the run was not made), and `where` it is.
    """
    protocols = load()["protocols"]
    comparable = [
        run
        for run in ours
        if run["model"] == MODEL and run["protocol"] == COMPARED and not _doubts(run)
    ]
    digits = [run for run in ours if run["model"] == "digits"]
    rest = [run for run in ours if run not in comparable and run not in digits]
    found = [_published(protocols[0], comparable)]
    if digits:
        found.append(_of_digits(digits))
    found += [
        Table(f"{run['name']}: {_said(run['protocol'])}", _note(run), _head(), [_our_row(run)])
        for run in rest
    ]
    return found + [_published(protocol, []) for protocol in protocols[1:]]


def sources() -> list[str]:
    """One line for each tag of the tables."""
    return [f"[{tag}] {text}" for tag, text in load()["sources"].items()]


def _doubts(run: Mapping[str, Any]) -> list[str]:
    """Why scores of a run do not compare with published ones, whatever its protocol."""
    others = []
    if run["model"] == MODEL:  # what is published of other models is not known here
        others = [
            f"{kind}: found {run['files'][kind] or 'none'}, published results have {name}"
            for kind, name in FILES.items()
            if run["files"][kind] != name
        ]
    return [*others, *run["notes"]]


def _note(run: Mapping[str, Any]) -> str:
    doubts = _doubts(run)
    if not doubts:
        return "Ours."
    listed = [f"- {doubt}" for doubt in doubts]
    return "\n".join(["Ours. Not to be compared with published results:", *listed])


def _head() -> list[str]:
    columns = [name for name, _ in (*_COLUMNS.values(), *_SHARES.values(), *_TWINS.values())]
    return ["W/A", "Method", "MiB", *columns, "Source"]


def _published(protocol: Mapping[str, Any], ours: Sequence[Mapping[str, Any]]) -> Table:
    keyed = [
        ((-row["weights"], -row["activations"], 0), _their_row(row)) for row in protocol["rows"]
    ]
    for run in ours:
        keyed.append(((-run["weights"], -run["activations"], 1), _our_row(run)))
    full = next((run for run in ours if run["results"].get("full.fid") is not None), None)
    if full is not None:
        keyed.append(((-32, -32, 1), _our_row(full, side="full.")))
    rows = [row for _, row in sorted(keyed, key=lambda pair: pair[0])]
    return Table(f"LDM-4, ImageNet 256: {protocol['protocol']}", load()["about"], _head(), rows)


def _their_row(row: Mapping[str, Any]) -> list[str]:
    cells = [_shown(row[field], places) for field, (_, places) in (_COLUMNS | _SHARES).items()]
    source = f"[{row['source']}]" if row["source"] else NOT_FOUND
    note = f" {row['note']}" if "note" in row else ""
    bits = f"{row['weights']:g}/{row['activations']:g}"
    size = _shown(row["size_mib"], 1)
    return [bits, row["method"], size, *cells, *[NOT_FOUND] * len(_TWINS), source + note]


def _our_row(run: Mapping[str, Any], side: str = "") -> list[str]:
    results = run["results"]
    cells = [
        _ours(results.get(side + field), places) for field, (_, places) in _COLUMNS.items()
    ] + [
        _ours(None if (share := results.get(side + field)) is None else 100 * share, places)
        for field, (_, places) in _SHARES.items()
    ]
    before, after = results.get("bytes_before"), results.get("bytes_after")
    size = before if side else after
    near = [
        "–" if side else _ours(results.get(field), places) for field, (_, places) in _TWINS.items()
    ]
    bits = "32/32" if side else f"{run['weights']:g}/{run['activations']:g}"
    method = "vqjax, full precision" if side else "vqjax"
    mebibytes = _ours(None if size is None else size / 2**20, 1)
    return [bits, method, mebibytes, *cells, *near, run["where"]]


def _of_digits(runs: Sequence[Mapping[str, Any]]) -> Table:
    fields = {f"digits.{field}": about for field, about in _DIGITS.items()} | _TWINS
    columns = ["W/A", "bits stored", "N", *(name for name, _ in fields.values()), "Run"]
    rows = []
    full = next((run for run in runs if run["results"].get("full.digits.fd") is not None), None)
    if full is not None:
        values = [full["results"].get(f"full.{field}") for field in fields]
        shown = [
            "–" if value is None else number(value, places)
            for value, (_, places) in zip(values, fields.values())
        ]
        rows.append(["32/32", "32", f"{full['protocol']['count']:,}", *shown, full["where"]])
    for run in sorted(runs, key=lambda run: -run["weights"]):
        results = run["results"]
        cells = [_ours(results.get(field), places) for field, (_, places) in fields.items()]
        bits, count = _ours(results.get("bits_per_weight"), 3), f"{run['protocol']['count']:,}"
        line = [f"{run['weights']:g}/{run['activations']:g}", bits, count, *cells, run["where"]]
        rows.append(line)
    note = (
        "Scores of the package's evaluation networks: they say nothing about ImageNet and compare "
        "at one N only. No other method was published on these digits."
    )
    return Table("Embedded digits", note, columns, rows)


def _said(protocol: Mapping[str, Any]) -> str:
    return (
        f"{protocol['count']:,} samples, DDIM {protocol['steps']} steps, eta {protocol['eta']:g}, "
        f"guidance {protocol['guidance']}"
    )


def _shown(value: float | str | None, places: int) -> str:
    if value is None:
        return NOT_FOUND
    return value if isinstance(value, str) else f"{value:.{places}f}"


def _ours(value: float | None, places: int) -> str:
    return NOT_MEASURED if value is None else number(value, places)
