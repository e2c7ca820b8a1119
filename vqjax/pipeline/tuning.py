# SPDX-License-Identifier: Apache-2.0
"""After all layers were compressed one by one: ranges of their inputs, then tuning of the whole."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax

from vqjax import progress, settings
from vqjax.core.coded import CodedWeight
from vqjax.core.host import to_device
from vqjax.core.model import Model
from vqjax.core.tensor import VQTensor
from vqjax.io import leaves
from vqjax.pipeline import activations, memory, timesteps
from vqjax.pipeline.journal import Journal
from vqjax.train import distill, pv

if TYPE_CHECKING:
    from vqjax.pipeline.quantize import Job

STEP_RATE, ZERO_RATE = 2e-3, 0.05
"""Adam's learning rates of ranges: per step, of the base-2 logarithm of the step size, and of the
zero point in levels."""

SEED = 3_000_017  # added to the run's seed: pictures of the report were never trained on


def tuned(job: "Job", journal: Journal, model: Model, visited: list[tuple]) -> Model:
    """The model with quantized inputs of its layers, and taught by the full-precision one.

    Args:
      model: compressed; unquantized leaves in float16.
      visited: from `calibrate.trajectories`.

    Returns:
      The model as it is stored; `model` itself where nothing was asked for.
    """
    bits = job.settings.act_bits
    if bits < settings.FLOAT_BITS:
        model = _kept(journal, "ranges", lambda: _ranged(job, journal, model, visited, bits))
    if job.tune_steps:
        before = model
        model = _kept(journal, f"tuned-{job.course}", lambda: _distilled(job, journal, before))
    return model


def _kept(journal: Journal, name: str, make: Callable[[], Model]) -> Model:
    """What `make` returns, kept across interruptions."""
    if journal.load(name) is None:
        journal.store(name, *leaves.of_model(make()))
    found = journal.load(name)
    assert found is not None
    return leaves.from_arrays(*found, where=f"piece {name!r} of the run")


def _ranged(job: "Job", journal: Journal, model: Model, visited: list[tuple], bits: int) -> Model:
    """The model with ranges of its layers' inputs, from the trajectories of the calibration."""
    calls = activations.calls(visited)
    with journal.stage("ranges"), progress.stage("ranges", calls) as advance:
        found = activations.observe(job.model, visited, bits, advance)
    return dataclasses.replace(model, params={**model.params, "activations": found})


def _distilled(job: "Job", journal: Journal, model: Model) -> Model:
    """The model after `job.tune_steps` of SeMI-PV."""
    recipe, rate = recipe_of(job), rate_of(job.settings.tuning, job.bits)
    with journal.stage("tune"):
        taught = distill.distill(
            job.model,
            student_of(model),
            weights_optimizer(recipe.steps, rate),
            ranges_optimizer(recipe.steps, rate),
            recipe,
            (journal.folder / "work" / f"tune-{job.course}").absolute(),
            activations=model.params.get("activations"),
            weight_of_t=lambda t_T: timesteps.at(journal, t_T),
            compile_ahead=compile_ahead(),
            metrics=lambda state: {"moved": pv.moved_fraction(state)},
        )
    return model_of(taught, model)


def rate_of(tuning: settings.Tuning, bits: float) -> float:
    """What learning rates are multiplied by.

    They were chosen at two bits, relative to the norms of weights, and at four, where an eighth of
    them did best. What is to be learned is the error of the codes, which halves with every bit; the
    less of it there is, the more the noise of gradients weighs beside it.
    """
    return min(1.0, 2.0 ** (1.5 * (2 - bits))) if tuning.rate is None else tuning.rate


def recipe_of(job: "Job") -> distill.Recipe:
    """How a job distils."""
    wanted, config = job.settings, job.model.config
    return distill.Recipe(
        steps=job.tune_steps,
        batch=wanted.tuning.batch,
        at_once=job.division.at_once,
        trajectories=wanted.tuning.trajectories,
        timesteps=wanted.calibration.steps,
        guidance=config.guidance,
        seed=wanted.seed + SEED,
        remat=memory.needs_remat(job.shapes),
        dtype=wanted.tuning.dtype,
    )


def weights_optimizer(
    steps: int, rate: float, variant: pv.PVConfig = pv.SEMI_PV
) -> optax.GradientTransformationExtraArgs:
    """PV-Tuning or a variant of it, with schedules; `rate` multiplies its learning rates.

    A state that is updated is gone.
    """
    config = dataclasses.replace(
        variant,
        lr=distill.schedule_of(variant.lr, steps, rate),
        code_lr=distill.schedule_of(variant.code_lr, steps, rate),
    )
    return pv.semi_pv(config, donate=True)


def compile_ahead(variant: pv.PVConfig = pv.SEMI_PV) -> Callable[[Any, Any], None]:
    """What compiles the programs of `weights_optimizer`, given weights and its state."""
    return functools.partial(pv.compile_ahead, variant, donate=True)


def ranges_optimizer(steps: int, rate: float) -> optax.GradientTransformation:
    """Adam on the ranges of activations, with a rate for each of their two numbers."""
    adams: dict[Any, optax.GradientTransformation] = {
        "steps": optax.adam(distill.schedule_of(rate * STEP_RATE, steps)),
        "zeros": optax.adam(distill.schedule_of(rate * ZERO_RATE, steps)),
    }

    def labels(ranges: Any) -> Any:
        return None if ranges is None else type(ranges)("steps", "zeros")

    return optax.partition(adams, labels)


def student_of(model: Model) -> distill.Student:
    """The trainable form of a compressed model: float32, quantized kernels as `CodedWeight`."""

    def trainable(leaf: Any) -> Any:
        if isinstance(leaf, VQTensor):
            return CodedWeight.of(leaf)
        return to_device(np.asarray(leaf, np.float32))

    def is_tensor(leaf: Any) -> bool:
        return isinstance(leaf, VQTensor)

    parts = {name: model.params[name] for name in memory.TRAINED if name in model.params}
    weights = jax.tree.map(trainable, parts, is_leaf=is_tensor)
    known = model.params.get("activations")
    return distill.Student(weights, None if known is None else distill.Ranges.of(known))


def model_of(student: distill.Student, before: Model) -> Model:
    """The inverse of `student_of`: all in the types of storage; `before` gives the first stage."""

    def stored(leaf: Any) -> Any:
        if isinstance(leaf, CodedWeight):
            return leaf.to_tensor()
        most = np.finfo(np.float16).max
        return np.clip(np.asarray(leaf), -most, most).astype(np.float16)

    def is_coded(leaf: Any) -> bool:
        return isinstance(leaf, CodedWeight)

    weights: Mapping[str, Any] = jax.tree.map(stored, student.weights, is_leaf=is_coded)
    params = {**before.params, **weights}
    if student.ranges is not None:
        params["activations"] = student.ranges.to_activations(params["activations"]).rounded()
    return dataclasses.replace(before, params=params)
