# SPDX-License-Identifier: Apache-2.0
"""The digits: sizes, enlargement and the split."""

import numpy as np
import pytest

from vqjax.io import digits_data


@pytest.fixture(scope="module")
def data():
    return digits_data.load()


def test_shapes_types_and_counts(data):
    assert data.train_images.shape == (898, 32, 32, 3)
    assert data.held_images.shape == (899, 32, 32, 3)
    assert data.train_images.dtype == data.held_images.dtype == np.uint8
    assert data.train_labels.dtype == data.held_labels.dtype == np.int32
    assert data.train_images.max() == 255
    assert data.train_images.min() == 0
    assert not data.train_images.flags.writeable


def test_channels_are_equal(data):
    assert (data.train_images == data.train_images[..., :1]).all()


def test_every_class_is_halved(data):
    train = np.bincount(data.train_labels, minlength=10)
    held = np.bincount(data.held_labels, minlength=10)
    assert np.abs(train - held).max() <= 1
    assert (train + held).min() == 174


def test_no_picture_is_in_both_halves(data):
    train = {image.tobytes() for image in data.train_images}
    assert not any(image.tobytes() in train for image in data.held_images)


def test_split_ignores_row_order_and_follows_the_seed():
    images = np.arange(40, dtype=np.uint8).reshape(40, 1, 1)
    labels = np.arange(40) % 4
    mask = digits_data.split_half(images, labels, seed=0)
    order = np.random.default_rng(1).permutation(40)
    shuffled = digits_data.split_half(images[order], labels[order], seed=0)
    np.testing.assert_array_equal(shuffled, mask[order])
    assert (digits_data.split_half(images, labels, seed=1) != mask).any()


def test_enlarging_keeps_constants_and_interpolates_halfway():
    flat = digits_data.enlarge(np.full((1, 8, 8), 200.0))
    assert (flat == 200).all()
    ramp = digits_data.enlarge(np.tile(np.arange(8) * 32.0, (1, 8, 1)))[0, 0, :, 0]
    # Source positions 0 (clamped), 0 (clamped), 0.125, 0.375, 0.625, 0.875, 1.125.
    np.testing.assert_array_equal(ramp[:7], [0, 0, 4, 12, 20, 28, 36])
    assert ramp[-1] == 224
