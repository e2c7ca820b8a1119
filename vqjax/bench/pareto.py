# SPDX-License-Identifier: Apache-2.0
"""`bench pareto`: what the embedded model loses at each number of stored bits, by method."""

import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from rich.table import Table

from vqjax import progress
from vqjax.bench import embedded, results
from vqjax.bench.embedded import FULL
from vqjax.bench.tables import wide_console
from vqjax.core.model import Model
from vqjax.errors import VqjaxError
from vqjax.eval import pareto_figure
from vqjax.eval.judge import SCORES
from vqjax.eval.judges import DIGITS
from vqjax.io import native
from vqjax.pipeline import environment, quantize
from vqjax.pipeline import results as report
from vqjax.pipeline.journal import fingerprint
from vqjax.settings import BenchParetoSettings, QuantizeSettings, command_line

_TAUGHT = {"tuned": "semi_pv", "scalar_tuned": "scalar"}  # as `embedded.tuned` names them
_ERRORS = 1.96  # standard errors on each side of a 95 % interval


class Point(NamedTuple):
    """One measurement. Full precision has no bits."""

    bits: float | None
    method: str

    @property
    def scalar(self) -> bool:
        """Whether each weight has a code of its own, so that bits must be whole."""
        return self.method.startswith("scalar")


@jax.default_matmul_precision("highest")  # scores must not depend on the device
def run(wanted: BenchParetoSettings) -> None:
    """Measures the points that are not yet in the JSON file; prints and draws all of them."""
    embedded.check(wanted.bits, wanted.count)
    everything = points(wanted)
    keys = dict(zip(everything, _keys(wanted, everything)))
    content = {
        "command": command_line("vqjax.bench", wanted, "pareto"),
        "seed": wanted.seed,
        "environment": environment.describe(),
        "reference": {"real_halves": DIGITS.real_halves()},
    }
    wanted.work.mkdir(parents=True, exist_ok=True)
    kept = results.Results(wanted.json or wanted.work / "pareto.json", content, keys.values())
    done = sum(kept.get(key) is not None for key in keys.values())
    # Models of one bit width follow each other, and those before are not needed again.
    compressed = functools.lru_cache(1)(functools.partial(embedded.compressed, wanted.work))
    with progress.stage("points", len(everything), done=done) as advance:
        for point, key in keys.items():
            if kept.get(key) is None:
                record = kept.add(key, _measure(wanted, point, key, compressed))
                advance(1, f"{point.method} {point.bits} bits: digit-FD {record['fd']:.2f}")
    rows = with_intervals(kept.records)
    kept.content["points"] = rows
    kept.save()
    show(rows)
    if wanted.figure is not None:
        halves = content["reference"]["real_halves"]
        native.write_atomically(wanted.figure, pareto_figure.draw(rows, halves))


def points(wanted: BenchParetoSettings) -> list[Point]:
    """Full precision, then all methods of each bit width.

    Raises:
      VqjaxError: if there is nothing to measure.
    """
    asked = [Point(bits, method) for bits in wanted.bits for method in wanted.methods]
    found = [point for point in asked if not point.scalar or float(point.bits or 0).is_integer()]
    if not found:
        raise VqjaxError(
            f"--bits {' '.join(f'{b:g}' for b in wanted.bits)} --methods "
            f"{' '.join(wanted.methods)}: nothing to measure; scalar quantization has whole bits "
            "only, so give some, or another method"
        )
    return [Point(None, FULL), *dict.fromkeys(found)]


def _keys(wanted: BenchParetoSettings, everything: Sequence[Point]) -> list[str]:
    """What each point depends on: tuning only where it is tuned, no places, no other points."""
    identity, taught = embedded.identity(), (wanted.tune_steps, repr(wanted.tuning))
    return [
        fingerprint(
            identity, wanted.count, wanted.seed, point, taught if point.method in _TAUGHT else None
        )
        for point in everything
    ]


