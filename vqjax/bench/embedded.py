# SPDX-License-Identifier: Apache-2.0
"""The embedded model as benches need it: compressed, tuned, sampled, scored.

What took time stays in a work folder, below a name that tells versions, device and source apart:
results of other code are not continued.
"""

import dataclasses
import functools
import io
import pathlib
import sys
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from vqjax import progress, sampling
from vqjax.bench import results
from vqjax.core import tree
from vqjax.core.model import Model
from vqjax.core.scalar import ScalarLayer
from vqjax.core.tensor import VQTensor, densify
from vqjax.errors import VqjaxError
from vqjax.eval import fidelity, metrics
from vqjax.eval.judge import SCORES
from vqjax.eval.judges import DIGITS
from vqjax.io import native
from vqjax.pipeline import environment, quantize, timesteps, tuning
from vqjax.pipeline.journal import Journal, fingerprint
from vqjax.settings import QuantizeSettings, Tuning
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
    "pv_decay": dataclasses.replace(pv.PV, codebook_moments="decay"),
    "semi_pv": pv.SEMI_PV,
    "semi_pv_first": dataclasses.replace(pv.SEMI_PV, invalidate="first"),
    "semi_pv_keep": dataclasses.replace(pv.SEMI_PV, codebook_moments="keep"),
    "semi_pv_restart": pv.SEMI_PV,
    "semi_pv_trust": dataclasses.replace(pv.SEMI_PV, trust_ratio=0.01),
}
_BATCH = 100  # samples of one compiled call
_HELD_OUT = 2500  # pairs of a latent and a timestep, all of so many trajectories as a batch has
_CLASSES = 10
_COMMON = ("trajectories", "timesteps", "gathered-0")
"""Pieces of a run that no bit width changes."""


class Teaching(NamedTuple):
    """How models are tuned: `distill.Recipe` has what is not here from the run.

    `code_rate` multiplies the learning rate of the codes' targets alone.
    """

    steps: int
    tuning: Tuning
    order: Literal["mixed", "trajectory"] = "mixed"
    code_rate: float = 1.0


class Compressed(NamedTuple):
    """What all measurements of a bit width start from.

    Attributes:
      model: compressed, not tuned; what layers read has 8 bits.
      rival: the same bits, rounded up, by scalar quantization (GPTQ) on the same inputs, with the
        same ranges; its kernels are float32 values of their grids.
      scalar: the layers of `rival`.
    """

    job: quantize.Job
    journal: Journal
    model: Model
    rival: Model
    scalar: dict[str, ScalarLayer]


def identity() -> list[Any]:
    """What every result depends on: versions, device, and all source but that of other benches."""
    own = results.source_digest(sys.modules[__name__])
    return [results.here(), environment.code(), own]


def folder(work: pathlib.Path) -> pathlib.Path:
    """The part of a work folder that belongs to `identity`."""
    return work / fingerprint(identity())[:12]


def check(bits: tuple[float, ...], count: int) -> None:
    """Refuses before any work what could not be compressed or scored.

    Raises:
      VqjaxError: naming the option.
    """
    if not bits:
        raise VqjaxError("--bits: found none; give one or more, such as --bits 2 4")
    if count < 4:
        raise VqjaxError(f"--count {count}: expected 4 or more, which the scores need")
    for value in bits:
        if not 0.5 <= value <= 8:
            raise VqjaxError(f"--bits {value:g}: expected 0.5 to 8 bits per weight")


def compressed(work: pathlib.Path, bits: float) -> Compressed:
    """Compresses the embedded model, or finds that in the work folder; ranges included."""
    here = folder(work)
    out = here / f"{bits:g}"
    job = quantize.prepare(QuantizeSettings(bits=bits, act_bits=ACT_BITS, tune_steps=0, out=out))
    record = quantize.record_of(job)
    journal = Journal.open(out, record)
    shared = record["source_sha256"], record["settings"]["calibration"], record["settings"]["seed"]
    about = {"command": record["command"], "fingerprint": fingerprint(*shared)}
    common = Journal.open(here / "common", about)
    _copy(common, journal)
    job, done = quantize.compressed(job, journal)
    _copy(journal, common)
    model, rival = quantize.assembled(job, done)
    # Ranges come from what full precision reads, so that they are the same for all bits.
    ranged = tuning.tuned(job, common, job.model, quantize.trajectories(job, journal))
    ranges = {"activations": ranged.params["activations"]}
    model, rival = (dataclasses.replace(m, params={**m.params, **ranges}) for m in (model, rival))
    return Compressed(job, journal, model, rival, done.scalar)


def _copy(before: Journal, after: Journal) -> None:
    for name in _COMMON:
        found = before.load(name)
        if found is not None and after.load(name) is None:
            after.store(name, *found)


