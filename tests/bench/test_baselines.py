# SPDX-License-Identifier: Apache-2.0
"""Baselines must be good ones, and count what they store."""

import numpy as np
import pytest

from vqjax.bench import baselines


def gaussian(outputs=64, fan_in=96):
    return np.random.default_rng(0).normal(size=(outputs, fan_in))


def error(w_ON, q_ON):
    return np.sum((w_ON - q_ON) ** 2) / np.sum(w_ON**2)


# Least distortion of a uniform quantizer of a unit Gaussian (Max, 1960, table II).
@pytest.mark.parametrize(("bits", "distortion"), [(2, 0.1188), (4, 0.01154)])
def test_rounding_reaches_the_best_uniform_quantizer(bits, distortion):
    found = baselines.round_to_nearest(gaussian(), bits)
    assert error(gaussian(), found.q_ON) < 1.02 * distortion
    assert found.bits_per_weight == bits + 32 / 96
    assert bits - 0.6 < found.codes_entropy - 32 / 96 < bits


def test_rounding_keeps_rows_of_two_values_and_constant_rows():
    w_ON = np.array([[0.5, -0.25, 0.5, -0.25], [3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(baselines.round_to_nearest(w_ON, 2).q_ON, w_ON)


def test_product_quantization_beats_rounding_and_the_bound_beats_it():
    w_ON = gaussian(256, 128)
    found = baselines.product_quantization(w_ON, group=2, entries=16, rng=np.random.default_rng(0))
    assert found.bits_per_weight == pytest.approx(2 + 16 * 2 * 16 / w_ON.size + 16 / 128)
    assert 2 ** (-2 * found.bits_per_weight) < error(w_ON, found.q_ON) < 0.1175
    assert found.codes_entropy < found.bits_per_weight


def test_product_quantization_pads_what_the_group_does_not_divide():
    w_ON = gaussian(8, 10)
    found = baselines.product_quantization(w_ON, group=4, entries=64, rng=np.random.default_rng(0))
    assert found.q_ON.shape == w_ON.shape
    assert error(w_ON, found.q_ON) < 1e-4  # as many entries as vectors
