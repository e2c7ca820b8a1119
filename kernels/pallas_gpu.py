# SPDX-License-Identifier: Apache-2.0
"""Pallas on its Triton backend, and how a kernel reads packed codes: shared by all our kernels.

JAX deprecated this backend in 0.11 and will remove it; Mosaic GPU, its successor, cannot gather
from a codebook (specs and versions: docs/kernels.md). Its location is known here alone, and
`MISSING` says why there are no kernels once it is gone.

A bare `pallas_call` means another backend in other versions of JAX; compiler parameters are
therefore always given.

Dimension key:  O outputs   V vectors of a tile   T outputs of a tile   Y bytes of a row
"""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vqjax.kernels import gpu_arrays
from vqjax.kernels.problem import Problem, Scaling
from vqjax.kernels.schedule import Tiles

MISSING: str | None = None
"""Why this JAX has no Pallas Triton backend, or None."""

pl: Any = None
backend: Any = None
try:
    pl = importlib.import_module("jax.experimental.pallas")
    backend = importlib.import_module("jax.experimental.pallas.triton")
except ImportError as _error:
    MISSING = f"jax {jax.__version__} has no Pallas Triton backend ({_error})"


def unsupported(problem: Problem) -> list[str]:
    """Returns why the kernels cannot run a problem on any device; nothing if they can."""
    return [*([MISSING] if MISSING else []), *gpu_arrays.unsupported(problem)]


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


def divide(number: jax.Array, by: int) -> tuple[jax.Array, jax.Array]:
    """Returns quotient and rest. `//` and `%` would treat signs, which are not there, and on a
    scalar they do not lower on this backend."""
    divisor = jnp.full(number.shape, by, number.dtype)
    return jax.lax.div(number, divisor), jax.lax.rem(number, divisor)


def load(ref: Any, at: tuple[jax.Array, ...], mask: jax.Array) -> jax.Array:
    """Gathers from an array in memory; 0 where the mask is false."""
    return backend.load(ref.at[at], mask=mask, other=0)


def store(ref: Any, at: tuple[jax.Array, ...], value: jax.Array, mask: jax.Array) -> None:
    """Scatters to an array in memory where the mask is true."""
    backend.store(ref.at[at], value, mask=mask)


def product(x_RD: jax.Array, w_TD: jax.Array) -> jax.Array:
    """Returns x @ w.T in float32, of int8 in int32, [R, T]. Weights take the type of x.

    float32 is multiplied as such: ten bits of mantissa (TF32) would be this backend's default.
    """
    exact = x_RD.dtype == jnp.float32
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    return jnp.dot(
        x_RD,
        w_TD.astype(x_RD.dtype).T,
        precision=precision,
        preferred_element_type=jnp.int32 if x_RD.dtype == jnp.int8 else jnp.float32,
    )


def read_codes(
    packed_ref: Any, rows_T: jax.Array, vectors_V: jax.Array, problem: Problem
) -> list[jax.Array]:
    """Returns row numbers of the codebooks below each other, int32 [T, V] for each codebook.

    Beyond the last row and vector, codes are 0: a finite weight, which meets an input of 0 or is
    not stored.

    Args:
      packed_ref: uint8 [O, Y], codes in the order (vector, codebook) from the lowest bit.
    """
    bits, of_vector = problem.code_bits, problem.books * problem.code_bits
    inside_TV = (rows_T < problem.outputs)[:, None] & (vectors_V < problem.groups)[None]
    whole = of_vector % 8 == 0  # vectors begin at bytes: two codes of one byte have one address
    seen: dict[int, jax.Array] = {}

    def byte(offset: int, following: int = 0) -> jax.Array:
        """The byte with the bit at this offset of each vector, or the one that follows it."""
        at = offset + 8 * following
        column_V = vectors_V * of_vector + at >> 3
        if whole:  # the same; the compiler sees that tiles are contiguous
            at //= 8
            column_V = vectors_V * (of_vector // 8) + at
        if at not in seen:
            stored_TV = inside_TV & (column_V < problem.row_bytes)[None] if following else inside_TV
            found_TV = load(packed_ref, (rows_T[:, None], column_V[None]), stored_TV)
            seen[at] = found_TV.astype(jnp.int32)
        return seen[at]

    codes_M = []
    for book in range(problem.books):
        offset = book * bits
        code_TV = byte(offset)
        if gpu_arrays.in_two_bytes(bits) and not (whole and offset % 8 + bits <= 8):
            code_TV = code_TV | byte(offset, 1) << 8
        if bits != 8:
            shift = offset % 8 if whole else (vectors_V * of_vector + offset & 7)[None]
            code_TV = code_TV >> shift & (problem.entries - 1)
        codes_M.append(code_TV + book * problem.entries)
    return codes_M


def sum_entries(books_ref: Any, at_M: list[tuple[jax.Array, jax.Array]], dtype: str) -> jax.Array:
    """Returns the sum over codebooks of the entries at some indices, added up in `dtype`."""
    total = books_ref[at_M[0]].astype(dtype)
    for at in at_M[1:]:
        total += books_ref[at].astype(dtype)
    return total


def finish(
    y_ref: Any,
    total_RT: jax.Array,
    rows_R: jax.Array,
    outputs_T: jax.Array,
    split: jax.Array,
    scaling_refs: Scaling,
    problem: Problem,
    tiles: Tiles,
) -> None:
    """Scales a tile of the output, adds the bias and stores it; a split stores its part as it is.

    Dimension key:  R rows of a tile   S splits

    Args:
      y_ref: [S * rows, O], the parts of the splits below each other.
      scaling_refs: of whole arrays.
    """
    stored_T, kept_R = outputs_T < problem.outputs, rows_R < problem.rows
    if tiles.splits == 1:
        loaded = {
            name: load(ref, (outputs_T,), stored_T)
            if name.endswith("_O")
            else load(ref, (rows_R,), kept_R)
            for name, ref in scaling_refs._asdict().items()
            if ref is not None
        }
        total_RT = Scaling(**loaded).apply(total_RT)
    store(
        y_ref,
        (split * problem.rows + rows_R[:, None], outputs_T[None]),
        total_RT.astype(y_ref.dtype),
        kept_R[:, None] & stored_T[None],
    )
