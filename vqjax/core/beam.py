# SPDX-License-Identifier: Apache-2.0
"""Beam search over all codes of a row, as in AQLM (arXiv:2401.06118, section 3.2).

Dimension key:  O rows   N fan-in (J * G)   J vectors of a row   M codebooks   K entries   G weights
                of a vector   B hypotheses   T vectors of a block   X weights of a block (T * G)

A hypothesis is a whole row of codes. One sweep visits every code of the row in turn, vector by
vector, codebook by codebook, tries all K entries in every hypothesis and keeps the best B. The
result equals that of recomputing (W - Q) S after each choice; here it is kept up to date inside a
block of vectors and recomputed by one matrix product from block to block.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vqjax.core.encode import dot
from vqjax.core.sweep import block_size, loss_rows, reconstruct, square
from vqjax.errors import VqjaxError


class _Hypotheses(NamedTuple):
    """What a hypothesis carries through a block; all of it moves when hypotheses are re-ordered."""

    loss_OB: jax.Array
    gradient_OBX: jax.Array  # (w - q) S, columns of the block
    residual_OBX: jax.Array  # w - q, columns of the block
    codes_OBTM: jax.Array
    source_OB: jax.Array  # which hypothesis of the block's start this one continues


def beam_search(
    w_ON: jax.Array,
    moment_NN: jax.Array,
    codes_OJM: jax.Array,
    books_MKG: jax.Array,
    scales_O: jax.Array,
    *,
    beam: int,
) -> tuple[jax.Array, jax.Array]:
    """Improves all codes in one sweep under tr((W - Q) S (W - Q)^T).

    Keeping an old code is always among the choices, so no row's loss grows.

    Args:
      w_ON: weights, float32, N = J * G.
      moment_NN: S, symmetric positive semidefinite.
      codes_OJM: codes to start from.
      books_MKG, scales_O: row o, vector j is scales[o] * sum over m of books[m, code[o, j, m]].
      beam: hypotheses per row; 1 is coordinate descent over single codes.

    Returns:
      codes_OJM: int32.
      loss_O: of each row, recomputed from the codes.

    Raises:
      VqjaxError: if beam is not positive.
    """
    if beam < 1:
        raise VqjaxError(f"beam of {beam} hypotheses: at least 1 is needed")
    codes_OJM = _sweep(w_ON, moment_NN, codes_OJM, books_MKG, scales_O, beam=beam)
    residual_ON = w_ON - reconstruct(codes_OJM, books_MKG, scales_O)
    return codes_OJM, loss_rows(residual_ON, moment_NN)


@functools.partial(jax.jit, static_argnames="beam")
def _sweep(w_ON, moment_NN, codes_OJM, books_MKG, scales_O, *, beam: int) -> jax.Array:
    rows, groups, _ = codes_OJM.shape
    group, size = books_MKG.shape[-1], block_size(groups)
    residual_ON = w_ON - reconstruct(codes_OJM, books_MKG, scales_O)
    # One hypothesis to start with: the other places are filled once there is something to fill in.
    loss_OB = jnp.full((rows, beam), jnp.inf).at[:, 0].set(loss_rows(residual_ON, moment_NN))
    residual_OBN = jnp.broadcast_to(residual_ON[:, None], (rows, beam, residual_ON.shape[1]))
    codes_OBJM = jnp.broadcast_to(codes_OJM[:, None], (rows, beam, *codes_OJM.shape[1:]))

    def block(carry, first):
        loss_OB, residual_OBN, codes_OBJM = carry
        start = first * group
        moment_XN, moment_XX = square(moment_NN, start, size=size * group)
        state = _Hypotheses(
            loss_OB,
            dot(residual_OBN, moment_XN.T),
            jax.lax.dynamic_slice_in_dim(residual_OBN, start, size * group, 2),
            jax.lax.dynamic_slice_in_dim(codes_OBJM, first, size, 2),
            jnp.broadcast_to(jnp.arange(beam, dtype=jnp.int32)[None], loss_OB.shape),
        )
        state = _inside_block(state, moment_XX, books_MKG, scales_O)
        residual_OBN = _reorder(residual_OBN, state.source_OB)
        codes_OBJM = _reorder(codes_OBJM, state.source_OB)
        return (
            state.loss_OB,
            jax.lax.dynamic_update_slice_in_dim(residual_OBN, state.residual_OBX, start, 2),
            jax.lax.dynamic_update_slice_in_dim(codes_OBJM, state.codes_OBTM, first, 2),
        ), None

    carry = (loss_OB, residual_OBN, codes_OBJM)
    (_, _, codes_OBJM), _ = jax.lax.scan(block, carry, jnp.arange(0, groups, size))
    return codes_OBJM[:, 0]  # top_k sorts: the first hypothesis is the best


def _inside_block(state: _Hypotheses, moment_XX, books_MKG, scales_O) -> _Hypotheses:
    books, _, group = books_MKG.shape

    def visit(index, state: _Hypotheses) -> _Hypotheses:
        at, m = index // books, index % books
        return _visit_code(state, at, m, moment_XX, books_MKG[m], scales_O)

    return jax.lax.fori_loop(0, moment_XX.shape[0] // group * books, visit, state)


def _visit_code(state: _Hypotheses, at, m, moment_XX, book_KG, scales_O) -> _Hypotheses:
    """Tries all entries for code m of vector `at` in every hypothesis; keeps the best."""
    entries, group = book_KG.shape
    rows, beam = state.loss_OB.shape
    scale_O11 = scales_O[:, None, None]
    moment_GX = jax.lax.dynamic_slice_in_dim(moment_XX, at * group, group, 0)
    metric_GG = jax.lax.dynamic_slice_in_dim(moment_GX, at * group, group, 1)
    gradient_OBG = jax.lax.dynamic_slice_in_dim(state.gradient_OBX, at * group, group, 2)
    old_OB = state.codes_OBTM[:, :, at, m]
    old_OBG = book_KG[old_OB]

    # With d = scale * (new - old), the loss changes by d A d^T - 2 d . gradient.
    linear_OBG = gradient_OBG + scale_O11 * dot(old_OBG, metric_GG)
    square_K = jnp.sum(dot(book_KG, metric_GG) * book_KG, axis=-1)
    constant_OB = jnp.sum(old_OBG * (gradient_OBG + linear_OBG), axis=-1) * scale_O11[..., 0]
    change_OBK = (
        scale_O11 * (scale_O11 * square_K[None, None] - 2 * dot(linear_OBG, book_KG.T))
        + constant_OB[..., None]
    )
    loss_OBK = state.loss_OB[..., None] + change_OBK
    best_OB, flat_OB = jax.lax.top_k(-loss_OBK.reshape(rows, -1), beam)
    source_OB, code_OB = flat_OB // entries, flat_OB % entries

    state = jax.tree.map(lambda values: _reorder(values, source_OB), state)
    old_OBG = _reorder(old_OBG, source_OB)
    step_OBG = scale_O11 * (book_KG[code_OB] - old_OBG)
    residual_OBG = jax.lax.dynamic_slice_in_dim(state.residual_OBX, at * group, group, 2)
    return state._replace(
        loss_OB=-best_OB,
        gradient_OBX=state.gradient_OBX - dot(step_OBG, moment_GX),
        residual_OBX=jax.lax.dynamic_update_slice_in_dim(
            state.residual_OBX, residual_OBG - step_OBG, at * group, 2
        ),
        codes_OBTM=state.codes_OBTM.at[:, :, at, m].set(code_OB),
    )


def _reorder(values: jax.Array, source_OB: jax.Array) -> jax.Array:
    """Returns values [O, B, ...] with hypothesis source[o, b] at the place (o, b)."""
    index = source_OB.reshape(source_OB.shape + (1,) * (values.ndim - 2))
    return jnp.take_along_axis(values, index, axis=1)
