# SPDX-License-Identifier: Apache-2.0
"""`vq_matmul` in Triton: the algorithm of `vq_matmul.pallas`, for GPUs that Pallas leaves out.

Importing this needs triton (`triton_gpu.missing`).

Dimension key:  B rows of x   I inputs   O outputs   R rows of a tile   T outputs of a tile
                D depth of a tile   V vectors of a tile   G weights of a vector   S splits
"""

import jax
import triton.language as tl  # pyright: ignore[reportMissingImports]

from vqjax.kernels import gpu_arrays, triton_decode, triton_gpu
from vqjax.kernels.problem import Operands, Problem
from vqjax.kernels.schedule import Schedule, Tiles, power_of_two
from vqjax.kernels.triton_decode import (
    add_product,
    finish,
    jit,
    read_codes,
    sum_places,
    sum_vectors,
)
from vqjax.kernels.vq_matmul import ref


def vq_matmul(
    operands: Operands, problem: Problem, schedule: Schedule, *, capability: int | None = None
) -> jax.Array:
    """Computes what `ref.vq_matmul` defines, for problems that are not `triton_gpu.unsupported`.

    Args:
      capability: as `triton_gpu.launch` takes it.
    """
    if schedule.kind == "staged":
        w_OI = triton_decode.decode(operands, problem, schedule.tiles, capability=capability)
        return ref.product(operands.x, w_OI, operands.bias_O)
    return _fused(operands, problem, schedule.tiles, capability)


def try_small(problem: Problem) -> None:
    """Tries both schedules on a small problem, on the default device; raises what it meets."""
    shape = (problem.rows, problem.inputs)
    gpu_arrays.try_small(vq_matmul, ref.definition(problem), problem, shape)


def _fused(operands: Operands, problem: Problem, tiles: Tiles, capability: int | None) -> jax.Array:
    whole = power_of_two(problem.group) == problem.group
    vectors = max(tiles.depth // problem.group, 1) if whole else tiles.depth
    scaling = operands.scaling()
    y = triton_gpu.launch(
        matmul_kernel,
        (
            operands.x,
            operands.packed_OY,
            gpu_arrays.flat_books(operands.codebooks_MKG),
            scaling.factors_O,
            scaling.biases_O,
        ),
        **gpu_arrays.frame(problem, tiles),
        tiles=tiles,
        name="vq_matmul",
        constants=triton_decode.code_constants(problem)
        | {
            "ROWS": problem.rows,
            "INPUTS": problem.inputs,
            "GROUP": problem.group,
            "SPLITS": tiles.splits,
            "STEPS": -(-problem.groups // (vectors * tiles.splits)),
            "WHOLE": whole,
            "TILE_R": tiles.rows,
            "TILE_T": tiles.outputs,
            "TILE_V": vectors,
        },
        capability=capability,
    )
    return gpu_arrays.add_splits(y, tiles.splits, scaling, problem.result)


@jit
def _inputs(x_ptr, rows_R, columns_D, ROWS: tl.constexpr, INPUTS: tl.constexpr):
    inside_RD = (rows_R < ROWS)[:, None] & (columns_D < INPUTS)[None, :]
    at_RD = x_ptr + rows_R[:, None] * INPUTS + columns_D[None, :]
    return tl.load(at_RD, mask=inside_RD, other=0)


@jit
def matmul_kernel(
    x_ptr, packed_ptr, books_ptr, factors_ptr, biases_ptr, y_ptr,
    OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, BYTES: tl.constexpr, BOOKS: tl.constexpr,
    ENTRIES: tl.constexpr, BITS: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, INPUTS: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr,
    STEPS: tl.constexpr, WHOLE: tl.constexpr,
    TILE_R: tl.constexpr, TILE_T: tl.constexpr, TILE_V: tl.constexpr,
):  # fmt: skip
    rows_R = tl.program_id(0) * TILE_R + tl.arange(0, TILE_R)
    outputs_T = tl.program_id(1) * TILE_T + tl.arange(0, TILE_T)
    split = tl.program_id(2)
    total_RT = tl.zeros((TILE_R, TILE_T), tl.float32)
    for step in range(STEPS):
        first = (split * STEPS + step) * TILE_V
        vectors_V = first + tl.arange(0, TILE_V)
        codes_M = read_codes(
            packed_ptr, outputs_T, vectors_V, OUTPUTS, GROUPS, BYTES, BOOKS, ENTRIES, BITS
        )
        if WHOLE:  # vectors lie side by side in the tile as they do in x
            w_TVG = sum_vectors(books_ptr, codes_M, BOOKS, PADDED)
            w_TD = tl.reshape(w_TVG, (TILE_T, TILE_V * GROUP))
            columns_D = first * GROUP + tl.arange(0, TILE_V * GROUP)
            x_RD = _inputs(x_ptr, rows_R, columns_D, ROWS, INPUTS)
            total_RT = add_product(x_RD, w_TD, total_RT)
        else:  # no side of a value may be 6 or 9: one place of all vectors at a time
            for place in range(GROUP):
                w_TV = sum_places(books_ptr, codes_M, place, BOOKS, PADDED)
                x_RV = _inputs(x_ptr, rows_R, vectors_V * GROUP + place, ROWS, INPUTS)
                total_RT = add_product(x_RV, w_TV, total_RT)
    finish(
        y_ptr, factors_ptr, biases_ptr, total_RT, rows_R, outputs_T, split, ROWS, OUTPUTS, SPLITS
    )
