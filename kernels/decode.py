# SPDX-License-Identifier: Apache-2.0
"""Packed codes to weights: the definition that every faster implementation must agree with.

Dimension key:  O rows   J vectors of a row   M codebooks   K entries   G weights of a vector
                C codes of a row (J * M)   Y bytes of a row (C * bits / 8, rounded up)

A row's codes follow each other without gaps, least significant bit first, so that code c occupies
the bits c * bits ... (c + 1) * bits - 1 of the row's little-endian bit string. Rows start at bytes.
"""

import jax
import jax.numpy as jnp
import numpy as np

MAX_BITS = 16


def code_bits(entries: int) -> int:
    """Returns the bits of one code that can name `entries` codebook entries: at least 1."""
    return max(1, (entries - 1).bit_length())


def packed_bytes(count: int, bits: int) -> int:
    """Returns the bytes of one row of `count` codes."""
    return -(-count * bits // 8)


def pack(codes_OC: jax.Array | np.ndarray, bits: int) -> jax.Array | np.ndarray:
    """Returns integer codes below 2**bits as bytes, uint8 [O, Y]. Unused last bits are zero.

    NumPy codes are packed by NumPy: a model has too many shapes to compile for each.
    """
    xp = np if isinstance(codes_OC, np.ndarray) else jnp
    rows, count = np.shape(codes_OC)
    shifts = xp.arange(bits, dtype=xp.uint32).reshape(1, 1, bits)
    bits_OCb = (xp.asarray(codes_OC).astype(xp.uint32)[..., None] >> shifts) & xp.uint32(1)
    bits_OX = bits_OCb.reshape(rows, count * bits).astype(xp.uint8)
    return xp.packbits(bits_OX, axis=1, bitorder="little")


def unpack(packed_OY: jax.Array, count: int, bits: int) -> jax.Array:
    """The inverse of `pack`: the first `count` codes of each row, int32 [O, C]."""
    rows = packed_OY.shape[0]
    mask = (1 << bits) - 1
    if 8 % bits == 0:
        shifts = jnp.arange(0, 8, bits, dtype=jnp.int32).reshape(1, 1, -1)
        codes = (packed_OY.astype(jnp.int32)[..., None] >> shifts) & mask
        return codes.reshape(rows, -1)[:, :count]
    # A code of up to 16 bits touches at most three bytes.
    start_C = np.arange(count) * bits
    window_OC = jnp.zeros((rows, count), jnp.int32)
    padded_OY = jnp.pad(packed_OY, ((0, 0), (0, 2))).astype(jnp.int32)
    for byte in range(3):
        window_OC |= padded_OY[:, start_C // 8 + byte] << (8 * byte)
    return (window_OC >> jnp.asarray(start_C % 8, jnp.int32)[None]) & mask


def real_codebooks(codebooks_MKG: jax.Array, codebook_scale: jax.Array | None) -> jax.Array:
    """Returns the codebooks in float32: int8 ones are multiples of `codebook_scale`."""
    books_MKG = codebooks_MKG.astype(jnp.float32)
    return books_MKG if codebook_scale is None else books_MKG * codebook_scale.astype(jnp.float32)


def sum_entries(codes_OJM: jax.Array, books_MKG: jax.Array) -> jax.Array:
    """Returns the sum over m of the chosen entries, [O, J, G], added in the order of m."""
    total_OJG = books_MKG[0][codes_OJM[..., 0]]
    for m in range(1, books_MKG.shape[0]):
        total_OJG += books_MKG[m][codes_OJM[..., m]]
    return total_OJG


def decode(
    packed_OY: jax.Array,
    codebooks_MKG: jax.Array,
    scales_O: jax.Array,
    codebook_scale: jax.Array | None = None,
    *,
    groups: int,
) -> jax.Array:
    """Returns the weight matrix in float32, [O, groups * G].

    Row o, vector j is scales[o] * sum over m of codebooks[m, code[o, j, m]] (AQLM,
    arXiv:2401.06118, section 3.1). Differentiable in the codebooks and the scales.

    Args:
      packed_OY: uint8, the codes of a row in the order (j, m), as `pack` makes them.
      codebooks_MKG: floating point, or int8 with `codebook_scale`.
      scales_O: one factor per row, floating point.
      codebook_scale: float scalar that turns int8 codebooks into numbers; None for floating point.
      groups: J, vectors of a row.
    """
    books, entries, group = codebooks_MKG.shape
    rows = packed_OY.shape[0]
    codes_OJM = unpack(packed_OY, groups * books, code_bits(entries)).reshape(rows, groups, books)
    total_OJG = sum_entries(codes_OJM, real_codebooks(codebooks_MKG, codebook_scale))
    return total_OJG.reshape(rows, groups * group) * scales_O.astype(jnp.float32)[:, None]
