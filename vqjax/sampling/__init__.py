# SPDX-License-Identifier: Apache-2.0
"""From a model and class ids to images.

Dimension key:  B images of one compiled batch   N images asked for   H W latent or image
                C channels
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vqjax import models
from vqjax.config import LatentDiffusionConfig
from vqjax.core import cores, draw
from vqjax.core.model import Model
from vqjax.errors import VqjaxError
from vqjax.kernels import dispatch
from vqjax.sampling import ddim
from vqjax.sampling.schedule import DDIMSchedule, ddim_schedule
from vqjax.sampling.weights import Placed, place, say_what_stays

BATCH_SIZE = 16


def image_noise(
    seed: int | jax.Array, index_B, shape: tuple[int, ...], step: int | jax.Array = 0
) -> jax.Array:
    """Standard normal noise [B, *shape] of the images with numbers `index_B`.

    Image i of a seed is the same picture whatever the batch size or the number of images. Step 0 is
    the start latent, steps from 1 are the noise that stochastic sampling adds.
    """
    key = jax.random.fold_in(jax.random.key(seed), step)

    def one(index):
        return draw.normal(jax.random.fold_in(key, index), shape)

    return jax.vmap(one)(jnp.asarray(index_B, jnp.uint32))


def guided(config: LatentDiffusionConfig, guidance: float) -> bool:
    """Returns whether the U-Net sees every latent twice: with a class and without."""
    return bool(config.n_classes) and guidance != 1


def rows(config: LatentDiffusionConfig, batch: int, guidance: float) -> int:
    """Returns how many latents the U-Net sees at a time for a batch of images."""
    return 2 * batch if guided(config, guidance) else batch


def predictor(
    config: LatentDiffusionConfig,
    params: models.Params,
    ids_B: jax.Array | None,
    guidance: float,
    dtype: str = "float32",
    t_T: np.ndarray | None = None,
) -> ddim.NoisePredictor:
    """The guided noise prediction for fixed classes, in the dtype of the latent.

    Classifier-free guidance (arXiv 2207.12598): e_u + guidance (e_c - e_u). As in the original,
    guidance 1 runs the conditional branch alone; otherwise both branches run as one batch,
    unconditional first. An unconditional model ignores guidance.

    Args:
      dtype: which the U-Net computes in.
      t_T: int32, where all examples of a call have one timestep, and that is one of these: what
        does not see the latent is computed now, and not in each call.
    """
    both = guided(config, guidance)
    if both and ids_B is not None:
        ids_B = jnp.concatenate([jnp.full_like(ids_B, config.null_class), ids_B])
    context = None if ids_B is None else models.embed_classes(config, params, ids_B)
    known_at = None
    if t_T is not None:
        timesteps_T = jnp.asarray(t_T)
        if "activations" in params:
            params = params | {"activations": params["activations"].tabulated(timesteps_T)}
        known_at = models.outputs_ahead(config, params, timesteps_T, context, dtype)

    def branches(x: jax.Array, t: jax.Array) -> jax.Array:
        known = None if known_at is None else known_at(t[0])
        found = models.predict_noise(config, params, x.astype(dtype), t, context, known=known)
        return found.astype(x.dtype)

    def guide(x_BHWC: jax.Array, t_B: jax.Array) -> jax.Array:
        doubled = jnp.concatenate([x_BHWC, x_BHWC]), jnp.concatenate([t_B, t_B])
        eps_uncond, eps_cond = jnp.split(branches(*doubled), 2)
        return eps_uncond + guidance * (eps_cond - eps_uncond)

    return guide if both else branches


def sample_latents(
    config: LatentDiffusionConfig,
    params: models.Params,
    schedule: DDIMSchedule,
    ids_B: jax.Array | None,
    x_BHWC: jax.Array,
    *,
    guidance: float = 3.0,
    noise: Callable[[jax.Array], jax.Array] | None = None,
    dtype: str = "float32",
) -> tuple[jax.Array, ddim.Trajectory]:
    """DDIM from given start latents; see `ddim.ddim` for what returns. Pure, traceable."""
    predict = predictor(config, params, ids_B, guidance, dtype, schedule.timesteps)
    return ddim.ddim(predict, schedule, x_BHWC, noise)


def to_uint8(images_BHWC: jax.Array) -> jax.Array:
    """Images in [-1, 1] to 0..255, rounded half up as the quantization papers do (EfficientDM)."""
    return (jnp.clip((images_BHWC + 1) / 2, 0, 1) * 255 + 0.5).astype(jnp.uint8)


class Run(NamedTuple):
    """What a compiled sampler is made for.

    Attributes:
      steps, eta: of DDIM; `guidance`: of classifier-free guidance.
      dtype: which the U-Net computes in.
      kernels: what `kernels.dispatch.wanted` says: another path is another program.
    """

    steps: int
    guidance: float
    eta: float
    dtype: str
    kernels: str


@functools.partial(jax.jit, static_argnames=("config", "run"))
def sample_batch(
    config: LatentDiffusionConfig,
    params: models.Params,
    ids_B: jax.Array | None,
    index_B: jax.Array,
    seed: jax.Array,
    *,
    run: Run,
) -> tuple[jax.Array, jax.Array]:
    """One compiled program from class ids to images: uint8 [B, H, W, 3], and their latents.

    Args:
      index_B: numbers of the images, uint32.
    """
    schedule = ddim_schedule(config, run.steps, run.eta)
    noise_of = functools.partial(image_noise, seed, index_B, config.latent_shape)
    z_BHWC, _ = sample_latents(
        config,
        params,
        schedule,
        ids_B,
        noise_of(),
        guidance=run.guidance,
        noise=lambda step: noise_of(step=step + 1),
        dtype=run.dtype,
    )
    return to_uint8(models.decode(config, params, z_BHWC)), z_BHWC


@jax.default_matmul_precision("highest")  # as in `generate_placed`
def generate_with_latents(
    model: Model,
    classes: Sequence[int] | np.ndarray,
    *,
    steps: int = 20,
    guidance: float | None = None,
    eta: float = 0.0,
    seed: int = 0,
    first_index: int = 0,
    batch_size: int = BATCH_SIZE,
    integer: bool = False,
    dtype: str = "float32",
    weight_memory: float | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Samples one image per entry of `classes`.

    Args:
      classes: class id of each image; for an unconditional model only their number counts.
      steps, eta: of DDIM.
      guidance: of classifier-free guidance, 1 is none; by default the model's own.
      seed: image i is drawn from (seed, first_index + i) alone.
      first_index: number of the first image, to continue a series.
      batch_size: most images in one compiled call; of several calls the last is padded, so that one
        program serves all.
      integer: multiply int8 by int8 in the U-Net, which needs a model with ranges of activations of
        at most 8 bits and 8-bit integer weights. Otherwise such a model is simulated in floating
        point.
      dtype: which the U-Net computes in: "float32", "bfloat16" or "float16".
      weight_memory: most GB of weights that are decoded at load, see `weights.place`.
      on_batch: called with the number of images finished.

    Returns:
      Images uint8 [N, H, W, 3] and latents float32 [N, h, w, c].

    Raises:
      VqjaxError: for a class id that the model does not have, unusable settings, numbers of images
        that are not below 2^32, or a model that integers cannot compute.
    """
    config, classes = model.config, np.asarray(classes)
    guidance = config.guidance if guidance is None else guidance
    run = Run(steps, float(guidance), float(eta), dtype, dispatch.wanted())
    check(config, classes, run, seed=seed, batch_size=batch_size)
    _check_numbers(first_index, len(classes))
    batch_size = min(batch_size, len(classes))
    if integer:
        _check_ranges(model)
    seen = rows(config, batch_size, run.guidance)
    placed = place(
        config, model.params, rows=seen, dtype=dtype, limit=weight_memory, integer=integer
    )
    say_what_stays(placed, weight_memory)
    return generate_placed(
        config,
        placed,
        classes,
        run=run,
        seed=seed,
        first_index=first_index,
        batch_size=batch_size,
        on_batch=on_batch,
    )


