# SPDX-License-Identifier: Apache-2.0
"""Scores of digits with the shipped extractors: real digits do well, each kind of damage shows."""

import numpy as np
import pytest

from vqjax.errors import VqjaxError
from vqjax.eval import judge
from vqjax.eval.judges import DIGITS
from vqjax.io import digits_data

COUNT = 400


@pytest.fixture(scope="module")
def data():
    return digits_data.load()


@pytest.fixture(scope="module")
def real(data):
    return DIGITS.evaluate_images(data.held_images[:COUNT], data.held_labels[:COUNT])


def test_shipped_extractors_know_unseen_digits(data):
    extractors = DIGITS.extractors()
    assert len(extractors.params) == 3
    assert len(extractors.sha256) == 64
    for rows, stated in zip(DIGITS.features(data.held_images), extractors.accuracies):
        found = np.mean(np.argmax(rows.logits, -1) == data.held_labels)
        assert found >= 0.98
        assert found == pytest.approx(stated["held_accuracy"], abs=0.003)
        assert rows.pooled.shape == (len(data.held_images), 64)
        assert rows.spatial.shape == (len(data.held_images), 128)


def test_features_have_the_agreed_scale(data):
    for rows in DIGITS.features(data.train_images):
        assert rows.pooled.var(0).sum() == pytest.approx(335, rel=0.01)
        assert rows.spatial.var(0).sum() == pytest.approx(335, rel=0.01)


def test_scores_are_means_over_extractors(real):
    for score in judge.SCORES:
        assert real[score] == pytest.approx(np.mean([one[score] for one in real["extractors"]]))
    assert real["n"] == COUNT
    assert (real["feature_dimension"], real["spatial_dimension"]) == (64, 128)
    assert real["reference_n"] == 1797
    assert real["name"] == "digit-FD"


def test_noise_raises_the_distance_step_by_step(data, real):
    rng = np.random.default_rng(0)
    images = data.held_images[:COUNT]
    noise = rng.normal(size=images.shape)
    distances = [real["fd"]]
    for level in (20, 40):
        noisy = np.clip(images + level * noise, 0, 255).astype(np.uint8)
        distances.append(DIGITS.evaluate_images(noisy, data.held_labels[:COUNT])["fd"])
    assert distances[0] + 1 < distances[1] < distances[2]


def test_one_class_only_loses_inception_score_and_recall(data, real):
    images = data.held_images[data.held_labels == 3]
    found = DIGITS.evaluate_images(images, np.full(len(images), 3))
    assert found["accuracy"] > 0.95
    assert found["is"] < 1.5 < real["is"]
    assert found["recall"] < 0.3 < real["recall"]


def test_wrong_labels_show_as_accuracy(data):
    found = DIGITS.evaluate_images(data.held_images[:50], (data.held_labels[:50] + 1) % 10)
    assert found["accuracy"] < 0.1


def test_the_error_of_accuracy_is_that_of_a_bootstrap(data):
    labels = np.where(np.arange(100) % 4, data.held_labels[:100], (data.held_labels[:100] + 1) % 10)
    found = DIGITS.evaluate_images(data.held_images[:100], labels)
    assert found["accuracy"] == pytest.approx(0.75, abs=0.02)
    drawn = np.random.default_rng(0).binomial(100, found["accuracy"], 5000) / 100
    assert found["accuracy_se"] == pytest.approx(np.std(drawn), rel=0.05)


def test_batching_does_not_show(data, monkeypatch):
    images = data.held_images[:70]
    whole = DIGITS.features(images)[0]
    monkeypatch.setattr(judge, "_BATCH", 32)
    for one, other in zip(whole, DIGITS.features(images)[0]):
        np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-4)


def test_memorization_tells_copies_from_unseen_digits(data):
    unseen = DIGITS.memorization(data.held_images[:100])
    assert unseen["copies"] < 0.05
    copies = np.clip(data.train_images[:100].astype(int) + 3, 0, 255).astype(np.uint8)
    found = DIGITS.memorization(copies)
    assert found["closer_to_train"] == 1.0
    assert found["copies"] > 0.95
    assert 0.4 < found["held_out"]["closer_to_train"] < 0.6


def test_paired_difference_finds_what_sampling_noise_hides(data):
    images = data.held_images[:200]
    noise = np.random.default_rng(0).normal(size=images.shape)
    worse = np.clip(images + 40 * noise, 0, 255).astype(np.uint8)
    found = DIGITS.paired_difference(images, worse, draws=10)
    assert found["fd_difference"] > 2 * found["fd_difference_sd"] > 0
    low, high = found["fd_difference_interval"]
    assert 0 < low < high
    assert 2 < (high - low) / found["fd_difference_sd"] < 4  # 3.9 of many Gaussian draws
    same = DIGITS.paired_difference(images, images, draws=3)
    assert same["fd_difference_interval"] == [0, 0]
    assert same["fd_difference"] == same["fd_difference_sd"] == 0


def test_real_halves_score_as_a_perfect_model_would():
    found = DIGITS.real_halves(splits=2)
    assert found["n"] + found["reference_n"] == 1797
    assert 0 < found["fd"] < 8
    assert found["accuracy"] > 0.98
    assert {"fd_sd", "sfd_sd", "is_sd"} <= set(found)


def test_messages(data):
    with pytest.raises(VqjaxError, match=r"found float32 \[2, 32, 32, 3\]; round and clip"):
        DIGITS.features(np.zeros((2, 32, 32, 3), np.float32))
    with pytest.raises(VqjaxError, match="3 pictures and 3 labels"):
        DIGITS.evaluate_images(data.held_images[:3], data.held_labels[:3])
    with pytest.raises(VqjaxError, match="all, train or held, found 'test'"):
        DIGITS.evaluate_images(data.held_images[:9], data.held_labels[:9], reference="test")  # type: ignore[arg-type]
    with pytest.raises(VqjaxError, match="twins differ in shape"):
        DIGITS.paired_difference(data.held_images[:9], data.held_images[:8])
