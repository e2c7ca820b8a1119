# SPDX-License-Identifier: Apache-2.0
"""How a kernel is cut into vectors: its matrix view, and which weights share one vector.

Dimension key:  O outputs   I inputs   H W window   N fan-in (I * H * W)   G weights of a vector
                J vectors of a row (N / G, rounded up)   P padded fan-in (J * G)

A row of the matrix holds everything that one output reads, ordered (input channel, ky, kx). Thus
the nine weights of one 3x3 kernel lie side by side and make one vector (kernel-aware quantization,
AQUATIC-Diff, arXiv:2506.05960), and eight neighbours along the input axis make one elsewhere.
"""

import math
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from vqjax.errors import VqjaxError

Matrix = TypeVar("Matrix", jax.Array, np.ndarray)

GROUPS = {"conv3x3": 9, "linear": 8, "scalar": 1}
"""Usual number of weights of one vector, by grouping."""

MOST_WEIGHTS = 64
"""Most weights of one vector."""


def fits(grouping: str, group: int) -> bool:
    """Whether vectors of `group` weights are possible: rows or whole numbers of 3x3 kernels, one
    weight for "scalar", any number elsewhere."""
    if not isinstance(group, int) or not 1 <= group <= MOST_WEIGHTS:
        return False
    return {"conv3x3": group == 3 or group % 9 == 0, "scalar": group == 1}.get(grouping, True)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns (O, N) of a kernel shape in Linen layout: [I, O] or [H, W, I, O].

    Raises:
      VqjaxError: for kernels of other ranks.
    """
    if len(shape) not in (2, 4):
        raise VqjaxError(
            f"kernel of shape {tuple(shape)}: only linear [in, out] and convolution "
            f"[height, width, in, out] kernels have a matrix view"
        )
    return shape[-1], math.prod(shape[:-1])


def channels(shape: tuple[int, ...]) -> int:
    """Returns how many input channels a kernel in Linen layout reads."""
    return shape[-2]


def channel_rows(kernel: Matrix) -> Matrix:
    """Returns all weights that read a channel, [C, weights]."""
    last = kernel.ndim - 1
    order = (last - 1, *(axis for axis in range(last - 1)), last)
    return kernel.transpose(*order).reshape(kernel.shape[-2], -1)


def to_matrix(kernel: Matrix) -> Matrix:
    """Returns the [O, N] view of a kernel, JAX or NumPy, columns ordered (channel, ky, kx)."""
    outputs, fan_in = matrix_shape(kernel.shape)
    if kernel.ndim == 4:
        return kernel.transpose(3, 2, 0, 1).reshape(outputs, fan_in)
    return kernel.T


def from_matrix(matrix_ON: Matrix, shape: tuple[int, ...]) -> Matrix:
    """The inverse of `to_matrix`: [O, N] back to a kernel of the given Linen shape."""
    if len(shape) == 4:
        height, width, inputs, outputs = shape
        return matrix_ON.reshape(outputs, inputs, height, width).transpose(2, 3, 1, 0)
    return matrix_ON.T


def groups_per_row(fan_in: int, group: int) -> int:
    """Returns J: vectors needed for one row, the last one zero-padded where G does not divide N."""
    return -(-fan_in // group)


def to_vectors(matrix_ON: jax.Array, group: int) -> jax.Array:
    """Returns the vectors of a matrix, [O, J, G], the last of each row zero-padded."""
    rows, columns = matrix_ON.shape
    return jnp.pad(matrix_ON, ((0, 0), (0, -columns % group))).reshape(rows, -1, group)


def to_rows(vectors_OJG: jax.Array, columns: int) -> jax.Array:
    """The inverse of `to_vectors`, [O, N]."""
    return vectors_OJG.reshape(len(vectors_OJG), -1)[:, :columns]


def padded(array: jax.typing.ArrayLike, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a float32 copy in host memory with zeros added at the ends, up to `shape`.

    Padded inputs are always zero, so the same padding serves kernels and moments.
    """
    array = np.asarray(array, np.float32)
    result = np.zeros(shape, np.float32)
    result[tuple(slice(size) for size in array.shape)] = array
    return result
