# SPDX-License-Identifier: Apache-2.0
"""`bench ablation`: what each part of the tuning is worth, on the embedded model.

A cell is a bit width, a way of tuning and a seed. All cells of a seed sample from the same noise
and classes, so differences between them have small errors even where scores have not.
"""

import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.table import Table

from vqjax import progress
from vqjax.bench import embedded, results
from vqjax.bench.embedded import FULL
from vqjax.bench.tables import wide_console
from vqjax.core.model import Model
from vqjax.eval import figures
from vqjax.eval.judge import SCORES
from vqjax.eval.judges import DIGITS
from vqjax.io import native
from vqjax.pipeline import environment
from vqjax.pipeline.journal import fingerprint
from vqjax.settings import BenchAblationSettings, command_line


class Cell(NamedTuple):
    """One measurement. Full precision has no bits."""

    bits: float | None
    method: str
    seed: int


@jax.default_matmul_precision("highest")  # scores must not depend on the device
def run(wanted: BenchAblationSettings) -> None:
    """Measures the cells that are not yet in the JSON file; prints and draws all of them."""
    embedded.check(wanted.bits, wanted.count)
    everything, identity = cells(wanted), embedded.identity()
    measured = wanted.count, _teaching(wanted)
    keys = {cell: fingerprint(identity, repr(measured), repr(cell)) for cell in everything}
    content = {
        "command": command_line("vqjax.bench", wanted, "ablation"),
        "environment": environment.describe(),
        "reference": {"real_halves": DIGITS.real_halves()},
    }
    kept = results.Results(wanted.json, content, keys.values())
    done = sum(kept.get(key) is not None for key in keys.values())
    compressed = functools.cache(functools.partial(embedded.compressed, wanted.work))
    with progress.stage("cells", len(everything), done=done) as advance:
        for cell, key in keys.items():
            if kept.get(key) is None:
                start = None if cell.method == FULL else compressed(cell.bits)
                record = kept.add(key, _measure(wanted, cell, start))
                advance(1, f"{cell.method} {cell.bits} bits: digit-FD {record['fd']:.2f}")
    kept.content["summary"] = summary(kept.records)
    kept.save()
    show(kept.content["summary"])
    if wanted.figure is not None:
        drawn = [row for row in kept.content["summary"] if row["method"] != FULL]
        native.write_atomically(wanted.figure, figures.ablation(drawn).light)


def cells(wanted: BenchAblationSettings) -> list[Cell]:
    """All cells, seed by seed, so that an unfinished file compares all methods."""
    found = []
    for seed in range(wanted.seed, wanted.seed + wanted.seeds):
        found.append(Cell(None, FULL, seed))
        found += [Cell(bits, method, seed) for bits in wanted.bits for method in wanted.methods]
    return found


def _model(wanted: BenchAblationSettings, cell: Cell, start: embedded.Compressed) -> Model:
    """The model of a cell."""
    if cell.method == "none":
        return start.model
    return embedded.tuned(start, cell.method, cell.seed, _teaching(wanted))


def _teaching(wanted: BenchAblationSettings) -> embedded.Teaching:
    return embedded.Teaching(wanted.tune_steps, wanted.tuning, wanted.order, wanted.code_rate)


def _measure(
    wanted: BenchAblationSettings, cell: Cell, start: embedded.Compressed | None
) -> results.Record:
    """Scores, "seconds" of sampling and scoring, of what was tuned the held-out "loss" and, where
    codes were trained, "codes_changed"."""
    full = embedded.full_precision(wanted.work, wanted.count, cell.seed)
    if start is None:
        begun = time.monotonic()
        found = embedded.scores(full)
    else:
        model = _model(wanted, cell, start)
        loss = embedded.held_out_loss(start, model)
        begun = time.monotonic()
        images_NHWC = embedded.sample(model, wanted.count, cell.seed, cell.method)
        found = {**embedded.scores(images_NHWC, full), "loss": loss}
        if cell.method in embedded.VARIANTS:
            found["codes_changed"] = embedded.changed(start.model, model)
    return {**cell._asdict(), **found, "seconds": round(time.monotonic() - begun, 1)}


