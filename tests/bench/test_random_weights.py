# SPDX-License-Identifier: Apache-2.0
"""Models of random weights: their trees are those of real ones, their numbers of usual size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.io import models as small
from vqjax import models
from vqjax.bench import random_weights
from vqjax.core import folding, tree
from vqjax.core.plan import LayerSpec
from vqjax.core.tensor import VQTensor


def test_a_dense_model_has_the_tree_of_a_real_one():
    model = random_weights.dense_model(small.CLASSES, seed=1)
    expected = folding.fold(small.CLASSES, models.param_shapes(small.CLASSES)).params
    for (path, found), (other, shape) in zip(
        sorted(tree.flatten(model.params).items()),
        sorted(tree.flatten(expected).items()),
        strict=True,
    ):
        assert (path, found.shape, found.dtype) == (other, shape.shape, shape.dtype)
    again = random_weights.dense_model(small.CLASSES, seed=1)
    small.assert_equal(model, again)
    x, t = jnp.ones((1, *small.CLASSES.latent_shape)), jnp.zeros(1, jnp.int32)
    context = models.embed_classes(small.CLASSES, model.params, t)
    noise = models.predict_noise(small.CLASSES, model.params, x, t, context)
    assert 0.1 < float(np.std(noise)) < 10


def test_shapes_are_those_of_the_model():
    model = random_weights.quantized_model(small.TINY, 4.0, seed=0)
    shapes = random_weights.quantized_shapes(small.TINY, 4.0)
    assert any(isinstance(leaf, VQTensor) for leaf in tree.flatten(model.params).values())
    found, expected = (
        [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(params)]
        for params in (model.params, shapes)
    )
    assert found == expected
    assert jax.tree.structure(model.params) == jax.tree.structure(shapes)


def test_a_random_kernel_has_the_size_of_an_untrained_one():
    spec = LayerSpec("conv3x3", "conv3x3", 9, 4, 16, 8)
    kernel = np.asarray(random_weights.random_tensor((3, 3, 32, 48), spec, (0, 1)).decode())
    assert kernel.shape == (3, 3, 32, 48)
    assert np.std(kernel) == pytest.approx((9 * 32) ** -0.5, rel=0.1)
