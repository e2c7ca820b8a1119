# SPDX-License-Identifier: Apache-2.0
"""Layers whose weight and input may be dense or quantized; the model files never ask which.

Where an `InputRange` stands beside a kernel as "input_range", the layer reads what its levels stand
for; with an `IntegerKernel`, it multiplies the levels themselves. A `VQTensor` and a
`PackedIntegerKernel` are multiplied as they are stored (`models.packed`).

Dimension key:  B batch   H W image   L tokens   I features in   O features out   T time features
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqjax.core.activations import InputRange
from vqjax.core.integer import IntegerKernel, PackedIntegerKernel
from vqjax.core.tensor import VQTensor
from vqjax.errors import VqjaxError
from vqjax.kernels import device
from vqjax.models import packed

GROUPS = 32  # every GroupNorm of the latent diffusion models has 32 groups


Kernel = jax.Array | IntegerKernel | PackedIntegerKernel | VQTensor


class _Affine(nn.Module):
    """What Dense and Conv share: kernel and input as they are read, and which product is taken."""

    def product(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """The linear part, with any kernel of this layer's shape."""
        raise NotImplementedError

    def integer_product(self, x: jax.Array, kernel: IntegerKernel, read: InputRange) -> jax.Array:
        """The linear part in integers, rescaled to float32."""
        raise NotImplementedError

    def packed_product(self, x: jax.Array, kernel: VQTensor, bias_O: jax.Array | None) -> jax.Array:
        """The affine map with a kernel as it is stored, in the dtype of x."""
        raise NotImplementedError

    def packed_integer_product(
        self, x: jax.Array, kernel: PackedIntegerKernel, read: InputRange, bias_O: jax.Array | None
    ) -> jax.Array:
        """The same in integers, in float32."""
        raise NotImplementedError

    def read(self, x: jax.Array) -> jax.Array:
        """The layer's input as it multiplies it: x itself where there is no range."""
        found = self.get_variable("params", "input_range")
        return x if found is None else found.fake_quantize(x)

    def kernel(self, shape: tuple[int, ...], dtype: jnp.dtype) -> Kernel:
        """`self.param("kernel")`, or a quantized one, which Linen's own shape check refuses."""
        if not self.has_variable("params", "kernel"):
            init = nn.initializers.lecun_normal()
            return self.param("kernel", init, shape, jnp.float32).astype(dtype)
        found = self.get_variable("params", "kernel")
        if tuple(found.shape) != shape:
            where = "/".join((*self.path, "kernel"))
            raise ValueError(f"{where}: stored shape {tuple(found.shape)}, the model needs {shape}")
        if isinstance(found, IntegerKernel | PackedIntegerKernel | VQTensor):
            return found
        return jnp.asarray(found, dtype)

    def affine(self, x: jax.Array, kernel: Kernel, bias_O: jax.Array | None) -> jax.Array:
        """The layer's output in the dtype of x."""
        if isinstance(kernel, VQTensor):
            return self.packed_product(self.read(x), kernel, bias_O)
        if isinstance(kernel, PackedIntegerKernel):
            read = self._range_of_integers()
            return self.packed_integer_product(x, kernel, read, bias_O).astype(x.dtype)
        if isinstance(kernel, IntegerKernel):
            y = self.integer_product(x, kernel, self._range_of_integers()).astype(x.dtype)
        else:
            y = self.product(self.read(x), kernel)
        return y if bias_O is None else y + jnp.broadcast_to(bias_O.astype(y.dtype), y.shape)

    def _range_of_integers(self) -> InputRange:
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
        return found


class Dense(_Affine):
    """Affine map of the last axis, [..., I] -> [..., features], in the dtype of its input."""

    features: int
    use_bias: bool = True

    def product(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return x @ kernel

    def integer_product(self, x: jax.Array, kernel: IntegerKernel, read: InputRange) -> jax.Array:
        return kernel.product(x, read)

    def packed_product(self, x: jax.Array, kernel: VQTensor, bias_O: jax.Array | None) -> jax.Array:
        return packed.product(x, kernel, bias_O)

    def packed_integer_product(
        self, x: jax.Array, kernel: PackedIntegerKernel, read: InputRange, bias_O: jax.Array | None
    ) -> jax.Array:
        return packed.integer_product(x, kernel, read, bias_O)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel, bias_O = self.kernel((x.shape[-1], self.features), x.dtype), None
        if self.use_bias:
            bias_O = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return self.affine(x, kernel, bias_O)


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
        point = (self.window, self.stride, self.padding) == (1, 1, (0, 0))
        if point and device.current().platform == "cpu":
            # The same to the bit. A step of training takes a fifth less, and compiling it. On a GPU
            # cuDNN adds the bias in the same call, which XLA's products leave to another kernel.
            return x @ kernel[0, 0]
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(self.stride, self.stride),
            padding=(self.padding, self.padding),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def integer_product(self, x: jax.Array, kernel: IntegerKernel, read: InputRange) -> jax.Array:
        return kernel.convolution(x, read, self.stride, self.padding)

    def packed_product(self, x: jax.Array, kernel: VQTensor, bias_O: jax.Array | None) -> jax.Array:
        return packed.convolution(x, kernel, bias_O, self.stride, self.padding)

    def packed_integer_product(
        self, x: jax.Array, kernel: PackedIntegerKernel, read: InputRange, bias_O: jax.Array | None
    ) -> jax.Array:
        return packed.integer_convolution(x, kernel, read, bias_O, self.stride, self.padding)

    @nn.compact
    def __call__(self, x_BHWI: jax.Array) -> jax.Array:
        shape = (self.window, self.window, x_BHWI.shape[-1], self.features)
        kernel = self.kernel(shape, x_BHWI.dtype)
        bias_O = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return self.affine(x_BHWI, kernel, bias_O)


def pointwise(features: int, name: str) -> Conv:
    """A 1x1 convolution."""
    return Conv(features, window=1, padding=(0, 0), name=name)


class GroupNorm(nn.Module):
    """GroupNorm (arXiv:1803.08494) over `GROUPS` groups of channels, [..., C] with a leading batch.

    Computed in float32, as its parameters are; the result has the dtype of x. The variance is that
    of x - mean: the one-pass form loses digits on small activations. Sums run over positions first
    and over the few channels of a group last: a CPU vectorizes over channels then, and not in a
    reduction over both at once.
    """

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        scale_C = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias_C = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        leading = tuple(range(x.ndim - 1))
        scale, bias = (jnp.expand_dims(p_C, leading) for p_C in (scale_C, bias_C))
        positions = leading[1:]

        def over_groups(x: jax.Array) -> jax.Array:
            """Means of groups, for each channel, [B, 1 ..., C]."""
            mean_BC = jnp.mean(x, positions)
            mean_BG = jnp.mean(mean_BC.reshape(len(x), GROUPS, -1), axis=-1)
            mean_BC = jnp.repeat(mean_BG, channels // GROUPS, axis=-1)
            return jnp.expand_dims(mean_BC, positions)

        centred = x.astype(jnp.float32)
        centred -= over_groups(centred)
        factor = jax.lax.rsqrt(over_groups(centred**2) + self.epsilon) * scale
        return (centred * factor + bias).astype(x.dtype)


class _LayerNorm(nn.LayerNorm):
    """Computed in float32, as its parameters are; the result has the dtype of x."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x).astype(x.dtype)


def layer_norm(name: str) -> nn.LayerNorm:
    """LayerNorm with the original epsilon 1e-5 (Flax defaults to 1e-6)."""
    return _LayerNorm(epsilon=1e-5, use_fast_variance=False, name=name)


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
