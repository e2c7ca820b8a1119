# SPDX-License-Identifier: Apache-2.0
"""Packed codes to weights: the definition that every faster implementation must agree with.

Dimension key:  O rows   J vectors of a row   M codebooks   K entries   G weights of a vector
                C codes of a row (J * M)   Y bytes of a row   V words of a row   D codes of a word
                L bytes of a word

A row's codes follow each other without gaps, least significant bit first. Where K is a power of
two, code c occupies the bits c * b ... (c + 1) * b - 1 of the row's little-endian bit string,
b = log2 K. Other K share words: D codes make the number code[0] + code[1] K + code[2] K^2 ...,
which takes fewer bits than D codes by themselves (K = 15: 16 codes in 63 bits), and words follow
each other like codes. A last word of fewer codes takes the bits that it needs. Rows start at bytes.
"""

import functools
from typing import Any, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np

Array = TypeVar("Array", jax.Array, np.ndarray)

MAX_ENTRIES = 65_536
_WORD_CODES, _WORD_BITS = 16, 64


@functools.cache
def code_word(entries: int) -> tuple[int, int]:
    """Returns D and the bits of a full word: the fewest bits per code, of these the fewest codes.

    A word has at most 16 codes and 64 bits.
    """
    if entries & (entries - 1) == 0:
        return 1, max(1, entries.bit_length() - 1)
    sizes = ((count, _number_bits(count, entries)) for count in range(1, _WORD_CODES + 1))
    fitting = [(count, bits) for count, bits in sizes if bits <= _WORD_BITS]
    return min(fitting, key=lambda word: word[1] / word[0])


def _number_bits(count: int, entries: int) -> int:
    return (entries**count - 1).bit_length()


def row_bits(count: int, entries: int) -> int:
    """Returns the bits of a row of `count` codes, before it is filled up to whole bytes."""
    size, bits = code_word(entries)
    rest = count % size
    return count // size * bits + (_number_bits(rest, entries) if rest else 0)


