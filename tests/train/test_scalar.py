# SPDX-License-Identifier: Apache-2.0
"""The scalar baseline of tuning: uniform grids with learned steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vqjax.core import scalar as core_scalar
from vqjax.train import scalar

KERNEL = np.random.default_rng(0).normal(size=(3, 3, 8, 6)).astype(np.float32)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_the_start_is_what_it_starts_from(bits):
    layer = core_scalar.scalar_baseline(jnp.asarray(KERNEL), None, bits)
    weight = scalar.ScalarWeight.of(layer.kernel, bits)
    np.testing.assert_allclose(weight.decode(), layer.kernel, atol=2e-6 * np.abs(KERNEL).max())
    levels = np.asarray(weight.levels_ON)
    assert levels.min() > -0.01
    assert levels.max() < 2**bits - 0.99


def test_a_constant_row_stays_constant():
    kernel = KERNEL.copy()
    kernel[..., 2], kernel[..., 3] = 0.5, 0.0
    weight = scalar.ScalarWeight.of(kernel.round(1), 8)
    np.testing.assert_allclose(weight.decode()[..., 2], 0.5, rtol=1e-6)
    np.testing.assert_array_equal(weight.decode()[..., 3], 0)


def test_gradients_are_those_of_learned_steps():
    weight = scalar.ScalarWeight(
        levels_ON=jnp.array([[-0.4, 0.3, 1.6, 3.7]]),  # clipped, two inside, clipped
        log2_steps_O=jnp.array([1.0]),
        offsets_O=jnp.array([-1.5]),
        shape=(4, 1),
        bits=2,
    )
    np.testing.assert_allclose(weight.decode()[:, 0], [-3, -3, 1, 3])
    found = jax.grad(lambda w: jnp.sum(w.decode() * jnp.array([[1.0], [10], [100], [1000]])))(
        weight
    )
    np.testing.assert_allclose(found.levels_ON, [[0, 20, 200, 0]])  # step 2, straight through
    np.testing.assert_allclose(found.offsets_O, [2 * 1111])
    steps = np.log(2) * (-3 - 30 + 100 + 3000)  # d decode / d log2 step = ln 2 * decode
    np.testing.assert_allclose(found.log2_steps_O, [steps], rtol=1e-6)


def test_training_lowers_the_error_that_rounding_left():
    layer = core_scalar.scalar_baseline(jnp.asarray(KERNEL), None, 2)
    params = {"kernel": scalar.ScalarWeight.of(layer.kernel, 2), "bias": jnp.ones(6)}
    optimizer = scalar.lsq(0.05, 0.01, 0.1)
    state = optimizer.init(params)
    x = np.random.default_rng(1).normal(size=(64, 72)).astype(np.float32)
    x[:, :9] *= 5  # errors of the first channel count most

    def loss_of(dense):
        change = (dense["kernel"] - KERNEL).transpose(2, 0, 1, 3).reshape(72, 6)
        return jnp.mean((x @ change + dense["bias"][None]) ** 2)

    @jax.jit
    def step(params, state):
        dense = {"kernel": params["kernel"].decode(), "bias": params["bias"]}
        loss, gradients = jax.value_and_grad(loss_of)(dense)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for _ in range(120):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert min(losses) < 0.6 * losses[0]
    values = np.unique(np.asarray(params["kernel"].decode())[..., 0])
    assert len(values) <= 4


def test_parameters_are_needed():
    with pytest.raises(ValueError, match="lsq needs the parameters"):
        scalar.lsq(0.1, 0.1, 0.1).update({}, ())
