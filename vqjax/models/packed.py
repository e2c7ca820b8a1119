# SPDX-License-Identifier: Apache-2.0
"""Products with a weight as it is stored: `vqjax.kernels` decides how they run.

Dimension key:  B batch   H W image   I features in   O features out
"""

import jax
import jax.numpy as jnp

from vqjax.core.tensor import VQTensor
from vqjax.kernels.dispatch import Choice
from vqjax.kernels.problem import Operands
from vqjax.kernels.vq_conv import api as conv
from vqjax.kernels.vq_conv.window import Window
from vqjax.kernels.vq_matmul import api as matmul


def product(x: jax.Array, kernel: VQTensor, bias_O: jax.Array | None) -> jax.Array:
    """Affine map of the last axis with a kernel [I, O], [..., O] in the dtype of x."""
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
    """
    return conv.vq_conv(
        *_operands(x_BHWI, kernel, bias_O),
        window=kernel.shape[0],
        strides=(stride, stride),
        padding=(padding, padding),
    )


def choice(
    x: jax.Array, kernel: VQTensor, *, window: int = 1, stride: int = 1, padding=(0, 0)
) -> Choice:
    """Returns how a layer with this input and kernel would run.

    Args:
      window, stride, padding: of a convolution, see `capture_inputs`.
    """
    operands = _operands(x, kernel, None)
    if kernel.ndim == 2:
        return matmul.choice(operands)
    return conv.choice(operands, Window(window, (stride, stride), (padding, padding)))


def _operands(x: jax.Array, kernel: VQTensor, bias_O: jax.Array | None) -> Operands:
    """What the kernels take. Scales of input channels are multiplied to what is read.

    The barrier makes codes depend on the input: XLA would otherwise take the decoding of a weight
    out of the sampler's loop, and hold all weights decoded as long as that runs.
    """
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
    )
