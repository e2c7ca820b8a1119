# SPDX-License-Identifier: Apache-2.0
"""Pallas on its Triton backend, and how a kernel reads packed codes: shared by all our kernels.

JAX deprecated this backend in 0.11 and will remove it; Mosaic GPU, its successor, cannot gather
from a codebook (specs and versions: docs/kernels.md). Its location is known here alone, and
`MISSING` says why there are no kernels once it is gone.

A bare `pallas_call` means another backend in other versions of JAX; compiler parameters are
therefore always given.

Dimension key:  O outputs   V vectors of a tile   T outputs of a tile   Y bytes of a row
                E entries of all codebooks (M * K)   P weights of a vector, up to a power of two
"""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vqjax.kernels.problem import FLOATS, Problem
from vqjax.kernels.schedule import Tiles, power_of_two

MISSING: str | None = None
"""Why this JAX has no Pallas Triton backend, or None."""

pl: Any = None
backend: Any = None
try:
    pl = importlib.import_module("jax.experimental.pallas")
    backend = importlib.import_module("jax.experimental.pallas.triton")
except ImportError as _error:
    MISSING = f"jax {jax.__version__} has no Pallas Triton backend ({_error})"

CODE_BITS = (4, 8, 12)
_MOST_BOOKS = 8
_MOST_ELEMENTS = 2**31 - 1  # indices are 32 bits


def unsupported(problem: Problem) -> list[str]:
    """Returns why the kernels cannot run a problem on any device; nothing if they can."""
    found = [MISSING] if MISSING else []
    bits = problem.code_bits
    if problem.entries != 1 << bits or bits not in CODE_BITS:
        found.append(f"K = {problem.entries}, kernels read codes of 4, 8 or 12 bits")
    if not 1 <= problem.books <= _MOST_BOOKS:
        found.append(f"M = {problem.books}, kernels add up 1 to {_MOST_BOOKS} codebooks")
    if problem.dtype not in FLOATS:
        found.append(f"activations are {problem.dtype}, kernels take {', '.join(FLOATS)}")
    reach = max(problem.strides[0] * problem.strides[1], 1)
    largest = max(
        problem.rows * reach * problem.inputs,
        problem.rows * problem.outputs,
        problem.outputs * problem.fan_in,
    )
    if largest > _MOST_ELEMENTS:
        found.append(f"an array of {largest} elements, kernels count with 32 bits")
    return found


def launch(
    kernel: Callable[..., None],
    operands: tuple[jax.Array, ...],
    *,
    grid: tuple[int, ...],
    shape: tuple[int, ...],
    dtype: Any,
    tiles: Tiles,
    name: str,
    interpret: bool,
) -> jax.Array:
    """Runs a kernel that sees whole arrays; it computes its own addresses and masks.

    Under `shard_map` the result varies over every mesh axis that an operand varies over.
    """
    varying = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in operands))
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(
            shape, dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=varying)
        ),
        grid=grid,
        interpret=interpret,
        compiler_params=backend.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        name=name,
    )(*operands)


def indices(first: jax.Array | int, count: int) -> jax.Array:
    """Returns first, first + 1, ... as int32 [count]."""
    return first + jnp.arange(count, dtype=jnp.int32)


def load(ref: Any, at: tuple[jax.Array, ...], mask: jax.Array) -> jax.Array:
    """Gathers from an array in memory; 0 where the mask is false."""
    return backend.load(ref.at[at], mask=mask, other=0)


def store(ref: Any, at: tuple[jax.Array, ...], value: jax.Array, mask: jax.Array) -> None:
    """Scatters to an array in memory where the mask is true."""
    backend.store(ref.at[at], value, mask=mask)