def summary(records: Sequence[results.Record]) -> list[dict[str, Any]]:
    """Means over the seeds of each pair of bits and method, in the order of the records.

    "rise" is that of digit-FD over full precision, "spread" its standard error: from the bootstrap
    of each seed, or from the spread between seeds where that is larger. "accuracy_se", "psnr_se"
    and "ssim_se" are the same of these means. "rise_interval" is the 95 % interval of one seed, its
    ends averaged over seeds. Records of earlier versions have none of these. "loss_over_pv"
    compares losses with those of plain PV-Tuning seed by seed, since seeds differ more than ways of
    tuning; of several seeds "loss_over_pv_spread" is its standard error.
    """
    groups: dict[tuple[float | None, str], list[results.Record]] = {}
    for record in records:
        groups.setdefault((record["bits"], record["method"]), []).append(record)
    plain = {(row["bits"], row["seed"]): row["loss"] for row in records if row["method"] == "pv"}
    return [
        {"bits": bits, "method": method, "seeds": len(rows), "n": rows[0]["n"]}
        | {name: float(np.mean([row[name] for row in rows])) for name in SCORES}
        | _errors(rows)
        | (_against_full(rows) | _against_plain(rows, plain) if method != FULL else {})
        for (bits, method), rows in groups.items()
    ]


def _against_full(rows: Sequence[results.Record]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "rise": float(np.mean([row["fd_difference"] for row in rows])),
        "spread": _error(rows, "fd_difference", [row["fd_difference_sd"] for row in rows]),
    }
    if all("fd_difference_interval" in row for row in rows):
        ends = [row["fd_difference_interval"] for row in rows]
        found["rise_interval"] = np.mean(ends, axis=0).tolist()
    means = {
        name: float(np.mean([row[name] for row in rows]))
        for name in ("psnr", "ssim", "loss", "codes_changed")
        if name in rows[0]
    }
    return found | means


def _errors(rows: Sequence[results.Record]) -> dict[str, float]:
    """Standard errors of the means whose errors all records have."""
    names = [n for n in ("accuracy", "psnr", "ssim") if all(f"{n}_se" in row for row in rows)]
    return {f"{n}_se": _error(rows, n, [row[f"{n}_se"] for row in rows]) for n in names}


def _error(rows: Sequence[results.Record], name: str, errors: Sequence[float]) -> float:
    """Standard error of a mean over seeds: from those of each, or from the spread between them."""
    values = [row[name] for row in rows]
    inside = float(np.sqrt(np.mean(np.square(errors))))
    between = float(np.std(values, ddof=1)) if len(rows) > 1 else 0.0
    return max(inside, between) / len(rows) ** 0.5


def _against_plain(
    rows: Sequence[results.Record], plain: dict[tuple[float, int], float]
) -> dict[str, float]:
    """The losses over those of PV-Tuning with the same bits and seeds, where all were measured."""
    pairs = [(row["loss"], plain.get((row["bits"], row["seed"]))) for row in rows]
    ratios = [loss / other for loss, other in pairs if other is not None]
    if len(ratios) < len(rows):
        return {}
    found = {"loss_over_pv": float(np.mean(ratios))}
    if len(ratios) > 1:
        found["loss_over_pv_spread"] = float(np.std(ratios, ddof=1)) / len(ratios) ** 0.5
    return found


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Prints the summary."""
    table = Table(title="Tuning, means over seeds", title_justify="left")
    for name in ("bits", "tuning"):
        table.add_column(name)
    shown = (*SCORES, "psnr", "ssim", "codes_changed")
    titles = {"fd": "digit-FD", "codes_changed": "codes changed"}
    for name in ("seeds", "N", "digit-FD rises by", *shown, "loss", "over PV's"):
        table.add_column(titles.get(name, name), justify="right")
    for row in rows:
        full = row["method"] == FULL
        table.add_row(
            "" if full else f"{row['bits']:g}",
            row["method"].replace("_", " "),
            str(row["seeds"]),
            str(row["n"]),
            "" if full else f"{row['rise']:+.2f} ± {row['spread']:.2f}",
            *(_with_error(row, name) for name in shown),
            f"{row['loss']:.3g}" if "loss" in row else "",
            _ratio(row),
        )
    wide_console().print(table)


def _with_error(row: dict[str, Any], name: str) -> str:
    if name not in row:
        return ""
    error = row.get(f"{name}_se")
    return f"{row[name]:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _ratio(row: dict[str, Any]) -> str:
    if "loss_over_pv" not in row:
        return ""
    spread = row.get("loss_over_pv_spread")
    return f"{row['loss_over_pv']:.3f}" + ("" if spread is None else f" ± {spread:.3f}")
