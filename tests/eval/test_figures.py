# SPDX-License-Identifier: Apache-2.0
"""Figures: right size and content, equal bytes for equal input."""

import io

import numpy as np
import pytest
from PIL import Image

from vqjax.eval import figures

LAYERS = [
    {"kind": kind, "shape": [3, 3, 8, 8], "bits_per_weight": bits, "rel_output_mse": error}
    for kind, bits, error in (("conv3x3", 1.9, 0.03), ("attention", 2.1, 0.0), ("new", 8.0, 1e-5))
]


def _pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def test_grid_shows_the_rows_of_each_class():
    labels = np.array([7, 3, 7, 3])
    images = np.zeros((4, 16, 16, 3), np.uint8)
    images[labels == 3] = (250, 0, 0)
    images[labels == 7] = (0, 0, 250)
    pixels = _pixels(figures.before_after({"a": images, "b": images}, labels, columns=1).light)
    red = np.argwhere((pixels[..., 0] > 240) & (pixels[..., 2] < 10) & (pixels[..., 3] == 255))
    blue = np.argwhere((pixels[..., 2] > 240) & (pixels[..., 0] < 10) & (pixels[..., 3] == 255))
    assert red[:, 0].max() < blue[:, 0].min()
    assert pixels[0, 0, 3] == 0


@pytest.mark.parametrize(
    "draw",
    [
        lambda: figures.layer_errors(LAYERS),
        lambda: figures.sizes(1_000_000, 80_000, LAYERS, 2.0),
    ],
)
def test_charts_differ_by_theme_and_repeat_exactly(draw):
    first, second = draw(), draw()
    assert first == second
    assert first.light != first.dark
    assert _pixels(first.light).shape == _pixels(first.dark).shape


def test_messages():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="panel 'a': 2 pictures, 3 labels"):
        figures.before_after({"a": images}, [0, 1, 2])
    with pytest.raises(ValueError, match="no layers"):
        figures.layer_errors([])
