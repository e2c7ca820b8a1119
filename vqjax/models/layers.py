# SPDX-License-Identifier: Apache-2.0
"""Layers whose weight may be dense or quantized; the model files never ask which.

Dimension key:  B batch   H W image   L tokens   I features in   O features out   T time features
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqjax.core.tensor import VQTensor

GROUPS = 32  # every GroupNorm of the latent diffusion models has 32 groups


def _kernel(module: nn.Module, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """`module.param("kernel")`, dense or a VQTensor, which Linen's own shape check refuses."""
    if not module.has_variable("params", "kernel"):
        init = nn.initializers.lecun_normal()
        return module.param("kernel", init, shape, jnp.float32).astype(dtype)
    found = module.get_variable("params", "kernel")
    if tuple(found.shape) != shape:
        where = "/".join((*module.path, "kernel"))
        raise ValueError(f"{where}: stored shape {tuple(found.shape)}, the model needs {shape}")
    return found.decode(dtype) if isinstance(found, VQTensor) else jnp.asarray(found, dtype)


class Dense(nn.Module):
    """Affine map of the last axis, [..., I] -> [..., features], in the dtype of its input."""

    features: int
    use_bias: bool = True

    def product(self, x: jax.Array, kernel_IO: jax.Array) -> jax.Array:
        """The linear part, with any kernel of this layer's shape."""
        return x @ kernel_IO

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.product(x, _kernel(self, (x.shape[-1], self.features), x.dtype))
        if self.use_bias:
            bias_O = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            y += jnp.broadcast_to(bias_O.astype(x.dtype), y.shape)
        return y


class Conv(nn.Module):
    """2-D convolution [B, H, W, I] -> [B, H', W', features] with explicit padding.

    Attributes:
      padding: zeros before and after each spatial axis. It is written out, since "SAME" pads a
        strided convolution differently from the original model.
    """

    features: int
    window: int = 3
    stride: int = 1
    padding: tuple[int, int] = (1, 1)

    def product(self, x_BHWI: jax.Array, kernel_HWIO: jax.Array) -> jax.Array:
        """The linear part, with any kernel of this layer's shape."""
        return jax.lax.conv_general_dilated(
            x_BHWI,
            kernel_HWIO,
            window_strides=(self.stride, self.stride),
            padding=(self.padding, self.padding),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    @nn.compact
    def __call__(self, x_BHWI: jax.Array) -> jax.Array:
        shape = (self.window, self.window, x_BHWI.shape[-1], self.features)
        y_BHWO = self.product(x_BHWI, _kernel(self, shape, x_BHWI.dtype))
        bias_O = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return y_BHWO + jnp.broadcast_to(bias_O.astype(y_BHWO.dtype), y_BHWO.shape)


def pointwise(features: int, name: str) -> Conv:
    """A 1x1 convolution."""
    return Conv(features, window=1, padding=(0, 0), name=name)


def group_norm(epsilon: float, name: str) -> nn.GroupNorm:
    """GroupNorm with two-pass variance: the one-pass form loses digits on small activations."""
    return nn.GroupNorm(GROUPS, epsilon=epsilon, use_fast_variance=False, name=name)


def layer_norm(name: str) -> nn.LayerNorm:
    """LayerNorm with the original epsilon 1e-5 (Flax defaults to 1e-6)."""
    return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name=name)


def upsample_nearest(x_BHWI: jax.Array) -> jax.Array:
    """Doubles height and width by repetition."""
    return x_BHWI.repeat(2, axis=1).repeat(2, axis=2)


def average_pool(x_BHWI: jax.Array) -> jax.Array:
    """Halves height and width by the mean of 2x2 cells."""
    return nn.avg_pool(x_BHWI, (2, 2), strides=(2, 2))


def attend(q_BLHD: jax.Array, k_BMHD: jax.Array, v_BMHD: jax.Array) -> jax.Array:
    """Scaled dot-product attention, softmax in float32.

    Dimension key:  H heads   D channels of a head   L queries   M keys

    Returns:
      [B, L, H * D], heads concatenated.
    """
    scale = q_BLHD.shape[-1] ** -0.5
    logits_BHLM = jnp.einsum("blhd,bmhd->bhlm", q_BLHD, k_BMHD) * scale
    weights_BHLM = nn.softmax(logits_BHLM.astype(jnp.float32)).astype(v_BMHD.dtype)
    y_BLHD = jnp.einsum("bhlm,bmhd->blhd", weights_BHLM, v_BMHD)
    return y_BLHD.reshape(*y_BLHD.shape[:2], -1)
