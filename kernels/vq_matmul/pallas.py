# SPDX-License-Identifier: Apache-2.0
"""`vq_matmul` on a GPU: weights are decoded where they are multiplied, or once for all rows.

Dimension key:  B rows of x   I inputs   O outputs   R rows of a tile   T outputs of a tile
                D depth of a tile   V vectors of a tile   G weights of a vector   S splits
"""

import functools

import jax
import jax.numpy as jnp

from vqjax.kernels import gpu_arrays, pallas_decode
from vqjax.kernels import pallas_gpu as gpu
from vqjax.kernels.problem import AnyOperands, IntegerOperands, Problem, Scaling
from vqjax.kernels.schedule import Schedule, Tiles, power_of_two
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


def try_small(problem: Problem) -> None:
    """Tries both schedules on a small problem, on the default device; raises what it meets."""
    shape = (problem.rows, problem.inputs)
    gpu_arrays.try_small(vq_matmul, ref.definition(problem), problem, shape)


def _fused(operands: AnyOperands, problem: Problem, tiles: Tiles, interpret: bool) -> jax.Array:
    whole = power_of_two(problem.group) == problem.group
    depth = gpu.depth(tiles, problem)
    vectors = max(depth // problem.group, 1) if whole else depth
    steps = -(-problem.groups // (vectors * tiles.splits))
    kernel = functools.partial(
        _kernel, problem=problem, tiles=tiles, vectors=vectors, steps=steps, whole=whole
    )
    scaling = operands.scaling()
    y = gpu.launch(
        kernel,
        (
            operands.x,
            operands.packed_OY,
            gpu_arrays.flat_books(operands.codebooks_MKG),
            *(array for array in scaling if array is not None),
        ),
        **gpu_arrays.frame(problem, tiles),
        tiles=tiles,
        name="vq_matmul",
        interpret=interpret,
    )
    return gpu_arrays.add_splits(y, tiles.splits, scaling, problem.result)


def _kernel(x_ref, packed_ref, books_ref, *refs, problem, tiles, vectors, steps, whole):
    *scaling_refs, y_ref = refs
    rows_R = gpu.indices(gpu.pl.program_id(0) * tiles.rows, tiles.rows)
    outputs_T = gpu.indices(gpu.pl.program_id(1) * tiles.outputs, tiles.outputs)
    split = gpu.pl.program_id(2)
    group = problem.group

    def x_tile(columns_D):
        inside_RD = (rows_R < problem.rows)[:, None] & (columns_D < problem.inputs)[None]
        return gpu.load(x_ref, (rows_R[:, None], columns_D[None]), inside_RD)

    def add_tile(step, total_RT):
        first = (split * steps + step) * vectors
        vectors_V = gpu.indices(first, vectors)
        codes_M = gpu.read_codes(packed_ref, outputs_T, vectors_V, problem)
        if whole:  # vectors lie side by side in the tile as they do in x
            w_TVG = gpu.sum_entries(
                books_ref,
                [code_TV[:, :, None] for code_TV in codes_M],
                gpu.indices(0, group)[None, None],
                problem,
            )
            w_TD = w_TVG.reshape(tiles.outputs, vectors * group)
            return total_RT + gpu.product(x_tile(gpu.indices(first * group, vectors * group)), w_TD)

        def add_place(place, total_RT):
            at = jnp.full((1, 1), place, jnp.int32)
            w_TV = gpu.sum_entries(books_ref, codes_M, at, problem)
            return total_RT + gpu.product(x_tile(vectors_V * group + place), w_TV)

        # No side of a value may be 6 or 9: one place of all vectors at a time.
        return jax.lax.fori_loop(0, group, add_place, total_RT)

    total_RT = jax.lax.fori_loop(
        0, steps, add_tile, jnp.zeros((tiles.rows, tiles.outputs), problem.sums)
    )
    scaling = Scaling(*scaling_refs)
    gpu.finish(y_ref, total_RT, rows_R, outputs_T, split, scaling, problem, tiles)
