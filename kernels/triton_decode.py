# SPDX-License-Identifier: Apache-2.0
"""How a kernel in Triton reads packed codes, and the one that decodes a whole weight.

Importing this needs triton (`triton_gpu.missing`).

Dimension key:  O outputs   N fan-in   R rows of a tile   T outputs of a tile   V vectors of a tile
                G weights of a vector   P the same, up to a power of two
"""

from typing import Any

import jax
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from vqjax.kernels import gpu_arrays, triton_gpu
from vqjax.kernels.books import Books, books_for
from vqjax.kernels.problem import AnyOperands, Problem, Scaling, power_of_two
from vqjax.kernels.schedule import Tiles, vectors_of

jit = triton.jit
"""For modules named triton.py, in which type checkers take the package for the module itself."""


def code_constants(books: Books) -> dict[str, Any]:
    """Returns the sizes by which every kernel finds codes and entries, and what it adds up in."""
    problem = books.problem
    return {
        "OUTPUTS": problem.outputs,
        "GROUPS": problem.groups,
        "BYTES": problem.row_bytes,
        "BOOKS": problem.books,
        "ENTRIES": problem.entries,
        "BITS": problem.code_bits,
        "IN_TWO": gpu_arrays.in_two_bytes(problem.code_bits),
        "SUMS": getattr(tl, books.sums),
        "PADDED": power_of_two(problem.group),
    }


def scaling_operands(scaling: Scaling) -> tuple[jax.Array, ...]:
    """Returns what `finish` reads: in floating point the first two, and any array for the rest."""
    return tuple(scaling.factors_O if array is None else array for array in scaling)


