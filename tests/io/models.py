# SPDX-License-Identifier: Apache-2.0
"""Small models with random weights, made from the key table alone."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from vqjax.config import AutoencoderConfig, LatentDiffusionConfig, UNetConfig
from vqjax.core import grouping, tree
from vqjax.core.activations import Activations, layer_bits
from vqjax.core.host import to_device
from vqjax.core.model import Model
from vqjax.core.tensor import VQTensor
from vqjax.io import keys, leaves

STAGE = AutoencoderConfig(resolution=32, ch=32, ch_mult=(1, 2), num_res_blocks=1, n_embed=16)
_SMALL = {"model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1}
CLASSES = LatentDiffusionConfig(
    name="small-classes",
    unet=UNetConfig(**_SMALL, attention_resolutions=(2,), context_dim=8),
    first_stage=STAGE,
    n_classes=4,
)
PLAIN = LatentDiffusionConfig(
    name="small-plain",
    unet=UNetConfig(**_SMALL, attention_resolutions=(1, 2), num_head_channels=16),
    first_stage=STAGE,
)
TINY = LatentDiffusionConfig(
    name="tiny",
    unet=UNetConfig(
        model_channels=32,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        context_dim=8,
    ),
    first_stage=dataclasses.replace(STAGE, resolution=16),
    n_classes=4,
)
LIKE_DIGITS = dataclasses.replace(TINY, first_stage=STAGE, n_classes=11)
UPDOWN = LatentDiffusionConfig(
    name="small-updown",
    unet=UNetConfig(
        **_SMALL,
        in_channels=4,
        out_channels=4,
        attention_resolutions=(1,),
        num_heads=4,
        use_scale_shift_norm=True,
        resblock_updown=True,
    ),
    first_stage=AutoencoderConfig(
        kind="kl",
        resolution=32,
        ch=32,
        ch_mult=(1, 2),
        num_res_blocks=1,
        attn_resolutions=(16,),
        z_channels=4,
        embed_dim=4,
        n_embed=0,
    ),
)


def tensors(config: LatentDiffusionConfig, dtype: DTypeLike = np.float32) -> dict[str, np.ndarray]:
    """Random checkpoint tensors by LDM key, each from a seed of its own."""
    return {entry.key: _random(entry.key, entry.shape, dtype) for entry in keys.table(config)}


def dense(config: LatentDiffusionConfig, dtype: DTypeLike = np.float32) -> Model:
    """The model that `tensors(config)` describes."""
    flat = {
        entry.path: to_device(entry.to_param(_random(entry.key, entry.shape, dtype)))
        for entry in keys.table(config)
    }
    return Model(config=config, params=tree.unflatten(flat))


@functools.cache
def quantized(config: LatentDiffusionConfig) -> Model:
    """Every kind of leaf: nine, eight and one weight to a vector, padding, int8, odd code sizes."""
    model, rng = dense(config, np.float16), np.random.default_rng(0)
    flat = tree.flatten(model.params)
    kernels = [path for path in flat if path.startswith("unet/") and path.endswith("/kernel")]
    for index, path in enumerate([*kernels[::12], "unet/out/conv/kernel"]):
        shape = flat[path].shape
        kind = "conv3x3" if shape[:2] == (3, 3) else "linear"
        entries = (16, 5, 8)[index % 3]
        if index % 7 == 0:
            kind, entries = "scalar", 256
        flat[path] = random_tensor(rng, shape, kind, entries, int8=index % 5 == 0)
    return Model(config=config, params=tree.unflatten(flat))


def random_tensor(rng, shape, kind: str, entries: int, *, int8: bool = False) -> VQTensor:
    outputs, fan_in = grouping.matrix_shape(shape)
    group, books = grouping.GROUPS[kind], 1 if kind == "scalar" else 3
    groups = grouping.groups_per_row(fan_in, group)
    values = rng.standard_normal((books, entries, group))
    books_MKG = (values * 40).astype(np.int8) if int8 else values.astype(np.float16)
    return VQTensor.pack(
        rng.integers(0, entries, (outputs, groups, books)),
        to_device(books_MKG),
        to_device(rng.random(outputs).astype(np.float16)),
        shape=shape,
        grouping=kind,
        codebook_scale=jnp.float32(0.03) if int8 else None,
    )


@functools.cache
def integer(config: LatentDiffusionConfig) -> Model:
    """Every kernel of the U-Net in int8 codebooks whose sums fit int8; weights of usual size."""
    model, rng = dense(config), np.random.default_rng(1)
    flat = tree.flatten(model.params)
    for path in [p for p in flat if p.startswith("unet/") and p.endswith("/kernel")]:
        flat[path] = integer_tensor(rng, flat[path].shape)
    return Model(config=config, params=tree.unflatten(flat))


def integer_tensor(rng, shape) -> VQTensor:
    """Three int8 codebooks, no sum of which exceeds 126; fan-in^-1/2 times scales near 1."""
    kind = "conv3x3" if shape[:2] == (3, 3) else "linear"
    outputs, fan_in = grouping.matrix_shape(shape)
    group = grouping.GROUPS[kind]
    groups = grouping.groups_per_row(fan_in, group)
    return VQTensor.pack(
        rng.integers(0, 16, (outputs, groups, 3)),
        to_device(rng.integers(-42, 43, (3, 16, group)).astype(np.int8)),
        rng.uniform(0.5, 1.5, outputs),
        shape=shape,
        grouping=kind,
        codebook_scale=jnp.float32(fan_in**-0.5 / 42),
    )


def any_ranges(model: Model, bits: int = 4) -> Activations:
    """Random ranges at three timesteps, of about what layers read; zero points not rounded."""
    rng = np.random.default_rng(3)
    flat = tree.flatten(model.params)
    steps, zeros = {}, {}
    for path in flat:
        if path.startswith("unet/") and path.endswith("/kernel"):
            low_T, high_T = rng.uniform(2, 3, 3), rng.uniform(3, 5, 3)
            step_T = (low_T + high_T) / (2 ** layer_bits(path, bits) - 1)
            steps[path] = to_device(np.log2(step_T).astype(np.float32))
            zeros[path] = to_device((low_T / step_T).astype(np.float32))
    timesteps_T = jnp.array([5, 400, 800], jnp.int32)
    return Activations(timesteps_T=timesteps_T, log2_steps=steps, zeros=zeros, bits=bits)


@functools.cache
def with_ranges(config: LatentDiffusionConfig, bits: int = 8) -> Model:
    """`integer(config)` with ranges of its inputs."""
    model = integer(config)
    return Model(config=config, params=model.params | {"activations": any_ranges(model, bits)})


def assert_equal(found: Model, expected: Model) -> None:
    """Same config, same paths, same types, same bits."""
    assert found.config == expected.config
    flat, wanted = tree.flatten(found.params), tree.flatten(expected.params)
    assert flat.keys() == wanted.keys()
    for path, leaf in wanted.items():
        if isinstance(leaf, VQTensor):
            assert isinstance(flat[path], VQTensor)
            assert (flat[path].shape, flat[path].grouping) == (leaf.shape, leaf.grouping)
            stored, expected_parts = leaves.tensor_arrays(flat[path]), leaves.tensor_arrays(leaf)
            assert stored.keys() == expected_parts.keys()
            pairs = [(stored[name], part) for name, part in expected_parts.items()]
        elif isinstance(leaf, Activations):
            assert isinstance(flat[path], Activations)
            assert jax.tree.structure(flat[path]) == jax.tree.structure(leaf)
            pairs = list(zip(jax.tree.leaves(flat[path]), jax.tree.leaves(leaf)))
        else:
            pairs = [(flat[path], leaf)]
        for a, b in pairs:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=path)


def _random(key: str, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    return rng.standard_normal(shape, np.float32).astype(dtype)
