# SPDX-License-Identifier: Apache-2.0
"""A tensor in a file: what it is is known, its values are read when asked for."""

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class LazyTensor:
    """One tensor of a checkpoint. Readers check everything but the values before they make one.

    Attributes:
      shape: as stored.
      dtype: of the array that `read` returns; bfloat16 is stored, float32 comes out.
      read: reads the values. The array may be a view shared with others: do not write to it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def widen_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Returns float32 values of bfloat16 bit patterns (uint16): the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
