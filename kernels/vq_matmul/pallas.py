# SPDX-License-Identifier: Apache-2.0
"""`vq_matmul` on a GPU: weights are decoded where they are multiplied, or once for all rows.

Dimension key:  B rows of x   I inputs   O outputs   R rows of a tile   T outputs of a tile
                D depth of a tile   V vectors of a tile   G weights of a vector   P the same, up
                to a power of two   S splits
"""

import functools

import jax
import jax.numpy as jnp

from vqjax.kernels import gpu_arrays, pallas_decode
from vqjax.kernels import pallas_gpu as gpu
from vqjax.kernels.books import books_for
from vqjax.kernels.problem import AnyOperands, IntegerOperands, Problem, Scaling, power_of_two
from vqjax.kernels.schedule import Schedule, Tiles, inner_depth, vectors_of
from vqjax.kernels.vq_matmul import ref


def unsupported(problem: Problem) -> list[str]:
    """Returns why no device can run a problem here; nothing if some can. Never raises."""
    return gpu.unsupported(problem)


def vq_matmul(
    operands: AnyOperands, problem: Problem, schedule: Schedule, *, interpret: bool = False
) -> jax.Array:
    """Computes what `ref.vq_matmul` or `ref.vq_matmul_int8` defines, where not `unsupported`.

    Args:
      interpret: run on the CPU, tile by tile, to check the numbers.
    """
    if schedule.kind == "staged":
        w_OI = pallas_decode.decode(operands, problem, schedule.tiles, interpret=interpret)
        if isinstance(operands, IntegerOperands):
            return operands.scaling().apply(ref.integer_product(operands.x, w_OI.T))
        return ref.product(operands.x, w_OI, operands.bias_O)
    return _fused(operands, problem, schedule.tiles, interpret)


def try_out(problem: Problem, schedule: Schedule) -> None:
    """Runs a problem with random operands, on the default device; raises what it meets."""
    shape = (problem.rows, problem.inputs)
    gpu_arrays.try_out(vq_matmul, ref.definition(problem), problem, schedule, shape)


def _fused(operands: AnyOperands, problem: Problem, tiles: Tiles, interpret: bool) -> jax.Array:
    books = books_for(problem, staged=False)
    vectors = vectors_of(inner_depth(tiles, problem), problem)
    steps = -(-problem.groups // (vectors * tiles.splits))
    kernel = functools.partial(
        _kernel, problem=books.problem, tiles=tiles, vectors=vectors, steps=steps, sums=books.sums
    )
    scaling = operands.scaling()
    y = gpu.launch(
        kernel,
        (
            operands.x,
            operands.packed_OY,
            books.table_of(operands),
            *(array for array in scaling if array is not None),
        ),
        **gpu_arrays.frame(problem, tiles),
        tiles=tiles,
        name="vq_matmul",
        interpret=interpret,
    )
    return gpu_arrays.add_splits(y, tiles.splits, scaling, problem.result)


def _kernel(x_ref, packed_ref, books_ref, *refs, problem, tiles, vectors, steps, sums):
    *scaling_refs, y_ref = refs
    rows_R = gpu.indices(gpu.pl.program_id(0) * tiles.rows, tiles.rows)
    outputs_T = gpu.indices(gpu.pl.program_id(1) * tiles.outputs, tiles.outputs)
    split = gpu.pl.program_id(2)
    group, padded = problem.group, power_of_two(problem.group)
    places_P = gpu.indices(0, padded)

    def columns_of(first):
        """Inputs that a tile of vectors meets, and where weights are: padding meets none."""
        within_D = gpu.indices(0, vectors * padded)
        if padded == group:  # vectors lie side by side in the tile as they do in x
            columns_D = first * group + within_D
            return columns_D, columns_D < problem.inputs
        place_D = within_D & (padded - 1)
        columns_D = (first + (within_D >> padded.bit_length() - 1)) * group + place_D
        return columns_D, (columns_D < problem.inputs) & (place_D < group)

    def add_tile(step, total_RT):
        first = (split * steps + step) * vectors
        codes_M = gpu.read_codes(packed_ref, outputs_T, gpu.indices(first, vectors), problem)
        at_M = [(code_TV[:, :, None], places_P[None, None]) for code_TV in codes_M]
        w_TVP = gpu.sum_entries(books_ref, at_M, sums)
        columns_D, weights_D = columns_of(first)
        read_RD = (rows_R < problem.rows)[:, None] & weights_D[None]
        x_RD = gpu.load(x_ref, (rows_R[:, None], columns_D[None]), read_RD)
        return total_RT + gpu.product(x_RD, w_TVP.reshape(tiles.outputs, vectors * padded))

    total_RT = jax.lax.fori_loop(
        0, steps, add_tile, jnp.zeros((tiles.rows, tiles.outputs), problem.sums)
    )
    scaling = Scaling(*scaling_refs)
    gpu.finish(y_ref, total_RT, rows_R, outputs_T, split, scaling, problem, tiles)
