# SPDX-License-Identifier: Apache-2.0
"""Products with a weight as it is stored: `vqjax.kernels` decides how they run.

Dimension key:  B batch   H W image   I features in   O features out
"""

import jax
import jax.numpy as jnp

from vqjax.core.activations import InputRange
from vqjax.core.integer import PackedIntegerKernel, shifted_zero
from vqjax.core.tensor import VQTensor
from vqjax.errors import VqjaxError
from vqjax.kernels.dispatch import Choice
from vqjax.kernels.problem import Operands
from vqjax.kernels.vq_conv import api as conv
from vqjax.kernels.vq_conv.window import Window
from vqjax.kernels.vq_matmul import api as matmul


def product(x: jax.Array, kernel: VQTensor, bias_O: jax.Array | None) -> jax.Array:
    """Affine map of the last axis with a kernel [I, O], [..., O] in the dtype of x.

    Raises:
      VqjaxError: if x has other features than the kernel.
    """
    return matmul.vq_matmul(*_operands(x, kernel, bias_O))


def convolution(
    x_BHWI: jax.Array,
    kernel: VQTensor,
    bias_O: jax.Array | None,
    stride: int,
    padding: tuple[int, int],
) -> jax.Array:
    """2-D convolution with a square kernel [H, W, I, O], [B, H', W', O] in the dtype of x.

    Args:
      padding: zeros before and after each spatial axis.

    Raises:
      VqjaxError: as `product`.
    """
    return conv.vq_conv(
        *_operands(x_BHWI, kernel, bias_O),
        window=kernel.shape[0],
        strides=(stride, stride),
        padding=(padding, padding),
    )


def integer_product(
    x: jax.Array, kernel: PackedIntegerKernel, read: InputRange, bias_O: jax.Array | None
) -> jax.Array:
    """`product` in integers: the levels of x [B, ..., I], float32 [B, ..., O]."""
    return matmul.vq_matmul_int8(*_integer_arguments(x, kernel, read, bias_O))


def integer_convolution(
    x_BHWI: jax.Array,
    kernel: PackedIntegerKernel,
    read: InputRange,
    bias_O: jax.Array | None,
    stride: int,
    padding: tuple[int, int],
) -> jax.Array:
    """`convolution` in integers, float32 [B, H', W', O]."""
    return conv.vq_conv_int8(
        *_integer_arguments(x_BHWI, kernel, read, bias_O),
        window=kernel.shape[0],
        strides=(stride, stride),
        padding=(padding, padding),
    )


def choice(
    x: jax.Array,
    kernel: VQTensor,
    *,
    integer: bool = False,
    window: int = 1,
    stride: int = 1,
    padding=(0, 0),
) -> Choice:
    """Returns how a layer with this input and kernel would run.

    Args:
      integer: in integers.
      window, stride, padding: of a convolution, see `capture_inputs`.
    """
    shape = Window(window, (stride, stride), (padding, padding))
    if integer:
        if kernel.ndim == 2:
            return matmul.integer_choice(x, kernel.codes, kernel.codebooks)
        return conv.integer_choice(x, kernel.codes, kernel.codebooks, shape)
    operands = _operands(x, kernel, None)
    if kernel.ndim == 2:
        return matmul.choice(operands)
    return conv.choice(operands, shape)


def _integer_arguments(
    x: jax.Array, kernel: PackedIntegerKernel, read: InputRange, bias_O: jax.Array | None
) -> tuple:
    """What the kernels take; the barrier is that of `_operands`."""
    tensor = kernel.tensor
    _check_features(x, kernel)
    x, codes = jax.lax.optimization_barrier((x, tensor.codes))
    return (
        read.quantize(x),
        read.step_B,
        shifted_zero(read),
        codes,
        tensor.codebooks,
        tensor.scales.values(),
        tensor.codebook_scale,
        kernel.totals_O,
        bias_O,
        tensor.prepared,
    )


def _operands(x: jax.Array, kernel: VQTensor, bias_O: jax.Array | None) -> Operands:
    """What the kernels take. Scales of input channels are multiplied to what is read.

    The barrier makes codes depend on the input: XLA would otherwise take the decoding of a weight
    out of the sampler's loop, and hold all weights decoded as long as that runs.
    """
    _check_features(x, kernel)
    x, codes = jax.lax.optimization_barrier((x, kernel.codes))
    if kernel.input_scales is not None:
        scales_I = kernel.input_scales.values().astype(x.dtype)
        x = x * jnp.broadcast_to(scales_I, x.shape)
    return Operands(
        x,
        codes,
        kernel.codebooks,
        kernel.scales.values(),
        kernel.codebook_scale,
        bias_O,
        kernel.prepared,
    )


def _check_features(x: jax.Array, kernel: VQTensor | PackedIntegerKernel) -> None:
    """Codes alone tell I only up to the vector that ends a row."""
    found, expected = x.shape[-1], kernel.shape[-2]
    if found != expected:
        raise VqjaxError(
            f"x {x.shape} has {found} features, the packed kernel {kernel.shape} takes {expected}: "
            "give the input of the layer that this kernel belongs to"
        )
