# SPDX-License-Identifier: Apache-2.0
"""Second moments of every layer's input, from the full-precision model's own trajectories.

Dimension key:  B batch   H W latent   C channels   T trajectory steps   R rows of a layer's input
                N fan-in of a layer
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqjax import models, sampling
from vqjax.config import LatentDiffusionConfig
from vqjax.core.model import Model
from vqjax.sampling.schedule import ddim_schedule
from vqjax.settings import Calibration

Moments = dict[str, np.ndarray]
"""S [N, N] float32 by kernel path: the mean of x x^T over calibration inputs."""


@dataclasses.dataclass(frozen=True)
class LayerInput:
    """One layer as the U-Net calls it: `positions` outputs per image, `fan_in` inputs to each."""

    fan_in: int
    positions: int


def trace_layers(config: LatentDiffusionConfig, params: models.Params) -> dict[str, LayerInput]:
    """What each layer of the U-Net sees for one image; nothing is computed."""
    context = models.embed_classes(config, params, jnp.zeros((1,), jnp.int32))
    sizes: dict[str, LayerInput] = {}

    def measure(path: str, x: jax.Array, window: dict[str, Any]) -> None:
        rows = jax.eval_shape(functools.partial(_rows, **window), x)
        sizes[path] = LayerInput(rows.shape[-1], int(np.prod(rows.shape[:-1])))

    def run(x, t):
        return models.capture_inputs(config, params, x, t, context, measure)[0]

    x_BHWC = jax.ShapeDtypeStruct((1, *config.latent_shape), jnp.float32)
    jax.eval_shape(run, x_BHWC, jax.ShapeDtypeStruct((1,), jnp.int32))
    return sizes


def batches(sizes: dict[str, LayerInput], limit_bytes: int) -> list[list[str]]:
    """Splits layers into groups whose moments fit `limit_bytes` together (one layer at least)."""
    groups: list[list[str]] = [[]]
    used = 0
    for path, size in sizes.items():
        needed = 4 * size.fan_in**2
        if groups[-1] and used + needed > limit_bytes:
            groups.append([])
            used = 0
        groups[-1].append(path)
        used += needed
    return groups


def trajectories(model: Model, calibration: Calibration, seed: int) -> Iterator[tuple]:
    """Yields (x_TBHWC, t_T, ids_B) of full-precision sampling, one batch of images at a time."""
    config = model.config
    schedule = ddim_schedule(config, calibration.steps)
    classes = max(config.null_class, 1)
    step = jax.jit(
        lambda params, ids, index: (
            sampling.sample_latents(
                config,
                params,
                schedule,
                ids,
                sampling.image_noise(seed, index, config.latent_shape),
                guidance=calibration.guidance,
            )[1].x_SBHWC
        )
    )
    for first in range(0, calibration.images, calibration.batch):
        index_B = np.arange(first, min(first + calibration.batch, calibration.images))
        ids_B = jnp.asarray(index_B % classes, jnp.int32) if config.n_classes else None
        x_TBHWC = step(model.params, ids_B, jnp.asarray(index_B, jnp.uint32))
        yield np.asarray(x_TBHWC), schedule.timesteps[::-1], ids_B


def second_moments(
    model: Model,
    visited: Sequence[tuple],
    paths: Sequence[str],
    on_step: Callable[[], None] = lambda: None,
) -> Moments:
    """Mean of x x^T over everything that the layers `paths` see along the trajectories.

    Args:
      visited: from `trajectories`.
      paths: kernels to look at; memory grows with the sum of their squared fan-ins.
      on_step: called after each U-Net call.
    """
    chosen = frozenset(paths)

    @functools.partial(jax.jit, donate_argnums=0)
    def add(sums, params, x_BHWC, t, ids_B):
        context = None
        if ids_B is not None:  # both guidance branches see the same latents
            both = jnp.concatenate([jnp.full_like(ids_B, model.config.null_class), ids_B])
            context = models.embed_classes(model.config, params, both)
            x_BHWC = jnp.concatenate([x_BHWC, x_BHWC])
        t_B = jnp.broadcast_to(t, x_BHWC.shape[:1])

        def reduce(path, x, window):
            if path not in chosen:
                return None
            rows_RN = _rows(x, **window).astype(jnp.float32)
            rows_RN = rows_RN.reshape(-1, rows_RN.shape[-1])
            precision = jax.lax.Precision.HIGHEST
            return jnp.matmul(rows_RN.T, rows_RN, precision=precision) / rows_RN.shape[0]

        _, means = models.capture_inputs(model.config, params, x_BHWC, t_B, context, reduce)
        return jax.tree.map(jnp.add, sums, means)

    sizes = trace_layers(model.config, model.params)
    sums = {path: jnp.zeros((sizes[path].fan_in,) * 2) for path in paths}
    calls = 0
    for x_TBHWC, t_T, ids_B in visited:
        for x_BHWC, t in zip(x_TBHWC, t_T):
            sums = add(sums, model.params, x_BHWC, jnp.int32(t), ids_B)
            calls += 1
            on_step()
    return {path: np.asarray(total) / np.float32(calls) for path, total in sums.items()}


def _rows(x: jax.Array, window: int = 1, stride: int = 1, padding: tuple[int, int] = (0, 0)):
    """A layer's input as what each output reads, [..., N], columns (input channel, ky, kx)."""
    if window == 1:
        return x
    return jax.lax.conv_general_dilated_patches(
        x,
        (window, window),
        (stride, stride),
        (padding, padding),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
