# SPDX-License-Identifier: Apache-2.0
"""Models of random weights: for what depends on shapes and codes alone, and needs no checkpoint.

Drawn by NumPy: Flax would run the network to initialize it, which takes minutes at full size.

Dimension key:  O outputs   J vectors of a row   M codebooks   K entries   G weights of a vector
"""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqjax import models
from vqjax.config import LatentDiffusionConfig
from vqjax.core import folding, grouping, tree
from vqjax.core.activations import Activations
from vqjax.core.model import Model
from vqjax.core.plan import LayerSpec, make_plan
from vqjax.core.scales import LogScales
from vqjax.core.tensor import VQTensor
from vqjax.kernels.decode import packed_bytes

_TIMESTEPS = 25
_REACH = 4.0  # base-2 logarithm of what a range spans


def dense_model(config: LatentDiffusionConfig, seed: int) -> Model:
    """A folded model before training."""
    flat = _shapes(config)
    leaves = {path: random_leaf(path, leaf.shape, seed) for path, leaf in flat.items()}
    return Model(config, tree.unflatten(leaves))


def quantized_model(config: LatentDiffusionConfig, bits: float, seed: int) -> Model:
    """The same of random codes, planned as `quantize` would without looking at it."""
    flat = _shapes(config)
    plan = _plan(flat, bits)
    leaves = {
        path: random_tensor(leaf.shape, plan[path], (seed, zlib.crc32(path.encode())))
        if path in plan
        else random_leaf(path, leaf.shape, seed)
        for path, leaf in flat.items()
    }
    return Model(config, tree.unflatten(leaves))


def with_ranges(model: Model, bits: int) -> Model:
    """The model with ranges of what its quantized layers read, all alike."""
    timesteps_T = np.linspace(1, model.config.timesteps - 1, _TIMESTEPS).astype(np.int32)
    flat = tree.flatten({"unet": model.params["unet"]})
    paths = [path for path, leaf in flat.items() if isinstance(leaf, VQTensor)]
    ranges = Activations(
        timesteps_T=jnp.asarray(timesteps_T),
        log2_steps={path: jnp.full(_TIMESTEPS, _REACH - bits) for path in paths},
        zeros={path: jnp.full(_TIMESTEPS, 2.0 ** (bits - 1)) for path in paths},
        bits=bits,
    )
    return Model(model.config, {**model.params, "activations": ranges})


def quantized_shapes(config: LatentDiffusionConfig, bits: float) -> models.Params:
    """The tree of `quantized_model` as shapes and types; nothing is drawn."""
    flat = _shapes(config)
    for path, spec in _plan(flat, bits).items():
        flat[path] = _stored(flat[path].shape, spec)
    return tree.unflatten(flat)


def random_leaf(path: str, shape: tuple[int, ...], seed: int) -> jax.Array:
    """A parameter before training: norms change nothing, biases are 0, kernels keep the size of
    what they read."""
    if path.endswith(("/scale", "/bias")):
        return jnp.asarray(np.full(shape, float(path.endswith("/scale")), np.float32))
    values = np.random.default_rng((seed, zlib.crc32(path.encode()))).standard_normal(
        shape, np.float32
    )
    if path.endswith("/kernel"):
        values *= np.float32(math.prod(shape[:-1]) ** -0.5)
    return jnp.asarray(values)


def random_tensor(shape: tuple[int, ...], spec: LayerSpec, seed: tuple[int, ...]) -> VQTensor:
    """A kernel of random codes into int8 codebooks, of about the size of an untrained one."""
    rng = np.random.default_rng(seed)
    outputs, fan_in = grouping.matrix_shape(shape)
    groups = grouping.groups_per_row(fan_in, spec.group)
    codes_OJM = rng.integers(0, spec.entries, (outputs, groups, spec.codebooks), np.uint8)
    most = 127 // spec.codebooks  # sums of entries fit int8, as those of searched codebooks do
    books_MKG = rng.integers(-most, most + 1, (spec.codebooks, spec.entries, spec.group))
    size = most * (spec.codebooks / 3) ** 0.5  # standard deviation of a sum
    return VQTensor.pack(
        codes_OJM,
        jnp.asarray(books_MKG, jnp.int8),
        np.full(outputs, fan_in**-0.5),
        shape=shape,
        grouping=spec.grouping,
        codebook_scale=jnp.float32(1 / size),
    )


def _shapes(config: LatentDiffusionConfig) -> dict[str, Any]:
    return tree.flatten(folding.fold(config, models.param_shapes(config)).params)


def _plan(flat: dict[str, Any], bits: float) -> dict[str, LayerSpec]:
    shapes = {path: tuple(leaf.shape) for path, leaf in flat.items()}
    return dict(make_plan(shapes, bits=bits, integer=True))


def _stored(shape: tuple[int, ...], spec: LayerSpec) -> VQTensor:
    """Shapes and types of a kernel's arrays."""
    outputs, fan_in = grouping.matrix_shape(shape)
    codes = grouping.groups_per_row(fan_in, spec.group) * spec.codebooks
    of: Any = jax.ShapeDtypeStruct
    return VQTensor(
        codes=of((outputs, packed_bytes(codes, spec.entries)), jnp.uint8),
        codebooks=of((spec.codebooks, spec.entries, spec.group), jnp.int8),
        scales=LogScales.of(np.ones(outputs)),
        codebook_scale=of((), jnp.float32),
        shape=shape,
        grouping=spec.grouping,
    )
