# SPDX-License-Identifier: Apache-2.0
"""The definition of `vq_conv`: decode, then convolve.

Dimension key:  B batch   H W image   I inputs   O outputs   G weights of a vector   M codebooks
                K entries   J vectors of a row (I * window**2 / G, rounded up)
                Y bytes of a row
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from vqjax.kernels.decode import decode


def vq_conv(
    x_BHWI: jax.Array,
    packed_OY: jax.Array,
    codebooks_MKG: jax.Array,
    scales_O: jax.Array,
    codebook_scale: jax.Array | None = None,
    *,
    window: int,
    strides: tuple[int, int] = (1, 1),
    padding: str | Sequence[tuple[int, int]] = "SAME",
) -> jax.Array:
    """Returns the convolution with a window x window kernel, [B, H', W', O] in the type of x.

    Args:
      x_BHWI: any floating type.
      packed_OY, codebooks_MKG, scales_O, codebook_scale: as in `decode`; columns of the matrix are
        ordered (input channel, ky, kx).
      strides, padding: as in `jax.lax.conv_general_dilated`.
    """
    inputs = x_BHWI.shape[-1]
    fan_in = inputs * window * window
    groups = -(-fan_in // codebooks_MKG.shape[-1])
    w_OP = decode(packed_OY, codebooks_MKG, scales_O, codebook_scale, groups=groups)
    w_OIHW = w_OP[:, :fan_in].reshape(-1, inputs, window, window)
    return jax.lax.conv_general_dilated(
        x_BHWI.astype(jnp.float32),
        w_OIHW,
        window_strides=strides,
        padding=padding,
        dimension_numbers=("NHWC", "OIHW", "NHWC"),
    ).astype(x_BHWI.dtype)
