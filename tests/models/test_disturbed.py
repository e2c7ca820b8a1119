# SPDX-License-Identifier: Apache-2.0
"""Errors added at layer outputs are errors in the kernels, image by image and row by row."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.io import models as small
from vqjax import models
from vqjax.core import tree


def _setup(seed=0):
    model = small.dense(small.CLASSES)
    rng = np.random.default_rng(seed)
    x_BHWC = jnp.asarray(rng.standard_normal((2, *model.config.latent_shape)), jnp.float32)
    t_B = jnp.array([10, 500])
    context = models.embed_classes(model.config, model.params, jnp.array([0, 1]))
    kernels = {
        path: leaf
        for path, leaf in tree.flatten(model.params).items()
        if path.startswith("unet/") and path.endswith("/kernel")
    }
    errors = {
        path: jnp.asarray(0.1 * rng.standard_normal(leaf.shape), jnp.float32)
        for path, leaf in kernels.items()
    }
    amounts = {
        path: jnp.asarray(rng.uniform(-1, 1, (2, leaf.shape[-1])), jnp.float32)
        for path, leaf in kernels.items()
    }
    return model, x_BHWC, t_B, context, errors, amounts


def test_outputs_are_those_of_kernels_with_the_errors():
    model, x_BHWC, t_B, context, errors, amounts = _setup()
    found = jax.jit(models.predict_noise_disturbed, static_argnums=0)(
        model.config, model.params, x_BHWC, t_B, context, errors, amounts
    )
    predict = jax.jit(models.predict_noise, static_argnums=0)
    for b in range(2):
        flat = tree.flatten(model.params)
        for path, error in errors.items():
            flat[path] = np.asarray(flat[path]) + np.asarray(error) * np.asarray(amounts[path][b])
        one = slice(b, b + 1)
        assert context is not None
        expected = predict(model.config, tree.unflatten(flat), x_BHWC[one], t_B[one], context[one])
        np.testing.assert_allclose(found[one], expected, atol=1e-4 * float(jnp.abs(found).max()))


def test_a_bias_entry_shifts_the_output_of_the_error():
    model, x_BHWC, t_B, context, errors, amounts = _setup()
    path = "unet/out/conv/kernel"
    bias = {"unet/out/conv/bias": jnp.ones(errors[path].shape[-1])}
    disturbed = jax.jit(models.predict_noise_disturbed, static_argnums=0)
    plain, shifted = (
        disturbed(model.config, model.params, x_BHWC, t_B, context, found, {path: amounts[path]})
        for found in ({path: errors[path]}, {path: errors[path]} | bias)
    )
    expected = np.broadcast_to(np.asarray(amounts[path])[:, None, None], plain.shape)
    np.testing.assert_allclose(shifted - plain, expected, atol=1e-5)