@jax.default_matmul_precision("highest")  # TF32 would change pictures from device to device
def generate_placed(
    config: LatentDiffusionConfig,
    placed: Placed,
    classes: np.ndarray,
    *,
    run: Run,
    seed: int,
    first_index: int,
    batch_size: int,
    on_batch: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`generate_with_latents` after `check` and `place`, for callers with many series of images.

    Args:
      placed: for `rows` of this batch size and guidance, in the dtype of `run`.
      batch_size: images in one compiled call; the last is padded.
    """

    def sample(start: int) -> tuple[np.ndarray, np.ndarray]:
        index_B = np.arange(start, start + batch_size)
        ids_B = jnp.asarray(classes[np.minimum(index_B, len(classes) - 1)], jnp.int32)
        ids_B = ids_B if config.n_classes else None
        index_B = jnp.asarray(first_index + index_B, jnp.uint32)
        batch = sample_batch(config, placed.params, ids_B, index_B, jnp.uint32(seed), run=run)
        images, latents = jax.device_get(batch)
        count = min(batch_size, len(classes) - start)
        return images[:count], latents[:count]

    batches, starts = [], range(0, len(classes), batch_size)
    for batch in cores.in_order(sample, starts, together=config.small):
        batches.append(batch)
        if on_batch is not None:
            on_batch(len(batch[0]))
    images, latents = zip(*batches)
    return np.concatenate(images), np.concatenate(latents)


def _check_ranges(model: Model) -> None:
    if "activations" not in model.params:
        raise VqjaxError(
            f"integer sampling: {model.config.name} has no ranges of activations; sample it in "
            f"floating point, or quantize it with 8-bit activations"
        )


def generate(model: Model, classes: Sequence[int] | np.ndarray, **settings) -> np.ndarray:
    """`generate_with_latents` without the latents: uint8 [N, H, W, 3]."""
    return generate_with_latents(model, classes, **settings)[0]


def check(
    config: LatentDiffusionConfig, classes: np.ndarray, run: Run, *, seed: int, batch_size: int
) -> None:
    """Refuses what cannot be sampled; placing a large model's weights takes long.

    Raises:
      VqjaxError: for a class id that the model does not have, or unusable settings.
    """
    _check_classes(config, classes)
    whole = isinstance(seed, int | np.integer)
    if not whole or not 0 <= seed < 2**32:
        raise VqjaxError(f"seed: found {seed}, expected a whole number from 0 to 2^32 - 1")
    if not math.isfinite(run.guidance):
        raise VqjaxError(f"guidance: found {run.guidance}, expected a finite number; 1 is none")
    if batch_size < 1:
        raise VqjaxError(f"batch_size: found {batch_size}, expected 1 or more images in a call")
    ddim_schedule(config, run.steps, run.eta)


def _check_numbers(first_index: int, count: int) -> None:
    last = first_index + count - 1
    if first_index < 0 or last >= 2**32:
        raise VqjaxError(
            f"first_index: images would have the numbers {first_index} to {last}, expected 0 to "
            f"2^32 - 1: the noise of an image is drawn from its number"
        )


def _check_classes(config: LatentDiffusionConfig, classes: np.ndarray) -> None:
    if classes.ndim != 1 or not len(classes) or not np.issubdtype(classes.dtype, np.integer):
        raise VqjaxError(
            f"classes: found {classes.dtype} of shape {classes.shape}, "
            "expected a list of class ids, one per image"
        )
    if config.n_classes:
        wrong = sorted({int(c) for c in classes if not 0 <= c < config.n_classes})
        if wrong:
            raise VqjaxError(
                f"classes: found {wrong}, but {config.name} has classes 0 to "
                f"{config.null_class - 1} ({config.null_class} is 'no class')"
            )