def packed_bytes(count: int, entries: int) -> int:
    """Returns the bytes of one row of `count` codes."""
    return -(-row_bits(count, entries) // 8)


def pack(codes_OC: jax.Array | np.ndarray, entries: int) -> jax.Array | np.ndarray:
    """Returns integer codes below K as bytes, uint8 [O, Y]. Unused last bits are zero.

    NumPy codes are packed by NumPy: a model has too many shapes to compile for each.
    """
    xp = np if isinstance(codes_OC, np.ndarray) else jnp
    rows, count = np.shape(codes_OC)
    size, bits = code_word(entries)
    words = -(-count // size)
    codes_OVD = xp.pad(codes_OC, ((0, 0), (0, words * size - count))).reshape(rows, words, size)
    if size == 1:
        shifts = xp.arange(bits, dtype=xp.uint32).reshape(1, 1, bits)
        bits_OVb = (codes_OVD.astype(xp.uint32) >> shifts) & xp.uint32(1)
    else:
        bytes_OVL = _to_words(codes_OVD.astype(xp.int32), entries, -(-bits // 8), xp)
        bits_OVb = xp.unpackbits(bytes_OVL, axis=2, bitorder="little")[..., :bits]
    bits_OX = bits_OVb.reshape(rows, words * bits)[:, : row_bits(count, entries)]
    return xp.packbits(bits_OX.astype(xp.uint8), axis=1, bitorder="little")


def _to_words(codes_OVD, entries: int, size: int, xp):
    """Returns code[0] + K (code[1] + K (...)) as bytes [O, V, L], the least significant first."""
    bytes_L = [xp.zeros(codes_OVD.shape[:2], xp.int32) for _ in range(size)]
    for place in reversed(range(codes_OVD.shape[2])):
        carry = codes_OVD[..., place]
        for index in range(size):
            carry = carry + bytes_L[index] * entries
            bytes_L[index], carry = carry & 255, carry >> 8
    return xp.stack(bytes_L, axis=2).astype(xp.uint8)


@overload
def unpack(packed_OY: np.ndarray, count: int, entries: int) -> np.ndarray: ...
@overload
def unpack(packed_OY: jax.Array, count: int, entries: int) -> jax.Array: ...
def unpack(packed_OY, count, entries):
    """The inverse of `pack`: the first `count` codes of each row, int32 [O, C].

    NumPy bytes are unpacked by NumPy, as in `pack`.
    """
    xp = np if isinstance(packed_OY, np.ndarray) else jnp
    size, bits = code_word(entries)
    if size > 1:
        return _from_words(packed_OY, count, entries, xp)
    rows = packed_OY.shape[0]
    mask = (1 << bits) - 1
    if 8 % bits == 0:
        shifts = xp.arange(0, 8, bits, dtype=xp.int32).reshape(1, 1, -1)
        codes = (packed_OY.astype(xp.int32)[..., None] >> shifts) & mask
        return codes.reshape(rows, -1)[:, :count]
    # A code of up to 16 bits touches at most three bytes.
    start_C = np.arange(count) * bits
    window_OC = xp.zeros((rows, count), xp.int32)
    padded_OY = xp.pad(packed_OY, ((0, 0), (0, 2))).astype(xp.int32)
    for byte in range(3):
        window_OC |= padded_OY[:, start_C // 8 + byte] << (8 * byte)
    return (window_OC >> xp.asarray(start_C % 8, xp.int32)[None]) & mask


def _from_words(packed_OY, count: int, entries: int, xp):
    """Long division of every word by K, byte by byte: no integer is longer than 32 bits."""
    size, bits = code_word(entries)
    rows, words = packed_OY.shape[0], -(-count // size)
    bits_OX = xp.unpackbits(packed_OY, axis=1, bitorder="little")[:, : row_bits(count, entries)]
    bits_OX = xp.pad(bits_OX, ((0, 0), (0, words * bits - bits_OX.shape[1])))
    bytes_OVL = xp.packbits(bits_OX.reshape(rows, words, bits), axis=2, bitorder="little")
    bytes_L = [bytes_OVL[..., index].astype(xp.int32) for index in range(bytes_OVL.shape[2])]

    def divided(bytes_L, _):
        rest, quotients_L = xp.zeros((rows, words), xp.int32), []
        for byte in reversed(bytes_L):
            rest = rest * 256 + byte
            quotients_L.insert(0, rest // entries)
            rest = rest % entries
        return quotients_L, rest

    if xp is np:
        codes_DOV = np.zeros((size, rows, words), np.int32)
        for place in range(size):
            bytes_L, codes_DOV[place] = divided(bytes_L, place)
    else:  # unrolled, XLA works out remainders anew for every code, and compiles for seconds
        _, codes_DOV = jax.lax.scan(divided, bytes_L, length=size)
    return xp.moveaxis(codes_DOV, 0, 2).reshape(rows, words * size)[:, :count]


def real_codebooks(codebooks_MKG: Array, codebook_scale: Array | None) -> Array:
    """Returns the codebooks in float32: int8 ones are multiples of `codebook_scale`."""
    books_MKG = codebooks_MKG.astype(jnp.float32)
    return books_MKG if codebook_scale is None else books_MKG * codebook_scale.astype(jnp.float32)


def sum_entries(codes_OJM: Array, books_MKG: Array) -> Array:
    """Returns the sum over m of the chosen entries, [..., G], added in the order of m.

    Codes must be below K.
    """
    total_OJG: Any = _entries(books_MKG[0], codes_OJM[..., 0])
    for m in range(1, books_MKG.shape[0]):
        total_OJG += _entries(books_MKG[m], codes_OJM[..., m])
    return total_OJG


def sum_entries_at_once(codes_OJM: jax.Array, books_MKG: jax.Array) -> jax.Array:
    """Returns `sum_entries` by one gather, whose gradient is one scatter.

    A fifth less to compile than gathers for each m, and no slower; but on a CPU the entries of all
    m are in memory together.
    """
    books, entries, group = books_MKG.shape
    first_M = entries * np.arange(books, dtype=np.int32)
    places_OJM = codes_OJM.astype(jnp.int32) + first_M.reshape(*[1] * (codes_OJM.ndim - 1), books)
    return jnp.sum(_entries(books_MKG.reshape(-1, group), places_OJM), axis=-2)


def _entries(book_KG: Any, codes: Any) -> Any:
    """Codes are in bounds: XLA need not look at each."""
    if isinstance(book_KG, np.ndarray):
        return book_KG[codes]
    return book_KG.at[codes].get(mode="promise_in_bounds")


def decode_integers(packed_OY: jax.Array, codebooks_MKG: jax.Array, *, groups: int) -> jax.Array:
    """Returns the sums of entries of int8 codebooks, int32 [O, groups * G]; scales are left out.

    Args:
      packed_OY, codebooks_MKG, groups: as in `decode`.
    """
    books, entries, _ = codebooks_MKG.shape
    rows = packed_OY.shape[0]
    codes_OJM = unpack(packed_OY, groups * books, entries).reshape(rows, groups, books)
    return sum_entries(codes_OJM, codebooks_MKG.astype(jnp.int32)).reshape(rows, -1)


def decode(
    packed_OY: Array,
    codebooks_MKG: Array,
    scales_O: Array,
    codebook_scale: Array | None = None,
    *,
    groups: int,
) -> Array:
    """Returns the weight matrix in float32, [O, groups * G].

    Row o, vector j is scales[o] * sum over m of codebooks[m, code[o, j, m]] (AQLM,
    arXiv:2401.06118, section 3.1). Differentiable in the codebooks and the scales. NumPy arrays
    are decoded by NumPy, as in `pack`.

    Args:
      packed_OY: uint8, the codes of a row in the order (j, m), as `pack` makes them.
      codebooks_MKG: floating point, or int8 with `codebook_scale`.
      scales_O: one factor per row, floating point.
      codebook_scale: float scalar that turns int8 codebooks into numbers; None for floating point.
      groups: J, vectors of a row.
    """
    books, entries, group = codebooks_MKG.shape
    rows = packed_OY.shape[0]
    codes_OJM = unpack(packed_OY, groups * books, entries).reshape(rows, groups, books)
    total_OJG = sum_entries(codes_OJM, real_codebooks(codebooks_MKG, codebook_scale))
    return total_OJG.reshape(rows, groups * group) * scales_O.astype(jnp.float32)[:, None]
