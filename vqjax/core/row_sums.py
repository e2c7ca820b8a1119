# SPDX-License-Identifier: Apache-2.0
"""Sums of x x^T over the rows that a layer reads, whatever these are.

Dimension key:  B images   R rows   C channels   N fan-in
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 2048
"""Columns that are added at a time; those below the diagonal are not."""


class RowSums(NamedTuple):
    """Sums of x x^T, the blocks below the diagonal left out, and of x."""

    second_NN: Any
    sum_N: Any


def shapes(fan_in: int) -> RowSums:
    """Returns the shapes of the sums."""
    return RowSums((fan_in, fan_in), (fan_in,))


def patches(
    x: jax.Array, window: int = 1, stride: int = 1, padding: tuple[int, int] = (0, 0)
) -> jax.Array:
    """A layer's input as what each output reads, [..., N], columns (input channel, ky, kx)."""
    if window == 1:
        return x
    return jax.lax.conv_general_dilated_patches(
        x,
        (window, window),
        (stride, stride),
        (padding, padding),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def add(sums: RowSums, rows: jax.Array, weight: jax.Array) -> RowSums:
    """Adds rows [..., N], each weighed by `weight`."""
    second_NN, fan_in = sums.second_NN, rows.shape[-1]
    rows_RN = rows.astype(jnp.float32).reshape(-1, fan_in)
    for low in range(0, fan_in, BLOCK):
        high = min(low + BLOCK, fan_in)
        product = jnp.matmul(
            rows_RN[:, :high].T, rows_RN[:, low:high], precision=jax.lax.Precision.HIGHEST
        )
        second_NN = second_NN.at[:high, low:high].add(weight * product)
    return RowSums(second_NN, sums.sum_N + weight * jnp.sum(rows_RN, axis=0))


def complete(second_NN: np.ndarray) -> None:
    """Fills in the blocks below the diagonal."""
    for low in range(BLOCK, len(second_NN), BLOCK):
        rows = slice(low, low + BLOCK)
        second_NN[rows, :low] = second_NN[:low, rows].T
