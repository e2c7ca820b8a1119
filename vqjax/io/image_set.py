# SPDX-License-Identifier: Apache-2.0
"""A set of pictures that is read batch by batch, never held whole.

Dimension key:  N pictures   H W rows and columns   F S features of either kind
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from vqjax.errors import VqjaxError


class Statistics(NamedTuple):
    """Stored moments of features, float64: `mu` [F], `sigma` [F, F], `mu_s` [S], `sigma_s` [S, S].

    `sigma` is the unbiased covariance; `_s` marks spatial features, flattened in H, W, C order.
    """

    mu: np.ndarray
    sigma: np.ndarray
    mu_s: np.ndarray
    sigma_s: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
    """Pictures of one size.

    Attributes:
      where: names the source in errors.
      count: N.
      size: (H, W).
      batches: takes a batch size and yields uint8 [B, H, W, 3] in order; the last may be smaller.
      labels: int64 [N] where the source has them.
      statistics: where the source has them.
      manifold: how many pictures, the first ones, precision and recall look at; None: all.
    """

    where: str
    count: int
    size: tuple[int, int]
    batches: Callable[[int], Iterator[np.ndarray]]
    labels: np.ndarray | None = None
    statistics: Statistics | None = None
    manifold: int | None = None


def from_array(
    images_NHWC: np.ndarray, labels_N: np.ndarray | None = None, *, where: str = "the samples"
) -> ImageSet:
    """Pictures that are in memory anyway.

    Raises:
      VqjaxError: unless they are uint8 [N, H, W, 3] with one label each.
    """
    check_shape(images_NHWC.shape, images_NHWC.dtype, where)
    if labels_N is not None and labels_N.shape != images_NHWC.shape[:1]:
        raise VqjaxError(f"{where}: {len(images_NHWC)} pictures, labels of shape {labels_N.shape}")

    def batches(size: int) -> Iterator[np.ndarray]:
        return (images_NHWC[start : start + size] for start in range(0, len(images_NHWC), size))

    height, width = images_NHWC.shape[1:3]
    return ImageSet(where, len(images_NHWC), (height, width), batches, labels_N)


def check_shape(shape: tuple[int, ...], dtype: np.dtype, where: str) -> None:
    """Raises VqjaxError unless this is a set of uint8 RGB pictures, at least one."""
    whole = all(type(side) is int and side > 0 for side in shape)  # a header may hold anything
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or not whole:
        raise VqjaxError(
            f"{where}: scores need uint8 pictures [N, H, W, 3] of 0..255, found {dtype} "
            f"{list(shape)}; convert to 8-bit RGB first"
        )
