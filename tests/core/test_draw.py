# SPDX-License-Identifier: Apache-2.0
"""Draws that compile fast are those of jax.random."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqjax.core import draw


@pytest.mark.parametrize("shape", [(4, 16, 9), (7, 5), (6,), ()])
def test_numbers_are_those_of_jax(shape):
    key = jax.random.key(3)
    normal, signs = (jax.jit(of, static_argnums=1)(key, shape) for of in (draw.normal, draw.signs))
    np.testing.assert_array_equal(normal, jax.random.normal(key, shape))
    np.testing.assert_array_equal(signs, jax.random.rademacher(key, shape, jnp.float32))
    assert normal.dtype == signs.dtype == jnp.float32


def test_keys_may_be_mapped_over():
    keys = jax.random.split(jax.random.key(0), 3)
    found = jax.vmap(lambda key: draw.normal(key, (2, 4)))(keys)
    expected = jnp.stack([jax.random.normal(key, (2, 4)) for key in keys])
    np.testing.assert_array_equal(found, expected)