def _measure(wanted: BenchParetoSettings, point: Point, key: str, compressed) -> results.Record:
    start = time.monotonic()
    full = embedded.full_precision(wanted.work, wanted.count, wanted.seed)
    if point.bits is None:
        scores = embedded.scores(full)
        weights = report.unet_weights(quantize.prepare(QuantizeSettings()))
        stored: dict[str, Any] = {"bits_per_weight": 32.0, "bytes": 4 * weights}
    else:
        model, taken = _model(wanted, point, compressed(point.bits))
        images = embedded.kept(
            embedded.folder(wanted.work) / "samples" / f"{key[:16]}.npy",
            lambda: embedded.sample(model, wanted.count, wanted.seed, point.method),
        )
        scores = embedded.scores(images, full)
        stored = {"bits_per_weight": taken.bits_per_weight, "bytes": taken.nbytes}
    return {**point._asdict(), **stored, **scores, "seconds": round(time.monotonic() - start, 1)}


def _model(
    wanted: BenchParetoSettings, point: Point, start: embedded.Compressed
) -> tuple[Model, report.Stored]:
    """The model of a point, and what it stores: tuning changes values only."""
    if point.scalar:
        taken = report.stored_scalar(start.rival, start.scalar)
    else:
        taken = report.stored(start.model)
    if point.method not in _TAUGHT:
        return start.rival if point.scalar else start.model, taken
    teaching = embedded.Teaching(wanted.tune_steps, wanted.tuning)
    return embedded.tuned(start, _TAUGHT[point.method], wanted.seed, teaching), taken


def with_intervals(records: Sequence[results.Record]) -> list[dict[str, Any]]:
    """The points for table and figure, with 95 % intervals of digit-FD and PSNR.

    That of digit-FD is of its difference to full precision, from the bootstrap that draws the same
    pictures of both: what noise and classes do to both is not in it. "fd_interval" and
    "psnr_interval" are [low, high]; full precision, which others are measured against, has none.
    """
    rows = []
    for record in records:
        names = ("bits", "method", "bits_per_weight", "bytes", "n", *SCORES)
        row: dict[str, Any] = {name: record[name] for name in names}
        if record["method"] != FULL:
            row |= {name: record[name] for name in ("fd_difference", "psnr", "ssim")}
            row["fd_interval"] = _interval(record["fd"], record["fd_difference_sd"])
            row["psnr_interval"] = _interval(record["psnr"], record["psnr_se"])
        rows.append(row)
    return rows


def _interval(value: float, error: float) -> list[float]:
    return [value - _ERRORS * error, value + _ERRORS * error]


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Prints the points."""
    table = Table(title="Stored and lost, by method", title_justify="left")
    for name in ("method", "stored bits", "MB", "N", "digit-FD", "rise", "PSNR, dB"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for name in ("SSIM", "accuracy", "precision", "recall"):
        table.add_column(name, justify="right")
    for row in sorted(rows, key=lambda r: (r["method"] != FULL, r["method"], -(r["bits"] or 0))):
        full = row["method"] == FULL
        table.add_row(
            row["method"].replace("_", " "),
            f"{row['bits_per_weight']:.3f}",
            f"{row['bytes'] / 1e6:.3f}",
            str(row["n"]),
            f"{row['fd']:.2f}",
            "" if full else f"{row['fd_difference']:+.2f} ± {_half(row['fd_interval']):.2f}",
            "" if full else f"{row['psnr']:.2f} ± {_half(row['psnr_interval']):.2f}",
            "" if full else f"{row['ssim']:.3f}",
            *(f"{row[name]:.3f}" for name in ("accuracy", "precision", "recall")),
        )
    console = wide_console()
    console.print(table)
    console.print("±: half of a 95 % interval", style="dim")


def _half(interval: Sequence[float]) -> float:
    return (interval[1] - interval[0]) / 2
