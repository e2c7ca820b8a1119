# SPDX-License-Identifier: Apache-2.0
"""The noise-prediction U-Net of latent diffusion (arXiv 2112.10752), at any size, NHWC inside.

Port of CompVis/latent-diffusion `UNetModel` (commit a506df5). Two attention blocks exist: models
with a context (class or text tokens) use `SpatialTransformer`, models without `AttentionBlock`.

Dimension key:  B batch   H W latent   C channels   T time features   L image tokens
                N context tokens   X context features
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqjax.config import UNetConfig
from vqjax.models.layers import (
    Conv,
    Dense,
    GroupNorm,
    attend,
    average_pool,
    layer_norm,
    pointwise,
    upsample_nearest,
)


def timestep_embedding(t_B: jax.Array, features: int) -> jax.Array:
    """Sinusoidal embedding [B, features] of integer timesteps: all cosines, then all sines."""
    half = features // 2
    frequency_F = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angle_BF = t_B.astype(jnp.float32)[:, None] * frequency_F[None]
    return jnp.concatenate([jnp.cos(angle_BF), jnp.sin(angle_BF)], axis=-1)


class TimeEmbed(nn.Module):
    """Two-layer MLP from the sinusoidal embedding to the features that residual blocks use."""

    features: int

    @nn.compact
    def __call__(self, x_BF: jax.Array) -> jax.Array:
        return Dense(self.features, name="dense2")(
            nn.silu(Dense(self.features, name="dense1")(x_BF))
        )


class ResBlock(nn.Module):
    """GroupNorm-SiLU-Conv twice, shifted (or scaled and shifted) by the time embedding.

    Attributes:
      resample: None, "down" (2x2 mean) or "up" (nearest), applied before the first convolution.
    """

    features: int
    scale_shift: bool = False
    resample: str | None = None

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, emb_BT: jax.Array) -> jax.Array:
        h = nn.silu(GroupNorm(1e-5, name="norm1")(x_BHWC))
        if self.resample is not None:
            resample = average_pool if self.resample == "down" else upsample_nearest
            h, x_BHWC = resample(h), resample(x_BHWC)
        h = Conv(self.features, name="conv1")(h)
        width = 2 * self.features if self.scale_shift else self.features
        emb_B11C = Dense(width, name="emb")(nn.silu(emb_BT))[:, None, None].astype(h.dtype)
        norm2 = GroupNorm(1e-5, name="norm2")
        if self.scale_shift:
            scale, shift = jnp.split(emb_B11C, 2, axis=-1)
            h = norm2(h) * (1 + scale) + shift
        else:
            h = norm2(h + emb_B11C)
        h = Conv(self.features, name="conv2")(nn.silu(h))
        if x_BHWC.shape[-1] != self.features:
            x_BHWC = pointwise(self.features, "skip")(x_BHWC)
        return x_BHWC + h


class CrossAttention(nn.Module):
    """Multi-head attention from image tokens to context tokens (to themselves without context).

    With one context token the softmax is over one key and equals 1, so queries and keys do nothing;
    a model whose `to_q` and `to_k` were folded away (`vqjax.core.folding`) runs without them.
    """

    heads: int

    @nn.compact
    def __call__(self, x_BLC: jax.Array, context_BNX: jax.Array | None = None) -> jax.Array:
        features = x_BLC.shape[-1]
        source = x_BLC if context_BNX is None else context_BNX
        v_BNC = Dense(features, use_bias=False, name="to_v")(source)
        if self.is_initializing() or self.has_variable("params", "to_q"):
            q_BLC = Dense(features, use_bias=False, name="to_q")(x_BLC)
            k_BNC = Dense(features, use_bias=False, name="to_k")(source)
            y_BLC = attend(*(_heads(a, self.heads) for a in (q_BLC, k_BNC, v_BNC)))
        elif source.shape[1] == 1:
            y_BLC = v_BNC
        else:
            where = "/".join(self.path)
            raise ValueError(
                f"{where}: to_q and to_k were folded away, which is exact for one context token "
                f"only; found {source.shape[1]}. Load the model without folding."
            )
        return Dense(features, name="to_out")(y_BLC)


def _heads(x_BLC: jax.Array, heads: int) -> jax.Array:
    return x_BLC.reshape(*x_BLC.shape[:2], heads, -1)


class FeedForward(nn.Module):
    """GEGLU with the exact (erf) GELU, four times as wide inside."""

    @nn.compact
    def __call__(self, x_BLC: jax.Array) -> jax.Array:
        features = x_BLC.shape[-1]
        value, gate = jnp.split(Dense(8 * features, name="proj")(x_BLC), 2, axis=-1)
        return Dense(features, name="out")(value * nn.gelu(gate, approximate=False))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each behind a LayerNorm and a residual."""

    heads: int

    @nn.compact
    def __call__(self, x_BLC: jax.Array, context_BNX: jax.Array | None) -> jax.Array:
        x_BLC += CrossAttention(self.heads, name="attn1")(layer_norm("norm1")(x_BLC))
        normed = x_BLC  # norm2 feeds the queries alone and is folded away with them
        if self.is_initializing() or self.has_variable("params", "norm2"):
            normed = layer_norm("norm2")(x_BLC)
        x_BLC += CrossAttention(self.heads, name="attn2")(normed, context_BNX)
        return x_BLC + FeedForward(name="ff")(layer_norm("norm3")(x_BLC))


