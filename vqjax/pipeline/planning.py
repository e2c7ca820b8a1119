# SPDX-License-Identifier: Apache-2.0
"""From calibrated inputs to a plan: what errors will be, what they will do, who gets the bits."""

import dataclasses
import json
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from rich.table import Table

from vqjax import progress
from vqjax.config import LatentDiffusionConfig
from vqjax.core import shrinkage, tree
from vqjax.core.granularity import input_scale_gain
from vqjax.core.moments import Moment
from vqjax.core.plan import Plan, expected_error, make_plan
from vqjax.core.shrinkage import Shrinkage
from vqjax.pipeline import activations, sensitivity
from vqjax.pipeline.journal import Journal
from vqjax.settings import FLOAT_BITS, QuantizeSettings

if TYPE_CHECKING:
    from vqjax.pipeline.quantize import Job


class Outlook(NamedTuple):
    """What is known of a layer before it is compressed.

    Attributes:
      shrinkage: how its metric is made of its moment.
      centred: whether the mean of its inputs is left to a corrected bias.
      gain: its relative output error over the distortion of unit Gaussians; `scalar_gain` with
        single weights.
      input_gain: its error with scales of its input channels over that without.
      errors: a typical error, of relative output error 1, by paths of parameters.
    """

    shrinkage: Shrinkage
    centred: bool
    gain: float
    scalar_gain: float
    input_gain: float
    errors: dict[str, np.ndarray]

    def moment(self, moment: Moment) -> np.ndarray:
        """The moment that the layer's error is measured with."""
        return sensitivity.measured_with(moment, centred=self.centred)

    def metric(self, moment: Moment, window: int) -> np.ndarray:
        """What the search minimizes."""
        return shrinkage.shrink(self.moment(moment), window, self.shrinkage)


def piece(path: str) -> str:
    """Name of a layer's outlook in the journal."""
    return f"outlook/{path.replace('/', '.')}"


def outlook(job: "Job", journal: Journal, path: str, moment: Moment) -> Outlook:
    """Chooses a layer's metric and draws its typical error, or finds both in the journal."""
    found = journal.load(piece(path))
    if found is not None:
        errors, notes = found
        named = {name.replace(".", "/"): error for name, error in errors.items()}
        about = {**notes, "shrinkage": Shrinkage(*notes["shrinkage"])}
        return Outlook(**about, errors=named)
    flat = tree.flatten(job.model.params)
    metric = shrinkage.layer_metric(
        moment,
        job.sizes[path].window,
        has_bias=f"{path.removesuffix('kernel')}bias" in flat,
        bits=job.bits,
    )
    rng = np.random.default_rng((job.settings.seed % 2**32, zlib.crc32(path.encode())))
    expected = sensitivity.expected(path, flat[path], moment, metric, rng)
    made = Outlook(
        metric.shrinkage,
        metric.centred,
        expected.gain,
        expected.scalar_gain,
        input_scale_gain(flat[path]),
        expected.errors,
    )
    notes = {
        "shrinkage": list(made.shrinkage),
        "centred": made.centred,
        "gain": made.gain,
        "scalar_gain": made.scalar_gain,
        "input_gain": made.input_gain,
    }
    stored = {name.replace("/", "."): error for name, error in expected.errors.items()}
    journal.store(piece(path), stored, notes)
    return made


def sensitivities(
    job: "Job",
    journal: Journal,
    visited: list[tuple],
    weights_T: np.ndarray,
    outlooks: Mapping[str, Outlook],
) -> dict[str, float]:
    """Mean squared change of the noise prediction for a relative output error of 1, by layer."""
    found = journal.shared("sensitivity")
    if found is not None:
        return found[1]
    errors = {path: error for one in outlooks.values() for path, error in one.errors.items()}
    count = sensitivity.calls(visited)
    with journal.stage("calibrate"), progress.stage("sensitivity", count) as advance:
        costs = sensitivity.responses(
            job.model,
            visited,
            errors,
            job.settings.calibration.guidance,
            jax.random.key(job.settings.seed),
            advance,
            weights_T=weights_T,
        )
    journal.store("sensitivity", {}, costs)
    return costs


def planned(job: "Job", outlooks: Mapping[str, Outlook], costs: Mapping[str, float]) -> "Job":
    """The job with the plan of its measured layers; a plan that the user gave stays."""
    if job.settings.plan is not None:
        return job
    gain = {path: one.gain for path, one in outlooks.items()}
    scalar_gain = {path: one.scalar_gain for path, one in outlooks.items()}
    input_gain = {path: one.input_gain for path, one in outlooks.items()}
    plan = make_plan(
        job.shapes,
        **budget(job.model.config, job.shapes, job.settings),
        sensitivity=costs,
        gain=gain,
        scalar_gain=scalar_gain,
        input_gain=input_gain,
    )
    return dataclasses.replace(job, plan=plan)


def budget(
    config: LatentDiffusionConfig, shapes: Mapping[str, tuple[int, ...]], wanted: QuantizeSettings
) -> dict[str, Any]:
    """The arguments of `make_plan` that say how much may be spent, and on what."""
    integer = wanted.act_bits < FLOAT_BITS
    if wanted.size is None:
        return {"bits": wanted.bits, "integer": integer}
    ranges = activations.stored_bytes(config, shapes, wanted.calibration) if integer else 0
    return {"size": int(wanted.size * 1e6), "range_bytes": ranges, "integer": integer}


def record(
    plan: Plan,
    shapes: Mapping[str, tuple[int, ...]],
    outlooks: Mapping[str, Outlook],
    costs: Mapping[str, float],
) -> dict[str, dict[str, float]]:
    """What each layer of the plan was expected to cost, and why.

    Returns:
      By layer: "sensitivity" (mean squared change of the guided noise prediction for a relative
      output error of 1), "gain", "scalar_gain", "input_gain", "expected_output_mse",
      "expected_cost" (the product of sensitivity and expected error) and "bits_per_weight".
    """
    rows = {}
    for path, spec in plan.items():
        known = outlooks[path]
        error = expected_error(spec, known.gain, known.scalar_gain, known.input_gain)
        rows[path] = {
            "sensitivity": costs[path],
            "gain": known.gain,
            "scalar_gain": known.scalar_gain,
            "input_gain": outlooks[path].input_gain,
            "expected_output_mse": error,
            "expected_cost": costs[path] * error,
            "bits_per_weight": spec.stored(tuple(shapes[path])).per_weight,
        }
    return rows


def to_json(rows: Mapping[str, dict[str, float]]) -> str:
    """One line per layer."""
    lines = [f"  {json.dumps(path)}: {json.dumps(row)}" for path, row in rows.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def show(plan: Plan, rows: Mapping[str, dict[str, float]]) -> None:
    """Prints the plan, a line per layer."""
    title = (
        "Plan by layer, as measured (t: input channels have scales; cost of losing all, error, "
        "share of the cost)"
    )
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("layer", overflow="fold")
    for name in ("G", "codes", "bits", "cost", "error", "%"):
        table.add_column(name, justify="right")
    total = sum(row["expected_cost"] for row in rows.values()) or 1.0
    for path, row in rows.items():
        spec = plan[path]
        codes = f"{spec.codebooks} x {spec.entries}" + " t" * spec.input_scales
        table.add_row(path.removeprefix("unet/").removesuffix("/kernel"), str(spec.group),
                      codes, f"{row['bits_per_weight']:.3f}",
                      f"{row['sensitivity']:.2g}", f"{row['expected_output_mse']:.2g}",
                      f"{100 * row['expected_cost'] / total:.1f}")  # fmt: skip
    progress.console().print(table)
