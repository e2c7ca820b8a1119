# SPDX-License-Identifier: Apache-2.0
"""Noise schedule and whole DDIM trajectories against the original."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import recipe
from tests.conftest import relative_rms
from vqjax import models
from vqjax.core import tree
from vqjax.core.noise import alphas_cumprod, betas
from vqjax.io import keys
from vqjax.sampling import sample_latents
from vqjax.sampling.schedule import ddim_schedule

CONFIG = recipe.whole_config()
predict = jax.jit(models.predict_noise, static_argnums=0)


@pytest.mark.parametrize("path", recipe.fixtures("schedule"))
def test_noise_schedule(path):
    data = recipe.Fixture(path)
    np.testing.assert_allclose(betas(CONFIG), data["betas_f64"], rtol=1e-14)
    np.testing.assert_allclose(alphas_cumprod(CONFIG), data["alphas_cumprod_f64"], rtol=1e-13)
    np.testing.assert_array_equal(betas(CONFIG).astype(np.float32), data["betas"])
    stored = alphas_cumprod(CONFIG).astype(np.float32)
    np.testing.assert_array_equal(stored, data["alphas_cumprod"])


@pytest.mark.parametrize("path", recipe.fixtures("schedule"))
def test_ddim_coefficients(path):
    data = recipe.Fixture(path)
    found = [re.fullmatch(r"ddim_sigmas_S(\d+)_eta(.+)", name) for name in sorted(data.names)]
    assert any(found)
    for match in filter(None, found):
        steps, eta = match.groups()
        ours = ddim_schedule(CONFIG, int(steps), float(eta))
        np.testing.assert_array_equal(ours.timesteps, data[f"ddim_timesteps_S{steps}"])
        np.testing.assert_array_equal(ours.alphas, data[f"ddim_alphas_S{steps}"])
        np.testing.assert_array_equal(ours.alphas_prev, data[f"ddim_alphas_prev_S{steps}"])
        np.testing.assert_allclose(ours.sigmas, data[match.group()], rtol=1e-6)


@functools.cache
def load(path):
    """The fixture, its model's config and its weights."""
    data = recipe.Fixture(path)
    unet = recipe.unet_config(data.text("unet_config_json"))
    stage = recipe.autoencoder_config(data.text("vq_config_json"))
    n_classes = int(data["n_classes"])
    config = recipe.whole_config(unet=unet, first_stage=stage, n_classes=n_classes)
    assert int(data["uncond_id"]) == config.null_class
    return data, config, recipe.params(keys.table(config), int(data["seed"]))


def runs() -> list:
    """(file, run) for every trajectory of every file."""
    pairs = []
    for param in recipe.fixtures("trajectories"):
        (path,) = param.values
        if path is None:
            return [pytest.param(None, None, marks=param.marks)]
        names = (name for name in recipe.Fixture(path).names if name.endswith("/final"))
        found = sorted(name.removesuffix("/final") for name in names)
        pairs += [pytest.param(path, run, id=f"{param.id}-{run}") for run in found]
    return pairs


@pytest.mark.parametrize(("path", "run"), runs())
def test_trajectory(path, run):
    data, config, params = load(path)
    steps, eta, scale = int(data[f"{run}/S"]), float(data[f"{run}/eta"]), data[f"{run}/scale"]
    schedule = ddim_schedule(config, steps, eta)
    np.testing.assert_array_equal(schedule.timesteps[::-1], data[f"{run}/t_order"])
    np.testing.assert_array_equal(schedule.alphas, data[f"{run}/ddim_alphas"])
    np.testing.assert_allclose(schedule.sigmas, data[f"{run}/ddim_sigmas"], rtol=1e-6)

    noise = None
    if eta:
        noises_SBHWC = recipe.nhwc(data[f"noise_S{steps}"])
        noise = noises_SBHWC.__getitem__
    x_BHWC, ids_B = recipe.nhwc(data["x_T"]), jnp.asarray(data["class_ids"], jnp.int32)
    sample = functools.partial(sample_latents, config, schedule=schedule, noise=noise)
    final, visited = jax.jit(
        lambda params, x: sample(params, ids_B=ids_B, x_BHWC=x, guidance=float(scale))
    )(params, x_BHWC)

    after = np.concatenate([np.asarray(visited.x_SBHWC)[1:], np.asarray(final)[None]])
    for i, (ours, theirs) in enumerate(zip(recipe.nchw(after), data[f"{run}/x_after_step"])):
        assert relative_rms(ours, theirs) <= recipe.LIMIT, f"after step {i}"
    pred_x0 = recipe.nchw(visited.pred_x0_SBHWC)
    for i, (ours, theirs) in enumerate(zip(pred_x0, data[f"{run}/pred_x0"])):
        assert relative_rms(ours, theirs) <= recipe.LIMIT, f"estimate at step {i}"
    assert relative_rms(recipe.nchw(final), data[f"{run}/final"]) <= recipe.LIMIT
    if f"{run}/decoded" in data:
        decoded = jax.jit(functools.partial(models.decode, config))(params, final)
        assert relative_rms(recipe.nchw(decoded), data[f"{run}/decoded"]) <= recipe.LIMIT


@pytest.mark.parametrize(("path", "run"), runs())
def test_first_noise_predictions(path, run):
    data, config, params = load(path)
    x_BHWC = recipe.nhwc(data["x_T"])
    t_B = jnp.full((len(x_BHWC),), int(data[f"{run}/t_order"][0]), jnp.int32)
    null = np.full_like(data["class_ids"], config.null_class)
    for branch, ids in (("cond", data["class_ids"]), ("uncond", null)):
        context = models.embed_classes(config, params, jnp.asarray(ids))
        np.testing.assert_array_equal(context, data[f"context_{branch}"])
        if f"{run}/first_eps_{branch}" in data:
            eps = predict(config, params, x_BHWC, t_B, context)
            assert relative_rms(recipe.nchw(eps), data[f"{run}/first_eps_{branch}"]) <= (
                recipe.LIMIT
            )


@pytest.mark.parametrize("path", recipe.fixtures("trajectories"))
def test_weights_have_the_keys_of_the_fixture(path):
    data, config, params = load(path)
    shapes = {entry.key: list(entry.shape) for entry in keys.table(config)}
    assert shapes == data.text("keys_json")
    assert {entry.path for entry in keys.table(config)} == set(tree.flatten(params))
