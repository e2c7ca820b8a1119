# SPDX-License-Identifier: Apache-2.0
"""From NumPy's memory to a device."""

import jax
import numpy as np


def to_device(array: np.typing.ArrayLike) -> jax.Array:
    """Returns a copy on the default device.

    `jnp.asarray` compiles a program for every shape (jax 0.10). `jax.device_put` alone may go on
    reading from NumPy's memory. Types of 64 bits become those of 32, as everywhere in JAX.
    """
    return jax.device_put(np.array(array))
