# SPDX-License-Identifier: Apache-2.0
"""Training of the evaluation networks: it learns, repeats, and fixes the scale of the features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqjax.io import digits_data
from vqjax.models import extractor
from vqjax.train import extractors


@pytest.fixture(scope="module")
def data():
    return digits_data.load()


def test_rescaling_moves_features_and_leaves_logits():
    params = extractor.init(jax.random.key(0))
    params["head/kernel"] = jax.random.normal(jax.random.key(1), params["head/kernel"].shape)
    images = jax.random.uniform(jax.random.key(2), (2, 32, 32, 3), minval=-1.0)
    apply = jax.jit(extractor.apply)
    before = apply(params, images)
    after = apply(extractor.rescale(params, pooled=3.0, spatial=0.25), images)
    np.testing.assert_allclose(after.pooled, 3 * before.pooled, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(after.spatial, 0.25 * before.spatial, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(after.logits, before.logits, rtol=1e-4, atol=1e-5)


def test_augmentation_changes_pictures_a_little(data):
    images = jnp.asarray(data.train_images[:4], jnp.float32) / 127.5 - 1
    found = extractors.augment(images, jax.random.key(0))
    assert found.shape == images.shape
    change = np.abs(np.asarray(found - images)).mean((1, 2, 3))
    assert (change > 0.05).all()
    assert (change < 0.8).all()
    again = extractors.augment(images, jax.random.key(0))
    np.testing.assert_array_equal(found, again)


def test_finished_weights_have_the_agreed_scale(data):
    images = jnp.asarray(data.train_images[:200], jnp.float32) / 127.5 - 1
    params = extractors._finish(extractor.init(jax.random.key(0)), images)
    assert {array.dtype for array in params.values()} == {np.dtype(np.float16)}
    full = {name: jnp.asarray(array, jnp.float32) for name, array in params.items()}
    for rows in jax.jit(extractor.apply)(full, images)[:2]:
        variance = np.asarray(rows).var(0, ddof=1).sum()
        assert variance == pytest.approx(extractors.TOTAL_VARIANCE, rel=0.02)


@pytest.mark.usefixtures("optimized")
@pytest.mark.slow
def test_training_learns_and_repeats_exactly(data):
    images, labels = data.train_images, data.train_labels
    params = extractors.train(images, labels, seed=0, steps=250, vary=extractors.augment)
    full = {name: jnp.asarray(array, jnp.float32) for name, array in params.items()}
    assert extractors.accuracy(full, data.held_images, data.held_labels) > 0.75
    first, second = (
        extractors.train(images, labels, seed=3, steps=4, vary=extractors.augment) for _ in range(2)
    )
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])
