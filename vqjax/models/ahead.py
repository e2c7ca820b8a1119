# SPDX-License-Identifier: Apache-2.0
"""What a sampler need not compute in its loop: outputs of layers that do not see the latent.

The time embedding and its projections follow from the timestep, cross-attention to one token from
the class (and from the timestep, where that decides how the token is rounded). Both are known
before the first step, in which a GPU has kernels enough to start.

Dimension key:  T timesteps   B batch   C channels   N context tokens   X context features
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqjax.config import UNetConfig
from vqjax.models.layers import Dense
from vqjax.models.unet import CrossAttention, TimeEmbed, timestep_embedding

Known = Mapping[tuple[str, ...], jax.Array]
"""Outputs by module path."""

_MOST_BYTES = 1 << 28
"""Of the outputs of cross-attention: those of a thousand steps are better computed in each."""


def of_timesteps(config: UNetConfig, unet: Mapping[str, Any], t_T: jax.Array, dtype) -> Known:
    """Returns the projections of the time embedding, [T, C] by path.

    Args:
      unet: tree of parameters, ranges of inputs at `t_T` beside the kernels that have some.
      dtype: which the network computes in.
    """
    embed = TimeEmbed(4 * config.model_channels)
    start_TF = timestep_embedding(t_T, config.model_channels).astype(dtype)
    emb_TE: Any = embed.apply({"params": unet["time_embed"]}, start_TF)

    def project(params: Mapping[str, Any]) -> Any:
        return Dense(params["kernel"].shape[-1]).apply({"params": params}, nn.silu(emb_TE))

    return {path: project(params) for path, params in _below(unet, "emb", ())}


def of_classes(unet: Mapping[str, Any], context_BNX: jax.Array) -> Known:
    """Returns the outputs of cross-attention to one token, [B, 1, C] by path.

    Nothing of those that have queries, which see the latent, nor where there are more tokens.

    Args:
      unet: as in `of_timesteps`, ranges at the timestep of each example.
    """

    def attended(params: Mapping[str, Any]) -> Any:
        channels = params["to_out"]["kernel"].shape[-1]
        x_BLC = jnp.zeros((len(context_BNX), 1, channels), context_BNX.dtype)
        return CrossAttention(1).apply({"params": params}, x_BLC, context_BNX)

    found = dict(_below(unet, "attn2", ())) if context_BNX.shape[1] == 1 else {}
    return {path: attended(params) for path, params in found.items() if "to_q" not in params}


def too_large(known: Known) -> bool:
    """Returns whether outputs of cross-attention (or their shapes) take too much memory."""
    sizes = (math.prod(y.shape) * jnp.dtype(y.dtype).itemsize for y in known.values())
    return sum(sizes) > _MOST_BYTES


def _below(tree: Mapping[str, Any], name: str, path: tuple[str, ...]) -> list[tuple]:
    """Modules of a name, with their paths and parameters."""
    found = []
    for key, params in tree.items():
        if key == name:
            found.append(((*path, key), params))
        elif isinstance(params, Mapping):
            found += _below(params, name, (*path, key))
    return found


def instead(known: Known) -> Callable[..., Any]:
    """Returns what intercepts methods: modules whose outputs are known are not called."""

    def intercept(call, args, kwargs, context):
        if context.method_name == "__call__" and context.module.path in known:
            return known[context.module.path]
        return call(*args, **kwargs)

    return intercept
