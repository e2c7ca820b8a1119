# SPDX-License-Identifier: Apache-2.0
"""The network behind FID: Inception-v3 of 2015-12-05 with 1008 classes, on a dict of arrays.

It is not torchvision's Inception-v3: the picture is resized as TensorFlow 1 did, average pools
divide by the cells that exist, and the last block pools by maximum. Batch norms are folded into the
convolutions (`vqjax.io.inception`). Published as `classify_image_graph_def.pb`; names follow its
PyTorch conversion (pytorch-fid, torch-fidelity).

Dimension key:  N images   H W rows and columns   C channels   F pooled features (2048)
                S spatial features: 17 x 17 x 7 = 2023   K classes (1008)
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SIDE = 299
POOLED = 2048
SPATIAL = 2023
CLASSES = 1008
_SPATIAL_CHANNELS = 7
_HIGHEST = jax.lax.Precision.HIGHEST

Params = Mapping[str, jax.Array]


class Features(NamedTuple):
    """What the scores are made of; every array is float32.

    Attributes:
      pooled: [N, 2048], the last layer's mean over positions: FID, precision and recall.
      spatial: [N, 2023], the first seven channels of the 1x1 branch of Mixed_6d, flattened in
        H, W, C order as stored statistics are: sFID.
      logits: [N, 1008] without the bias, as the evaluator takes them: inception score.
    """

    pooled: jax.Array
    spatial: jax.Array
    logits: jax.Array


def resize(images_NHWC: jax.Array) -> jax.Array:
    """TensorFlow 1's `ResizeBilinear` to 299 x 299: corners not aligned, no half-pixel centres.

    Output row i reads source row i * (H / 299), computed in float32, without antialiasing.

    Args:
      images_NHWC: [N, H, W, 3] of 0..255, any dtype and size.

    Returns:
      float32 [N, 299, 299, 3] of 0..255.
    """
    images = images_NHWC.astype(jnp.float32)
    for axis in (2, 1):  # columns first, as TensorFlow does
        low, high, share = _source_rows(images.shape[axis])
        below, above = jnp.take(images, low, axis), jnp.take(images, high, axis)
        share = share.reshape([-1 if other == axis else 1 for other in range(4)])
        images = below + (above - below) * share
    return images


def features(params: Params, resized_NHWC: jax.Array) -> Features:
    """Runs the network.

    Args:
      params: as `vqjax.io.inception.load` returns them: "block/branch/kernel" [kH, kW, I, O] and
        "block/branch/bias" [O], "fc/kernel" [2048, 1008], float32.
      resized_NHWC: what `resize` returns.
    """
    seen = activations(params, resized_NHWC)
    pooled_NF = jnp.mean(seen["Mixed_7c"], axis=(1, 2))
    spatial_NHWC = seen["Mixed_6d/branch1x1"][..., :_SPATIAL_CHANNELS]
    return Features(
        pooled=pooled_NF,
        spatial=spatial_NHWC.reshape(spatial_NHWC.shape[0], -1),
        logits=jnp.dot(pooled_NF, params["fc/kernel"], precision=_HIGHEST),
    )


def activations(params: Params, resized_NHWC: jax.Array) -> dict[str, jax.Array]:
    """Every block's output by name, both stem pools ("pool1", "pool2") and the branch for sFID."""
    x = (resized_NHWC - 128) * 0.0078125
    x = _conv(params, "Conv2d_1a_3x3", x, stride=2, padding="VALID")
    x = _conv(params, "Conv2d_2a_3x3", x, padding="VALID")
    x = _conv(params, "Conv2d_2b_3x3", x)
    seen = {}
    seen["pool1"] = x = _max_pool(x, stride=2, padding="VALID")
    x = _conv(params, "Conv2d_3b_1x1", x)
    x = _conv(params, "Conv2d_4a_3x3", x, padding="VALID")
    seen["pool2"] = x = _max_pool(x, stride=2, padding="VALID")
    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        seen[name] = x = _block_a(params, name, x)
    seen["Mixed_6a"] = x = _block_b(params, "Mixed_6a", x)
    for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        branch = _conv(params, f"{name}/branch1x1", x)
        if name == "Mixed_6d":
            seen["Mixed_6d/branch1x1"] = branch
        seen[name] = x = _block_c(params, name, x, branch)
    seen["Mixed_7a"] = x = _block_d(params, "Mixed_7a", x)
    seen["Mixed_7b"] = x = _block_e(params, "Mixed_7b", x, _average_pool(x))
    seen["Mixed_7c"] = _block_e(params, "Mixed_7c", x, _max_pool(x, stride=1, padding="SAME"))
    return seen