class SpatialTransformer(nn.Module):
    """Transformer over the positions of an image, in row-major token order."""

    heads: int
    depth: int

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, context_BNX: jax.Array | None) -> jax.Array:
        b, h, w, c = x_BHWC.shape
        y_BHWC = pointwise(c, "proj_in")(GroupNorm(1e-6, name="norm")(x_BHWC))
        y_BLC = y_BHWC.reshape(b, h * w, c)
        for d in range(self.depth):
            y_BLC = TransformerBlock(self.heads, name=f"block_{d}")(y_BLC, context_BNX)
        return x_BHWC + pointwise(c, "proj_out")(y_BLC.reshape(b, h, w, c))


class AttentionBlock(nn.Module):
    """Self-attention over the positions of an image; one projection for queries, keys, values."""

    heads: int

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        b, h, w, c = x_BHWC.shape
        x_BLC = GroupNorm(1e-5, name="norm")(x_BHWC).reshape(b, h * w, c)
        # Channels of the projection are ordered (head, query | key | value, channel of the head).
        qkv = Dense(3 * c, name="qkv")(x_BLC).reshape(b, h * w, self.heads, 3, c // self.heads)
        y_BLC = Dense(c, name="proj_out")(attend(qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :]))
        return x_BHWC + y_BLC.reshape(b, h, w, c)


class Stage(nn.Module):
    """One input or output block: residual block, then attention and upsampling where asked."""

    config: UNetConfig
    features: int
    attention: bool = False
    upsample: bool = False

    @nn.compact
    def __call__(
        self, x_BHWC: jax.Array, emb_BT: jax.Array, context_BNX: jax.Array | None
    ) -> jax.Array:
        c = self.config
        x_BHWC = ResBlock(self.features, c.use_scale_shift_norm, name="res")(x_BHWC, emb_BT)
        if self.attention:
            x_BHWC = _attention(c, self.features, "attn", x_BHWC, context_BNX)
        if self.upsample:
            if c.resblock_updown:
                up = ResBlock(self.features, c.use_scale_shift_norm, "up", name="upsample")
                return up(x_BHWC, emb_BT)
            return Conv(self.features, name="upsample")(upsample_nearest(x_BHWC))
        return x_BHWC


class Downsample(nn.Module):
    """Halves the resolution: a strided convolution or, with `resblock_updown`, a residual block."""

    config: UNetConfig
    features: int

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, emb_BT: jax.Array) -> jax.Array:
        if self.config.resblock_updown:
            scale_shift = self.config.use_scale_shift_norm
            return ResBlock(self.features, scale_shift, "down", name="downsample")(x_BHWC, emb_BT)
        return Conv(self.features, stride=2, name="downsample")(x_BHWC)


class Stem(nn.Module):
    """The first convolution."""

    features: int

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        return Conv(self.features, name="conv")(x_BHWC)


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    config: UNetConfig
    features: int

    @nn.compact
    def __call__(
        self, x_BHWC: jax.Array, emb_BT: jax.Array, context_BNX: jax.Array | None
    ) -> jax.Array:
        scale_shift = self.config.use_scale_shift_norm
        x_BHWC = ResBlock(self.features, scale_shift, name="res1")(x_BHWC, emb_BT)
        x_BHWC = _attention(self.config, self.features, "attn", x_BHWC, context_BNX)
        return ResBlock(self.features, scale_shift, name="res2")(x_BHWC, emb_BT)


