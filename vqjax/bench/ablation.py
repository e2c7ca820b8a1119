# SPDX-License-Identifier: Apache-2.0
"""`bench ablation`: what each part of the tuning is worth, on the embedded model.

A cell is a bit width, a way of tuning and a seed. All cells of a seed sample from the same noise
and classes, so differences between them have small errors even where scores have not.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

import vqjax.train
from vqjax import core, progress, sampling
from vqjax.bench import results
from vqjax.bench.tables import wide_console
from vqjax.core import tree
from vqjax.core.model import Model
from vqjax.core.scalar import ScalarLayer
from vqjax.eval import digits, fidelity, figures
from vqjax.io import native
from vqjax.pipeline import environment, quantize, timesteps, tuning
from vqjax.pipeline.journal import Journal, fingerprint
from vqjax.settings import BenchAblationSettings, QuantizeSettings, command_line
from vqjax.train import distill, pv, scalar

FULL = "full_precision"
ACT_BITS = 8
LEVEL_RATE, STEP_RATE = 0.02, 2e-3
"""Adam's learning rates of scalar quantization: latent weights in steps; logarithms of steps."""

VARIANTS = {
    "codebooks": pv.CODEBOOKS_ONLY,
    "straight_through": pv.STRAIGHT_THROUGH,
    "pv": pv.PV,
    "pv_restart": pv.PV,
    "semi_pv": pv.SEMI_PV,
}
_BATCH = 100  # samples of one compiled call


class Cell(NamedTuple):
    """One measurement. Full precision has no bits."""

    bits: float | None
    method: str
    seed: int


class Compressed(NamedTuple):
    """What all cells of a bit width start from."""

    job: quantize.Job
    journal: Journal
    model: Model
    scalar: dict[str, ScalarLayer]


@jax.default_matmul_precision("highest")  # scores must not depend on the device
def run(wanted: BenchAblationSettings) -> None:
    """Measures the cells that are not yet in the JSON file; prints and draws all of them."""
    everything = cells(wanted)
    identity = [results.here(), results.source_digest(core, vqjax.train)]
    measured = dataclasses.replace(wanted, bits=(), methods=(), seeds=0, json=None, figure=None)
    keys = {cell: fingerprint(identity, repr(measured), repr(cell)) for cell in everything}
    content = {
        "command": command_line("vqjax.bench", wanted, "ablation"),
        "environment": environment.describe(),
        "reference": {"real_halves": digits.real_halves()},
    }
    kept = results.Results(wanted.json, content, keys.values())
    done = sum(kept.get(key) is not None for key in keys.values())
    compressed = functools.cache(functools.partial(_compressed, wanted))
    with progress.stage("cells", len(everything), done=done) as advance:
        for cell, key in keys.items():
            if kept.get(key) is None:
                full = _full_precision(wanted, cell.seed)
                model = None if cell.method == FULL else _tuned(wanted, cell, compressed(cell.bits))
                record = kept.add(key, _measure(wanted, cell, model, full))
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
    for seed in range(wanted.seeds):
        found.append(Cell(None, FULL, seed))
        found += [Cell(bits, method, seed) for bits in wanted.bits for method in wanted.methods]
    return found


def _compressed(wanted: BenchAblationSettings, bits: float) -> Compressed:
    """Compresses the embedded model, or finds that in the work folder; ranges included."""
    out = wanted.work / f"{bits:g}"
    job = quantize.prepare(QuantizeSettings(bits=bits, act_bits=ACT_BITS, tune_steps=0, out=out))
    journal = Journal.open(out, quantize.record_of(job))
    job, done = quantize.compressed(job, journal)
    model = tuning.tuned(
        job, journal, quantize.assembled(job, done)[0], quantize.trajectories(job, journal)
    )
    return Compressed(job, journal, model, done.scalar)


def _tuned(wanted: BenchAblationSettings, cell: Cell, start: Compressed) -> Model:
    """The model of a cell."""
    if cell.method == "none":
        return start.model
    steps, rate = wanted.tune_steps, wanted.tuning.rate
    student, optimizer, metrics = _pupil(cell, start, steps, rate)
    recipe = dataclasses.replace(
        tuning.recipe_of(start.job),
        steps=steps,
        batch=wanted.tuning.batch,
        trajectories=wanted.tuning.trajectories,
        seed=cell.seed + tuning.SEED,
        order=wanted.order,
    )
    name = f"{cell.method}-{cell.seed}-{fingerprint(repr(wanted.tuning), steps, wanted.order)[:8]}"
    taught = distill.distill(
        start.job.model,
        student,
        optimizer,
        tuning.ranges_optimizer(steps, rate),
        recipe,
        (start.journal.folder / "tuned" / name).absolute(),
        activations=start.model.params["activations"],
        weight_of_t=lambda t_T: timesteps.at(start.journal, t_T),
        metrics=metrics,
        on_restart=pv.invalidate_all if cell.method == "pv_restart" else None,
        name=f"{cell.method} {cell.bits:g}",
    )
    if cell.method != "scalar":
        return tuning.model_of(taught, start.model)
    dense = jax.jit(distill.decoded)(taught.weights)
    assert taught.ranges is not None
    ranges = taught.ranges.to_activations(start.model.params["activations"]).rounded()
    params = {**start.model.params, **dense, "activations": ranges}
    return Model(start.model.config, params)


