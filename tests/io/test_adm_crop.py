# SPDX-License-Identifier: Apache-2.0
"""The crop of ImageNet references: which filter, which rounding, which middle."""

import numpy as np
import pytest
from PIL import Image

from vqjax.io import adm_crop

RNG = np.random.default_rng(0)


def test_large_pictures_are_halved_by_boxes():
    pixels = RNG.integers(0, 256, (64, 64, 3), np.uint8)
    found = adm_crop.center_crop(Image.fromarray(pixels), 16)
    once = pixels.reshape(32, 2, 32, 2, 3).mean((1, 3)).round()
    twice = once.reshape(16, 2, 16, 2, 3).mean((1, 3))
    assert np.abs(found - twice).max() <= 2  # both steps round halves up


def test_what_is_left_is_resized_bicubically():
    step = np.full((12, 12, 3), 64, np.uint8)
    step[:, 6:] = 192
    found = adm_crop.center_crop(Image.fromarray(step), 16)
    assert found.min() < 64  # boxes, Hamming windows and lines do not overshoot
    assert found.max() > 192
    assert found.min() > 64 - 0.1 * 128  # and Lanczos windows overshoot more
    np.testing.assert_array_equal(found[0], found[-1])


@pytest.mark.parametrize(("height", "width"), [(40, 101), (101, 40), (33, 32), (500, 375)])
def test_the_middle_of_any_size(height, width):
    rows, columns = np.mgrid[:height, :width]
    ramps = (rows + 0.5) * (255 / height), (columns + 0.5) * (255 / width)
    pixels = np.stack([*ramps, 0 * rows], -1)
    found = adm_crop.center_crop(Image.fromarray(pixels.astype(np.uint8)), 32)
    assert found.shape == (32, 32, 3)
    assert found.dtype == np.uint8
    # Both ramps reach 127 in the middle; a row or column that is left over may shift them.
    assert np.abs(found[..., :2].mean((0, 1)) - 127).max() < 6
    share = min(height, width) / np.array([height, width])
    spans = np.ptp(found[..., 0], axis=0).mean(), np.ptp(found[..., 1], axis=1).mean()
    np.testing.assert_allclose(spans, 255 * share, atol=14)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "1"])
def test_every_mode_becomes_rgb(mode):
    picture = Image.new("RGB", (8, 9), (255, 255, 255)).convert(mode)
    assert (adm_crop.center_crop(picture, 8) == 255).all()
