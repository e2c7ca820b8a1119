# SPDX-License-Identifier: Apache-2.0
"""DDIM coefficients (arXiv 2010.02502) with the timestep choice of CompVis/latent-diffusion.

Dimension key:  T training timesteps   S sampling steps
"""

import dataclasses

import numpy as np

from vqjax.config import LatentDiffusionConfig
from vqjax.core.noise import alphas_cumprod
from vqjax.errors import VqjaxError


@dataclasses.dataclass(frozen=True)
class DDIMSchedule:
    """What each DDIM step needs, in ascending order of timesteps; arrays of length S.

    Attributes:
      timesteps: int32; sampling runs through them backwards.
      alphas: alpha-bar at the timestep, float32.
      alphas_prev: alpha-bar at the next lower timestep. The lowest step goes to alpha-bar of
        timestep 0, not to 1: the last sample keeps a little noise, as in the original.
      sigmas: standard deviation of the noise added, float32; 0 where eta is 0.
    """

    timesteps: np.ndarray
    alphas: np.ndarray
    alphas_prev: np.ndarray
    sigmas: np.ndarray


def check(steps: int, eta: float, timesteps: int | None = None) -> None:
    """Refuses what there is no schedule of.

    Args:
      timesteps: that the model was trained on; None where the model is not known.

    Raises:
      VqjaxError: if `steps` is no whole number in [1, timesteps - 1], or `eta` not in [0, 1]: above
        1 there can be more noise than a latent has (arXiv 2010.02502, eq. 12 takes a root of what
        is left), and samples are NaN.
    """
    if not isinstance(steps, int | np.integer):
        raise VqjaxError(f"steps: found {steps!r}, expected a whole number")
    if steps < 1 or (timesteps is not None and steps >= timesteps):
        expected = (
            "1 or more"
            if timesteps is None
            else f"1 to {timesteps - 1} (the model was trained on {timesteps} timesteps)"
        )
        raise VqjaxError(f"steps: found {steps}, expected {expected}")
    if not 0 <= eta <= 1:
        raise VqjaxError(f"eta: found {eta}, expected 0 (deterministic) to 1 (the noise of DDPM)")


def ddim_schedule(config: LatentDiffusionConfig, steps: int, eta: float = 0.0) -> DDIMSchedule:
    """The original's uniform choice of timesteps: every (T // steps)-th, beginning at 1.

    Args:
      steps: steps asked for. Where `steps` does not divide T, there are more (30 gives 31).
      eta: 0 is deterministic DDIM, 1 has the noise of DDPM (arXiv 2010.02502, eq. 16).

    Raises:
      VqjaxError: as `check` says.
    """
    check(steps, eta, config.timesteps)
    all_alphas = alphas_cumprod(config).astype(np.float32).astype(np.float64)
    timesteps = np.arange(0, config.timesteps, config.timesteps // steps) + 1
    timesteps = timesteps[timesteps < config.timesteps]
    alphas = all_alphas[timesteps]
    alphas_prev = np.concatenate([all_alphas[:1], all_alphas[timesteps[:-1]]])
    sigmas = eta * np.sqrt((1 - alphas_prev) / (1 - alphas) * (1 - alphas / alphas_prev))
    arrays = (a.astype(np.float32) for a in (alphas, alphas_prev, sigmas))
    return DDIMSchedule(timesteps.astype(np.int32), *arrays)