def _pupil(
    cell: Cell, start: Compressed, steps: int, rate: float
) -> tuple[distill.Student, distill.Optimizer, Callable[[Any], Any]]:
    """What a cell trains, how, and what it shows."""
    student = tuning.student_of(start.model)
    if cell.method in VARIANTS:
        optimizer = tuning.weights_optimizer(steps, rate, VARIANTS[cell.method])
        return student, optimizer, lambda state: {"moved": pv.moved_fraction(state)}
    flat = tree.flatten(start.job.model.params)
    weights = tree.flatten(student.weights)
    for path, layer in start.scalar.items():
        weights[path] = scalar.ScalarWeight.of(layer.kernel, start.job.scalar_bits_of(path))
    for path, leaf in weights.items():  # corrected biases belong to our kernels
        if path.endswith("/bias"):
            weights[path] = jnp.asarray(flat[path], leaf.dtype)
    schedules = (
        distill.schedule_of(each, steps, rate) for each in (LEVEL_RATE, STEP_RATE, pv.SEMI_PV.lr)
    )
    student = student._replace(weights=tree.unflatten(weights))
    return student, scalar.lsq(*schedules), lambda state: {}


def _full_precision(wanted: BenchAblationSettings, seed: int) -> np.ndarray:
    """Samples of full precision, uint8 [N, H, W, 3], made once."""
    path = wanted.work / f"full-{wanted.count}-{seed}.npy"
    if not path.exists():
        job = quantize.prepare(QuantizeSettings())
        path.parent.mkdir(parents=True, exist_ok=True)
        images, part = _sample(wanted, job.model, seed, FULL), path.with_suffix(".part.npy")
        np.save(part, images)
        part.rename(path)
    return np.load(path)


def _sample(wanted: BenchAblationSettings, model: Model, seed: int, name: str) -> np.ndarray:
    with progress.stage(f"sample {name}", wanted.count) as advance:
        return sampling.generate(
            model,
            np.arange(wanted.count) % 10,
            guidance=model.config.guidance,
            seed=seed,
            batch_size=min(_BATCH, wanted.count),
            on_batch=advance,
        )


def _measure(
    wanted: BenchAblationSettings, cell: Cell, model: Model | None, full: np.ndarray
) -> results.Record:
    start = time.monotonic()
    images = full if model is None else _sample(wanted, model, cell.seed, cell.method)
    labels = np.arange(len(images)) % 10
    scores = digits.evaluate_images(images, labels)
    psnr, identical = fidelity.mean_psnr(fidelity.psnr(full, images))
    return {
        **cell._asdict(),
        **{name: scores[name] for name in (*digits.SCORES, "n")},
        **(digits.paired_difference(full, images) if model is not None else {}),
        "psnr": None if model is None else psnr,
        "identical": identical,
        "ssim": float(np.mean(fidelity.ssim(full, images))),
        "seconds": round(time.monotonic() - start, 1),
    }


def summary(records: Sequence[results.Record]) -> list[dict[str, Any]]:
    """Means over the seeds of each pair of bits and method, in the order of the records.

    "rise" is that of digit-FD over full precision, "spread" its standard error: from the bootstrap
    of each seed, or from the spread between seeds where that is larger.
    """
    groups: dict[tuple[float | None, str], list[results.Record]] = {}
    for record in records:
        groups.setdefault((record["bits"], record["method"]), []).append(record)
    return [
        {"bits": bits, "method": method, "seeds": len(rows), "n": rows[0]["n"]}
        | {name: float(np.mean([row[name] for row in rows])) for name in digits.SCORES}
        | (_against_full(rows) if method != FULL else {})
        for (bits, method), rows in groups.items()
    ]


def _against_full(rows: Sequence[results.Record]) -> dict[str, float]:
    rises = [row["fd_difference"] for row in rows]
    inside = float(np.sqrt(np.mean([row["fd_difference_sd"] ** 2 for row in rows])))
    between = float(np.std(rises, ddof=1)) if len(rises) > 1 else 0.0
    return {
        "rise": float(np.mean(rises)),
        "spread": max(inside, between) / len(rows) ** 0.5,
        "psnr": float(np.mean([row["psnr"] for row in rows])),
        "ssim": float(np.mean([row["ssim"] for row in rows])),
    }


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Prints the summary."""
    table = Table(title="Tuning, means over seeds", title_justify="left")
    for name in ("bits", "tuning"):
        table.add_column(name)
    shown = (*digits.SCORES, "psnr", "ssim")
    for name in ("seeds", "N", "digit-FD rises by", *shown):
        table.add_column("digit-FD" if name == "fd" else name, justify="right")
    for row in rows:
        full = row["method"] == FULL
        table.add_row(
            "" if full else f"{row['bits']:g}",
            row["method"].replace("_", " "),
            str(row["seeds"]),
            str(row["n"]),
            "" if full else f"{row['rise']:+.2f} ± {row['spread']:.2f}",
            *(f"{row[name]:.3f}" if name in row else "" for name in shown),
        )
    wide_console().print(table)