def product(x_RD: jax.Array, w_TD: jax.Array) -> jax.Array:
    """Returns x @ w.T in float32, [R, T]. Weights are rounded to the type of x.

    float32 is multiplied as such: ten bits of mantissa (TF32) would be this backend's default.
    """
    exact = x_RD.dtype == jnp.float32
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    return jnp.dot(
        x_RD,
        w_TD.astype(x_RD.dtype).T,
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def flat_books(codebooks_MKG: jax.Array) -> jax.Array:
    """Returns the codebooks below each other with rows of a power of two, [E, P].

    Rows that begin at multiples of their size are read whole; values of a kernel need sizes of a
    power of two.
    """
    books, entries, group = codebooks_MKG.shape
    books_EG = codebooks_MKG.reshape(books * entries, group)
    return jnp.pad(books_EG, ((0, 0), (0, power_of_two(group) - group)))


def read_codes(
    packed_ref: Any, rows_T: jax.Array, vectors_V: jax.Array, problem: Problem
) -> list[jax.Array]:
    """Returns row numbers of `flat_books`, int32 [T, V] for each codebook.

    Beyond the last row and vector, codes are 0: a finite weight, which meets an input of 0 or is
    not stored.

    Args:
      packed_ref: uint8 [O, Y], codes in the order (vector, codebook) from the lowest bit.
    """
    half_bytes = problem.code_bits // 4
    of_vector = problem.books * half_bytes
    inside_TV = (rows_T < problem.outputs)[:, None] & (vectors_V < problem.groups)[None]
    seen: dict[int, jax.Array] = {}

    def byte(offset: int) -> jax.Array:
        """The byte which holds a half byte of each vector, read once where two codes share it."""
        key = offset // 2 if of_vector % 2 == 0 else offset
        if key not in seen:
            column_V = (vectors_V * of_vector + offset) // 2
            found_TV = load(packed_ref, (rows_T[:, None], column_V[None]), inside_TV)
            seen[key] = found_TV.astype(jnp.int32)
        return seen[key]

    codes_M = []
    for book in range(problem.books):
        offset = book * half_bytes
        code_TV = byte(offset)
        if half_bytes == 3:
            code_TV = code_TV | byte(offset + 2) << 8
        if half_bytes != 2:
            shift_V = 4 * ((vectors_V * of_vector + offset) % 2)
            code_TV = code_TV >> shift_V[None] & (problem.entries - 1)
        codes_M.append(code_TV + book * problem.entries)
    return codes_M


def sum_entries(books_ref: Any, rows_M: list[jax.Array], columns: jax.Array) -> jax.Array:
    """Returns the sum of the chosen entries at some places of a vector, float32.

    Args:
      rows_M: as `read_codes` gives them, with the axes of the result.
      columns: places, broadcast against them.
    """
    total = books_ref[rows_M[0], columns].astype(jnp.float32)
    for rows in rows_M[1:]:
        total += books_ref[rows, columns].astype(jnp.float32)
    return total


def finish(
    y_ref: Any,
    total_RT: jax.Array,
    rows_R: jax.Array,
    outputs_T: jax.Array,
    split: jax.Array,
    factors_ref: Any,
    biases_ref: Any,
    problem: Problem,
    tiles: Tiles,
) -> None:
    """Scales a tile of the output, adds the bias and stores it; a split stores its part as it is.

    Dimension key:  R rows of a tile   S splits

    Args:
      y_ref: [S * rows, O], the parts of the splits below each other.
    """
    stored_T = outputs_T < problem.outputs
    if tiles.splits == 1:
        factors_T = load(factors_ref, (outputs_T,), stored_T)
        biases_T = load(biases_ref, (outputs_T,), stored_T)
        total_RT = total_RT * factors_T[None] + biases_T[None]
    store(
        y_ref,
        (split * problem.rows + rows_R[:, None], outputs_T[None]),
        total_RT.astype(y_ref.dtype),
        (rows_R < problem.rows)[:, None] & stored_T[None],
    )


def add_splits(
    y: jax.Array, splits: int, factors_O: jax.Array, biases_O: jax.Array, dtype: Any
) -> jax.Array:
    """Adds the parts that `finish` stored: in a fixed order, so that runs agree to the bit."""
    if splits == 1:
        return y
    total = jnp.sum(y.reshape(splits, -1, y.shape[-1]), axis=0)
    return (total * factors_O[None] + biases_O[None]).astype(dtype)
