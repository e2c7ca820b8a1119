# SPDX-License-Identifier: Apache-2.0
"""LPIPS of pictures and their twins from the full-precision model, in batches of one shape.

Dimension key:  N pairs   H W C picture
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from vqjax.core import cores
from vqjax.errors import VqjaxError
from vqjax.models import lpips as network

_BATCH = 8
SMALLEST = 16
"""Side in pixels below which the fifth activation has no position left."""


def lpips(
    places: Mapping[Any, network.Params], a_NHWC: np.ndarray, b_NHWC: np.ndarray
) -> np.ndarray:
    """LPIPS per pair, float64 [N]; 0 for identical pictures.

    Args:
      places: what `vqjax.io.lpips.load` returns, as `vqjax.core.cores.placed` puts it on devices.
      a_NHWC: uint8 [N, H, W, 3].
      b_NHWC: the twins, in the same order.

    Raises:
      VqjaxError: if shapes differ, pictures are not uint8 RGB, or a side is below 16 pixels.
    """
    for images in (a_NHWC, b_NHWC):
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise VqjaxError(
                f"LPIPS needs uint8 pictures [N, H, W, 3], found {images.dtype} "
                f"{list(images.shape)}"
            )
    if a_NHWC.shape != b_NHWC.shape:
        raise VqjaxError(f"twins must have one shape, found {a_NHWC.shape} and {b_NHWC.shape}")
    if min(a_NHWC.shape[1:3]) < SMALLEST:
        raise VqjaxError(f"LPIPS needs sides of at least {SMALLEST} pixels, found {a_NHWC.shape}")

    def of_batch(params: network.Params, start: int) -> np.ndarray:
        a, b = a_NHWC[start : start + _BATCH], b_NHWC[start : start + _BATCH]
        filler = np.zeros((_BATCH - len(a), *a.shape[1:]), np.uint8)
        pair = np.concatenate([a, filler]), np.concatenate([b, filler])
        return np.asarray(_distance(params, *pair), np.float64)[: len(a)]

    starts = range(0, len(a_NHWC), _BATCH)
    # One call fills a CPU, and takes much memory.
    return np.concatenate([*cores.over_devices(of_batch, starts, places, together=False)])


_distance = jax.jit(network.distance)
