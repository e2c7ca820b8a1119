# SPDX-License-Identifier: Apache-2.0
"""Crops of photographs: halves that share no pixel, and what is said where there are none."""

import importlib.util
import types

import numpy as np
import pytest
from PIL import Image

from vqjax.errors import VqjaxError
from vqjax.io import textures_data as data

HERE = importlib.util.find_spec("skimage") is not None
NEEDS_PICTURES = pytest.mark.skipif(not HERE, reason="scikit-image is not installed")


@pytest.fixture(autouse=True)
def _nothing_is_remembered():
    for cached in (data.load, data.photographs):
        cached.cache_clear()
    yield
    for cached in (data.load, data.photographs):
        cached.cache_clear()


def covered(height: int, width: int, half: data.Half) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    for top, left in data._places(height, width, half):
        mask[top : top + data.IMAGE_SIZE, left : left + data.IMAGE_SIZE] = True
    return mask


def test_no_pixel_is_in_both_halves():
    train, held = (covered(300, 210, half) for half in ("train", "held"))
    assert not (train & held).any()
    assert (train | held)[:288, :192].all()  # what is left over is narrower than a crop
    assert train[:96, :96].all()
    assert held[:96, 96:192].all()


@pytest.fixture
def package(monkeypatch, tmp_path):
    """A package with pictures of our own in place of the photographs."""
    (tmp_path / "data").mkdir()
    rng = np.random.default_rng(0)
    made = []
    for number in range(3):
        pixels = rng.integers(0, 256, (200, 230, 3)[: 2 if number == 1 else 3], np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{number}.png")
        made.append(data.Photograph(f"{number}.png", "CC0", ""))
    monkeypatch.setattr(data, "PHOTOGRAPHS", tuple(made))
    monkeypatch.setattr(data, "CLASSES", 3)
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    return tmp_path


def test_crops_are_cut_where_they_are_said_to_be(package):
    images, labels = data.crops("held", 5)
    assert images.shape == (15, 32, 32, 3)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(labels[:6], [0, 1, 2, 0, 1, 2])
    assert (images[labels == 1] == images[labels == 1][..., :1]).all()  # a gray photograph
    for image, label in zip(images, labels):
        photograph = data.photographs()[label]
        found = [
            (top, left)
            for top, left in data._places(200, 230, "held")
            if (photograph[top, left] == image[0, 0]).all()
            and (photograph[top : top + 32, left : left + 32] == image).all()
        ]
        assert len(found) == 1


def test_places_follow_the_seed_alone(package):
    images, _ = data.crops("train", 6)
    np.testing.assert_array_equal(data.crops("train", 4)[0], images[:12])
    assert (data.crops("train", 6, seed=1)[0] != images).any()


def test_other_files_are_refused(package, monkeypatch):
    first = data.PHOTOGRAPHS[0]._replace(sha256="0123456789abcdef")
    monkeypatch.setattr(data, "PHOTOGRAPHS", (first, *data.PHOTOGRAPHS[1:]))
    with pytest.raises(VqjaxError, match=r"0\.png: sha256 \w{16}, expected 0123456789abcdef"):
        data.photographs()
    (package / "data" / "0.png").unlink()
    with pytest.raises(VqjaxError, match="not in this version of scikit-image"):
        data.photographs()


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(VqjaxError, match=r"not installed; pip install 'vqjax\[textures\]'"):
        data.load()


def test_every_licence_allows_what_is_done():
    for photograph in data.PHOTOGRAPHS:
        assert photograph.licence == "CC0" or photograph.licence.startswith("public domain")


@NEEDS_PICTURES
def test_the_photographs():
    found = data.load()
    for images, labels in (
        (found.train_images, found.train_labels),
        (found.held_images, found.held_labels),
    ):
        assert images.shape == (9 * data.PER_CLASS, 32, 32, 3)
        np.testing.assert_array_equal(np.bincount(labels), [data.PER_CLASS] * 9)
        assert not images.flags.writeable
    train = {image.tobytes() for image in found.train_images[found.train_labels == 4]}  # grass
    assert len(train) == data.PER_CLASS
    assert not any(image.tobytes() in train for image in found.held_images)
