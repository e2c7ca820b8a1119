# SPDX-License-Identifier: Apache-2.0
"""What a quantization refuses before any work, beside what a model and its plan refuse."""

import math
import pathlib
from collections.abc import Iterator

import jax

from vqjax.config import LatentDiffusionConfig
from vqjax.errors import VqjaxError
from vqjax.io import places
from vqjax.sampling.schedule import ddim_schedule
from vqjax.settings import FLOAT_BITS, QuantizeSettings, check_seed


def check(wanted: QuantizeSettings) -> None:
    """Looks at what no model could be quantized with.

    Raises:
      VqjaxError: naming every option that is wrong, what was found and what is expected.
    """
    check_seed(wanted)
    found = list(_problems(wanted))
    if found:
        raise VqjaxError("; ".join(found))


def check_steps(config: LatentDiffusionConfig, wanted: QuantizeSettings, tune_steps: int) -> None:
    """Looks at the timesteps of calibration and tuning, and at who tunes.

    Raises:
      VqjaxError: if there are no such trajectories, too few of them for a batch of tuning, or
        several processes below `jax.distributed`, one of which would tune.
    """
    try:
        timesteps = len(ddim_schedule(config, wanted.calibration.steps).timesteps)
    except VqjaxError as error:
        raise VqjaxError(f"--calibration.{error}") from None
    connected = jax.distributed.is_initialized() and jax.process_count() > 1
    if tune_steps and connected:  # checkpoints of one would wait for all of them
        raise VqjaxError(
            f"--tune-steps {tune_steps}: not below jax.distributed; ask for 0, or use the command "
            "with JAX_COORDINATOR_ADDRESS, whose processes leave jax.distributed before"
        )
    pairs, batch = timesteps * wanted.tuning.trajectories, wanted.tuning.batch
    if tune_steps and pairs < batch:
        raise VqjaxError(
            f"--tuning.batch {batch}: {wanted.tuning.trajectories} trajectories of {timesteps} "
            f"timesteps have {pairs} pairs; give more --tuning.trajectories or a smaller batch"
        )


def _problems(wanted: QuantizeSettings) -> Iterator[str]:
    if not 0.5 <= wanted.bits <= 8:
        yield f"--bits {wanted.bits:g}: expected 0.5 to 8 bits per weight"
    if wanted.size is not None and not 0 < wanted.size < math.inf:
        yield f"--size {wanted.size:g}: expected a number of MB above 0"
    if wanted.act_bits != FLOAT_BITS and not 2 <= wanted.act_bits <= 8:
        yield (f"--act-bits {wanted.act_bits}: expected 2 to 8, or {FLOAT_BITS} for floating point")
    if wanted.tune_steps is not None and wanted.tune_steps < 0:
        yield f"--tune-steps {wanted.tune_steps}: expected 0 or more"
    taught = wanted.tuning
    still = taught.rate is not None and not 0 < taught.rate < math.inf
    if taught.batch < 1 or taught.trajectories < 1 or still:
        yield (
            f"--tuning: found {taught}; expected 1 or more of batch and trajectories, and a "
            "rate above 0"
        )
    seen = wanted.calibration
    if seen.images < 1 or seen.batch < 1 or not math.isfinite(seen.guidance):
        yield (
            f"--calibration: found {seen}; expected 1 or more of images and batch, and a finite "
            "guidance"
        )
    if wanted.samples is not None and wanted.samples < 4:
        yield f"--samples {wanted.samples}: expected 4 or more images per model"
    if wanted.least_psnr is not None and not math.isfinite(wanted.least_psnr):
        yield f"--least-psnr {wanted.least_psnr:g}: expected a finite number of dB"
    if wanted.memory is not None and not 0 < wanted.memory < math.inf:
        yield f"--memory {wanted.memory:g}: expected a number of GB above 0"
    if wanted.export is not None:
        if wanted.export.suffix != ".safetensors":
            yield f"--export {wanted.export}: expected a name that ends in .safetensors"
        elif _is_of(wanted.export, pathlib.Path(wanted.source)):
            yield f"--export {wanted.export}: would replace the source; choose another name"
        else:
            try:
                places.check_file("--export", wanted.export)
            except VqjaxError as error:
                yield str(error)


def _is_of(path: pathlib.Path, source: pathlib.Path) -> bool:
    """Whether a file is the source, or one of those in its folder."""
    return path.exists() and path.resolve().is_relative_to(source.resolve())
