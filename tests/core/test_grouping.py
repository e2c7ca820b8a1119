# SPDX-License-Identifier: Apache-2.0
"""The matrix view multiplies the patches that the convolution reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqjax.core import grouping
from vqjax.errors import VqjaxError


@pytest.mark.parametrize("shape", [(3, 3, 4, 5), (1, 1, 4, 5), (4, 5)])
def test_matrix_view_round_trips(shape):
    kernel = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    matrix = grouping.to_matrix(kernel)
    assert matrix.shape == grouping.matrix_shape(shape)
    np.testing.assert_array_equal(grouping.from_matrix(matrix, shape), kernel)


def test_columns_are_ordered_by_channel_then_window():
    key_x, key_w = jax.random.split(jax.random.key(0))
    x = jax.random.normal(key_x, (2, 6, 6, 4))
    kernel = jax.random.normal(key_w, (3, 3, 4, 5))
    dims = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=dims)
    # One patch by hand: (channel, ky, kx) of the window at (2, 1).
    patch = x[1, 2:5, 1:4].transpose(2, 0, 1).reshape(-1)
    found = grouping.to_matrix(kernel) @ patch
    np.testing.assert_allclose(found, expected[1, 2, 1], rtol=1e-4, atol=1e-5)


def test_padding_adds_zeros_at_the_ends():
    padded = grouping.padded(jnp.ones((2, 10)), (3, 16))
    assert padded.shape == (3, 16)
    np.testing.assert_array_equal(padded[:2, :10], 1)
    assert padded.sum() == 20


def test_other_ranks_are_refused():
    with pytest.raises(VqjaxError, match=r"kernel of shape \(3, 4, 5\): only linear"):
        grouping.matrix_shape((3, 4, 5))
