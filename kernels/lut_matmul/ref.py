# SPDX-License-Identifier: Apache-2.0
"""Products with packed codes by lookup tables, in XLA: fewer operations than the dense product.

The product of each input vector with each codebook entry is computed once, for all outputs; an
output adds M table values per vector. Counted over P rows (one multiply-add is 2, an addition 1):

    tables  2 (J G) M K P        sums  M J O P        dense  2 N O P

The first of the M J values of a sum takes no addition, the scale of the output one multiplication.
That saves where many outputs share few entries (`counts` says where, `core.flops` counts the same
for reports). On CPUs XLA's gathers take longer than the products that they replace: the dispatcher
takes this path only where it is asked for, to count and to check.

Dimension key:  P rows of x   I inputs   N fan-in   O outputs   J vectors of a row   G weights of a
                vector   M codebooks   K entries   L table values of a row (J M K)   Y bytes of a
                row   S sums of an output (J M)
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from vqjax.kernels.decode import real_codebooks, unpack
from vqjax.kernels.vq_conv.window import Window

_MOST_GATHERED = 1 << 24
"""Table values that are gathered at a time (64 MB), one vector of all outputs at least."""


def lut_matmul(
    x_PI: jax.Array,
    packed_OY: jax.Array,
    codebooks_MKG: jax.Array,
    scales_O: jax.Array,
    codebook_scale: jax.Array | None = None,
    bias_O: jax.Array | None = None,
) -> jax.Array:
    """Returns what `vq_matmul` defines, [P, O] in the type of x; computed in float32.

    Args:
      x_PI: any floating type.
      packed_OY, codebooks_MKG, scales_O, codebook_scale, bias_O: as in `vq_matmul`.
    """
    rows, inputs = x_PI.shape
    books, entries, group = codebooks_MKG.shape
    groups = -(-inputs // group)
    x_PN = jnp.pad(x_PI.astype(jnp.float32), ((0, 0), (0, groups * group - inputs)))
    codes_OS = unpack(packed_OY, groups * books, entries)
    codes_OJM = codes_OS.reshape(packed_OY.shape[0], groups, books)
    books_MKG = real_codebooks(codebooks_MKG, codebook_scale)
    y_PO = _lookup(x_PN.reshape(rows, groups, group), codes_OJM, books_MKG)
    y_PO = y_PO * scales_O.astype(jnp.float32)[None]
    if bias_O is not None:
        y_PO += bias_O.astype(jnp.float32)[None]
    return y_PO.astype(x_PI.dtype)


def lut_conv(
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
    """Returns what `vq_conv` defines: `lut_matmul` of the patches, which are stored here."""
    image = x_BHWI.shape[1:3]
    shape = Window.of(window, strides, padding, image)
    patches_PN = _patches(x_BHWI, shape)
    arrays = (packed_OY, codebooks_MKG, scales_O, codebook_scale, bias_O)
    y_PO = lut_matmul(patches_PN, *arrays)
    return y_PO.reshape(x_BHWI.shape[0], *shape.outputs(image), -1)


def tables(x_PJG: jax.Array, books_MKG: jax.Array) -> jax.Array:
    """Returns the products of all input vectors with all entries, [L, P]."""
    # float32 is multiplied as such: a GPU would round it to TF32 by default.
    exact = jax.lax.Precision.HIGHEST
    products_JMKP = jnp.einsum("pjg,mkg->jmkp", x_PJG, books_MKG, precision=exact)
    return products_JMKP.reshape(-1, x_PJG.shape[0])


def add_up(tables_LP: jax.Array, places_OS: jax.Array) -> jax.Array:
    """Returns the sums of S table values per output, [P, O]."""
    found_OSP = tables_LP.at[places_OS].get(mode="promise_in_bounds", wrap_negative_indices=False)
    return jnp.sum(found_OSP, axis=1).T


def _lookup(x_PJG: jax.Array, codes_OJM: jax.Array, books_MKG: jax.Array) -> jax.Array:
    rows, groups, group = x_PJG.shape
    outputs, _, books = codes_OJM.shape
    entries = books_MKG.shape[1]
    part = max(1, min(groups, _MOST_GATHERED // (outputs * books * rows)))
    parts = -(-groups // part)
    # Vectors that fill up the last part are zero: whatever their codes are, they add zero.
    more = parts * part - groups
    x_PJG = jnp.pad(x_PJG, ((0, 0), (0, more), (0, 0)))
    codes_OJM = jnp.pad(codes_OJM, ((0, 0), (0, more), (0, 0)))
    first_JM = (jnp.arange(part)[:, None] * books + jnp.arange(books)[None]) * entries

    def one(x_PJG: jax.Array, codes_OJM: jax.Array) -> jax.Array:
        places_OS = (codes_OJM + first_JM[None]).reshape(outputs, -1)
        return add_up(tables(x_PJG, books_MKG), places_OS)

    if parts == 1:
        return one(x_PJG, codes_OJM)

    def step(y_PO: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return y_PO + one(*inputs), None

    x_parts = x_PJG.reshape(rows, parts, part, group).swapaxes(0, 1)
    code_parts = codes_OJM.reshape(outputs, parts, part, books).swapaxes(0, 1)
    y_PO, _ = jax.lax.scan(step, one(x_parts[0], code_parts[0]), (x_parts[1:], code_parts[1:]))
    return y_PO


def _patches(x_BHWI: jax.Array, window: Window) -> jax.Array:
    """Returns what each output pixel sees, [P, I * size**2] ordered (channel, ky, kx)."""
    height, width = window.outputs(x_BHWI.shape[1:3])
    padded_BHWI = jnp.pad(x_BHWI, ((0, 0), *window.padding, (0, 0)))
    down, right = window.strides
    seen = [
        padded_BHWI[:, ky : ky + height * down : down, kx : kx + width * right : right]
        for ky in range(window.size)
        for kx in range(window.size)
    ]
    return jnp.stack(seen, axis=-1).reshape(x_BHWI.shape[0] * height * width, -1)
