# SPDX-License-Identifier: Apache-2.0
"""First codebooks: additive k-means on a sample of the vectors, under one mean metric.

Dimension key:  V sampled vectors   M codebooks   K entries   G weights of a vector
"""

import functools

import jax
import jax.numpy as jnp

from vqjax.core import draw
from vqjax.core.encode import EXACT_LIMIT, dot, encode, entry_sum

SAMPLE = 2048
"""Vectors that the first codebooks are made from; more of them gain nothing measurable."""

_SUMS = 4096
"""Sums of a block where not all are enumerated, or those of two codebooks if these are more.
Codebooks move on while these codes are searched: larger blocks take longer for no less error."""


@functools.partial(jax.jit, static_argnames=("books", "entries", "steps", "beam", "tile"))
def initial_codebooks(
    vectors_VG: jax.Array,
    metric_GG: jax.Array,
    key: jax.Array,
    *,
    books: int,
    entries: int,
    steps: int,
    beam: int = 0,
    tile: int = 128,
) -> jax.Array:
    """Returns codebooks [M, K, G] whose sums fit the vectors under the metric.

    Codes by search and codebooks by least squares in turn, with noise on the codebooks that cools
    down to zero (stochastic relaxation of LSQ++, Martinez et al., ECCV 2018, section 3.2); the last
    tenth of the steps has none. The start is drawn from the vectors, each codebook's share of their
    size falling as the residual of an ideal code of its rate would.

    Args:
      vectors_VG: V is a multiple of `tile`.
      beam: as in `encode`.
      tile: vectors searched together.
    """
    count, group = vectors_VG.shape
    shares = (entries ** (-1 / group)) ** jnp.arange(books, dtype=jnp.float32)
    shares = shares / jnp.linalg.norm(shares)
    most = min(EXACT_LIMIT, max(_SUMS, entries**2))
    draw_key, noise_key = jax.random.split(key)
    drawn = jax.random.randint(draw_key, (books, entries), 0, count)
    start_MKG = vectors_VG[drawn] * shares[:, None, None]
    linear_XTG = dot(vectors_VG, metric_GG).reshape(-1, tile, group)

    def step(books_MKG, inputs):
        temperature, key = inputs
        codes_XTM = jax.lax.map(
            lambda v: encode(v, metric_GG, books_MKG, beam=beam, most=most), linear_XTG
        )
        codes_VM = codes_XTM.reshape(count, books)
        fitted_MKG = fit_free(vectors_VG, codes_VM, books_MKG)
        error_VG = vectors_VG - entry_sum(codes_VM, fitted_MKG)
        # The error is shared by M codebooks: noise of its size on each would drown them.
        size_G = jnp.std(error_VG, axis=0) / jnp.sqrt(1.0 * books)
        noise_MKG = draw.normal(key, books_MKG.shape) * size_G[None, None]
        return fitted_MKG + temperature * noise_MKG, None

    cold = steps - max(2, steps // 10)
    temperatures = jnp.sqrt(jnp.maximum(0.0, 1 - jnp.arange(1, steps + 1) / max(1, cold)))
    books_MKG, _ = jax.lax.scan(step, start_MKG, (temperatures, jax.random.split(noise_key, steps)))
    return books_MKG


def fit_free(vectors_VG: jax.Array, codes_VM: jax.Array, books_MKG: jax.Array) -> jax.Array:
    """Returns codebooks of least squared error for these codes, all vectors weighted alike.

    The solution does not depend on the metric as long as all vectors share it. A small pull towards
    the given codebooks settles what the codes leave open (sums fix entries up to shared offsets).
    """
    books, entries, group = books_MKG.shape
    chosen_VX = jax.nn.one_hot(codes_VM, entries).reshape(-1, books * entries)
    together_XX = dot(chosen_VX.T, chosen_VX)
    pull = 1e-3 * vectors_VG.shape[0] / entries
    system_XX = together_XX + pull * jnp.eye(books * entries, dtype=jnp.float32)
    given_XG = books_MKG.reshape(-1, group)
    error_VG = vectors_VG - dot(chosen_VX, given_XG)
    factor = jax.scipy.linalg.cho_factor(system_XX)
    change_XG = jax.scipy.linalg.cho_solve(factor, dot(chosen_VX.T, error_VG))
    return books_MKG + change_XG.reshape(books_MKG.shape)
