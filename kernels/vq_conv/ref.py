# SPDX-License-Identifier: Apache-2.0
"""The definition of `vq_conv`: decode, then convolve. It is also the path of most devices.

Dimension key:  B batch   H W image   I inputs   O outputs   N fan-in (I * window**2)   G weights of
                a vector   M codebooks   K entries   J vectors of a row (N / G, rounded up)
                Y bytes of a row
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqjax.kernels.decode import decode, decode_integers
from vqjax.kernels.problem import IntegerOperands, Problem
from vqjax.kernels.vq_conv.window import Window
from vqjax.kernels.vq_matmul.ref import integer_product, precision_of


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
    return convolve_places(x_BHWI, by_places(w_ON, window), bias_O, window)


def by_places(w_ON: jax.Array, window: Window) -> jax.Array:
    """Returns a weight whose columns are ordered (input channel, ky, kx) as [O, ky, kx, I]."""
    return w_ON.reshape(len(w_ON), -1, window.size, window.size).transpose(0, 2, 3, 1)


def convolve_places(
    x_BHWI: jax.Array, w_OHWI: jax.Array, bias_O: jax.Array | None, window: Window
) -> jax.Array:
    """Returns the convolution with a decoded weight [O, ky, kx, I] in the type of x.

    On GPUs XLA makes one call of it and its bias: of this layout, with all arrays of one type.
    """
    # Products of half precision are asked for in half precision, since a float32 result would
    # have no derivative in JAX; libraries of GPUs add up in float32 all the same.
    y_BHWO = jax.lax.conv_general_dilated(
        x_BHWI,
        w_OHWI,
        window_strides=window.strides,
        padding=window.padding,
        dimension_numbers=("NHWC", "OHWI", "NHWC"),
        precision=precision_of(x_BHWI),
    )
    if bias_O is None:
        return y_BHWO
    return y_BHWO + bias_O.astype(y_BHWO.dtype)[None, None, None]


def definition(problem: Problem, window: Window) -> Callable[[Any], jax.Array]:
    """Returns what defines a problem's result, by its operands."""
    if problem.integer:
        return lambda operands: vq_conv_int8(operands, window)
    return lambda operands: vq_conv(*operands.defining, **window.keywords())


def vq_conv_int8(operands: IntegerOperands, window: Window) -> jax.Array:
    """Returns what `problem.Scaling` says of the sums of the convolution, float32 [B, H', W', O].

    Args:
      operands: x [B, H, W, I] was padded with levels (`pad_levels`).
      window: without padding.
    """
    fan_in = operands.x.shape[-1] * window.size**2
    groups = -(-fan_in // operands.codebooks_MKG.shape[-1])
    w_OP = decode_integers(operands.packed_OY, operands.codebooks_MKG, groups=groups)
    w_OHWI = by_places(w_OP[:, :fan_in].astype(jnp.int8), window)
    return scaled_sums(operands, w_OHWI, window)


def scaled_sums(operands: IntegerOperands, w_OHWI: jax.Array, window: Window) -> jax.Array:
    """The same with a decoded weight, int8 [O, ky, kx, I]."""
    sums = integer_sums(operands.x, w_OHWI.transpose(1, 2, 3, 0), window.strides)
    y_PO = operands.scaling().apply(sums.reshape(-1, sums.shape[-1]))
    return y_PO.reshape(sums.shape)


def integer_sums(q_BHWI: jax.Array, w_HWIO: jax.Array, strides: tuple[int, int]) -> jax.Array:
    """Convolution without padding, int8 * int8 -> int32 [B, H', W', O].

    It is one product with what each pixel sees, side by side: XLA has fast products of int8 on more
    devices than convolutions of int8. These patches are bytes; a product for each place of the
    window would pass its sums, of 32 bits, through memory.
    """
    batch, *sides, inputs = q_BHWI.shape
    window = w_HWIO.shape[:2]
    # Where the last window of each axis begins.
    last = [(side - size) // step * step for side, size, step in zip(sides, window, strides)]
    places = [
        jax.lax.slice(
            q_BHWI,
            (0, y, x, 0),
            (batch, y + last[0] + 1, x + last[1] + 1, inputs),
            (1, *strides, 1),
        )
        for y, x in np.ndindex(*window)
    ]
    patches_BHWN = jnp.concatenate(places, axis=-1)
    return integer_product(patches_BHWN, w_HWIO.reshape(-1, w_HWIO.shape[-1]))


def pad_levels(
    q_BHWI: jax.Array, zeros_B: jax.Array, padding: Sequence[tuple[int, int]]
) -> jax.Array:
    """Pads with the levels that stand for 0.0, which differ from example to example.

    Args:
      q_BHWI: int8.
      zeros_B: whole numbers that fit int8.
      padding: levels before and after, of height and width.
    """
    (above, below), (left, right) = padding
    if not above + below + left + right:
        return q_BHWI
    batch, height, width, inputs = q_BHWI.shape
    shape = (batch, height + above + below, width + left + right, inputs)
    padded = jnp.broadcast_to(zeros_B.astype(jnp.int8).reshape(-1, 1, 1, 1), shape)
    return jax.lax.dynamic_update_slice(padded, q_BHWI, (0, above, left, 0))
