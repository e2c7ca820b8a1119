# SPDX-License-Identifier: Apache-2.0
"""DDIM (arXiv 2010.02502) as one compiled scan.

Dimension key:  B batch   H W latent   C channels   S steps
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vqjax.sampling.schedule import DDIMSchedule

NoisePredictor = Callable[[jax.Array, jax.Array], jax.Array]
"""`(x_BHWC, t_B) -> eps_BHWC`"""


class Trajectory(NamedTuple):
    """What a sampler visited, in the order of execution (highest timestep first).

    Attributes:
      x_SBHWC: latents that each step started from, the inputs of the U-Net.
      pred_x0_SBHWC: each step's estimate of the clean latent.
    """

    x_SBHWC: jax.Array
    pred_x0_SBHWC: jax.Array


def update(
    x: jax.Array, eps: jax.Array, a: jax.Array, a_prev: jax.Array, sigma: jax.Array | float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """One step without its noise (arXiv 2010.02502, eq. 12).

    Args:
      x: latent at the step's timestep, any shape; `eps`: its predicted noise.
      a, a_prev, sigma: coefficients of the step, from `DDIMSchedule`.

    Returns:
      The next latent and the estimate of the clean one.
    """
    pred_x0 = (x - jnp.sqrt(1 - a) * eps) / jnp.sqrt(a)
    return jnp.sqrt(a_prev) * pred_x0 + jnp.sqrt(1 - a_prev - sigma**2) * eps, pred_x0


def ddim(
    predict: NoisePredictor,
    schedule: DDIMSchedule,
    x_BHWC: jax.Array,
    noise: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, Trajectory]:
    """Runs the whole reverse process as one `lax.scan`.

    Args:
      predict: noise prediction, guidance included.
      schedule: coefficients, from `ddim_schedule`.
      x_BHWC: start latent, standard normal.
      noise: `step -> [B, H, W, C]` standard normal, the i-th executed step's noise. Needed where
        the schedule's sigmas are not 0; the last step adds noise too, as the original does.

    Returns:
      The final latent [B, H, W, C] and what was visited. Under `jit` an unused trajectory costs
      nothing.
    """
    stochastic = bool(schedule.sigmas.any())
    if stochastic and noise is None:
        raise ValueError("eta > 0 adds noise at every step: pass `noise`")
    backwards = (schedule.timesteps, schedule.alphas, schedule.alphas_prev, schedule.sigmas)
    coefficients = [jnp.asarray(array[::-1].copy()) for array in backwards]
    steps = jnp.arange(len(schedule.timesteps))

    def step(x, inputs):
        index, t, a, a_prev, sigma = inputs
        eps = predict(x, jnp.broadcast_to(t, x.shape[:1])).astype(jnp.float32)
        x_next, pred_x0 = update(x, eps, a, a_prev, sigma)
        if stochastic and noise is not None:
            x_next += sigma * noise(index)
        return x_next, Trajectory(x, pred_x0)

    return jax.lax.scan(step, x_BHWC, (steps, *coefficients))
