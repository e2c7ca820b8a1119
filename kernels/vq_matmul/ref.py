# SPDX-License-Identifier: Apache-2.0
"""The definition of `vq_matmul`: decode, then multiply. It is also the path of most devices.

Dimension key:  B rows of x   I inputs   O outputs   J = I / G rounded up   G weights of a vector
                M codebooks   K entries   Y bytes of a row of codes
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vqjax.kernels.decode import decode, decode_integers
from vqjax.kernels.problem import IntegerOperands, Problem


def vq_matmul(
    x_BI: jax.Array,
    packed_OY: jax.Array,
    codebooks_MKG: jax.Array,
    scales_O: jax.Array,
    codebook_scale: jax.Array | None = None,
    bias_O: jax.Array | None = None,
) -> jax.Array:
    """Returns x @ W.T + bias as [B, O] in the type of x.

    Weights are summed in float32 and rounded to the type of x, products are added up in float32.

    Args:
      x_BI: any floating type.
      packed_OY, codebooks_MKG, scales_O, codebook_scale: as in `decode`.
      bias_O: floating point, or None.
    """
    inputs = x_BI.shape[1]
    groups = -(-inputs // codebooks_MKG.shape[-1])
    w_OP = decode(packed_OY, codebooks_MKG, scales_O, codebook_scale, groups=groups)
    return product(x_BI, w_OP[:, :inputs].astype(x_BI.dtype), bias_O)


def product(x_BI: jax.Array, w_OI: jax.Array, bias_O: jax.Array | None) -> jax.Array:
    """Returns x @ w.T + bias for a decoded weight in the type of x."""
    y_BO = jnp.einsum(
        "bi,oi->bo",
        x_BI,
        w_OI,
        precision=precision_of(x_BI),
        preferred_element_type=jnp.float32,
    )
    if bias_O is not None:
        y_BO += bias_O.astype(jnp.float32)[None]
    return y_BO.astype(x_BI.dtype)


def precision_of(x: jax.Array) -> jax.lax.Precision | None:
    """Returns the precision of products with x: GPUs would shorten float32 to TF32."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def definition(problem: Problem) -> Callable[[Any], jax.Array]:
    """Returns what defines a problem's result, by its operands."""
    return vq_matmul_int8 if problem.integer else lambda operands: vq_matmul(*operands.defining)


def vq_matmul_int8(operands: IntegerOperands) -> jax.Array:
    """Returns what `problem.Scaling` says of the sums of x @ W.T, float32 [B, O].

    Weights are sums of entries, int8; products are added up in int32, so that sums are exact.
    """
    inputs = operands.x.shape[1]
    groups = -(-inputs // operands.codebooks_MKG.shape[-1])
    w_OP = decode_integers(operands.packed_OY, operands.codebooks_MKG, groups=groups)
    w_IO = w_OP[:, :inputs].astype(jnp.int8).T
    return operands.scaling().apply(integer_product(operands.x, w_IO))


def integer_product(q: jax.Array, w_IO: jax.Array) -> jax.Array:
    """Product over the last axis of q with the first of w, int8 x int8 -> int32 [..., O]."""
    axes = (((q.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(q, w_IO, axes, preferred_element_type=jnp.int32)
