# SPDX-License-Identifier: Apache-2.0
"""The definition of `vq_conv`: decode, then convolve. It is also the path of most devices.

Dimension key:  B batch   H W image   I inputs   O outputs   N fan-in (I * window**2)   G weights of
                a vector   M codebooks   K entries   J vectors of a row (N / G, rounded up)
                Y bytes of a row
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from vqjax.kernels.decode import decode
from vqjax.kernels.vq_conv.window import Window


def vq_conv(
    x_BHWI: jax.Array,
    packed_OY: jax.Array,
    codebooks_MKG: jax.Array,
    scales_O: jax.Array,
    codebook_scale: jax.Array | None = None,
    bias_O: jax.Array | None = None,
    *,
    window: int,
    strides: tuple[int, int] = (1, 1),
    padding: str | Sequence[tuple[int, int]] = "SAME",
) -> jax.Array:
    """Returns the convolution with a window x window kernel, [B, H', W', O] in the type of x.

    Weights are summed in float32 and rounded to the type of x, in which the convolution runs.

    Args:
      x_BHWI: any floating type.
      packed_OY, codebooks_MKG, scales_O, codebook_scale: as in `decode`; columns of the matrix are
        ordered (input channel, ky, kx).
      bias_O: floating point, or None.
      strides, padding: as in `jax.lax.conv_general_dilated`.
    """
    fan_in = x_BHWI.shape[-1] * window * window
    groups = -(-fan_in // codebooks_MKG.shape[-1])
    w_OP = decode(packed_OY, codebooks_MKG, scales_O, codebook_scale, groups=groups)
    shape = Window.of(window, strides, padding, x_BHWI.shape[1:3])
    return convolve(x_BHWI, w_OP[:, :fan_in].astype(x_BHWI.dtype), bias_O, shape)


def convolve(
    x_BHWI: jax.Array, w_ON: jax.Array, bias_O: jax.Array | None, window: Window
) -> jax.Array:
    """Returns the convolution with a decoded weight in the type of x."""
    # Products of half precision are asked for in half precision, since a float32 result would
    # have no derivative in JAX; libraries of GPUs add up in float32 all the same.
    y_BHWO = jax.lax.conv_general_dilated(
        x_BHWI,
        w_ON.reshape(w_ON.shape[0], x_BHWI.shape[-1], window.size, window.size),
        window_strides=window.strides,
        padding=window.padding,
        dimension_numbers=("NHWC", "OIHW", "NHWC"),
    )
    if bias_O is None:
        return y_BHWO
    y_BHWO = y_BHWO.astype(jnp.float32) + bias_O.astype(jnp.float32)[None, None, None]
    return y_BHWO.astype(x_BHWI.dtype)
