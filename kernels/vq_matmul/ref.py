# SPDX-License-Identifier: Apache-2.0
"""The definition of `vq_matmul`: decode, then multiply.

Dimension key:  B rows of x   I inputs   O outputs   J = I / G rounded up   G weights of a vector
                M codebooks   K entries   Y bytes of a row of codes
"""

import jax
import jax.numpy as jnp

from vqjax.kernels.decode import decode


def vq_matmul(
    x_BI: jax.Array,
    packed_OY: jax.Array,
    codebooks_MKG: jax.Array,
    scales_O: jax.Array,
    codebook_scale: jax.Array | None = None,
) -> jax.Array:
    """Returns x @ W.T as [B, O] in the type of x, accumulated in float32.

    Args:
      x_BI: any floating type.
      packed_OY, codebooks_MKG, scales_O, codebook_scale: as in `decode`.
    """
    inputs = x_BI.shape[1]
    groups = -(-inputs // codebooks_MKG.shape[-1])
    w_OP = decode(packed_OY, codebooks_MKG, scales_O, codebook_scale, groups=groups)
    return jnp.einsum("bi,oi->bo", x_BI.astype(jnp.float32), w_OP[:, :inputs]).astype(x_BI.dtype)
