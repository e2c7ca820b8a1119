# SPDX-License-Identifier: Apache-2.0
"""The models' parameters: how many, under which paths, and what may stand in their place."""

import collections
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.io import models as small
from vqjax import models
from vqjax.config import PRESETS, AutoencoderConfig, LatentDiffusionConfig, UNetConfig
from vqjax.core import tree
from vqjax.io import keys
from vqjax.models.layers import Conv, Dense, pointwise
from vqjax.models.unet import Middle

DEEP = dataclasses.replace(
    small.CLASSES, unet=dataclasses.replace(small.CLASSES.unet, transformer_depth=2, num_heads=4)
)


@functools.cache
def shapes(config: LatentDiffusionConfig) -> dict[str, tuple[int, ...]]:
    flat = tree.flatten(models.param_shapes(dataclasses.replace(config, name="any")))
    return {path: leaf.shape for path, leaf in flat.items()}


def test_cin256_parameter_counts():
    found = collections.Counter()
    for path, shape in shapes(LatentDiffusionConfig.cin256_v2()).items():
        found[path.split("/")[0]] += math.prod(shape)
    assert found == {"unet": 400_920_579, "first_stage": 55_322_782, "cond_stage": 512_512}


@pytest.mark.parametrize(
    "config",
    [*(make() for make in PRESETS.values()), small.PLAIN, small.UPDOWN, DEEP],
    ids=lambda config: config.name,
)
def test_key_table_is_the_tree_of_the_model(config):
    assert {entry.path: entry.param_shape for entry in keys.table(config)} == shapes(config)


def inputs(config: LatentDiffusionConfig, tokens: int = 1):
    """Latent, timesteps and context for two images of a small model."""
    rng = np.random.default_rng(0)
    x_BHWC = jnp.asarray(rng.standard_normal((2, 8, 8, config.unet.in_channels)), jnp.float32)
    width = config.unet.context_dim
    shape = (2, tokens, width or 0)
    context = None if width is None else jnp.asarray(rng.standard_normal(shape), jnp.float32)
    return x_BHWC, jnp.asarray([901, 3], jnp.int32), context


predict = jax.jit(models.predict_noise, static_argnums=0)


def shapes_of_noise(config: LatentDiffusionConfig, params, *args) -> jax.ShapeDtypeStruct:
    """Traces the U-Net without compiling it: what the errors below need, in a tenth of the time."""
    return jax.eval_shape(functools.partial(models.predict_noise, config), params, *args)


@pytest.mark.parametrize(
    ("layer", "shape", "kind"),
    [
        (Conv(6), (3, 3, 5, 6), "conv3x3"),
        (Conv(6, stride=2), (3, 3, 5, 6), "conv3x3"),
        (pointwise(6, "layer"), (1, 1, 5, 6), "linear"),
        (Dense(6), (5, 6), "linear"),
        (Dense(6, use_bias=False), (5, 6), "scalar"),
    ],
)
def test_layers_take_a_packed_kernel_under_jit(layer, shape, kind):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 4, 4, 5)), jnp.float32)
    kernel = small.random_tensor(rng, shape, kind, 256 if kind == "scalar" else 16)
    params: dict[str, Any] = {"kernel": kernel}
    if getattr(layer, "use_bias", True):
        params["bias"] = jnp.asarray(rng.standard_normal(6), jnp.float32)
    found = jax.jit(layer.apply)({"params": params}, x)
    expected = jax.jit(layer.apply)({"params": params | {"kernel": kernel.decode()}}, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [lambda shape: jnp.zeros(shape), None], ids=["dense", "packed"])
def test_kernel_of_another_shape_is_named(make):
    config = small.CLASSES
    flat = tree.flatten(small.dense(config).params)
    wrong = (3, 3, 32, 5)
    if make is None:
        rng = np.random.default_rng(0)
        flat["unet/out/conv/kernel"] = small.random_tensor(rng, wrong, "conv3x3", 16)
    else:
        flat["unet/out/conv/kernel"] = make(wrong)
    message = r"out/conv/kernel: stored shape \(3, 3, 32, 5\), the model needs \(3, 3, 32, 3\)"
    with pytest.raises(ValueError, match=message):
        shapes_of_noise(config, tree.unflatten(flat), *inputs(config))


def without_dead_weights(config: LatentDiffusionConfig, params):
    """Leaves out what one context token cannot reach: queries, keys and norm of attn2."""
    dead = ("attn2/to_q/kernel", "attn2/to_k/kernel", "norm2/scale", "norm2/bias")
    flat = tree.flatten(params)
    kept = {
        path: leaf
        for path, leaf in flat.items()
        if not (path.startswith("unet/") and "/block_" in path and path.endswith(dead))
    }
    assert len(flat) - len(kept) == 4 * sum(path.endswith("attn2/to_q/kernel") for path in flat)
    return tree.unflatten(kept)


def test_folded_cross_attention_leaves_the_output_unchanged():
    config = small.CLASSES
    params = small.dense(config).params
    full = predict(config, params, *inputs(config))
    folded = predict(config, without_dead_weights(config, params), *inputs(config))
    np.testing.assert_allclose(folded, full, rtol=0, atol=2e-6 * float(full.std()))


