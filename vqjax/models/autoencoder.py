# SPDX-License-Identifier: Apache-2.0
"""The first stage: images to latents and back (VQ with a codebook, or KL), NHWC inside.

Port of CompVis `VQModelInterface` and `AutoencoderKL` (taming-transformers encoder and decoder).

Dimension key:  B batch   H W image or latent   C channels   Z latent channels   E codebook rows
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqjax.config import AutoencoderConfig
from vqjax.models.layers import Conv, GroupNorm, attend, pointwise, upsample_nearest

EPSILON = 1e-6  # every GroupNorm of the first stage; the U-Net's residual blocks use 1e-5


class ResBlock(nn.Module):
    """GroupNorm-SiLU-Conv twice with a residual."""

    features: int

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        h = Conv(self.features, name="conv1")(nn.silu(GroupNorm(EPSILON, name="norm1")(x_BHWC)))
        h = Conv(self.features, name="conv2")(nn.silu(GroupNorm(EPSILON, name="norm2")(h)))
        if x_BHWC.shape[-1] != self.features:
            x_BHWC = pointwise(self.features, "skip")(x_BHWC)
        return x_BHWC + h


class AttnBlock(nn.Module):
    """Single-head self-attention over positions, 1x1 convolutions with bias."""

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        b, h, w, c = x_BHWC.shape
        normed = GroupNorm(EPSILON, name="norm")(x_BHWC)
        q, k, v = (pointwise(c, name)(normed).reshape(b, h * w, 1, c) for name in "qkv")
        return x_BHWC + pointwise(c, "proj_out")(attend(q, k, v).reshape(b, h, w, c))


class Mid(nn.Module):
    """Residual block, attention, residual block."""

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        features = x_BHWC.shape[-1]
        x_BHWC = AttnBlock(name="attn_1")(ResBlock(features, name="block_1")(x_BHWC))
        return ResBlock(features, name="block_2")(x_BHWC)


class Level(nn.Module):
    """The blocks of one resolution, then the change to the next one."""

    features: int
    blocks: int
    attention: bool
    resample: str | None = None

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        for i in range(self.blocks):
            x_BHWC = ResBlock(self.features, name=f"block_{i}")(x_BHWC)
            if self.attention:
                x_BHWC = AttnBlock(name=f"attn_{i}")(x_BHWC)
        if self.resample == "down":
            # The encoder pads right and bottom only; the U-Net pads all sides.
            return Conv(self.features, stride=2, padding=(0, 1), name="downsample")(x_BHWC)
        if self.resample == "up":
            return Conv(self.features, name="upsample")(upsample_nearest(x_BHWC))
        return x_BHWC


def _out(x_BHWC: jax.Array, features: int) -> jax.Array:
    h = nn.silu(GroupNorm(EPSILON, name="norm_out")(x_BHWC))
    return Conv(features, name="conv_out")(h)


class Encoder(nn.Module):
    """Images [B, H, W, in_channels] to latent moments [B, H/f, W/f, z or 2z]."""

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        c, last = self.config, len(self.config.ch_mult) - 1
        h = Conv(c.ch, name="conv_in")(x_BHWC)
        for i, multiplier in enumerate(c.ch_mult):
            attention = c.resolution // 2**i in c.attn_resolutions
            resample = "down" if i < last else None
            level = Level(
                c.ch * multiplier, c.num_res_blocks, attention, resample, name=f"down_{i}"
            )
            h = level(h)
        return _out(Mid(name="mid")(h), c.z_channels * (2 if c.kind == "kl" else 1))


class Decoder(nn.Module):
    """Latents [B, H/f, W/f, z] to images [B, H, W, out_channels]; no final nonlinearity."""

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, z_BHWZ: jax.Array) -> jax.Array:
        c = self.config
        h = Conv(c.ch * c.ch_mult[-1], name="conv_in")(z_BHWZ)
        h = Mid(name="mid")(h)
        # Levels are numbered by resolution, highest first, and run from the lowest.
        for i, multiplier in reversed(list(enumerate(c.ch_mult))):
            attention = c.resolution // 2**i in c.attn_resolutions
            resample = "up" if i > 0 else None
            level = Level(
                c.ch * multiplier, c.num_res_blocks + 1, attention, resample, name=f"up_{i}"
            )
            h = level(h)
        return _out(h, c.out_channels)


class Codebook(nn.Module):
    """Vector quantization of latents: the nearest row, the first one on ties."""

    rows: int
    features: int

    @nn.compact
    def __call__(self, z_BHWZ: jax.Array) -> tuple[jax.Array, jax.Array]:
        init = nn.initializers.uniform(2 / self.rows)
        rows_EZ = self.param("embedding", init, (self.rows, self.features), jnp.float32)
        # Nearest and second nearest row may differ by 1e-6: lower precision would flip codes.
        cross_BHWE = jnp.einsum(
            "bhwz,ez->bhwe",
            z_BHWZ.astype(jnp.float32),
            rows_EZ,
            precision=jax.lax.Precision.HIGHEST,
        )
        distance_BHWE = jnp.sum(rows_EZ**2, -1)[None, None, None] - 2 * cross_BHWE
        codes_BHW = jnp.argmin(distance_BHWE, axis=-1)
        return rows_EZ[codes_BHW].astype(z_BHWZ.dtype), codes_BHW


class Autoencoder(nn.Module):
    """First stage with `encode`, `quantize` and `decode` as separate methods."""

    config: AutoencoderConfig

    def setup(self) -> None:
        c = self.config
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)
        moments = 2 if c.kind == "kl" else 1
        self.quant_conv = Conv(moments * c.embed_dim, window=1, padding=(0, 0))
        self.post_quant_conv = Conv(c.z_channels, window=1, padding=(0, 0))
        if c.kind == "vq":
            # The attribute may not be called `quantize`, which is a method here.
            self.codebook = Codebook(c.n_embed, c.embed_dim, name="quantize")

    def encode(self, x_BHWC: jax.Array) -> jax.Array:
        """Images in [-1, 1] to latents before quantization (the mean of the posterior for "kl")."""
        moments = self.quant_conv(self.encoder(x_BHWC))
        return moments[..., : self.config.embed_dim]

    def quantize(self, z_BHWZ: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Nearest codebook rows [B, H, W, Z] and their numbers [B, H, W]; "vq" only."""
        return self.codebook(z_BHWZ)

    def decode(self, z_BHWZ: jax.Array) -> jax.Array:
        """Latents, quantized already where the model has a codebook, to images."""
        return self.decoder(self.post_quant_conv(z_BHWZ))

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """Encodes, quantizes and decodes: touches every parameter, for initialization."""
        z_BHWZ = self.encode(x_BHWC)
        return self.decode(self.quantize(z_BHWZ)[0] if self.config.kind == "vq" else z_BHWZ)
