# SPDX-License-Identifier: Apache-2.0
"""What stands around a GPU kernel, whatever it is written in: its limits and its arrays.

Dimension key:  O outputs   E entries of all codebooks (M * K)   P weights of a vector, up to a
                power of two
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vqjax.kernels.problem import Problem, Scaling
from vqjax.kernels.schedule import SMALLEST, Tiles, power_of_two

CODE_BITS = (4, 8, 12)
_MOST_BOOKS = 8
_MOST_ELEMENTS = 2**31 - 1  # indices are 32 bits


def unsupported(problem: Problem, dtypes: tuple[str, ...]) -> list[str]:
    """Returns why kernels that take activations of these types cannot run a problem."""
    found = []
    bits = problem.code_bits
    if problem.entries != 1 << bits or bits not in CODE_BITS:
        found.append(f"K = {problem.entries}, kernels read codes of 4, 8 or 12 bits")
    if not 1 <= problem.books <= _MOST_BOOKS:
        found.append(f"M = {problem.books}, kernels add up 1 to {_MOST_BOOKS} codebooks")
    if problem.dtype not in dtypes:
        found.append(f"activations are {problem.dtype}, kernels take {', '.join(dtypes)}")
    reach = max(problem.strides[0] * problem.strides[1], 1)
    largest = max(
        problem.rows * reach * problem.inputs,
        problem.rows * problem.outputs,
        problem.outputs * problem.fan_in,
    )
    if largest > _MOST_ELEMENTS:
        found.append(f"an array of {largest} elements, kernels count with 32 bits")
    return found


def flat_books(codebooks_MKG: jax.Array) -> jax.Array:
    """Returns the codebooks below each other with rows of a power of two, [E, P].

    Rows that begin at multiples of their size are read whole; values of a kernel need sizes of a
    power of two.
    """
    books, entries, group = codebooks_MKG.shape
    books_EG = codebooks_MKG.reshape(books * entries, group)
    return jnp.pad(books_EG, ((0, 0), (0, power_of_two(group) - group)))


def frame(problem: Problem, tiles: Tiles) -> dict[str, Any]:
    """Returns grid, shape and type of what a fused kernel stores, as `launch` takes them.

    Programs are numbered by tile of rows, tile of outputs, and split; the parts of the splits stand
    below each other, and are scaled after they were added.
    """
    down, across = -(-problem.rows // tiles.rows), -(-problem.outputs // tiles.outputs)
    return {
        "grid": (down, across, tiles.splits),
        "shape": (tiles.splits * problem.rows, problem.outputs),
        "dtype": problem.result if tiles.splits == 1 else problem.sums,
    }


def compile_small(
    run: Callable[..., jax.Array], problem: Problem, x_shape: tuple[int, ...]
) -> None:
    """Compiles `run(operands, problem=, schedule=)` for the default device by both schedules.

    Whatever the compiler raises passes on.
    """
    for schedule in SMALLEST:
        work = functools.partial(run, problem=problem, schedule=schedule)
        jax.jit(work).lower(problem.abstract(x_shape)).compile()


def add_splits(y: jax.Array, splits: int, scaling: Scaling, dtype: Any) -> jax.Array:
    """Adds the parts that splits stored: in a fixed order, so that runs agree to the bit."""
    if splits == 1:
        return y
    return scaling.apply(jnp.sum(y.reshape(splits, -1, y.shape[-1]), axis=0)).astype(dtype)
