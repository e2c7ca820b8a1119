# SPDX-License-Identifier: Apache-2.0
"""Codebooks and scales by least squares, for given codes.

Dimension key:  O rows   N fan-in, padded to J * G   J vectors of a row   M codebooks   K entries
                G weights of a vector

For fixed codes the loss tr((W - Q) S (W - Q)^T) is an exact quadratic in the codebooks, and in the
scales row by row. The codebooks' normal equations are solved by conjugate gradients: the operator
is decode, multiply by S, and add up what falls to each entry.
"""

import functools

import jax
import jax.numpy as jnp

from vqjax.core.encode import dot
from vqjax.core.sweep import loss_rows, reconstruct

_TINY = 1e-30


def gather_to_entries(values_ON, codes_OJM, scales_O, entries: int) -> jax.Array:
    """Returns the transpose of `reconstruct`: scaled values added up by entry, [M, K, G]."""
    rows, groups, books = codes_OJM.shape
    group = values_ON.shape[1] // groups
    vectors_VG = (values_ON * scales_O[:, None]).reshape(rows * groups, group)
    sums = [
        jax.ops.segment_sum(vectors_VG, codes_OJM[..., m].reshape(-1), entries)
        for m in range(books)
    ]
    return jnp.stack(sums)


def _entry_weights(codes_OJM, scales_O, entries: int) -> jax.Array:
    rows, groups, books = codes_OJM.shape
    squares_V = jnp.broadcast_to((scales_O**2)[:, None], (rows, groups)).reshape(-1)
    sums = [
        jax.ops.segment_sum(squares_V, codes_OJM[..., m].reshape(-1), entries) for m in range(books)
    ]
    return jnp.stack(sums)


def mean_metric(moment_NN: jax.Array, group: int) -> jax.Array:
    """Returns the mean of the [G, G] blocks on the diagonal of S, slightly damped."""
    groups = moment_NN.shape[0] // group
    blocks_JGJG = moment_NN.reshape(groups, group, groups, group)
    mean_GG = jnp.einsum("jajb->ab", blocks_JGJG) / groups
    ridge = 1e-4 * jnp.mean(jnp.diagonal(mean_GG)) + _TINY
    return mean_GG + ridge * jnp.eye(group, dtype=jnp.float32)


@functools.partial(jax.jit, static_argnames="steps")
def fit_codebooks(w_ON, moment_NN, codes_OJM, books_MKG, scales_O, *, steps: int = 10) -> jax.Array:
    """Returns codebooks [M, K, G] of least loss for these codes and scales.

    Conjugate gradients, preconditioned by each entry's weight times the mean diagonal block of S.
    In float32 they would diverge after convergence, so they end once the preconditioned residual
    has dropped by 1e-5 or the curvature along a direction is lost. Unused entries stay as they are.

    Args:
      steps: at most so many iterations; each costs one product with S.
    """
    entries, group = books_MKG.shape[1:]
    inverse_GG = jnp.linalg.inv(mean_metric(moment_NN, group))
    weights_MK = _entry_weights(codes_OJM, scales_O, entries)
    share_MK = jnp.where(weights_MK > 0, 1 / jnp.maximum(weights_MK, _TINY), 0.0)

    def to_entries(values_ON):
        return gather_to_entries(dot(values_ON, moment_NN), codes_OJM, scales_O, entries)

    def precondition(residual_MKG):
        return jnp.einsum("mkg,gh->mkh", residual_MKG, inverse_GG) * share_MK[..., None]

    def step(state):
        index, books, residual, direction, energy, _, first = state
        image = to_entries(reconstruct(codes_OJM, direction, scales_O))
        curvature = jnp.sum(direction * image)
        sound = curvature > _TINY
        length = jnp.where(sound, energy / jnp.maximum(curvature, _TINY), 0.0)
        books, residual = books + length * direction, residual - length * image
        conditioned = precondition(residual)
        new_energy = jnp.sum(residual * conditioned)
        direction = conditioned + new_energy / jnp.maximum(energy, _TINY) * direction
        return index + 1, books, residual, direction, new_energy, sound, first

    def unfinished(state):
        index, _, _, _, energy, sound, first = state
        return (index < steps) & sound & (energy > 1e-10 * first) & (energy > _TINY)

    residual_ON = w_ON - reconstruct(codes_OJM, books_MKG, scales_O)
    residual = to_entries(residual_ON)
    direction = precondition(residual)
    energy = jnp.sum(residual * direction)
    start = (0, books_MKG, residual, direction, energy, jnp.array(True), energy)
    return jax.lax.while_loop(unfinished, step, start)[1]


@jax.jit
def fit_scales(w_ON, moment_NN, codes_OJM, books_MKG, scales_O) -> jax.Array:
    """Returns the scale of least loss for each row, [O]: (q S w) / (q S q) with q the unscaled row.

    Rows where that is undefined (no output, or nothing chosen) keep their scale.
    """
    q_ON = reconstruct(codes_OJM, books_MKG, jnp.ones_like(scales_O))
    image_ON = dot(q_ON, moment_NN)
    above_O = jnp.sum(image_ON * w_ON, axis=-1)
    below_O = jnp.sum(image_ON * q_ON, axis=-1)
    sound_O = (below_O > _TINY) & (above_O > 0)
    return jnp.where(sound_O, above_O / jnp.where(sound_O, below_O, 1.0), scales_O)


@functools.partial(jax.jit, static_argnames="entries")
def _used(codes_OJM, entries):
    return _entry_weights(codes_OJM, jnp.ones(codes_OJM.shape[0]), entries)


def revive(codes_OJM, books_MKG, key: jax.Array) -> jax.Array:
    """Moves entries that no vector uses next to the most used one of their codebook."""
    counts_MK = _used(codes_OJM, books_MKG.shape[1])
    busiest_M = jnp.argmax(counts_MK, axis=1)
    popular_M1G = jnp.take_along_axis(books_MKG, busiest_M[:, None, None], axis=1)
    spread = 0.3 * jnp.std(books_MKG)
    moved_MKG = popular_M1G + spread * jax.random.normal(key, books_MKG.shape)
    return jnp.where(counts_MK[..., None] > 0, books_MKG, moved_MKG)


def loss(w_ON, moment_NN, codes_OJM, books_MKG, scales_O) -> jax.Array:
    """Returns tr((W - Q) S (W - Q)^T), a scalar."""
    return jnp.sum(loss_rows(w_ON - reconstruct(codes_OJM, books_MKG, scales_O), moment_NN))
