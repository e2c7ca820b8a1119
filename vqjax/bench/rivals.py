# SPDX-License-Identifier: Apache-2.0
"""What `bench evaluate` compares with: the same work in TensorFlow and SciPy, written plainly.

The published evaluator runs its network and its distances in TensorFlow, and takes SciPy's root of
a matrix; these are the same operations on the same arrays. TensorFlow is no dependency: who has it
sees the ratio.

Dimension key:  N images   H W rows and columns   F features   R reference rows   B rows of a block
"""

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import scipy.linalg

from vqjax.eval.metrics import NEIGHBOURS, Moments
from vqjax.models import inception

_STEM = ("Conv2d_1a_3x3/2", "Conv2d_2a_3x3/v", "Conv2d_2b_3x3", "max/2",
         "Conv2d_3b_1x1", "Conv2d_4a_3x3/v", "max/2")  # fmt: skip
_BRANCHES = {
    "5": (
        ("branch1x1",),
        ("branch5x5_1", "branch5x5_2"),
        ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
        ("average", "branch_pool"),
    ),
    "6a": (
        ("branch3x3/2",),
        ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3/2"),
        ("max/2",),
    ),
    "6": (
        ("branch1x1",),
        tuple(f"branch7x7_{index}" for index in range(1, 4)),
        tuple(f"branch7x7dbl_{index}" for index in range(1, 6)),
        ("average", "branch_pool"),
    ),
    "7a": (
        ("branch3x3_1", "branch3x3_2/2"),
        ("branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4/2"),
        ("max/2",),
    ),
    "7": (
        ("branch1x1",),
        ("branch3x3_1", "branch3x3_2a"),
        ("branch3x3_1", "branch3x3_2b"),
        ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3a"),
        ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3b"),
        ("pool", "branch_pool"),
    ),
}
_BLOCKS = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")


def has_tensorflow() -> bool:
    """Whether TensorFlow is installed; it is not imported."""
    return importlib.util.find_spec("tensorflow") is not None


def tensorflow_network(params: Mapping[str, Any]) -> Callable[[np.ndarray], np.ndarray]:
    """The FID network in TensorFlow.

    Args:
      params: as `vqjax.models.inception.features` takes them.

    Returns:
      Takes uint8 pictures [N, H, W, 3] and returns the pooled features, float32 [N, 2048].
    """
    import tensorflow as tf  # pyright: ignore[reportMissingImports]

    weights = {name: tf.constant(np.asarray(value)) for name, value in params.items()}
    side = inception.SIDE

    def layer(x_NHWC, block: str, name: str):
        kind, _, how = name.partition("/")
        stride, padding = (2 if how == "2" else 1), ("VALID" if how else "SAME")
        if kind in ("max", "pool"):
            return tf.nn.max_pool2d(x_NHWC, 3, stride, padding)
        if kind == "average":  # divides by the cells that exist
            return tf.nn.avg_pool2d(x_NHWC, 3, 1, "SAME")
        path = f"{block}{kind}"
        y_NHWC = tf.nn.conv2d(x_NHWC, weights[f"{path}/kernel"], stride, padding)
        return tf.nn.relu(tf.nn.bias_add(y_NHWC, weights[f"{path}/bias"]))

    @tf.function
    def pooled(images_NHWC):
        x = tf.cast(images_NHWC, tf.float32)
        x = tf.compat.v1.image.resize_bilinear(x, [side, side], align_corners=False)
        x = (x - 128.0) * 0.0078125
        for name in _STEM:
            x = layer(x, "", name)
        for block in _BLOCKS:
            branches = _BRANCHES.get(block) or _BRANCHES[block[0]]
            done = {(): x}  # by the layers so far: branches share how they begin
            for branch in branches:
                for end in range(1, len(branch) + 1):
                    name = branch[end - 1]
                    if name == "pool" and block == "7b":
                        name = "average"
                    if branch[:end] not in done:
                        before = done[branch[: end - 1]]
                        done[branch[:end]] = layer(before, f"Mixed_{block}/", name)
            x = tf.concat([done[branch] for branch in branches], -1)
        return tf.reduce_mean(x, [1, 2])

    return lambda images_NHWC: pooled(images_NHWC).numpy()


def tensorflow_precision_recall(reference_RF: np.ndarray, samples_NF: np.ndarray, block: int):
    """(precision, recall) with distances and comparisons in TensorFlow, as the evaluator has them.

    It takes float16 distances where they are finite; these are float32, as ours are.
    """
    import tensorflow as tf  # pyright: ignore[reportMissingImports]

    @tf.function
    def distances(rows_BF, others_RF):
        norms_B, norms_R = tf.reduce_sum(rows_BF**2, 1), tf.reduce_sum(others_RF**2, 1)
        product = tf.matmul(rows_BF, others_RF, transpose_b=True)
        return tf.maximum(norms_B[:, None] - 2 * product + norms_R[None], 0)

    def blocks(rows_NF):
        return (rows_NF[start : start + block] for start in range(0, len(rows_NF), block))

    def radii(rows_NF):
        parts = (distances(rows, rows_NF).numpy() for rows in blocks(rows_NF))
        return np.concatenate(
            [np.partition(part, NEIGHBOURS, axis=1)[:, NEIGHBOURS] for part in parts]
        )

    def share(rows_NF, others_RF):
        within = radii(others_RF)[None]
        parts = (tf.reduce_any(distances(rows, others_RF) <= within, 1) for rows in blocks(rows_NF))
        return float(np.mean(np.concatenate([part.numpy() for part in parts])))

    return share(samples_NF, reference_RF), share(reference_RF, samples_NF)


def scipy_distance(a: Moments, b: Moments) -> float:
    """The Frechet distance with SciPy's root of the product of covariances, as the evaluator's."""
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    step = a.mean - b.mean
    return float(step @ step + np.trace(a.covariance + b.covariance) - 2 * np.trace(root).real)
