# SPDX-License-Identifier: Apache-2.0
"""Codebooks and scales by least squares, for given codes.

Dimension key:  O rows   N fan-in, padded to J * G   J vectors of a row   M codebooks   K entries
                G weights of a vector

For fixed codes the loss tr((W - Q) S (W - Q)^T) is an exact quadratic in the codebooks, and in the
scales row by row. The codebooks' normal equations are solved by conjugate gradients: the operator
is decode, multiply by S, and add up what falls to each entry.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vqjax.core import draw
from vqjax.core.encode import dot
from vqjax.core.sweep import reconstruct

_TINY = 1e-30
_ONWARD, MOMENTUM = 1.0, 0.8
"""Search and least squares in turn creep. The next search starts further along: by so many times
the change that least squares made, and that since the round before (heavy ball, Polyak 1964)."""


class Fit(NamedTuple):
    """What least squares reached.

    Attributes:
      books_MKG, scales_O: of no larger loss than the given ones; the given ones where float32
        gained nothing.
      onward_MKG: where the next search from scratch starts: further along the same way, unused
        entries moved (`revive`).
      loss: tr((W - Q) S (W - Q)^T).
    """

    books_MKG: jax.Array
    scales_O: jax.Array
    onward_MKG: jax.Array
    loss: jax.Array


def gather_to_entries(values_ON, codes_OJM, scales_O, entries: int) -> jax.Array:
    """Returns the transpose of `reconstruct`: scaled values added up by entry, [M, K, G]."""
    rows, groups, books = codes_OJM.shape
    group = values_ON.shape[1] // groups
    vectors_OJ1G = (values_ON * scales_O[:, None]).reshape(rows, groups, 1, group)
    places_OJM = codes_OJM + entries * jnp.arange(books, dtype=jnp.int32).reshape(1, 1, books)
    sums_XG = (
        jnp.zeros((books * entries, group), jnp.float32)
        .at[places_OJM]
        .add(jnp.broadcast_to(vectors_OJ1G, (rows, groups, books, group)))
    )
    return sums_XG.reshape(books, entries, group)


def entry_weights(codes_OJM, scales_O, diagonal_N, entries: int) -> jax.Array:
    """Returns how much of the loss rests on each entry, [M, K]: 0 for entries that nothing uses.

    Args:
      diagonal_N: of S; zero columns (padding) weigh nothing.
    """
    rows, groups, _ = codes_OJM.shape
    size_J = jnp.mean(diagonal_N.reshape(groups, -1), axis=1)
    weights_OJ = jnp.broadcast_to(scales_O[:, None] * size_J[None], (rows, groups))
    return gather_to_entries(weights_OJ, codes_OJM, scales_O, entries)[..., 0]


def mean_metric(moment_NN: jax.Array, group: int) -> jax.Array:
    """Returns the mean [G, G] block on the diagonal of S, scaled to a mean diagonal of 1."""
    groups = moment_NN.shape[0] // group
    blocks_JGJG = moment_NN.reshape(groups, group, groups, group)
    mean_GG = jnp.einsum("jajb->ab", blocks_JGJG)
    size = jnp.mean(jnp.diagonal(mean_GG))
    mean_GG = mean_GG / jnp.where(size > 0, size, 1.0)
    return mean_GG + 1e-4 * jnp.eye(group, dtype=jnp.float32)


def fit_codebooks(
    image_ON, moment_NN, codes_OJM, books_MKG, scales_O, weights_MK, *, steps: int = 8
) -> jax.Array:
    """Returns codebooks [M, K, G] of least loss for these codes and scales.

    Conjugate gradients, preconditioned by each entry's weight times the mean diagonal block of S.
    In float32 they would diverge after convergence, so they end once the preconditioned residual
    has dropped by 1e-4 or the curvature along a direction is lost. Unused entries stay as they are.

    Args:
      image_ON: (W - Q) S for the given codebooks.
      weights_MK: from `entry_weights`.
      steps: at most so many iterations; each costs one product with S.
    """
    entries, group = books_MKG.shape[1:]
    inverse_GG = jnp.linalg.inv(mean_metric(moment_NN, group))
    share_MK = jnp.where(weights_MK > 0, 1 / jnp.maximum(weights_MK, _TINY), 0.0)

    def precondition(residual_MKG):
        return jnp.einsum("mkg,gh->mkh", residual_MKG, inverse_GG) * share_MK[..., None]

    def step(state):
        index, books, residual, direction, energy, _ = state
        values_ON = dot(reconstruct(codes_OJM, direction, scales_O), moment_NN)
        image = gather_to_entries(values_ON, codes_OJM, scales_O, entries)
        curvature = jnp.sum(direction * image)
        sound = curvature > _TINY
        length = jnp.where(sound, energy / jnp.maximum(curvature, _TINY), 0.0)
        books, residual = books + length * direction, residual - length * image
        conditioned = precondition(residual)
        new_energy = jnp.sum(residual * conditioned)
        direction = conditioned + new_energy / jnp.maximum(energy, _TINY) * direction
        return index + 1, books, residual, direction, new_energy, sound

    residual = gather_to_entries(image_ON, codes_OJM, scales_O, entries)
    direction = precondition(residual)
    first = jnp.sum(residual * direction)

    def unfinished(state):
        index, _, _, _, energy, sound = state
        return (index < steps) & sound & (energy > 1e-8 * first) & (energy > _TINY)

    start = (0, books_MKG, residual, direction, first, jnp.array(True))
    return jax.lax.while_loop(unfinished, step, start)[1]


def fit_scales(w_ON, q_ON, image_ON, scales_O) -> jax.Array:
    """Returns the scale of least loss for each row, [O]: (q S w) / (q S q).

    Rows where that is undefined or not positive keep their scale.

    Args:
      q_ON: unscaled rows.
      image_ON: q S.
    """
    above_O = jnp.sum(image_ON * w_ON, axis=-1)
    below_O = jnp.sum(image_ON * q_ON, axis=-1)
    sound_O = (below_O > _TINY) & (above_O > 0)
    return jnp.where(sound_O, above_O / jnp.where(sound_O, below_O, 1.0), scales_O)


def revive(books_MKG, weights_MK, key: jax.Array) -> jax.Array:
    """Moves entries that no vector uses next to the most used one of their codebook.

    Args:
      weights_MK: from `entry_weights`.
    """
    busiest_M = jnp.argmax(weights_MK, axis=1)
    popular_M1G = jnp.take_along_axis(books_MKG, busiest_M[:, None, None], axis=1)
    spread = 0.3 * jnp.std(books_MKG)
    moved_MKG = popular_M1G + spread * draw.normal(key, books_MKG.shape)
    return jnp.where(weights_MK[..., None] > 0, books_MKG, moved_MKG)


FIT_VECTORS = 65_536
"""Vectors, about, that codebooks are fitted to: a hundred and more for each of their numbers."""


def fit_rows(rows: int, groups: int) -> int:
    """Returns how many rows of a layer hold `FIT_VECTORS` vectors, all where there are fewer."""
    return min(rows, max(1, FIT_VECTORS // groups))


@functools.partial(jax.jit, static_argnames="rows")
def improve(
    w_ON,
    moment_NN,
    codes_OJM,
    books_MKG,
    scales_O,
    key,
    outputs=None,
    last_MKG=None,
    momentum=0.0,
    *,
    rows: int | None = None,
) -> Fit:
    """Least squares for the codes as they are: codebooks first, then scales.

    Args:
      outputs: rows that hold anything; default: all. The rest is padding.
      last_MKG, momentum: codebooks of the round before, and how far their change carries on.
      rows: fit the codebooks to so many of them, at equal distances. Scales and loss are always
        those of all rows, and a fit that does not lower their loss is discarded.
    """
    entries = books_MKG.shape[1]
    residual_ON = w_ON - reconstruct(codes_OJM, books_MKG, scales_O)
    image_ON = dot(residual_ON, moment_NN)
    before = jnp.sum(image_ON * residual_ON)
    diagonal_N = jnp.diagonal(moment_NN)
    count = w_ON.shape[0] if outputs is None else outputs
    rows = w_ON.shape[0] if rows is None else rows
    place_R = jnp.arange(rows, dtype=jnp.int32)
    # Padding has scale 0 and weighs nothing: where there is room for it, no row counts twice.
    fit_R = jnp.where(count <= rows, place_R, place_R * count // rows)
    part = codes_OJM[fit_R], books_MKG, scales_O[fit_R]
    part_MK = entry_weights(part[0], part[2], diagonal_N, entries)
    fitted_MKG = fit_codebooks(image_ON[fit_R], moment_NN, *part, part_MK)

    q_ON = reconstruct(codes_OJM, fitted_MKG, jnp.ones_like(scales_O))
    image_ON = dot(q_ON, moment_NN)
    fitted_O = fit_scales(w_ON, q_ON, image_ON, scales_O)
    residual_ON = w_ON - fitted_O[:, None] * q_ON
    target_ON = dot(w_ON, moment_NN)
    after = jnp.sum(residual_ON * (target_ON - fitted_O[:, None] * image_ON))
    better = after < before
    given_MKG, books_MKG = books_MKG, jnp.where(better, fitted_MKG, books_MKG)
    scales_O = jnp.where(better, fitted_O, scales_O)
    weights_MK = entry_weights(codes_OJM, scales_O, diagonal_N, entries)
    onward_MKG = books_MKG + _ONWARD * (books_MKG - given_MKG)
    if last_MKG is not None:
        onward_MKG += momentum * (books_MKG - last_MKG)
    onward_MKG = revive(onward_MKG, weights_MK, key)
    return Fit(books_MKG, scales_O, onward_MKG, jnp.minimum(after, before))
