# SPDX-License-Identifier: Apache-2.0
"""Noise schedule of a latent diffusion model, in numpy and float64.

It is linear in the square root of beta ("scaled linear" elsewhere). Training and sampling share it.

Dimension key:  T training timesteps
"""

import numpy as np

from vqjax.config import LatentDiffusionConfig


def betas(config: LatentDiffusionConfig) -> np.ndarray:
    """Noise variances beta_t, float64 [T]."""
    ends = np.sqrt(config.linear_start), np.sqrt(config.linear_end)
    return np.linspace(*ends, config.timesteps, dtype=np.float64) ** 2


def alphas_cumprod(config: LatentDiffusionConfig) -> np.ndarray:
    """Products of (1 - beta) up to each timestep, float64 [T]: the share of signal variance."""
    return np.cumprod(1 - betas(config))
