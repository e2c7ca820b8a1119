# SPDX-License-Identifier: Apache-2.0
"""The small classifier whose insides judge digits or textures, as plain functions on a dict.

Three stride-2 convolutions, a mean over positions and a head without bias. Training and evaluation
share this file, so both see one definition.

Dimension key:  N images   H W C picture (32, 32, 3)   F features (64)   K classes (10 digits)
                S spatial features: 2 channels x 8 x 8 = 128
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

WIDTHS = (32, 64, 64)
CLASSES = 10
SPATIAL_CHANNELS = 2
_HIGHEST = jax.lax.Precision.HIGHEST


class Features(NamedTuple):
    """What the extractor sees in each picture; every array is float32.

    Attributes:
      pooled: [N, 64], the penultimate layer: Frechet distance, precision and recall.
      spatial: [N, 128], two channels of the 8x8 layer in H, W, C order: spatial Frechet distance.
      logits: [N, K]: inception score and conditional accuracy.
    """

    pooled: jax.Array
    spatial: jax.Array
    logits: jax.Array


def init(key: jax.Array, classes: int = CLASSES) -> dict[str, jax.Array]:
    """He-normal kernels and zero biases, float32; names are "layer/kind"."""
    params, inputs = {}, 3
    for index, (width, key_i) in enumerate(zip(WIDTHS, jax.random.split(key, len(WIDTHS))), 1):
        noise = jax.random.normal(key_i, (3, 3, inputs, width), jnp.float32)
        params[f"conv{index}/kernel"] = noise * (2 / (9 * inputs)) ** 0.5
        params[f"conv{index}/bias"] = jnp.zeros(width, jnp.float32)
        inputs = width
    params["head/kernel"] = jnp.zeros((inputs, classes), jnp.float32)
    return params


def apply(params: dict[str, jax.Array], images_NHWC: jax.Array) -> Features:
    """Runs the classifier.

    Args:
      params: as `init` makes them.
      images_NHWC: float32 [N, 32, 32, 3] in [-1, 1].
    """
    hidden = images_NHWC
    spatial_NS = None
    for index in range(1, len(WIDTHS) + 1):
        hidden = jax.lax.conv_general_dilated(
            hidden,
            params[f"conv{index}/kernel"],
            window_strides=(2, 2),
            padding=((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=_HIGHEST,
        )
        hidden = jax.nn.relu(hidden + params[f"conv{index}/bias"][None, None, None])
        if index == 2:
            spatial_NS = hidden[..., :SPATIAL_CHANNELS].reshape(hidden.shape[0], -1)
    assert spatial_NS is not None
    pooled_NF = jnp.mean(hidden, axis=(1, 2))
    logits_NK = jnp.dot(pooled_NF, params["head/kernel"], precision=_HIGHEST)
    return Features(pooled_NF, spatial_NS, logits_NK)


def rescale(params: dict[str, jax.Array], *, pooled: float, spatial: float) -> dict[str, jax.Array]:
    """Multiplies both kinds of features by positive factors and leaves the logits as they are.

    ReLU and the mean commute with a positive factor, so the layer after takes its inverse. It
    puts separately trained extractors on one scale.
    """
    return params | {
        "conv2/kernel": params["conv2/kernel"] * spatial,
        "conv2/bias": params["conv2/bias"] * spatial,
        "conv3/kernel": params["conv3/kernel"] * (pooled / spatial),
        "conv3/bias": params["conv3/bias"] * pooled,
        "head/kernel": params["head/kernel"] / pooled,
    }
