# SPDX-License-Identifier: Apache-2.0
"""Folding removes weights and changes nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.io import models as small
from vqjax import models
from vqjax.config import LatentDiffusionConfig
from vqjax.core import folding, tree


def _forward(model, params, tokens: int):
    key = jax.random.key(0)
    x = jax.random.normal(key, (2, *model.config.latent_shape))
    context = jax.random.normal(key, (2, tokens, model.config.unet.context_dim))
    return models.predict_noise(model.config, params, x, jnp.array([7, 800]), context)


def test_the_output_is_unchanged():
    model = small.dense(small.CLASSES)
    folded = folding.fold(model.config, model.params)
    assert folded.weights > 0
    before, after = _forward(model, model.params, 1), _forward(model, folded.params, 1)
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-6 * float(jnp.abs(before).max()))


def test_exactly_queries_keys_and_their_norm_go():
    model = small.dense(small.CLASSES)
    folded = folding.fold(model.config, model.params)
    kept, all_paths = tree.flatten(folded.params), tree.flatten(model.params)
    assert set(all_paths) - set(kept) == set(folded.paths)
    names = {path.split("block_0/")[1] for path in folded.paths}
    assert names == {"attn2/to_q/kernel", "attn2/to_k/kernel", "norm2/scale", "norm2/bias"}
    assert folding.fold(model.config, folded.params).paths == ()


def test_several_context_tokens_are_refused_after_folding():
    model = small.dense(small.CLASSES)
    folded = folding.fold(model.config, model.params)
    with pytest.raises(ValueError, match="exact for one context token only; found 3"):
        _forward(model, folded.params, 3)


def test_a_model_without_context_has_nothing_to_fold():
    model = small.dense(small.PLAIN)
    assert folding.fold(model.config, model.params).paths == ()


def test_cin256_loses_3_percent():
    config = LatentDiffusionConfig.cin256_v2()
    folded = folding.fold(config, models.param_shapes(config))
    assert folded.weights == 13_353_600
