# SPDX-License-Identifier: Apache-2.0
"""LPIPS against the reference with recipe weights, and its loader."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from tests.conftest import golden_files
from tests.eval import fixtures
from tests.io.torch_writer import save_zip
from vqjax.core import cores
from vqjax.errors import VqjaxError
from vqjax.eval import perceptual
from vqjax.io import lpips as weights_io
from vqjax.models import lpips

_LEVELS = {"exp_relu3_3_sub": (2, 4, 16), "exp_relu5_3_sub": (4, 1, 32)}  # which, strides
_activations = jax.jit(lpips.activations)


def _stacks(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of `count` pictures of any fixture: the LPIPS file does not hold its inputs."""
    found = []
    for path in golden_files(fixtures.FOLDER, "*.npz"):
        file = fixtures.load(path)
        for name, a in file.items():
            twin = file.get("b_" + name[2:])
            if name.startswith("a_") and twin is not None and a.ndim == 4 and len(a) == count:
                found.append((a, twin))
    return found


def _params(tensors: dict[str, np.ndarray], tmp_path) -> dict:
    """As a user has them: torchvision's file, whose last layers play no part, and the authors'."""
    save_zip(
        tmp_path / "vgg16.pth",
        {k: v for k, v in tensors.items() if k.startswith("features")}
        | {"classifier.0.weight": np.zeros((2, 2), np.float32)},
    )
    channel_weights = {k: v for k, v in tensors.items() if k.startswith("lin")}
    safetensors_numpy.save_file(channel_weights, tmp_path / "lpips.safetensors")
    return weights_io.load(tmp_path / "vgg16.pth", tmp_path / "lpips.safetensors")


@pytest.mark.parametrize("path", fixtures.files("lpips"))
def test_fixture(path, tmp_path):
    fixture = fixtures.load(path)
    tensors = fixtures.state_dict(weights_io.entries(), int(fixture["seed"]))
    params = _params(tensors, tmp_path)
    expected = fixture["exp_lpips"]
    misfits = []
    for a, b in _stacks(len(expected)):
        found = perceptual.lpips(cores.placed(params), a, b)
        misfits.append(np.max(np.abs(found - expected) / (1e-5 * np.abs(expected) + 1e-7)))
        if misfits[-1] > 1:
            continue  # pictures of another fixture
        seen = [np.asarray(level) for level in _activations(params, jnp.asarray(a))]
        for name, (level, step, channels) in _LEVELS.items():
            strided = seen[level][:, ::step, ::step, ::channels]
            np.testing.assert_allclose(strided, fixture[name], rtol=1e-4, atol=1e-5)
        assert found[expected == 0].tolist() == [0] * int((expected == 0).sum())
        return
    if not misfits:
        pytest.skip(f"no {len(expected)} pairs of pictures beside {path.name}")
    raise AssertionError(f"no pairs give these values; nearest: {min(misfits)} times the limit")


def test_misfits_of_weights(tmp_path):
    tensors = {entry.key: np.zeros(entry.shape, np.float32) for entry in weights_io.entries()}
    del tensors["lin2.model.1.weight"]
    tensors["features.0.bias"] = np.zeros(3, np.float32)
    safetensors_numpy.save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(VqjaxError, match=r"not the weights of LPIPS 0\.1") as caught:
        weights_io.load(tmp_path / "a.safetensors")
    assert "lin2.model.1.weight: missing" in str(caught.value)
    assert "features.0.bias: shape (3,), expected (64,)" in str(caught.value)
    with pytest.raises(VqjaxError, match=r"both hold features\.0\.bias"):
        weights_io.load(tmp_path / "a.safetensors", tmp_path / "a.safetensors")


def test_pictures_that_do_not_compare():
    pictures = np.zeros((2, 16, 16, 3), np.uint8)
    for other, message in (
        (pictures[:1], "twins must have one shape"),
        (pictures.astype(np.float32), "needs uint8 pictures"),
    ):
        with pytest.raises(VqjaxError, match=message):
            perceptual.lpips({}, pictures, other)
    with pytest.raises(VqjaxError, match="at least 16 pixels"):
        perceptual.lpips({}, pictures[:, :8], pictures[:, :8])