class Head(nn.Module):
    """GroupNorm, SiLU and the last convolution."""

    features: int

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        return Conv(self.features, name="conv")(nn.silu(GroupNorm(1e-5, name="norm")(x_BHWC)))


def _attention(
    config: UNetConfig, features: int, name: str, x_BHWC: jax.Array, context_BNX: jax.Array | None
) -> jax.Array:
    head_channels = config.num_head_channels
    heads = config.num_heads if head_channels is None else features // head_channels
    if config.context_dim is None:
        return AttentionBlock(heads, name=name)(x_BHWC)
    return SpatialTransformer(heads, config.transformer_depth, name=name)(x_BHWC, context_BNX)


class UNet(nn.Module):
    """Predicts the noise in a latent. Blocks keep the numbers they have in the checkpoint.

    Attributes:
      remat: on the way back through the network, make the activations inside blocks again instead
        of keeping them (gradient checkpointing): a third more work, a fraction of the memory.
    """

    config: UNetConfig
    remat: bool = False

    @nn.compact
    def __call__(
        self, x_BHWC: jax.Array, t_B: jax.Array, context_BNX: jax.Array | None = None
    ) -> jax.Array:
        """Runs the U-Net.

        Args:
          x_BHWC: noisy latent; height and width divisible by 2 ** (levels - 1).
          t_B: integer timesteps.
          context_BNX: context tokens, or None where `config.context_dim` is None.

        Returns:
          Predicted noise, shape and dtype of `x_BHWC` with `config.out_channels` channels.
          Every block's output is sown into the collection "intermediates" as "act.<block>".
        """
        c = self.config
        wrap: Callable[[Any], Any] = nn.remat if self.remat else lambda module: module
        stage, middle = wrap(Stage), wrap(Middle)
        if (context_BNX is None) != (c.context_dim is None):
            raise ValueError(
                f"context_dim is {c.context_dim}, context given: {context_BNX is not None}"
            )
        t_emb_BF = timestep_embedding(t_B, c.model_channels)
        emb_BT = TimeEmbed(4 * c.model_channels, name="time_embed")(t_emb_BF.astype(x_BHWC.dtype))
        self._record("t_emb", t_emb_BF)
        self._record("time_embed", emb_BT)

        h = Stem(c.model_channels, name="input_blocks_0")(x_BHWC)
        skips = [self._record("input_blocks.0", h)]
        for level, multiplier in enumerate(c.channel_mult):
            features, attention = multiplier * c.model_channels, 2**level in c.attention_resolutions
            for _ in range(c.num_res_blocks):
                block = stage(c, features, attention, name=f"input_blocks_{len(skips)}")
                h = block(h, emb_BT, context_BNX)
                skips.append(self._record(f"input_blocks.{len(skips)}", h))
            if level < len(c.channel_mult) - 1:
                h = Downsample(c, features, name=f"input_blocks_{len(skips)}")(h, emb_BT)
                skips.append(self._record(f"input_blocks.{len(skips)}", h))

        h = middle(c, h.shape[-1], name="middle_block")(h, emb_BT, context_BNX)
        self._record("middle_block", h)

        index = 0
        for level, multiplier in reversed(list(enumerate(c.channel_mult))):
            features, attention = multiplier * c.model_channels, 2**level in c.attention_resolutions
            for i in range(c.num_res_blocks + 1):
                upsample = level > 0 and i == c.num_res_blocks
                block = stage(c, features, attention, upsample, name=f"output_blocks_{index}")
                h = block(jnp.concatenate([h, skips.pop()], axis=-1), emb_BT, context_BNX)
                self._record(f"output_blocks.{index}", h)
                index += 1
        return Head(c.out_channels, name="out")(h)

    def _record(self, name: str, activation: jax.Array) -> jax.Array:
        # A prefix, since "time_embed" and "middle_block" are names of submodules already.
        self.sow("intermediates", f"act.{name}", activation)
        return activation
