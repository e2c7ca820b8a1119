# SPDX-License-Identifier: Apache-2.0
"""Layers whose weight and input may be dense or quantized; the model files never ask which.

Where an `InputRange` stands beside a kernel as "input_range", the layer reads what its levels stand
for; with an `IntegerKernel`, it multiplies the levels themselves.

Dimension key:  B batch   H W image   L tokens   I features in   O features out   T time features
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqjax.core.activations import InputRange
from vqjax.core.integer import IntegerKernel
from vqjax.core.tensor import VQTensor
from vqjax.errors import VqjaxError

GROUPS = 32  # every GroupNorm of the latent diffusion models has 32 groups


def _kernel(
    module: nn.Module, shape: tuple[int, ...], dtype: jnp.dtype
) -> jax.Array | IntegerKernel:
    """`module.param("kernel")`, or a quantized one, which Linen's own shape check refuses."""
    if not module.has_variable("params", "kernel"):
        init = nn.initializers.lecun_normal()
        return module.param("kernel", init, shape, jnp.float32).astype(dtype)
    found = module.get_variable("params", "kernel")
    if tuple(found.shape) != shape:
        where = "/".join((*module.path, "kernel"))
        raise ValueError(f"{where}: stored shape {tuple(found.shape)}, the model needs {shape}")
    if isinstance(found, IntegerKernel):
        return found
    return found.decode(dtype) if isinstance(found, VQTensor) else jnp.asarray(found, dtype)


class _Affine(nn.Module):
    """What Dense and Conv share: the input as it is read, and which product is taken."""

    def product(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """The linear part, with any kernel of this layer's shape."""
        raise NotImplementedError

    def integer_product(self, x: jax.Array, kernel: IntegerKernel, read: InputRange) -> jax.Array:
        """The linear part in integers, rescaled to float32."""
        raise NotImplementedError

    def read(self, x: jax.Array) -> jax.Array:
        """The layer's input as it multiplies it: x itself where there is no range."""
        found = self.get_variable("params", "input_range")
        return x if found is None else found.fake_quantize(x)

    def linear(self, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The linear part with the layer's own kernel, in the dtype of x."""
        kernel = _kernel(self, shape, x.dtype)
        if not isinstance(kernel, IntegerKernel):
            return self.product(self.read(x), kernel)
        found, where = self.get_variable("params", "input_range"), "/".join((*self.path, "kernel"))
        if found is None:
            raise VqjaxError(
                f"{where}: integer kernel, but no range of its input; sample in floating point, or "
                f"calibrate activations"
            )
        if found.bits > 8:
            raise VqjaxError(
                f"{where}: inputs of {found.bits} bits, integer kernels take 8 or less; sample in "
                f"floating point"
            )
        return self.integer_product(x, kernel, found).astype(x.dtype)


class Dense(_Affine):
    """Affine map of the last axis, [..., I] -> [..., features], in the dtype of its input."""

    features: int
    use_bias: bool = True

    def product(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return x @ kernel

    def integer_product(self, x: jax.Array, kernel: IntegerKernel, read: InputRange) -> jax.Array:
        return kernel.product(x, read)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.linear(x, (x.shape[-1], self.features))
        if self.use_bias:
            bias_O = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            y += jnp.broadcast_to(bias_O.astype(x.dtype), y.shape)
        return y


class Conv(_Affine):
    """2-D convolution [B, H, W, I] -> [B, H', W', features] with explicit padding.

    Attributes:
      padding: zeros before and after each spatial axis. It is written out, since "SAME" pads a
        strided convolution differently from the original model.
    """

    features: int
    window: int = 3
    stride: int = 1
    padding: tuple[int, int] = (1, 1)

    def product(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(self.stride, self.stride),
            padding=(self.padding, self.padding),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def integer_product(self, x: jax.Array, kernel: IntegerKernel, read: InputRange) -> jax.Array:
        return kernel.convolution(x, read, self.stride, self.padding)

    @nn.compact
    def __call__(self, x_BHWI: jax.Array) -> jax.Array:
        shape = (self.window, self.window, x_BHWI.shape[-1], self.features)
        y_BHWO = self.linear(x_BHWI, shape)
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
