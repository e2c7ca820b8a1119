# SPDX-License-Identifier: Apache-2.0
"""PSNR and SSIM against scikit-image's values, and on cases with a known answer."""

import numpy as np
import pytest

from tests.eval import fixtures
from vqjax.eval import fidelity

LUMA = (0.299, 0.587, 0.114)


def _pairs(fixture: dict) -> list[tuple[np.ndarray, np.ndarray]]:
    """Every (a, b) pair of pictures in the order of the expected vectors."""
    pairs = []
    for key, array in fixture.items():
        if key.startswith("a_"):
            twin = fixture["b_" + key[2:]]
            stack = array.ndim == 4
            pairs += list(zip(array, twin)) if stack else [(array, twin)]
    return pairs


@pytest.mark.parametrize("path", fixtures.files("fidelity"))
def test_fixture(path):
    fixture = fixtures.load(path)
    pairs = _pairs(fixture)
    for name, function in (
        ("exp_mse_u8", fidelity.mean_squared_error),
        ("exp_psnr_u8", fidelity.psnr),
        ("exp_ssim_gauss", fidelity.ssim),
    ):
        found = np.array([function(a[None], b[None])[0] for a, b in pairs])
        np.testing.assert_allclose(found, fixture[name], rtol=1e-6, atol=1e-6, err_msg=name)
    found = [fidelity.psnr(a[None] / 255, b[None] / 255, peak=1.0)[0] for a, b in pairs]
    np.testing.assert_allclose(found, fixture["exp_psnr_float01"], rtol=1e-6)
    found = [fidelity.ssim(a[None] / 255, b[None] / 255, peak=1.0)[0] for a, b in pairs]
    np.testing.assert_allclose(found, fixture["exp_ssim_gauss_float01"], atol=1e-6)
    gray = [[(x / 255 @ LUMA)[None, ..., None] for x in pair] for pair in pairs]
    found = [fidelity.ssim(a, b, peak=1.0)[0] for a, b in gray]
    np.testing.assert_allclose(found, fixture["exp_ssim_gray_gauss"], atol=1e-6)


def test_identical_pictures_are_counted_apart():
    images = np.zeros((3, 12, 12, 3), np.uint8)
    other = images.copy()
    other[1] = 255
    mean, identical = fidelity.mean_psnr(fidelity.psnr(images, other))
    assert mean == pytest.approx(0.0)
    assert identical == 2
    assert fidelity.mean_psnr(fidelity.psnr(images, images)) == (float("inf"), 3)


def test_latent_error_is_relative_to_full_precision():
    latents = np.full((2, 4, 4, 3), 2.0, np.float32)
    assert fidelity.latent_mse(latents, latents + 1) == pytest.approx(0.25)


def test_messages():
    small = np.zeros((1, 8, 8, 3))
    with pytest.raises(ValueError, match="at least 11 pixels"):
        fidelity.ssim(small, small)
    with pytest.raises(ValueError, match="must have one shape"):
        fidelity.psnr(small, small[:, :4])
    with pytest.raises(ValueError, match="all zero"):
        fidelity.latent_mse(small, small)