def test_folded_cross_attention_refuses_two_tokens():
    config = small.CLASSES
    params = without_dead_weights(config, small.dense(config).params)
    with pytest.raises(ValueError, match=r"attn2: to_q and to_k were folded.* found 2"):
        shapes_of_noise(config, params, *inputs(config, tokens=2))


def test_context_must_fit_the_model():
    x_BHWC, t_B, context = inputs(small.CLASSES)
    with pytest.raises(ValueError, match="context_dim is 8, context given: False"):
        shapes_of_noise(small.CLASSES, small.dense(small.CLASSES).params, x_BHWC, t_B, None)
    with pytest.raises(ValueError, match="context_dim is None, context given: True"):
        shapes_of_noise(small.PLAIN, small.dense(small.PLAIN).params, x_BHWC, t_B, context)


FORMS = [small.CLASSES, small.PLAIN, small.UPDOWN, DEEP]


@pytest.mark.parametrize("config", FORMS, ids=["classes", "plain", "updown", "deep"])
def test_inputs_of_every_layer_are_captured_once(config):
    params = small.dense(config).params
    kernels = {
        path: leaf.shape
        for path, leaf in tree.flatten(params).items()
        if path.startswith("unet/") and path.endswith("/kernel")
    }
    seen: list[str] = []

    def columns(path, x, window):
        seen.append(path)
        # As many columns as the matrix view of the kernel; a Dense has no window.
        return jnp.zeros(window.get("window", 1) ** 2 * x.shape[-1])

    eps, captured = jax.eval_shape(
        lambda params, x, t, context: models.capture_inputs(config, params, x, t, context, columns),
        params,
        *inputs(config),
    )
    assert eps.shape == (2, 8, 8, config.unet.out_channels)
    assert sorted(seen) == sorted(kernels)
    assert {path: leaf.shape for path, leaf in captured.items()} == {
        path: (math.prod(shape[:-1]),) for path, shape in kernels.items()
    }


def test_capturing_leaves_the_prediction_unchanged():
    config = small.CLASSES
    params = small.dense(config).params

    def mean_of_input(path, x, window):
        return jnp.mean(x) if path == "unet/input_blocks_0/conv/kernel" else None

    eps, captured = jax.jit(
        lambda params, x, t, context: models.capture_inputs(
            config, params, x, t, context, mean_of_input
        )
    )(params, *inputs(config))
    expected = predict(config, params, *inputs(config))
    np.testing.assert_allclose(eps, expected, rtol=0, atol=1e-5 * float(expected.std()))
    (mean,) = captured.values()
    np.testing.assert_allclose(mean, inputs(config)[0].mean(), rtol=1e-5)


def test_capture_may_skip_layers():
    config = small.CLASSES

    def only_convolutions(path, x, window):
        return jnp.mean(x) if window.get("stride") == 2 else None

    _, captured = jax.eval_shape(
        lambda params, x, t, context: models.capture_inputs(
            config, params, x, t, context, only_convolutions
        ),
        small.dense(config).params,
        *inputs(config),
    )
    assert list(captured) == ["unet/input_blocks_2/downsample/kernel"]


def test_unconditional_model_has_no_context():
    assert models.embed_classes(small.PLAIN, {}, jnp.zeros(3, jnp.int32)) is None


def test_latents_are_scaled_between_the_stages():
    stage = AutoencoderConfig(
        kind="kl", resolution=8, ch=32, ch_mult=(1,), num_res_blocks=1, n_embed=0
    )
    config = LatentDiffusionConfig(
        name="scaled", unet=small.PLAIN.unet, first_stage=stage, scale_factor=0.5
    )
    unscaled = dataclasses.replace(config, scale_factor=1.0)
    params = small.dense(config).params
    image = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 3)), jnp.float32)
    encode, decode = (jax.jit(f, static_argnums=0) for f in (models.encode, models.decode))
    z = encode(config, params, image)
    np.testing.assert_allclose(z, 0.5 * encode(unscaled, params, image), rtol=1e-5)
    expected = decode(unscaled, params, 2 * z)
    np.testing.assert_allclose(decode(config, params, z), expected, rtol=1e-4)


def test_channels_of_a_head_and_number_of_heads_agree():
    x_BHWC = jax.random.normal(jax.random.key(0), (1, 4, 4, 64))
    emb_BT = jax.random.normal(jax.random.key(1), (1, 32))

    def middle(params=None, **heads):
        module = Middle(UNetConfig(**heads), 64)
        if params is None:
            return jax.jit(module.init)(jax.random.key(2), x_BHWC, emb_BT, None)
        return jax.jit(module.apply)(params, x_BHWC, emb_BT, None)

    params = middle(num_heads=1)
    by_width = middle(params, num_head_channels=16)
    np.testing.assert_array_equal(by_width, middle(params, num_heads=4))
    assert np.abs(by_width - middle(params, num_heads=1)).max() > 1e-4
