# SPDX-License-Identifier: Apache-2.0
"""Layers with packed weights against the same layers with decoded ones."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import relative_rms
from tests.io import models as small
from vqjax.core.activations import InputRange
from vqjax.core.integer import integerize
from vqjax.core.scales import LogScales
from vqjax.errors import VqjaxError
from vqjax.kernels import dispatch
from vqjax.models import packed
from vqjax.models.layers import Conv, Dense, GroupNorm, layer_norm

# Packed weights are added up before the bias is rounded, decoded ones after.
TOL = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 1e-2}

LAYERS = {
    "dense": (Dense(100), (24, 100), (24,)),
    "tokens without bias": (Dense(100, use_bias=False), (24, 100), (5, 24)),
    "1x1": (Conv(100, window=1, padding=(0, 0)), (1, 1, 8, 100), (5, 6, 8)),
    "3x3": (Conv(100), (3, 3, 4, 100), (5, 6, 4)),
    "3x3 stride 2": (Conv(100, stride=2, padding=(0, 1)), (3, 3, 4, 100), (5, 6, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    ("path", "dtype", "ranges"),
    [
        ("xla", "float32", False),
        ("xla", "float32", True),
        ("xla", "float16", False),
        ("xla", "bfloat16", True),
        ("lut", "float32", True),
    ],
)
def test_packed_and_decoded_weights_agree(name, path, dtype, ranges):
    """Scales of input channels, bias and range of the input included."""
    layer, shape, x_shape = LAYERS[name]
    rng = np.random.default_rng(0)
    kernel = dataclasses.replace(
        small.integer_tensor(rng, shape),
        input_scales=LogScales.of(rng.uniform(0.5, 2, shape[-2])),
    )
    leaves: dict[str, Any] = {"bias": rng.standard_normal(100).astype(np.float32)}
    if ranges:
        read = {"step_B": jnp.array([0.02, 0.03]), "zero_B": jnp.array([100.0, 31.0])}
        leaves["input_range"] = InputRange(**read, bits=8)
    if name.startswith("tokens"):
        del leaves["bias"]
    x = rng.standard_normal((2, *x_shape)).astype(jnp.dtype(dtype))
    with dispatch.asking(path):  # what is traced there is no other program's
        found = jax.jit(layer.apply)({"params": leaves | {"kernel": kernel}}, x)
    expected = jax.jit(layer.apply)({"params": leaves | {"kernel": kernel.decode()}}, x)
    assert found.dtype == dtype
    assert relative_rms(found, expected) < TOL[dtype]


@pytest.mark.parametrize("name", LAYERS)
def test_the_choice_of_a_layer_is_known_before_it_runs(name):
    layer, shape, x_shape = LAYERS[name]
    kernel = small.integer_tensor(np.random.default_rng(0), shape)
    window = {}
    if isinstance(layer, Conv):
        window = {field: getattr(layer, field) for field in ("window", "stride", "padding")}
    x = jax.device_put(np.zeros((2, *x_shape), np.float32))
    for path in ("xla", "lut"):
        with dispatch.asking(path):
            assert packed.choice(x, kernel, **window).path == path


def test_an_input_of_another_size_is_refused():
    """37 and 40 features fill five vectors of 8 alike: codes cannot tell them apart."""
    rng = np.random.default_rng(0)
    kernel, x = small.integer_tensor(rng, (40, 16)), jnp.ones((2, 37))
    read = InputRange(step_B=jnp.array([0.02, 0.03]), zero_B=jnp.array([100.0, 31.0]), bits=8)
    integers = integerize({"kernel": kernel}, ["kernel"])["kernel"]
    scaled = dataclasses.replace(kernel, input_scales=LogScales.of(rng.uniform(0.5, 2, 40)))
    for run in (
        lambda: packed.product(x, kernel, None),
        lambda: packed.product(x, scaled, None),
        lambda: packed.integer_product(x, integers, read, None),
    ):
        with pytest.raises(VqjaxError, match=r"x \(2, 37\) has 37 .* \(40, 16\) takes 40"):
            run()
    window = small.integer_tensor(rng, (3, 3, 6, 16))
    with pytest.raises(VqjaxError, match=r"has 5 features, .* \(3, 3, 6, 16\) takes 6"):
        packed.convolution(jnp.ones((2, 4, 4, 5)), window, None, 1, (1, 1))


def test_norms_keep_the_dtype_of_their_input():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 3, 32)), jnp.bfloat16)
    for norm in (GroupNorm(1e-5, name="norm"), layer_norm("norm")):
        params = norm.init(jax.random.key(0), x)
        found: Any = norm.apply(params, x)
        exact = norm.apply(params, x.astype(jnp.float32))
        assert found.dtype == jnp.bfloat16
        assert relative_rms(found, exact) < 3e-3


def test_weights_are_decoded_inside_a_loop():
    """XLA takes out of loops what does not change in them, unless it is kept from it."""
    kernel = small.integer_tensor(np.random.default_rng(0), (64, 64))

    def run(x, kernel):
        step = lambda x, _: (packed.product(x, kernel, None), None)  # noqa: E731
        return jax.lax.scan(step, x, length=5)[0]

    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        text = jax.jit(run).lower(jnp.ones((2, 64)), kernel).compile().as_text()
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
    assert text is not None
    assert "gather" in text
    assert "gather" not in text[text.index("ENTRY") :]
