# SPDX-License-Identifier: Apache-2.0
"""`vq_matmul` in Triton: the algorithm of `vq_matmul.pallas`, for GPUs that Pallas leaves out.

Importing this needs triton (`triton_gpu.missing`).

Dimension key:  B rows of x   I inputs   O outputs   R rows of a tile   T outputs of a tile
                D depth of a tile   V vectors of a tile   G weights of a vector   P the same, up
                to a power of two   S splits
"""

import jax
import triton.language as tl  # pyright: ignore[reportMissingImports]

from vqjax.kernels import gpu_arrays, triton_decode, triton_gpu
from vqjax.kernels.books import books_for
from vqjax.kernels.problem import AnyOperands, IntegerOperands, Problem
from vqjax.kernels.schedule import Schedule, Tiles, inner_depth, vectors_of
from vqjax.kernels.triton_decode import add_product, finish, jit, read_codes, sum_vectors
from vqjax.kernels.vq_matmul import ref


def vq_matmul(
    operands: AnyOperands, problem: Problem, schedule: Schedule, *, capability: int | None = None
) -> jax.Array:
    """Computes what `ref.vq_matmul` or `ref.vq_matmul_int8` defines, where not
    `triton_gpu.unsupported`.

    Args:
      capability: as `triton_gpu.launch` takes it.
    """
    if schedule.kind == "staged":
        w_OI = triton_decode.decode(operands, problem, schedule.tiles, capability=capability)
        if isinstance(operands, IntegerOperands):
            return operands.scaling().apply(ref.integer_product(operands.x, w_OI.T))
        return ref.product(operands.x, w_OI, operands.bias_O)
    return _fused(operands, problem, schedule.tiles, capability)


def try_out(problem: Problem, schedule: Schedule) -> None:
    """Runs a problem with random operands, on the default device; raises what it meets."""
    shape = (problem.rows, problem.inputs)
    gpu_arrays.try_out(vq_matmul, ref.definition(problem), problem, schedule, shape)


def _fused(
    operands: AnyOperands, problem: Problem, tiles: Tiles, capability: int | None
) -> jax.Array:
    books = books_for(problem, staged=False)
    vectors = vectors_of(inner_depth(tiles, problem), problem)
    scaling = operands.scaling()
    y = triton_gpu.launch(
        matmul_kernel,
        (
            operands.x,
            operands.packed_OY,
            books.table_of(operands),
            *triton_decode.scaling_operands(scaling),
        ),
        **gpu_arrays.frame(problem, tiles),
        tiles=tiles,
        name="vq_matmul",
        constants=triton_decode.code_constants(books)
        | {
            "ROWS": problem.rows,
            "INPUTS": problem.inputs,
            "GROUP": problem.group,
            "SPLITS": tiles.splits,
            "STEPS": -(-problem.groups // (vectors * tiles.splits)),
            "PRODUCTS": getattr(tl, problem.sums),
            "TILE_R": tiles.rows,
            "TILE_T": tiles.outputs,
            "TILE_V": vectors,
        },
        capability=capability,
    )
    return gpu_arrays.add_splits(y, tiles.splits, scaling, problem.result)


@jit
def matmul_kernel(
    x_ptr, packed_ptr, books_ptr,
    factors_ptr, biases_ptr, steps_ptr, zeros_ptr, totals_ptr, y_ptr,
    OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, BYTES: tl.constexpr, BOOKS: tl.constexpr,
    ENTRIES: tl.constexpr, BITS: tl.constexpr, IN_TWO: tl.constexpr, SUMS: tl.constexpr,
    PADDED: tl.constexpr, ROWS: tl.constexpr, INPUTS: tl.constexpr, GROUP: tl.constexpr,
    SPLITS: tl.constexpr, STEPS: tl.constexpr, PRODUCTS: tl.constexpr,
    TILE_R: tl.constexpr, TILE_T: tl.constexpr, TILE_V: tl.constexpr,
):  # fmt: skip
    rows_R = tl.program_id(0) * TILE_R + tl.arange(0, TILE_R)
    outputs_T = tl.program_id(1) * TILE_T + tl.arange(0, TILE_T)
    split = tl.program_id(2)
    total_RT = tl.zeros((TILE_R, TILE_T), PRODUCTS)
    within_D = tl.arange(0, TILE_V * PADDED)
    for step in range(STEPS):
        first = (split * STEPS + step) * TILE_V
        codes_M = read_codes(
            packed_ptr, outputs_T, first + tl.arange(0, TILE_V),
            OUTPUTS, GROUPS, BYTES, BOOKS, ENTRIES, BITS, IN_TWO,
        )  # fmt: skip
        w_TVP = sum_vectors(books_ptr, codes_M, BOOKS, PADDED, SUMS)
        if PADDED == GROUP:  # vectors lie side by side in the tile as they do in x
            columns_D = first * GROUP + within_D
            weights_D = columns_D < INPUTS
        else:  # padding meets no input
            columns_D = (first + within_D // PADDED) * GROUP + within_D % PADDED
            weights_D = (columns_D < INPUTS) & (within_D % PADDED < GROUP)
        at_RD = x_ptr + rows_R[:, None] * INPUTS + columns_D[None, :]
        x_RD = tl.load(at_RD, mask=(rows_R < ROWS)[:, None] & weights_D[None, :], other=0)
        w_TD = tl.reshape(w_TVP, (TILE_T, TILE_V * PADDED))
        total_RT = add_product(x_RD, w_TD, total_RT)
    finish(
        y_ptr, factors_ptr, biases_ptr, steps_ptr, zeros_ptr, totals_ptr,
        total_RT, rows_R, outputs_T, split, ROWS, OUTPUTS, SPLITS,
    )  # fmt: skip