@jit
def read_codes(
    packed_ptr, outputs_T, vectors_V,
    OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, BYTES: tl.constexpr, BOOKS: tl.constexpr,
    ENTRIES: tl.constexpr, BITS: tl.constexpr, IN_TWO: tl.constexpr,
):  # fmt: skip
    """Row numbers of the codebooks below each other, int32 [T, V] for each codebook.

    Beyond the last row and vector, codes are 0: a finite weight, which meets an input of 0 or is
    not stored.
    """
    OF_VECTOR: tl.constexpr = BOOKS * BITS
    WHOLE: tl.constexpr = OF_VECTOR % 8 == 0  # vectors begin at bytes
    inside_TV = (outputs_T < OUTPUTS)[:, None] & (vectors_V < GROUPS)[None, :]
    row_TV = packed_ptr + outputs_T[:, None] * BYTES
    codes_M = ()
    for book in tl.static_range(BOOKS):
        if WHOLE:  # two codes of one byte have one address
            byte_V = vectors_V * (OF_VECTOR // 8) + book * BITS // 8
        else:
            byte_V = (vectors_V * OF_VECTOR + book * BITS) >> 3
        code_TV = tl.load(row_TV + byte_V[None, :], mask=inside_TV, other=0).to(tl.int32)
        if IN_TWO and not (WHOLE and book * BITS % 8 + BITS <= 8):
            stored_TV = inside_TV & (byte_V + 1 < BYTES)[None, :]
            next_TV = tl.load(row_TV + byte_V[None, :] + 1, mask=stored_TV, other=0)
            code_TV = code_TV | (next_TV.to(tl.int32) << 8)
        if BITS != 8:
            if WHOLE:
                code_TV = code_TV >> (book * BITS % 8)
            else:
                code_TV = code_TV >> ((vectors_V * OF_VECTOR + book * BITS) & 7)[None, :]
            code_TV = code_TV & (ENTRIES - 1)
        codes_M = codes_M + (code_TV + book * ENTRIES,)  # noqa: RUF005 (Triton has no star)
    return codes_M


@jit
def sum_vectors(books_ptr, codes_M, BOOKS: tl.constexpr, PADDED: tl.constexpr, SUMS: tl.constexpr):
    """The sums of the chosen entries in the type SUMS, whole vectors, [T, V, P]."""
    places_P = tl.arange(0, PADDED)[None, None, :]
    total_TVP = tl.load(books_ptr + codes_M[0][:, :, None] * PADDED + places_P).to(SUMS)
    for book in tl.static_range(1, BOOKS):
        at_TVP = books_ptr + codes_M[book][:, :, None] * PADDED + places_P
        total_TVP += tl.load(at_TVP).to(SUMS)
    return total_TVP


@jit
def sum_places(
    books_ptr, codes_M, place, BOOKS: tl.constexpr, ENTRIES: tl.constexpr, SUMS: tl.constexpr
):
    """The sums of the chosen entries at one place of the vectors in the type SUMS, [T, V].

    Entries of a place lie side by side.
    """
    place_ptr = books_ptr + place * BOOKS * ENTRIES
    total_TV = tl.load(place_ptr + codes_M[0]).to(SUMS)
    for book in tl.static_range(1, BOOKS):
        total_TV += tl.load(place_ptr + codes_M[book]).to(SUMS)
    return total_TV


@jit
def add_product(x_RD, w_TD, total_RT):
    """total + x @ w.T, of int8 in int32; weights are rounded to the type of x, float32 is not
    shortened to TF32."""
    return tl.dot(x_RD, tl.trans(w_TD.to(x_RD.dtype)), acc=total_RT, input_precision="ieee")


@jit
def finish(
    y_ptr, factors_ptr, biases_ptr, steps_ptr, zeros_ptr, totals_ptr,
    total_RT, rows_R, outputs_T, split,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Scales a tile of the output, adds the bias and stores it; a split stores its part as it is.

    Parts of the splits stand below each other: y is [SPLITS * ROWS, OUTPUTS].
    """
    stored_T, kept_R = outputs_T < OUTPUTS, rows_R < ROWS
    if SPLITS == 1:  # as `Scaling.apply`
        factors_RT = tl.load(factors_ptr + outputs_T, mask=stored_T, other=0)[None, :]
        biases_T = tl.load(biases_ptr + outputs_T, mask=stored_T, other=0)
        if total_RT.dtype == tl.int32:
            steps_R = tl.load(steps_ptr + rows_R, mask=kept_R, other=0)
            zeros_R = tl.load(zeros_ptr + rows_R, mask=kept_R, other=0)
            totals_T = tl.load(totals_ptr + outputs_T, mask=stored_T, other=0)
            factors_RT = steps_R[:, None] * factors_RT
            total_RT = total_RT - zeros_R[:, None] * totals_T[None, :]
        total_RT = total_RT.to(tl.float32) * factors_RT + biases_T[None, :]
    at_RT = y_ptr + (split * ROWS + rows_R)[:, None] * OUTPUTS + outputs_T[None, :]
    mask_RT = kept_R[:, None] & stored_T[None, :]
    tl.store(at_RT, total_RT.to(y_ptr.dtype.element_ty), mask=mask_RT)


@jit
def decode_kernel(
    packed_ptr, books_ptr, factors_ptr, w_ptr,
    OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, BYTES: tl.constexpr, BOOKS: tl.constexpr,
    ENTRIES: tl.constexpr, BITS: tl.constexpr, IN_TWO: tl.constexpr, SUMS: tl.constexpr,
    PADDED: tl.constexpr, FAN_IN: tl.constexpr, GROUP: tl.constexpr, PLACES: tl.constexpr,
    TILE_T: tl.constexpr, TILE_V: tl.constexpr,
):  # fmt: skip
    outputs_T = tl.program_id(0) * TILE_T + tl.arange(0, TILE_T)
    vectors_V = tl.program_id(1) * TILE_V + tl.arange(0, TILE_V)
    places_P = tl.arange(0, PADDED)
    codes_M = read_codes(
        packed_ptr, outputs_T, vectors_V, OUTPUTS, GROUPS, BYTES, BOOKS, ENTRIES, BITS, IN_TWO
    )
    w_TVP = sum_vectors(books_ptr, codes_M, BOOKS, PADDED, SUMS)
    stored_T = outputs_T < OUTPUTS
    if w_ptr.dtype.element_ty != tl.int8:  # sums of entries are scaled later
        factors_T = tl.load(factors_ptr + outputs_T, mask=stored_T, other=0)
        w_TVP = w_TVP * factors_T[:, None, None]
    columns_VP = vectors_V[:, None] * GROUP + places_P[None, :]
    real_VP = (columns_VP < FAN_IN) & (places_P < GROUP)[None, :]
    if PLACES > 1:
        IN_CHANNEL: tl.constexpr = PLACES // GROUP  # vectors that read one channel
        at_VP = (vectors_V % IN_CHANNEL * GROUP)[:, None] + places_P[None, :]
        columns_VP = at_VP * (FAN_IN // PLACES) + (vectors_V // IN_CHANNEL)[:, None]
    tl.store(
        w_ptr + outputs_T[:, None, None] * FAN_IN + columns_VP[None, :, :],
        w_TVP.to(w_ptr.dtype.element_ty),
        mask=stored_T[:, None, None] & real_VP[None, :, :],
    )


def decode(
    operands: AnyOperands, problem: Problem, tiles: Tiles, *, capability: int | None = None
) -> jax.Array:
    """Returns the weight matrix [O, N] in the type of x: `decode` of the definition, rounded.

    For integer products these are sums of entries, which are scaled later. Columns of a convolution
    are ordered (ky, kx, input channel), which is what libraries of GPUs take without a copy.

    Args:
      tiles: outputs and vectors (depth over the size of a vector) of a program.
    """
    books = books_for(problem, staged=True)
    vectors = vectors_of(tiles.depth, problem)
    return triton_gpu.launch(
        decode_kernel,
        (operands.packed_OY, books.table_of(operands), operands.scaling().factors_O),
        grid=(-(-problem.outputs // tiles.outputs), -(-problem.groups // vectors)),
        shape=(problem.outputs, problem.fan_in),
        dtype=operands.x.dtype,
        tiles=tiles,
        name="vq_decode",
        constants=code_constants(books)
        | {
            "FAN_IN": problem.fan_in,
            "GROUP": problem.group,
            "PLACES": problem.window**2,
            "TILE_T": tiles.outputs,
            "TILE_V": vectors,
        },
        capability=capability,
    )
