# SPDX-License-Identifier: Apache-2.0
"""The pieces of the digits training, and what the shipped model promises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vqjax
from tests.io import models as small
from vqjax import models
from vqjax.config import LatentDiffusionConfig
from vqjax.eval.judges import DIGITS
from vqjax.io import digits_data
from vqjax.train import digits, latent_diffusion


def test_augmentation_keeps_the_images_and_adds_small_changes():
    images = digits_data.load().train_images[:4]
    variants = digits.augment(images, np.random.default_rng(0))
    assert variants.shape == (digits.VARIANTS, *images.shape)
    np.testing.assert_allclose(variants[0], images / 127.5 - 1, atol=1e-6)
    change = np.abs(variants[1:] - variants[:1]).mean()
    assert 0.01 < change < 0.3
    assert np.abs(variants).max() <= 1 + 1e-6


def test_trainings_of_other_results_have_other_checkpoints(tmp_path, monkeypatch):
    folders, config = [], small.TINY
    first_stage, rest = small.dense(config).params["first_stage"], {"unet": {}, "cond_stage": {}}

    def train_autoencoder(config, images, args):
        folders.append(args.work)
        return first_stage

    monkeypatch.setattr(latent_diffusion, "train_autoencoder", train_autoencoder)
    monkeypatch.setattr(latent_diffusion, "train_unet", lambda *arguments: rest)
    images, labels = np.random.default_rng(0).normal(size=(1, 2, 16, 16, 3)), np.arange(2)
    wanted = digits.Args(out=tmp_path / "model.safetensors", work=tmp_path / "work")
    others = ({}, {"seed": 1}, {"unet_steps": 3}, {"autoencoder_steps": 4})
    for number, changes in enumerate((*others, {})):
        data = images.astype(np.float32) + (number == len(others))
        latent_diffusion.fit(config, data, labels, dataclasses.replace(wanted, **changes), "test")
    latent_diffusion.fit(config, images.astype(np.float32), labels, wanted, "test")
    assert len(set(folders)) == 5
    assert folders[-1] == folders[0]
    assert {folder.parent for folder in folders} == {tmp_path / "work"}


def test_rescaling_the_latents_changes_no_image():
    config = LatentDiffusionConfig.digits()
    init = jax.jit(lambda key: models.init_params(config, key)["first_stage"])
    first_stage = init(jax.random.key(0))
    images = jax.random.uniform(jax.random.key(1), (2, 32, 32, 3), minval=-1)

    @jax.jit
    def through(params):
        z = models.encode(config, {"first_stage": params}, images)
        return z, models.decode(config, {"first_stage": params}, z)

    z, before = through(first_stage)
    z_scaled, after = through(latent_diffusion.rescaled(first_stage, 4.0))
    np.testing.assert_allclose(z_scaled, 4 * z, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-4)


def test_the_shipped_model_reconstructs_digits_it_never_saw():
    model, held = vqjax.load("digits"), digits_data.load().held_images[:64]
    x = jnp.asarray(held, jnp.float32) / 127.5 - 1

    @jax.jit
    def decoded(params, x):
        return models.decode(model.config, params, models.encode(model.config, params, x))

    assert np.sqrt(np.mean((decoded(model.params, x) - x) ** 2)) < 0.1


@pytest.mark.usefixtures("optimized")
@pytest.mark.slow
def test_the_shipped_model_draws_the_class_it_is_asked_for():
    labels = np.arange(200) % 10
    found = DIGITS.evaluate_images(vqjax.sample("digits", labels, guidance=1.5), labels)
    assert found["accuracy"] >= 0.95
    assert found["fd"] < 20  # at N = 200; about 4 at N = 10,000
