# SPDX-License-Identifier: Apache-2.0
"""Blocks that no reference file covers, against a plain float64 numpy account of the original.

Dimension key:  B batch   H W image   C D channels   T time features   L positions   E heads
"""

import jax
import numpy as np
import pytest

from tests.conftest import relative_rms
from vqjax.models import autoencoder
from vqjax.models.unet import AttentionBlock, ResBlock

LIMIT = 1e-5


def random_params(module, *args):
    """Parameters of the module's own tree, all random: norms are not 1 and biases not 0."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args))["params"]
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if path[-1].key == "kernel":
            return noise / np.float32(np.sqrt(np.prod(leaf.shape[:-1])))
        return noise * np.float32(0.2) + np.float32(path[-1].key == "scale")

    return jax.tree_util.tree_map_with_path(draw, shapes)


def silu(x):
    return x / (1 + np.exp(-x))


def group_norm(x_BHWC, params, epsilon):
    b, h, w, c = x_BHWC.shape
    x = x_BHWC.reshape(b, h, w, 32, c // 32)
    mean, var = x.mean((1, 2, 4), keepdims=True), x.var((1, 2, 4), keepdims=True)
    normed = ((x - mean) / np.sqrt(var + epsilon)).reshape(b, h, w, c)
    return normed * params["scale"] + params["bias"]


def conv(x_BHWC, params):
    """A 3x3 convolution with one pixel of zeros around, or a 1x1 one, as a sum over taps."""
    kernel, (_, h, w, _) = params["kernel"].astype(np.float64), x_BHWC.shape
    reach = kernel.shape[0] // 2
    padded = np.pad(x_BHWC, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
    taps = [
        padded[:, y : y + h, x : x + w] @ kernel[y, x]
        for y in range(kernel.shape[0])
        for x in range(kernel.shape[1])
    ]
    return sum(taps) + params["bias"]


def pool(x_BHWC):
    return (
        x_BHWC[:, ::2, ::2] + x_BHWC[:, 1::2, ::2] + x_BHWC[:, ::2, 1::2] + x_BHWC[:, 1::2, 1::2]
    ) / 4


def double(x_BHWC):
    out = np.zeros((x_BHWC.shape[0], 2 * x_BHWC.shape[1], 2 * x_BHWC.shape[2], x_BHWC.shape[3]))
    for dy in (0, 1):
        for dx in (0, 1):
            out[:, dy::2, dx::2] = x_BHWC
    return out


def res_block(p, x_BHWC, emb_BT, *, scale_shift, resample):
    change = {"down": pool, "up": double, None: lambda x: x}[resample]
    h = conv(change(silu(group_norm(x_BHWC, p["norm1"], 1e-5))), p["conv1"])
    emb = silu(emb_BT) @ p["emb"]["kernel"].astype(np.float64) + p["emb"]["bias"]
    emb = emb[:, None, None]
    if scale_shift:
        half = emb.shape[-1] // 2
        h = group_norm(h, p["norm2"], 1e-5) * (1 + emb[..., :half]) + emb[..., half:]
    else:
        h = group_norm(h + emb, p["norm2"], 1e-5)
    skip = change(x_BHWC)
    return conv(silu(h), p["conv2"]) + (conv(skip, p["skip"]) if "skip" in p else skip)


@pytest.mark.parametrize("resample", [None, "down", "up"])
@pytest.mark.parametrize("scale_shift", [False, True])
def test_res_block(scale_shift, resample):
    rng = np.random.default_rng(0)
    x, emb = rng.standard_normal((2, 4, 6, 32)), rng.standard_normal((2, 24))
    args = x.astype(np.float32), emb.astype(np.float32)
    features = 64 if resample is None else 32  # those that resample keep their channels
    module = ResBlock(features, scale_shift, resample)
    params = random_params(module, *args)
    expected = res_block(
        params,
        args[0].astype(np.float64),
        args[1].astype(np.float64),
        scale_shift=scale_shift,
        resample=resample,
    )
    assert relative_rms(module.apply({"params": params}, *args), expected) <= LIMIT


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_block(heads):
    """The original stores (head, query | key | value, channel) along the projection's outputs."""
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 64)).astype(np.float32)
    module = AttentionBlock(heads)
    params = random_params(module, x)
    b, h, w, c = x.shape
    normed = group_norm(x.astype(np.float64), params["norm"], 1e-5).reshape(b, h * w, c)
    qkv_BLD = normed @ params["qkv"]["kernel"].astype(np.float64) + params["qkv"]["bias"]
    width, parts = c // heads, []
    for head in range(heads):
        first = 3 * width * head
        q, k, v = (qkv_BLD[..., first + i * width : first + (i + 1) * width] for i in range(3))
        parts.append(softmax(q @ k.transpose(0, 2, 1) / np.sqrt(width)) @ v)
    y = np.concatenate(parts, -1) @ params["proj_out"]["kernel"].astype(np.float64)
    expected = x + (y + params["proj_out"]["bias"]).reshape(x.shape)
    assert relative_rms(module.apply({"params": params}, x), expected) <= LIMIT


def test_first_stage_attention_at_a_level():
    """`attn_resolutions` puts attention behind every residual block of a level."""
    x = np.random.default_rng(0).standard_normal((1, 4, 4, 32)).astype(np.float32)
    module = autoencoder.Level(32, 2, True)
    params = random_params(module, x)
    expected = x.astype(np.float64)
    for i in range(2):
        p = params[f"block_{i}"]
        h = conv(silu(group_norm(expected, p["norm1"], 1e-6)), p["conv1"])
        expected = expected + conv(silu(group_norm(h, p["norm2"], 1e-6)), p["conv2"])
        p = params[f"attn_{i}"]
        normed = group_norm(expected, p["norm"], 1e-6)
        q, k, v = (conv(normed, p[name]).reshape(1, 16, 32) for name in "qkv")
        mixed = softmax(q @ k.transpose(0, 2, 1) / np.sqrt(32)) @ v
        expected = expected + conv(mixed.reshape(expected.shape), p["proj_out"])
    assert relative_rms(module.apply({"params": params}, x), expected) <= LIMIT
