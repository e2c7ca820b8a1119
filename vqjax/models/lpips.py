# SPDX-License-Identifier: Apache-2.0
"""LPIPS (Zhang et al. 2018, arXiv 1801.03924), version 0.1 on VGG16, on a dict of arrays.

Activations after five ReLUs are normalized along channels; their squared differences, weighted per
channel, are averaged over positions and added up.

Dimension key:  N pairs   H W rows and columns   C channels
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

# Convolutions between pools; the last activation of each group is compared (relu1_2 ... relu5_3).
GROUPS = (2, 2, 3, 3, 3)
_HIGHEST = jax.lax.Precision.HIGHEST
_EPSILON = 1e-10
# Of pictures in [-1, 1]: ImageNet's mean and deviation, rounded as the authors did.
_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
_SCALE = np.array([0.458, 0.448, 0.450], np.float32)

Params = Mapping[str, jax.Array]


def distance(params: Params, a_NHWC: jax.Array, b_NHWC: jax.Array) -> jax.Array:
    """LPIPS of each pair, float32 [N].

    Args:
      params: as `vqjax.io.lpips.load` returns them.
      a_NHWC: uint8 [N, H, W, 3], H and W at least 16.
      b_NHWC: the twins.
    """
    total_N = jnp.zeros(a_NHWC.shape[0], jnp.float32)
    pairs = zip(activations(params, a_NHWC), activations(params, b_NHWC))
    for level, (a, b) in enumerate(pairs):
        difference = (_unit(a) - _unit(b)) ** 2
        weighted = jnp.dot(difference, params[f"lin{level}"], precision=_HIGHEST)
        total_N += jnp.mean(weighted, axis=(1, 2))
    return total_N


def activations(params: Params, images_NHWC: jax.Array) -> list[jax.Array]:
    """The five compared activations of VGG16 before normalization, float32."""
    x = images_NHWC.astype(jnp.float32) / 127.5 - 1
    x = (x - _SHIFT[None, None, None]) / _SCALE[None, None, None]
    found, index = [], 0
    for group, length in enumerate(GROUPS):
        if group:
            window = (1, 2, 2, 1)
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID")
        for _ in range(length):
            x = jax.nn.relu(_conv(x, params[f"conv{index}/kernel"], params[f"conv{index}/bias"]))
            index += 1
        found.append(x)
    return found


def _conv(x_NHWC: jax.Array, kernel_HWIO: jax.Array, bias_O: jax.Array) -> jax.Array:
    y_NHWC = jax.lax.conv_general_dilated(
        x_NHWC,
        kernel_HWIO,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=_HIGHEST,
    )
    return y_NHWC + bias_O[None, None, None]


def _unit(x_NHWC: jax.Array) -> jax.Array:
    return x_NHWC / (jnp.sqrt(jnp.sum(x_NHWC**2, -1, keepdims=True)) + _EPSILON)
