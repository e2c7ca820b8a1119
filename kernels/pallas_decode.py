# SPDX-License-Identifier: Apache-2.0
"""Decodes a whole weight on a GPU, once, for the schedule in which many rows use it.

Dimension key:  O outputs   N fan-in   T outputs of a tile   V vectors of a tile   G weights of a
                vector   P the same, up to a power of two
"""

import functools

import jax

from vqjax.kernels import pallas_gpu as gpu
from vqjax.kernels.books import books_for
from vqjax.kernels.problem import AnyOperands, Problem, power_of_two
from vqjax.kernels.schedule import Tiles, vectors_of


def decode(
    operands: AnyOperands, problem: Problem, tiles: Tiles, *, interpret: bool = False
) -> jax.Array:
    """Returns the weight matrix [O, N] in the type of x: `decode` of the definition, rounded.

    For integer products these are sums of entries, which are scaled later. Columns of a convolution
    are ordered (ky, kx, input channel), which is what libraries of GPUs take without a copy.

    Args:
      tiles: outputs and vectors (depth over the size of a vector) of a program.
    """
    books = books_for(problem, staged=True)
    vectors = vectors_of(tiles.depth, problem)
    grid = (-(-problem.outputs // tiles.outputs), -(-problem.groups // vectors))
    kernel = functools.partial(
        _kernel, problem=books.problem, outputs=tiles.outputs, vectors=vectors, sums=books.sums
    )
    return gpu.launch(
        kernel,
        (
            operands.packed_OY,
            books.table_of(operands),
            operands.scaling().factors_O,
        ),
        grid=grid,
        shape=(problem.outputs, problem.fan_in),
        dtype=operands.x.dtype,
        tiles=tiles,
        name="vq_decode",
        interpret=interpret,
    )


def _kernel(packed_ref, books_ref, factors_ref, w_ref, *, problem, outputs, vectors, sums):
    rows_T = gpu.indices(gpu.pl.program_id(0) * outputs, outputs)
    vectors_V = gpu.indices(gpu.pl.program_id(1) * vectors, vectors)
    places_P = gpu.indices(0, power_of_two(problem.group))
    codes_M = gpu.read_codes(packed_ref, rows_T, vectors_V, problem)
    at_M = [(code_TV[:, :, None], places_P[None, None]) for code_TV in codes_M]
    w_TVP = gpu.sum_entries(books_ref, at_M, sums)
    stored_T = rows_T < problem.outputs
    if not problem.integer:
        w_TVP = w_TVP * gpu.load(factors_ref, (rows_T,), stored_T)[:, None, None]
    columns_VP = vectors_V[:, None] * problem.group + places_P[None]
    real_VP = (columns_VP < problem.fan_in) & (places_P < problem.group)[None]
    if problem.window > 1:
        channels_V, parts_V = gpu.divide(vectors_V, problem.window**2 // problem.group)
        places_VP = parts_V[:, None] * problem.group + places_P[None]
        columns_VP = places_VP * problem.inputs + channels_V[:, None]
    gpu.store(
        w_ref,
        (rows_T[:, None, None], columns_VP[None]),
        w_TVP.astype(w_ref.dtype),
        stored_T[:, None, None] & real_VP[None],
    )
