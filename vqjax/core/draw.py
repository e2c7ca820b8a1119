# SPDX-License-Identifier: Apache-2.0
"""Random arrays that compile fast inside larger programs.

XLA's code for a CPU computes the place of each number from its index on every axis: seconds to
compile for an array of a few hundred numbers with three axes, a quarter of a second for the same
numbers in one row.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def normal(key: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Returns `jax.random.normal(key, shape)`, float32."""
    return _in_shape(jax.random.normal(key, (math.prod(shape),), jnp.float32), shape)


def signs(key: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Returns `jax.random.rademacher(key, shape)`, float32."""
    return _in_shape(jax.random.rademacher(key, (math.prod(shape),), jnp.float32), shape)


def _in_shape(row: jax.Array, shape: Sequence[int]) -> jax.Array:
    # Without the barrier XLA would shape the row before it draws.
    return jax.lax.optimization_barrier(row).reshape(shape)
