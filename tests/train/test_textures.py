# SPDX-License-Identifier: Apache-2.0
"""Training for the texture benchmark: its variants, and a handful of steps up to the scores."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vqjax
from tests.io import models as small
from vqjax.config import LatentDiffusionConfig
from vqjax.eval import judge
from vqjax.io import textures_data
from vqjax.pipeline import evaluate, sources
from vqjax.settings import EvaluateSettings
from vqjax.train import extractors, textures

NEEDS_PICTURES = pytest.mark.skipif(
    importlib.util.find_spec("skimage") is None, reason="scikit-image is not installed"
)


def test_turning_and_mirroring_only_move_pixels(monkeypatch):
    monkeypatch.setattr(extractors, "NOISE_OF_TEXTURES", 0.0)
    images = np.random.default_rng(0).normal(size=(40, 6, 6, 3)).astype(np.float32)
    found = np.asarray(extractors.turn(jnp.asarray(images), jax.random.key(0)))
    ways = set()
    for image, moved in zip(images, found):
        all_ways = [np.rot90(i, k) for i in (image, image[:, ::-1]) for k in range(4)]
        ways |= {number for number, way in enumerate(all_ways) if (way == moved).all()}
        assert any((way == moved).all() for way in all_ways)
    assert len(ways) == 8


def test_without_the_pictures(monkeypatch, capsys):
    textures_data.photographs.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert textures.main(["--unet-steps", "1"]) == 2
    assert "pip install 'vqjax[textures]'" in capsys.readouterr().err


@NEEDS_PICTURES
def test_variants_are_other_crops_of_the_same_classes():
    images, labels = textures.variants(3, per_class=4, seed=0)
    assert images.shape == (3, 36, 32, 32, 3)
    first, same = textures_data.crops("train", 4)
    np.testing.assert_allclose(images[0], first / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(labels, same)
    assert (images[1] != images[0]).any((1, 2, 3)).all()
    plain = textures_data.crops("train", 4, seed=1)[0] / 127.5 - 1
    kept = np.isclose(images[1], plain, atol=1e-6).all((1, 2, 3))
    turned = np.isclose(images[1], plain[:, :, ::-1], atol=1e-6).all((1, 2, 3))
    assert (kept | turned).all()
    assert kept.any()
    assert turned.any()


def forget() -> None:
    """Of data and of what the judge remembers of it: here it is smaller than elsewhere."""
    for cached in (textures_data.load, judge._reference_features, judge._real_halves):
        cached.cache_clear()


@pytest.mark.slow
@NEEDS_PICTURES
def test_from_a_handful_of_steps_to_scores(tmp_path, monkeypatch, request):
    config = dataclasses.replace(
        LatentDiffusionConfig.textures(), unet=small.TINY.unet, first_stage=small.STAGE
    )
    monkeypatch.setattr(LatentDiffusionConfig, "textures", lambda: config)
    monkeypatch.setattr(textures, "VARIANTS", 2)
    monkeypatch.setattr(textures_data, "PER_CLASS", 20)
    forget()
    request.addfinalizer(forget)
    file = tmp_path / "textures.safetensors"
    words = ["--out", str(file), "--work", str(tmp_path / "work")]
    assert textures.main([*words, "--autoencoder-steps", "4", "--unet-steps", "3"]) == 0
    model = vqjax.load(file)
    assert model.config == config
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(model.params))
    assert sources.open_source(str(file)).judge is not None
    found = evaluate.run(
        EvaluateSettings(source=str(file), count=18, steps=1, batch=18, out=tmp_path / "scores")
    )
    scores = found["models"]["source"]["textures"]
    assert (scores["n"], scores["reference_n"], scores["name"]) == (18, 360, "texture-FD")
    assert scores["fd"] > 0
    assert found["real_halves"]["fd"] < scores["fd"]  # a few steps are no training
    assert found["missing"] == []
    assert any("nine known photographs" in note for note in found["notes"])
    assert "texture-FD" in (tmp_path / "scores" / "evaluation.md").read_text()
