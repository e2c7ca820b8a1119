# SPDX-License-Identifier: Apache-2.0
"""The distinct layers of a U-Net, as one image passes through it."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp

from vqjax import models
from vqjax.config import LatentDiffusionConfig
from vqjax.core import tree
from vqjax.core.plan import RULES, kind_of
from vqjax.core.tensor import VQTensor
from vqjax.kernels.specs import Layer


def layers_of(name: str, config: LatentDiffusionConfig, params: models.Params) -> list[Layer]:
    """Returns every distinct layer in the order of the network, how often it occurs counted.

    Args:
      name: of the model, for the layers.
      params: folded; shapes are enough. Layers of quantized weights have the code of these, and
        then those of others are left out.
    """
    flat = tree.flatten(params)
    quantized = any(isinstance(leaf, VQTensor) for leaf in flat.values())
    found: Counter[Layer] = Counter()

    def note(path: str, x: jax.Array, window: dict) -> None:
        leaf = flat[path]
        if quantized and not isinstance(leaf, VQTensor):
            return
        size = window.get("window", 1)
        before, after = window.get("padding", (0, 0))
        layer = Layer(
            model=name,
            op="vq_conv" if size > 1 else "vq_matmul",
            x_shape=tuple(x.shape),
            outputs=leaf.shape[-1],
            window=size,
            stride=window.get("stride", 1),
            padding=(before, after),
            scalar=kind_of(path, tuple(leaf.shape), RULES) == "first_last",
            count=0,
            code=_code(leaf) if quantized else None,
        )
        found[layer] += 1

    def predict(params: models.Params, x_BHWC: jax.Array, t_B: jax.Array, ids_B: jax.Array):
        context = models.embed_classes(config, params, ids_B)
        return models.capture_inputs(config, params, x_BHWC, t_B, context, note)[0]

    x_BHWC = jax.ShapeDtypeStruct((1, *config.latent_shape), jnp.float32)
    one_B = jax.ShapeDtypeStruct((1,), jnp.int32)
    jax.eval_shape(predict, params, x_BHWC, one_B, one_B)
    return [dataclasses.replace(layer, count=count) for layer, count in found.items()]


def _code(leaf: VQTensor) -> tuple[int, int, int, str]:
    books, entries, group = leaf.codebooks.shape
    return books, entries, group, jnp.dtype(leaf.codebooks.dtype).name
