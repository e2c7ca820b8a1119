# SPDX-License-Identifier: Apache-2.0
"""Images depend on seed, number and class alone; guidance and mistakes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vqjax
from tests.io import models as small
from vqjax import models, sampling
from vqjax.errors import VqjaxError
from vqjax.io import native
from vqjax.sample import __main__ as command
from vqjax.sampling import png

MODEL = small.dense(small.CLASSES)
CLASSES = [0, 1, 2, 0, 1]


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return sampling.generate(MODEL, CLASSES, steps=2, seed=3, batch_size=5)


def test_images_do_not_depend_on_the_batch_size(images):
    split = sampling.generate(MODEL, CLASSES, steps=2, seed=3, batch_size=2)
    assert images.shape == (5, 32, 32, 3)
    assert images.dtype == np.uint8
    # Rounding inside a convolution may differ with the batch: at most one grey level.
    assert np.abs(images.astype(int) - split.astype(int)).max() <= 1


def test_no_call_computes_more_images_than_are_asked_for(monkeypatch):
    sizes, real = [], sampling.sample_batch

    def counted(config, params, ids_B, *others, **named):
        sizes.append(len(ids_B))
        return real(config, params, ids_B, *others, **named)

    monkeypatch.setattr(sampling, "sample_batch", counted)
    assert len(sampling.generate(MODEL, CLASSES[:2], steps=1)) == 2
    assert len(sampling.generate(MODEL, CLASSES[:3], steps=1, batch_size=2)) == 3
    assert sizes == [2, 2, 2]


def test_a_series_can_be_continued(images):
    rest = sampling.generate(MODEL, CLASSES[3:], steps=2, seed=3, first_index=3, batch_size=5)
    assert np.abs(images[3:].astype(int) - rest.astype(int)).max() <= 1


def test_seeds_numbers_and_eta_change_the_latent():
    latents = [
        sampling.generate_with_latents(MODEL, CLASSES, steps=2, seed=seed, eta=eta, batch_size=5)[1]
        for seed, eta in ((3, 0.0), (4, 0.0), (3, 1.0), (3, 1.0))
    ]
    plain, other, noisy, again = latents
    np.testing.assert_array_equal(noisy, again)
    size = np.abs(plain).mean()
    assert np.abs(other - plain).mean() > 0.1 * size
    assert np.abs(noisy - plain).mean() > 0.01 * size  # small beside what noise predictions add up
    assert np.abs(plain[0] - plain[3]).mean() > 0.1 * size  # two images of one class


def test_noise_is_standard_normal_and_different_at_every_step():
    index = jnp.arange(64, dtype=jnp.uint32)
    start = np.asarray(sampling.image_noise(0, index, (8, 8, 3)))
    later = np.asarray(sampling.image_noise(0, index, (8, 8, 3), step=1))
    assert start.std() == pytest.approx(1, abs=0.02)
    assert abs(np.corrcoef(start.ravel(), later.ravel())[0, 1]) < 0.05


def test_guidance_mixes_both_branches():
    x, t = jnp.ones((2, *MODEL.config.latent_shape)), jnp.array([5, 900])
    ids, none = jnp.array([1, 2]), jnp.array([3, 3])

    @jax.jit
    def guided(params, ids):
        return sampling.predictor(MODEL.config, params, ids, 2.5)(x, t)

    @jax.jit
    def branch(params, classes):
        context = models.embed_classes(MODEL.config, params, classes)
        return models.predict_noise(MODEL.config, params, x, t, context)

    conditional, unconditional = (branch(MODEL.params, some) for some in (ids, none))
    expected = unconditional + 2.5 * (conditional - unconditional)
    np.testing.assert_allclose(guided(MODEL.params, ids), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("asked", "expected"), [(None, 1.25), (1.0, 1.0), (2.5, 2.5)])
def test_guidance_is_the_models_own_unless_told(asked, expected, tmp_path, monkeypatch):
    """In the function and in the command, whose grid says which it was."""
    model, found = small.dense(dataclasses.replace(small.TINY, guidance=1.25)), []

    def compiled(config, params, ids_B, index_B, seed, *, run):
        found.append(run.guidance)
        return np.zeros((len(ids_B), 16, 16, 3), np.uint8), np.zeros((len(ids_B), 8, 8, 3))

    monkeypatch.setattr(sampling, "sample_batch", compiled)
    source, grid = tmp_path / "model.safetensors", tmp_path / "grid.png"
    native.save_model(source, model)
    options = {} if asked is None else {"guidance": asked}
    words = [] if asked is None else ["--guidance", f"{asked:g}"]
    vqjax.sample(model, [0], steps=1, **options)
    assert command.main([str(source), *words, "--count", "2", "--out", str(grid)]) == 0
    assert found == [expected, expected]
    assert png.read_metadata(grid)["guidance"] == expected


def test_rounding_is_half_up():
    levels = np.array([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0]).reshape(1, 1, 6, 1)
    values = np.asarray(sampling.to_uint8(jnp.asarray(levels))).ravel()
    assert values.tolist() == [0, 0, 128, 255, 255, 255]


@pytest.mark.parametrize(
    ("classes", "settings", "message"),
    [
        ([0, 9], {}, r"found \[9\], but small-classes has classes 0 to 2 \(3 is 'no class'\)"),
        ([0.5], {}, "expected a list of class ids"),
        ([], {}, "expected a list of class ids"),
        ([0], {"steps": 0}, "steps: found 0, expected 1 to 999"),
        ([0], {"steps": 1000}, "steps: found 1000"),
        ([0], {"steps": 2.0}, "steps: found 2.0, expected a whole number"),
        ([0], {"eta": -1}, "eta: found -1"),
        ([0], {"eta": 1.2}, r"eta: found 1.2, expected 0 \(deterministic\) to 1"),
        ([0], {"seed": -1}, "seed: found -1, expected a whole number from 0 to"),
        ([0], {"seed": 2**32}, "seed: found 4294967296"),
        ([0], {"seed": 1.5}, "seed: found 1.5"),
        ([0], {"guidance": float("nan")}, "guidance: found nan, expected a finite number"),
    ],
)
def test_mistakes_are_named(classes, settings, message):
    with pytest.raises(VqjaxError, match=message):
        vqjax.sample(MODEL, classes, **settings)


@pytest.mark.parametrize("first_index", [-1, 2**32 - 1])
def test_images_have_numbers_of_their_own(first_index):
    with pytest.raises(VqjaxError, match=r"first_index: .* expected 0 to 2\^32 - 1"):
        sampling.generate(MODEL, [0, 0], steps=2, first_index=first_index)


def test_a_call_has_images():
    with pytest.raises(VqjaxError, match="batch_size: found 0, expected 1 or more"):
        sampling.generate(MODEL, [0], batch_size=0)


def test_an_unconditional_model_counts_classes_only():
    model = small.dense(small.PLAIN)
    assert sampling.generate(model, [7, 7], steps=1, batch_size=2).shape == (2, 32, 32, 3)