def _block_a(params: Params, name: str, x_NHWC: jax.Array) -> jax.Array:
    return jnp.concatenate(
        [
            _chain(params, name, x_NHWC, "branch1x1"),
            _chain(params, name, x_NHWC, "branch5x5_1", "branch5x5_2"),
            _chain(params, name, x_NHWC, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
            _chain(params, name, _average_pool(x_NHWC), "branch_pool"),
        ],
        axis=-1,
    )


def _block_b(params: Params, name: str, x_NHWC: jax.Array) -> jax.Array:
    double = _chain(params, name, x_NHWC, "branch3x3dbl_1", "branch3x3dbl_2")
    return jnp.concatenate(
        [
            _conv(params, f"{name}/branch3x3", x_NHWC, stride=2, padding="VALID"),
            _conv(params, f"{name}/branch3x3dbl_3", double, stride=2, padding="VALID"),
            _max_pool(x_NHWC, stride=2, padding="VALID"),
        ],
        axis=-1,
    )


def _block_c(params: Params, name: str, x_NHWC: jax.Array, branch_NHWC: jax.Array) -> jax.Array:
    single = [f"branch7x7_{index}" for index in range(1, 4)]
    double = [f"branch7x7dbl_{index}" for index in range(1, 6)]
    return jnp.concatenate(
        [
            branch_NHWC,
            _chain(params, name, x_NHWC, *single),
            _chain(params, name, x_NHWC, *double),
            _chain(params, name, _average_pool(x_NHWC), "branch_pool"),
        ],
        axis=-1,
    )


def _block_d(params: Params, name: str, x_NHWC: jax.Array) -> jax.Array:
    single = _chain(params, name, x_NHWC, "branch3x3_1")
    double = _chain(params, name, x_NHWC, "branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3")
    return jnp.concatenate(
        [
            _conv(params, f"{name}/branch3x3_2", single, stride=2, padding="VALID"),
            _conv(params, f"{name}/branch7x7x3_4", double, stride=2, padding="VALID"),
            _max_pool(x_NHWC, stride=2, padding="VALID"),
        ],
        axis=-1,
    )


def _block_e(params: Params, name: str, x_NHWC: jax.Array, pool_NHWC: jax.Array) -> jax.Array:
    single = _chain(params, name, x_NHWC, "branch3x3_1")
    double = _chain(params, name, x_NHWC, "branch3x3dbl_1", "branch3x3dbl_2")
    return jnp.concatenate(
        [
            _chain(params, name, x_NHWC, "branch1x1"),
            _chain(params, name, single, "branch3x3_2a"),
            _chain(params, name, single, "branch3x3_2b"),
            _chain(params, name, double, "branch3x3dbl_3a"),
            _chain(params, name, double, "branch3x3dbl_3b"),
            _chain(params, name, pool_NHWC, "branch_pool"),
        ],
        axis=-1,
    )


def _chain(params: Params, name: str, x_NHWC: jax.Array, *branches: str) -> jax.Array:
    for branch in branches:
        x_NHWC = _conv(params, f"{name}/{branch}", x_NHWC)
    return x_NHWC


def _conv(
    params: Params, name: str, x_NHWC: jax.Array, *, stride: int = 1, padding: str = "SAME"
) -> jax.Array:
    y_NHWC = jax.lax.conv_general_dilated(
        x_NHWC,
        params[f"{name}/kernel"],
        window_strides=(stride, stride),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=_HIGHEST,  # TF32 would change the third digit of FID
    )
    return jax.nn.relu(y_NHWC + params[f"{name}/bias"][None, None, None])


def _max_pool(x_NHWC: jax.Array, *, stride: int, padding: str) -> jax.Array:
    window, strides = (1, 3, 3, 1), (1, stride, stride, 1)
    return jax.lax.reduce_window(x_NHWC, -jnp.inf, jax.lax.max, window, strides, padding)


def _average_pool(x_NHWC: jax.Array) -> jax.Array:
    """3x3 mean over the cells that lie within the picture: what padding adds is not counted."""
    window, strides = (1, 3, 3, 1), (1, 1, 1, 1)
    sums = jax.lax.reduce_window(x_NHWC, 0.0, jax.lax.add, window, strides, "SAME")
    height, width = (_cells(side) for side in x_NHWC.shape[1:3])
    return sums / (height[:, None] * width[None])[None, :, :, None]


def _cells(side: int) -> np.ndarray:
    """How many of the three cells about each position exist."""
    return np.convolve(np.ones(side, np.float32), np.ones(3, np.float32), mode="same")


def _source_rows(source: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Neighbours below and above of each output row, and the share of the one above."""
    position = np.arange(SIDE, dtype=np.float32) * np.float32(source / SIDE)
    low = np.floor(position).astype(np.int32)
    return low, np.minimum(low + 1, source - 1), position - low.astype(np.float32)
