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
        seen[name], branch = _block_c(params, name, x)
        x = seen[name]
        if name == "Mixed_6d":
            seen["Mixed_6d/branch1x1"] = branch
    seen["Mixed_7a"] = x = _block_d(params, "Mixed_7a", x)
    seen["Mixed_7b"] = x = _block_e(params, "Mixed_7b", x, maximum=False)
    seen["Mixed_7c"] = _block_e(params, "Mixed_7c", x, maximum=True)
    return seen


def _block_a(params: Params, name: str, x_NHWC: jax.Array) -> jax.Array:
    branches = ("branch1x1", "branch5x5_1", "branch3x3dbl_1")
    plain, wide, double, pooled = _pointwise(params, name, x_NHWC, *branches, pooled="branch_pool")
    return jnp.concatenate(
        [
            plain,
            _chain(params, name, wide, "branch5x5_2"),
            _chain(params, name, double, "branch3x3dbl_2", "branch3x3dbl_3"),
            pooled,
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


def _block_c(params: Params, name: str, x_NHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The block's output, and that of its 1x1 branch."""
    branches = ("branch1x1", "branch7x7_1", "branch7x7dbl_1")
    plain, single, double, pooled = _pointwise(
        params, name, x_NHWC, *branches, pooled="branch_pool"
    )
    singles = [f"branch7x7_{index}" for index in range(2, 4)]
    doubles = [f"branch7x7dbl_{index}" for index in range(2, 6)]
    whole = jnp.concatenate(
        [
            plain,
            _chain(params, name, single, *singles),
            _chain(params, name, double, *doubles),
            pooled,
        ],
        axis=-1,
    )
    return whole, plain


def _block_d(params: Params, name: str, x_NHWC: jax.Array) -> jax.Array:
    single, double = _pointwise(params, name, x_NHWC, "branch3x3_1", "branch7x7x3_1")
    double = _chain(params, name, double, "branch7x7x3_2", "branch7x7x3_3")
    return jnp.concatenate(
        [
            _conv(params, f"{name}/branch3x3_2", single, stride=2, padding="VALID"),
            _conv(params, f"{name}/branch7x7x3_4", double, stride=2, padding="VALID"),
            _max_pool(x_NHWC, stride=2, padding="VALID"),
        ],
        axis=-1,
    )


def _block_e(params: Params, name: str, x_NHWC: jax.Array, *, maximum: bool) -> jax.Array:
    """The last two blocks, which differ in how one branch pools."""
    branches = ("branch1x1", "branch3x3_1", "branch3x3dbl_1")
    averaged = None if maximum else "branch_pool"
    plain, single, double, *pooled = _pointwise(params, name, x_NHWC, *branches, pooled=averaged)
    if maximum:
        highest = _max_pool(x_NHWC, stride=1, padding="SAME")
        pooled = [_conv(params, f"{name}/branch_pool", highest)]
    double = _chain(params, name, double, "branch3x3dbl_2")
    return jnp.concatenate(
        [
            plain,
            _chain(params, name, single, "branch3x3_2a"),
            _chain(params, name, single, "branch3x3_2b"),
            _chain(params, name, double, "branch3x3dbl_3a"),
            _chain(params, name, double, "branch3x3dbl_3b"),
            *pooled,
        ],
        axis=-1,
    )


def _chain(params: Params, name: str, x_NHWC: jax.Array, *branches: str) -> jax.Array:
    for branch in branches:
        x_NHWC = _conv(params, f"{name}/{branch}", x_NHWC)
    return x_NHWC


def _pointwise(
    params: Params, name: str, x_NHWC: jax.Array, *branches: str, pooled: str | None = None
) -> list[jax.Array]:
    """All 1x1 convolutions of one input as a single product, which a CPU computes faster.

    Args:
      pooled: a branch that reads the input's 3x3 average. An average over positions and a product
        over channels commute, so it is taken of the fewer channels that come out. Its result is
        the last one.
    """
    names = [f"{name}/{branch}" for branch in (*branches, *([pooled] if pooled else []))]
    kernels = [params[f"{path}/kernel"] for path in names]
    y_NHWC = _product(x_NHWC, jnp.concatenate(kernels, axis=-1))
    ends = np.cumsum([kernel.shape[-1] for kernel in kernels])[:-1]
    parts = jnp.split(y_NHWC, ends, axis=-1)
    if pooled:
        parts[-1] = _average_pool(parts[-1])
    return [_activation(params, path, part) for path, part in zip(names, parts)]


def _conv(
    params: Params, name: str, x_NHWC: jax.Array, *, stride: int = 1, padding: str = "SAME"
) -> jax.Array:
    y_NHWC = _product(x_NHWC, params[f"{name}/kernel"], stride=stride, padding=padding)
    return _activation(params, name, y_NHWC)


def _product(
    x_NHWC: jax.Array, kernel_HWIO: jax.Array, *, stride: int = 1, padding: str = "SAME"
) -> jax.Array:
    if kernel_HWIO.shape[:2] == (1, 1):  # on a CPU a product is faster than a convolution
        return jnp.matmul(x_NHWC, kernel_HWIO[0, 0], precision=_HIGHEST)
    # XLA's code for CPUs is slow without padding: pad 3x3 windows, the only such ones, and cut off.
    cropped = padding == "VALID" and stride == 1
    y_NHWC = jax.lax.conv_general_dilated(
        x_NHWC,
        kernel_HWIO,
        window_strides=(stride, stride),
        padding="SAME" if cropped else padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=_HIGHEST,  # TF32 would change the third digit of FID
    )
    return y_NHWC[:, 1:-1, 1:-1] if cropped else y_NHWC


def _activation(params: Params, name: str, y_NHWC: jax.Array) -> jax.Array:
    return jax.nn.relu(y_NHWC + params[f"{name}/bias"][None, None, None])


def _max_pool(x_NHWC: jax.Array, *, stride: int, padding: str) -> jax.Array:
    """Largest of 3x3, rows and columns apart: faster than a window reduction on a CPU."""
    for axis in (1, 2):
        if padding == "SAME":
            around = [(1, 1) if other == axis else (0, 0) for other in range(4)]
            x_NHWC = jnp.pad(x_NHWC, around, constant_values=-jnp.inf)
        last = (x_NHWC.shape[axis] - 3) // stride * stride
        first, second, third = (
            jax.lax.slice_in_dim(x_NHWC, shift, shift + last + 1, stride, axis=axis)
            for shift in range(3)
        )
        x_NHWC = jnp.maximum(jnp.maximum(first, second), third)
    return x_NHWC


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
