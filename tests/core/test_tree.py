# SPDX-License-Identifier: Apache-2.0
"""Paths to leaves and back."""

import jax.numpy as jnp
import pytest

from vqjax.core import tree
from vqjax.core.tensor import VQTensor
from vqjax.errors import VqjaxError


def test_round_trip_keeps_leaves_and_sorts_paths():
    tensor = VQTensor.pack(
        jnp.zeros((2, 1, 1), int),
        jnp.zeros((1, 2, 8)),
        jnp.ones(2),
        shape=(8, 2),
        grouping="linear",
    )
    nested = {"unet": {"out": {"kernel": tensor, "bias": 1}, "a_2": {"kernel": 2}}, "b": 3}
    flat = tree.flatten(nested)
    assert list(flat) == ["b", "unet/a_2/kernel", "unet/out/bias", "unet/out/kernel"]
    assert flat["unet/out/kernel"] is tensor
    assert tree.unflatten(flat) == nested


def test_bad_names_and_overlapping_paths_are_refused():
    with pytest.raises(VqjaxError, match="parameter name 'a/b' below 'unet/'"):
        tree.flatten({"unet": {"a/b": 1}})
    with pytest.raises(VqjaxError, match="'a' is a leaf, yet 'a/b' lies below it"):
        tree.unflatten({"a": 1, "a/b": 2})
