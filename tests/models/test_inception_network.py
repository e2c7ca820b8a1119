# SPDX-License-Identifier: Apache-2.0
"""The FID network against the reference's activations, at every input size of the fixtures."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.eval import fixtures
from vqjax.io import inception as weights_io
from vqjax.io import inception_keys
from vqjax.models import inception

TOLERANCE = 1e-4  # absolute; the smallest of the known mistakes moves features by 4e-3
# Which of our activations a fixture's name speaks of: channel means, and strided values.
_MEANS = {"64": "pool1", "192": "pool2", "768": "Mixed_6e"}
_STRIDES = {"mixed_5d": (6, 9), "mixed_6e": (4, 12), "mixed_7b": (3, 32), "mixed_7c": (3, 32)}


@jax.jit
def _everything(params, resized_NHWC):
    seen = inception.activations(params, resized_NHWC)
    kept = {name: seen[name] for name in ("Mixed_5d", "Mixed_6e", "Mixed_7b", "Mixed_7c")}
    means = {number: jnp.mean(seen[name], (1, 2)) for number, name in _MEANS.items()}
    return kept, means, inception.features(params, resized_NHWC)


def _found(params: dict, images_NHWC: np.ndarray) -> dict[str, np.ndarray]:
    """Everything that a fixture may ask for, by its names."""
    resized = inception.resize(jnp.asarray(images_NHWC))
    kept, means, seen = _everything(params, resized)
    found = {"resized": resized[:, ::13, ::13], **means}
    for name, (step, channels) in _STRIDES.items():
        found[name] = kept[name.capitalize()][:, ::step, ::step, ::channels]
    found["2048"] = seen.pooled
    found["sfid_spatial"] = seen.spatial.reshape(-1, 17, 17, 7)
    found["logits_unbiased"] = seen.logits
    found["logits"] = seen.logits + params["fc/bias"][None]
    return {name: np.asarray(value) for name, value in found.items()}


@pytest.mark.parametrize("path", fixtures.files("inception"))
def test_fixture(path):
    fixture = fixtures.load(path)
    tensors = fixtures.state_dict(inception_keys.torch_entries(), int(fixture["seed"]))
    arrays = {e.path: e.to_param(tensors[e.key]) for e in inception_keys.torch_entries()}
    params = weights_io.fold(arrays, where=str(path))
    checked = 0
    for key, images in fixture.items():
        if not key.startswith("images_"):
            continue
        size = key.removeprefix("images_")
        found = _found(params, images)
        for name, expected in fixture.items():
            match = re.fullmatch(rf"(\w+)_{size}(?:_sub)?", name)
            if match and match[1] != "images":
                np.testing.assert_allclose(
                    found[match[1]], expected, rtol=0, atol=TOLERANCE, err_msg=name
                )
                checked += 1
    assert checked >= 8
