# SPDX-License-Identifier: Apache-2.0
"""Code search over a whole weight matrix under tr((W - Q) S (W - Q)^T).

Dimension key:  O rows   N fan-in, padded to J * G   J vectors of a row   M codebooks   K entries
                G weights of a vector   T vectors of a block   X weights of a block (T * G)

Two passes over the vectors of a row, all rows at once:
  * `feedback` chooses each vector once and lets the vectors still to come make up for its error
    (the block-wise form of GPTQ, arXiv:2210.17323; GPTVQ, arXiv:2402.15319);
  * `descend` is coordinate descent: every vector is chosen again, the others held. It never makes
    the loss larger.
Both keep what a vector needs to know of the rest of its row up to date lazily: exactly inside a
block of vectors, by one matrix product from block to block.
"""

import functools

import jax
import jax.numpy as jnp

from vqjax.core.encode import dot, encode, entry_sum
from vqjax.kernels.decode import sum_entries_at_once


@jax.jit
def loss_rows(residual_ON: jax.Array, moment_NN: jax.Array) -> jax.Array:
    """Returns r S r^T of each row, [O]."""
    return jnp.sum(dot(residual_ON, moment_NN) * residual_ON, axis=-1)


@jax.jit
def reconstruct(codes_OJM: jax.Array, books_MKG: jax.Array, scales_O: jax.Array) -> jax.Array:
    """Returns Q, [O, J * G]."""
    sums_OJG = sum_entries_at_once(codes_OJM, books_MKG)
    return sums_OJG.reshape(codes_OJM.shape[0], -1) * scales_O[:, None]


def block_size(groups: int) -> int:
    """Returns T: the largest of 16, 8, 4, 2, 1 that divides J (few sizes, few compilations)."""
    return next(size for size in (16, 8, 4, 2, 1) if groups % size == 0)


def _safe_divide(numerator_OG: jax.Array, scales_O: jax.Array) -> jax.Array:
    """Returns numerator / scale, and 0 where the scale is 0 (a row of zeros)."""
    inverse_O = jnp.where(scales_O == 0, 0.0, 1 / jnp.where(scales_O == 0, 1.0, scales_O))
    return numerator_OG * inverse_O[:, None]


def square(matrix_NN: jax.Array, start: jax.Array, *, size: int) -> tuple[jax.Array, jax.Array]:
    """Returns `size` rows [X, N] from `start`, and the square [X, X] that the diagonal crosses."""
    rows_XN = jax.lax.dynamic_slice_in_dim(matrix_NN, start, size, 0)
    return rows_XN, jax.lax.dynamic_slice_in_dim(rows_XN, start, size, 1)