def tuned(start: Compressed, method: str, seed: int, teaching: Teaching) -> Model:
    """The model tuned by one of `VARIANTS`, or the rival with learned steps ("scalar")."""
    student, optimizer, metrics = _pupil(start, method, teaching)
    recipe = dataclasses.replace(
        tuning.recipe_of(start.job),
        steps=teaching.steps,
        batch=teaching.tuning.batch,
        trajectories=teaching.tuning.trajectories,
        seed=seed + tuning.SEED,
        order=teaching.order,
        dtype=teaching.tuning.dtype,
    )
    known = fingerprint(repr(teaching))[:8]
    ahead = {}
    if method in VARIANTS:
        ahead["compile_ahead"] = tuning.compile_ahead(VARIANTS[method])
    taught = distill.distill(
        start.job.model,
        student,
        optimizer,
        tuning.ranges_optimizer(teaching.steps, tuning.rate_of(teaching.tuning, start.job.bits)),
        recipe,
        (start.journal.folder / "tuned" / f"{method}-{seed}-{known}").absolute(),
        activations=start.model.params["activations"],
        weight_of_t=lambda t_T: timesteps.at(start.journal, t_T),
        **ahead,
        metrics=metrics,
        on_restart=pv.invalidate_all if method.endswith("_restart") else None,
        name=f"{method} {start.job.bits:g}",
    )
    pv.forget_programs()  # the next method has others
    if method != "scalar":
        return tuning.model_of(taught, start.model)
    dense = jax.jit(distill.decoded)(taught.weights)
    assert taught.ranges is not None
    ranges = taught.ranges.to_activations(start.model.params["activations"]).rounded()
    params = {**start.model.params, **dense, "activations": ranges}
    return Model(start.model.config, params)


def held_out_loss(start: Compressed, model: Model) -> float:
    """What `distill.mean_loss` says on trajectories that no tuning visits, the same for all."""
    recipe = dataclasses.replace(
        tuning.recipe_of(start.job),
        steps=_HELD_OUT // _BATCH,
        batch=_BATCH,
        at_once=0,
        trajectories=_BATCH,
        seed=tuning.SEED - 1,
    )
    teacher, params = start.job.model, densify(model.params)
    weight_of_t = functools.partial(timesteps.at, start.journal)
    return distill.mean_loss(teacher, params, recipe, weight_of_t=weight_of_t)


def changed(before: Model, after: Model) -> float:
    """The share of all vectors whose codes differ."""
    flat, different, whole = tree.flatten(after.params), 0, 0
    for path, tensor in tree.flatten(before.params).items():
        if isinstance(tensor, VQTensor):
            codes, others = (jax.device_get(one).unpack() for one in (tensor, flat[path]))
            different += int(np.sum(np.any(codes != others, axis=-1)))
            whole += codes[..., 0].size
    return different / max(whole, 1)


def _pupil(
    start: Compressed, method: str, teaching: Teaching
) -> tuple[distill.Student, distill.Optimizer, Callable[[Any], Any]]:
    """What is trained, how, and what it shows."""
    student = tuning.student_of(start.model)
    steps, rate = teaching.steps, tuning.rate_of(teaching.tuning, start.job.bits)
    if method in VARIANTS:
        variant = VARIANTS[method]
        code_lr = float(cast(float, variant.code_lr)) * teaching.code_rate
        variant = dataclasses.replace(variant, code_lr=code_lr)
        optimizer = tuning.weights_optimizer(steps, rate, variant)
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


def full_precision(work: pathlib.Path, count: int, seed: int) -> np.ndarray:
    """Samples of full precision, uint8 [N, H, W, 3], made once."""

    def make() -> np.ndarray:
        return sample(quantize.prepare(QuantizeSettings()).model, count, seed, FULL)

    return kept(folder(work) / "samples" / f"full-{count}-{seed}.npy", make)


def kept(path: pathlib.Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """An array from its file, or from `make`, which then has its file."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        native.write_atomically(path, _npy(make()))
    return np.load(path)


def _npy(array: np.ndarray) -> bytes:
    data = io.BytesIO()
    np.save(data, array)
    return data.getvalue()


def classes(count: int) -> np.ndarray:
    """The digits asked for, in turn."""
    return np.arange(count) % _CLASSES


def sample(model: Model, count: int, seed: int, name: str) -> np.ndarray:
    """Samples of a model, uint8 [N, H, W, 3]; equal seeds give equal noise and classes."""
    with progress.stage(f"sample {name}", count) as advance:
        return sampling.generate(
            model,
            classes(count),
            guidance=model.config.guidance,
            seed=seed,
            batch_size=_BATCH,
            on_batch=advance,
        )


def scores(images_NHWC: np.ndarray, full_NHWC: np.ndarray | None = None) -> dict[str, Any]:
    """`SCORES`, `accuracy_se` and `n`; with the twins of full precision also what was lost.

    That is what `DIGITS.paired_difference` says of the distance, `psnr` in dB, `identical` and
    `ssim`. `accuracy_se`, `psnr_se` and `ssim_se` are standard errors.
    """
    whole = DIGITS.evaluate_images(images_NHWC, classes(len(images_NHWC)))
    found = {name: whole[name] for name in (*SCORES, "accuracy_se", "n")}
    if full_NHWC is None:
        return found
    psnr_N = fidelity.psnr(full_NHWC, images_NHWC)
    ssim_N = fidelity.ssim(full_NHWC, images_NHWC)
    mean, identical = fidelity.mean_psnr(psnr_N)
    return {
        **found,
        **DIGITS.paired_difference(full_NHWC, images_NHWC),
        "psnr": mean,
        "psnr_se": metrics.standard_error(psnr_N[np.isfinite(psnr_N)]),
        "identical": identical,
        "ssim": float(np.mean(ssim_N)),
        "ssim_se": metrics.standard_error(ssim_N),
    }
