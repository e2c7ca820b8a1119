# SPDX-License-Identifier: Apache-2.0
"""Distances of `vqjax.eval.metrics` as programs for a GPU: the same blocks, in float32.

Dimension key:  N rows   R others   F features   B rows of a block
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def nth(rows_NF: np.ndarray, others_RF: np.ndarray, index: int, *, block: int) -> np.ndarray:
    """Squared distance float32 [N] from each row to the others, the index-th smallest from 0 on.

    Args:
      block: rows at once; the device holds the others, and a few arrays of [block, R].
    """
    others = jnp.asarray(others_RF, jnp.float32)
    return _by_block(lambda rows_BF: _nth(rows_BF, others, index), rows_NF, block)


def inside(
    rows_NF: np.ndarray, centres_RF: np.ndarray, radii_R: np.ndarray, *, block: int
) -> np.ndarray:
    """Bool [N]: whether a row is within the ball of at least one centre.

    Args:
      radii_R: squared.
      block: see `nth`.
    """
    centres, radii = jnp.asarray(centres_RF, jnp.float32), jnp.asarray(radii_R, jnp.float32)
    return _by_block(lambda rows_BF: _inside(rows_BF, centres, radii), rows_NF, block)


def _by_block(
    work: Callable[[np.ndarray], jax.Array], rows_NF: np.ndarray, block: int
) -> np.ndarray:
    """One compilation serves all blocks: the last one is filled up with zeros and cut off."""
    block, parts = min(block, len(rows_NF)), []
    for start in range(0, len(rows_NF), block):
        rows = np.asarray(rows_NF[start : start + block], np.float32)
        filled = np.pad(rows, ((0, block - len(rows)), (0, 0)))
        parts.append(np.asarray(work(filled))[: len(rows)])  # waits: one block at a time
    return np.concatenate(parts)


@functools.partial(jax.jit, static_argnames="index")
def _nth(rows_BF: jax.Array, others_RF: jax.Array, index: int) -> jax.Array:
    return -jax.lax.top_k(-_squared(rows_BF, others_RF), index + 1)[0][:, index]


@jax.jit
def _inside(rows_BF: jax.Array, centres_RF: jax.Array, radii_R: jax.Array) -> jax.Array:
    return (_squared(rows_BF, centres_RF) <= radii_R[None]).any(1)


def _squared(rows_BF: jax.Array, others_RF: jax.Array) -> jax.Array:
    norms_B, norms_R = jnp.sum(rows_BF**2, 1), jnp.sum(others_RF**2, 1)
    # Differences of large norms: TF32 would move neighbours.
    product_BR = jnp.dot(rows_BF, others_RF.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(-2 * product_BR + norms_B[:, None] + norms_R[None], 0)