@functools.partial(jax.jit, static_argnames=("size", "group"))
def _descend_read(residual_ON, moment_NN, codes_OJM, first, *, size, group):
    moment_XN, moment_XX = square(moment_NN, first * group, size=size * group)
    codes_OTM = jax.lax.dynamic_slice_in_dim(codes_OJM, first, size, 1)
    return dot(residual_ON, moment_XN.T), moment_XX, codes_OTM


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _descend_write(residual_ON, codes_OJM, change_OX, codes_OTM, first):
    start = first * (change_OX.shape[1] // codes_OTM.shape[1])
    old_OX = jax.lax.dynamic_slice_in_dim(residual_ON, start, change_OX.shape[1], 1)
    return (
        jax.lax.dynamic_update_slice_in_dim(residual_ON, old_OX - change_OX, start, 1),
        jax.lax.dynamic_update_slice_in_dim(codes_OJM, codes_OTM, first, 1),
    )


@functools.partial(jax.jit, static_argnames="beam")
def _descend_inside(gradient_OX, moment_XX, codes_OTM, books_MKG, scales_O, *, beam):
    group = books_MKG.shape[-1]

    def step(gradient_OX, inputs):
        at, old_OM = inputs
        moment_GX = jax.lax.dynamic_slice_in_dim(moment_XX, at, group, 0)
        metric_GG = jax.lax.dynamic_slice_in_dim(moment_GX, at, group, 1)
        gradient_OG = jax.lax.dynamic_slice_in_dim(gradient_OX, at, group, 1)
        q_OG = entry_sum(old_OM, books_MKG)
        linear_OG = dot(q_OG, metric_GG) + _safe_divide(gradient_OG, scales_O)
        new_OM = encode(linear_OG, metric_GG, books_MKG, old_OM, beam=beam)
        change_OG = (entry_sum(new_OM, books_MKG) - q_OG) * scales_O[:, None]
        return gradient_OX - dot(change_OG, moment_GX), (new_OM, change_OG)

    starts = jnp.arange(codes_OTM.shape[1]) * group
    _, (codes_TOM, change_TOG) = jax.lax.scan(
        step, gradient_OX, (starts, codes_OTM.transpose(1, 0, 2))
    )
    change_OX = change_TOG.transpose(1, 0, 2).reshape(gradient_OX.shape)
    return codes_TOM.transpose(1, 0, 2), change_OX


def descend(
    w_ON: jax.Array,
    moment_NN: jax.Array,
    codes_OJM: jax.Array,
    books_MKG: jax.Array,
    scales_O: jax.Array,
    *,
    beam: int = 0,
    groups: int | None = None,
) -> jax.Array:
    """One sweep of coordinate descent over the vectors; returns codes [O, J, M], no worse ones.

    The steps are compiled for the size of a block, not of the matrix, so that layers share them.

    Args:
      w_ON, moment_NN, codes_OJM, books_MKG, scales_O: as everywhere in this file.
      beam: as in `encode`.
      groups: vectors of a row that hold anything; the rest, padding, keep their codes.
    """
    group, size = books_MKG.shape[-1], block_size(codes_OJM.shape[1])
    residual_ON, codes_OJM = _residual(w_ON, codes_OJM, books_MKG, scales_O)
    for first in range(0, groups or codes_OJM.shape[1], size):
        gradient_OX, moment_XX, codes_OTM = _descend_read(
            residual_ON, moment_NN, codes_OJM, first, size=size, group=group
        )
        codes_OTM, change_OX = _descend_inside(
            gradient_OX, moment_XX, codes_OTM, books_MKG, scales_O, beam=beam
        )
        residual_ON, codes_OJM = _descend_write(residual_ON, codes_OJM, change_OX, codes_OTM, first)
    return codes_OJM


@jax.jit
def _residual(w_ON, codes_OJM, books_MKG, scales_O):
    """Returns W - Q and a copy of the codes: both are written to in place afterwards."""
    return w_ON - reconstruct(codes_OJM, books_MKG, scales_O), jnp.copy(codes_OJM)


@functools.partial(jax.jit, static_argnames="group")
def feedback_factors(moment_NN: jax.Array, damping: float, *, group: int):
    """Prepares `feedback`: how an error is passed on, and what remains of it afterwards.

    With the upper Cholesky factor U of the inverse moment, the least loss that an error in one
    vector can still cause, the later ones making up for it, is measured by the inverse of
    (U_gg^T U_gg): the Schur complement of the later vectors.

    Args:
      moment_NN: S; a multiple `damping` of its mean positive diagonal is added, which also makes it
        regular.
      damping: relative, positive; 0.01 is usual.
      group: G, divides N.

    Returns:
      passed_NN: by how much a unit of error moves the targets of later columns.
      metric_JGG: metric of each vector.
      mean_GG: their mean over the vectors that see any input.
    """
    size = moment_NN.shape[0]
    diagonal_N = jnp.diagonal(moment_NN)
    mean_diagonal = jnp.sum(diagonal_N) / jnp.maximum(jnp.sum(diagonal_N > 0), 1)
    ridge = damping * jnp.where(mean_diagonal > 0, mean_diagonal, 1.0)
    damped_NN = moment_NN + ridge * jnp.eye(size, dtype=jnp.float32)
    # Reversed twice, the Cholesky factor of S gives that of its inverse without inverting S.
    lower_NN = jnp.linalg.cholesky(damped_NN[::-1, ::-1])
    factor_NN = lower_NN[::-1, ::-1]  # S = R R^T, R upper triangular, and U = R^-1.
    starts = jnp.arange(0, size, group)

    def of_group(start):
        rows_GN = jax.lax.dynamic_slice_in_dim(factor_NN, start, group, 0)
        return jax.lax.dynamic_slice_in_dim(rows_GN, start, group, 1)

    diagonal_JGG = jax.vmap(of_group)(starts)
    metric_JGG = jnp.matmul(
        diagonal_JGG, diagonal_JGG.transpose(0, 2, 1), precision=jax.lax.Precision.HIGHEST
    )
    inverse_NN = jax.scipy.linalg.solve_triangular(
        factor_NN, jnp.eye(size, dtype=jnp.float32), lower=False
    )
    rows_JGN = jnp.matmul(
        diagonal_JGG, inverse_NN.reshape(-1, group, size), precision=jax.lax.Precision.HIGHEST
    )
    real_J = jnp.max(diagonal_N.reshape(-1, group), axis=1) > 0
    mean_GG = jnp.sum(metric_JGG * real_J[:, None, None], axis=0) / jnp.maximum(jnp.sum(real_J), 1)
    return rows_JGN.reshape(size, size), metric_JGG, mean_GG


@functools.partial(jax.jit, static_argnames="beam")
def _feedback_inside(target_OX, passed_XX, metric_TGG, books_MKG, scales_O, *, beam):
    group = books_MKG.shape[-1]

    def step(target_OX, inputs):
        at, metric_GG = inputs
        target_OG = jax.lax.dynamic_slice_in_dim(target_OX, at, group, 1)
        linear_OG = dot(_safe_divide(target_OG, scales_O), metric_GG)
        codes_OM = encode(linear_OG, metric_GG, books_MKG, beam=beam)
        error_OG = target_OG - entry_sum(codes_OM, books_MKG) * scales_O[:, None]
        passed_GX = jax.lax.dynamic_slice_in_dim(passed_XX, at, group, 0)
        return target_OX - dot(error_OG, passed_GX), (codes_OM, error_OG)

    starts = jnp.arange(metric_TGG.shape[0]) * group
    _, (codes_TOM, error_TOG) = jax.lax.scan(step, target_OX, (starts, metric_TGG))
    error_OX = error_TOG.transpose(1, 0, 2).reshape(target_OX.shape)
    return codes_TOM.transpose(1, 0, 2), error_OX


@functools.partial(jax.jit, static_argnames=("size", "group"))
def _feedback_read(target_ON, passed_NN, metric_JGG, first, *, size, group):
    passed_XN, passed_XX = square(passed_NN, first * group, size=size * group)
    target_OX = jax.lax.dynamic_slice_in_dim(target_ON, first * group, size * group, 1)
    metric_TGG = jax.lax.dynamic_slice_in_dim(metric_JGG, first, size, 0)
    return target_OX, passed_XN, passed_XX, metric_TGG


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _feedback_write(target_ON, codes_OJM, error_OX, passed_XN, codes_OTM, first):
    codes_OJM = jax.lax.dynamic_update_slice_in_dim(codes_OJM, codes_OTM, first, 1)
    return target_ON - dot(error_OX, passed_XN), codes_OJM


@functools.partial(jax.jit, static_argnames=("groups", "books"))
def _feedback_start(w_ON, *, groups, books):
    return jnp.copy(w_ON), jnp.zeros((w_ON.shape[0], groups, books), jnp.int32)


def feedback(
    w_ON: jax.Array,
    passed_NN: jax.Array,
    metric_JGG: jax.Array,
    books_MKG: jax.Array,
    scales_O: jax.Array,
    *,
    beam: int = 0,
    groups: int | None = None,
) -> jax.Array:
    """One pass of error feedback in the natural order; returns codes [O, J, M].

    Args:
      passed_NN, metric_JGG: from `feedback_factors`.
      beam, groups: as in `descend`; padding gets zero codes.
    """
    total, group, _ = metric_JGG.shape
    size = block_size(total)
    target_ON, codes_OJM = _feedback_start(w_ON, groups=total, books=books_MKG.shape[0])
    for first in range(0, groups or total, size):
        target_OX, passed_XN, passed_XX, metric_TGG = _feedback_read(
            target_ON, passed_NN, metric_JGG, first, size=size, group=group
        )
        codes_OTM, error_OX = _feedback_inside(
            target_OX, passed_XX, metric_TGG, books_MKG, scales_O, beam=beam
        )
        target_ON, codes_OJM = _feedback_write(
            target_ON, codes_OJM, error_OX, passed_XN, codes_OTM, first
        )
    return codes_OJM
