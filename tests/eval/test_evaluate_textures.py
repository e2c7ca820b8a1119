# SPDX-License-Identifier: Apache-2.0
"""Scores of textures: the shipped extractors know unseen crops, and see lost high frequencies."""

import dataclasses
import importlib.util

import numpy as np
import pytest
from PIL import Image

from vqjax.config import PRESETS
from vqjax.errors import VqjaxError
from vqjax.eval import judges
from vqjax.eval.judges import DIGITS, TEXTURES
from vqjax.io import textures_data

NEEDS_PICTURES = pytest.mark.skipif(
    importlib.util.find_spec("skimage") is None, reason="scikit-image is not installed"
)
COUNT = 900


def test_judges_are_found_by_the_name_of_a_model():
    assert judges.of_model(PRESETS["digits"]()) is DIGITS
    assert judges.of_model(PRESETS["textures"]()) is TEXTURES
    assert judges.of_model(PRESETS["cin256-v2"]()) is None
    named_like = dataclasses.replace(PRESETS["cin256-v2"](), name="textures")
    assert judges.of_model(named_like) is None
    for kind in judges.JUDGES:
        assert PRESETS[kind]().name == kind


def test_extractors_have_as_many_classes_as_the_model():
    params = TEXTURES.extractors().params
    assert len(params) == 3
    for one in params:
        assert one["head/kernel"].shape == (64, textures_data.CLASSES)
    assert PRESETS["textures"]().null_class == textures_data.CLASSES


def test_what_is_not_here_is_said_before_any_work(monkeypatch):
    def absent():
        raise VqjaxError("no pictures")

    judge = judges.Judge("moss", "moss-FD", "moss_eval.safetensors", absent, "nothing")
    with pytest.raises(VqjaxError, match="no pictures"):
        judge.check()
    with pytest.raises(VqjaxError, match=r"no vqjax/assets/moss_eval\.safetensors"):
        judge.extractors()


@NEEDS_PICTURES
def test_unseen_crops_are_known():
    data = textures_data.load()
    for rows, stated in zip(TEXTURES.features(data.held_images), TEXTURES.extractors().accuracies):
        found = np.mean(np.argmax(rows.logits, -1) == data.held_labels)
        assert found == pytest.approx(stated["held_accuracy"], abs=0.003)
        assert found > 0.75


@NEEDS_PICTURES
def test_lost_high_frequencies_show():
    """A quarter, then half of the resolution is gone."""
    data = textures_data.load()
    images, labels = data.held_images[:COUNT], data.held_labels[:COUNT]

    def blurred(side: int) -> np.ndarray:
        small = [Image.fromarray(i).resize((side, side), Image.Resampling.BOX) for i in images]
        return np.stack([np.asarray(i.resize((32, 32), Image.Resampling.BICUBIC)) for i in small])

    distances = [
        TEXTURES.evaluate_images(crops, labels, reference="held")["fd"]
        for crops in (images, blurred(24), blurred(16))
    ]
    assert distances[0] < distances[1] < distances[2]
    assert 4 * distances[0] < distances[2]
