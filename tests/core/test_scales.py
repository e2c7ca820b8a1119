# SPDX-License-Identifier: Apache-2.0
"""Scales in five bits."""

import jax.numpy as jnp
import numpy as np
import pytest

from vqjax.core import scales
from vqjax.core.scales import LogScales
from vqjax.errors import VqjaxError


@pytest.mark.parametrize("spread", [1e-3, 0.3, 0.9])
def test_errors_stay_below_half_a_step(spread):
    given = np.exp(np.random.default_rng(0).normal(size=200) * spread)
    found = LogScales.of(given)
    step = np.log(given.max() / given.min()) / (scales.LEVELS - 1)
    assert np.abs(np.log(np.asarray(found.values()) / given)).max() <= step / 2 * 1.01 + 1e-6
    assert np.all(np.asarray(LogScales.of(given, up=True).values()) >= given * (1 - 1e-4))


@pytest.mark.parametrize("tiny", [1e-3, 1e-6, 1e-12, 1e-30])
@pytest.mark.parametrize("up", [False, True])
def test_one_tiny_scale_leaves_the_others_their_resolution(tiny, up):
    given = np.append(np.random.default_rng(0).uniform(0.5, 1, 95), tiny)
    found = np.asarray(LogScales.of(given, up=up).values())
    assert np.abs(found / given - 1)[:-1].max() < (0.21 if up else 0.1)  # of 8 octaves in 31 sizes
    assert found[-1] < given[:-1].min() / 100


def test_bytes_are_those_that_are_counted():
    for count in (1, 5, 64, 193):
        found = LogScales.of(np.ones(count))
        assert 8 * found.nbytes == scales.stored_bits(count)
        np.testing.assert_array_equal(found.values(), np.ones(count))


def test_zeros_stay_zero_and_extremes_stay_finite():
    found = np.asarray(LogScales.of(np.array([0.0, 1e-30, 1e30, 0.0])).values())
    np.testing.assert_allclose(found, [0.0, 1e-30, 1e30, 0.0], rtol=1e-4)
    np.testing.assert_array_equal(LogScales.of(np.zeros(3)).values(), np.zeros(3))


def test_what_is_stored_is_rounded_to_itself():
    given = np.random.default_rng(1).uniform(0.1, 3, 100)
    once = LogScales.of(given)
    np.testing.assert_array_equal(LogScales.of(once.values()).codes, once.codes)
    upwards = LogScales.of(once.values(), up=True)
    np.testing.assert_array_equal(upwards.codes, once.codes)


@pytest.mark.parametrize("bad", [[-1.0, 1.0], [jnp.nan], [jnp.inf], [[1.0]]])
def test_what_is_no_scale_is_refused(bad):
    with pytest.raises(VqjaxError, match="expected finite numbers of one axis, 0 or more"):
        LogScales.of(np.asarray(bad))
