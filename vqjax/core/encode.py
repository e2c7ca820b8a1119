# SPDX-License-Identifier: Apache-2.0
"""The inner problem: choose the codes of one vector per row under a quadratic cost.

Dimension key:  O rows   M codebooks   K entries   G weights of a vector   B hypotheses
                P, Q sums of the entries of one half of the codebooks

For every row the cost of a sum q of entries is  q A q^T - 2 q . v : the output error of the layer
as a function of one vector, all others held. The metric A is shared by the rows, v is not, which
is what makes enumeration cheap.
"""

import jax
import jax.numpy as jnp

from vqjax.kernels.decode import sum_entries_at_once

EXACT_LIMIT = 262_144
"""Sums of entries up to which all are enumerated: beams find worse ones in about that time."""

_HIGHEST = jax.lax.Precision.HIGHEST


def dot(left: jax.Array, right: jax.Array) -> jax.Array:
    """Matrix product in full float32, also where the hardware prefers a shorter type."""
    return jnp.matmul(left, right, precision=_HIGHEST)


def entry_sum(codes_OM: jax.Array, books_MKG: jax.Array) -> jax.Array:
    """Returns the sum of the chosen entries, [O, G]."""
    return sum_entries_at_once(codes_OM, books_MKG)


def cost(q_OG: jax.Array, linear_OG: jax.Array, metric_GG: jax.Array) -> jax.Array:
    """Returns q A q^T - 2 q . v of each row, [O]."""
    return jnp.sum(q_OG * (dot(q_OG, metric_GG) - 2 * linear_OG), axis=-1)


def all_sums(books_MKG: jax.Array) -> jax.Array:
    """Returns every sum of one entry per codebook, [K**M, G], the last codebook's code fastest."""
    group = books_MKG.shape[-1]
    sums_PG = jnp.zeros((1, group), books_MKG.dtype)
    for book_KG in books_MKG:
        sums_PG = (sums_PG[:, None] + book_KG[None]).reshape(-1, group)
    return sums_PG


def _smallest_over_q(cross_PQ: jax.Array, cost_QO: jax.Array) -> jax.Array:
    """Returns min over q of cross[p, q] + cost[q, o]: a matrix product in (min, +).

    Sixteen values of q are taken per step so that the accumulator stays in registers; the plain
    reduction takes five times as long on a CPU.
    """
    unroll = 16
    spare = -cross_PQ.shape[1] % unroll
    cross_PQ = jnp.pad(cross_PQ, ((0, 0), (0, spare)))
    cost_QO = jnp.pad(cost_QO, ((0, spare), (0, 0)), constant_values=jnp.inf)
    start = jnp.full((cross_PQ.shape[0], cost_QO.shape[1]), jnp.inf, jnp.float32)

    def step(index: jax.Array, least_PO: jax.Array) -> jax.Array:
        cross_PU = jax.lax.dynamic_slice_in_dim(cross_PQ, index * unroll, unroll, 1)
        cost_UO = jax.lax.dynamic_slice_in_dim(cost_QO, index * unroll, unroll, 0)
        for u in range(unroll):
            sum_PO = cross_PU[:, u][:, None] + cost_UO[u][None]
            least_PO = jnp.where(sum_PO < least_PO, sum_PO, least_PO)
        return least_PO

    return jax.lax.fori_loop(0, cross_PQ.shape[1] // unroll, step, start)


def _argmin_first_axis(values: jax.Array) -> jax.Array:
    """`argmin` over axis 0 from two plain minima, which a CPU vectorizes; ties go to the first."""
    rows = jnp.arange(values.shape[0], dtype=jnp.int32)[:, None]
    is_least = values <= jnp.min(values, axis=0, keepdims=True)
    return jnp.min(jnp.where(is_least, rows, values.shape[0] - 1), axis=0)


def _digits(number_O: jax.Array, base: int, count: int) -> jax.Array:
    """Returns the codes [O, count] that `all_sums` puts at the row `number`."""
    places = [base**place for place in reversed(range(count))]
    return jnp.stack([(number_O // place) % base for place in places], axis=-1).astype(jnp.int32)


def encode_exact(linear_OG: jax.Array, metric_GG: jax.Array, books_MKG: jax.Array) -> jax.Array:
    """Returns the best of all K**M sums for every row, codes int32 [O, M].

    The codebooks are split in two halves with sums p and q. Their cross term 2 p A q^T is the same
    for all rows, so a row costs one addition and one comparison per sum, not G multiplications.
    """
    books, entries, _ = books_MKG.shape
    first = (books + 1) // 2
    p_PG, q_QG = all_sums(books_MKG[:first]), all_sums(books_MKG[first:])
    linear_GO = linear_OG.T

    def half_cost(sums: jax.Array) -> jax.Array:
        own = jnp.sum(dot(sums, metric_GG) * sums, axis=-1)
        return own[:, None] - 2 * dot(sums, linear_GO)

    cost_PO, cost_QO = half_cost(p_PG), half_cost(q_QG)
    cross_PQ = 2 * dot(dot(p_PG, metric_GG), q_QG.T)
    p_O = _argmin_first_axis(cost_PO + _smallest_over_q(cross_PQ, cost_QO))
    q_O = _argmin_first_axis(cross_PQ[p_O].T + cost_QO)
    return _digits(p_O * q_QG.shape[0] + q_O, entries, books)


def encode_beam(
    linear_OG: jax.Array, metric_GG: jax.Array, books_MKG: jax.Array, beam: int
) -> jax.Array:
    """Returns the best sum found by keeping the `beam` best partial sums, codes int32 [O, M].

    A beam of K**(M - 1) is exhaustive; 1 is greedy residual coding.
    """
    rows, group = linear_OG.shape
    books, entries, _ = books_MKG.shape
    left_OBG = linear_OG[:, None]
    cost_OB = jnp.zeros((rows, 1), jnp.float32)
    codes_OBM = jnp.zeros((rows, 1, books), jnp.int32)
    for m in range(books):
        metric_KG = dot(books_MKG[m], metric_GG)
        own_K = jnp.sum(metric_KG * books_MKG[m], axis=-1)
        cross_OBK = dot(left_OBG.reshape(-1, group), books_MKG[m].T).reshape(rows, -1, entries)
        cost_OBK = cost_OB[..., None] + own_K[None, None] - 2 * cross_OBK
        width = min(beam, cost_OBK.shape[1] * entries)
        best_OB, flat_OB = jax.lax.top_k(-cost_OBK.reshape(rows, -1), width)
        source_OB1, code_OB = flat_OB[..., None] // entries, flat_OB % entries
        # Everything that belongs to a hypothesis moves with it, or the next step continues another.
        left_OBG = jnp.take_along_axis(left_OBG, source_OB1, axis=1) - metric_KG[code_OB]
        codes_OBM = jnp.take_along_axis(codes_OBM, source_OB1, axis=1).at[..., m].set(code_OB)
        cost_OB = -best_OB
    return codes_OBM[:, 0]


def _blocks(books: int, entries: int, most: int) -> list[list[int]]:
    """All codebooks, or overlapping sets of one size with `most` sums each, in visiting order."""
    if entries**books <= EXACT_LIMIT:
        return [list(range(books))]
    size = 1
    while entries ** (size + 1) <= most:
        size += 1
    apart = [[(start + i) % books for i in range(size)] for start in range(0, books, size)]
    stride = -(-books // size)
    woven = [[(start + i * stride) % books for i in range(size)] for start in range(stride)]
    return apart + [block for block in woven if len(set(block)) == size]


def encode(
    linear_OG: jax.Array,
    metric_GG: jax.Array,
    books_MKG: jax.Array,
    previous_OM: jax.Array | None = None,
    *,
    beam: int = 0,
    most: int = EXACT_LIMIT,
) -> jax.Array:
    """Returns codes int32 [O, M] of low cost, never worse than `previous`.

    Where K**M is at most `EXACT_LIMIT` and beam is 0, the result is the optimum. Otherwise a beam
    search gives the start (`beam` hypotheses, 8 where 0 is given), and blocks of codebooks that can
    be enumerated are then optimized in turn.

    Args:
      linear_OG: v, in the units of the metric times an entry.
      metric_GG: A, symmetric positive semidefinite.
      books_MKG: float32.
      previous_OM: codes to start from and to improve on.
      beam: hypotheses; 0 chooses.
      most: sums of a block, at most, up to `EXACT_LIMIT`; blocks of one codebook may have more.
    """
    books, entries, _ = books_MKG.shape
    blocks = _blocks(books, entries, most)
    if len(blocks) == 1 and not beam:
        codes_OM = encode_exact(linear_OG, metric_GG, books_MKG)
    else:
        codes_OM = encode_beam(linear_OG, metric_GG, books_MKG, beam or 8)
    if previous_OM is not None:
        codes_OM = _better(codes_OM, previous_OM, linear_OG, metric_GG, books_MKG)
    if len(blocks) > 1:
        codes_OM = _improve_blocks(codes_OM, linear_OG, metric_GG, books_MKG, blocks)
    return codes_OM


def _better(
    codes_OM: jax.Array,
    previous_OM: jax.Array,
    linear_OG: jax.Array,
    metric_GG: jax.Array,
    books_MKG: jax.Array,
) -> jax.Array:
    found_O = cost(entry_sum(codes_OM, books_MKG), linear_OG, metric_GG)
    kept_O = cost(entry_sum(previous_OM, books_MKG), linear_OG, metric_GG)
    return jnp.where((found_O < kept_O)[:, None], codes_OM, previous_OM)


def _improve_blocks(
    codes_OM: jax.Array,
    linear_OG: jax.Array,
    metric_GG: jax.Array,
    books_MKG: jax.Array,
    blocks: list[list[int]],
) -> jax.Array:
    def visit(codes_OM: jax.Array, block: jax.Array) -> tuple[jax.Array, None]:
        part_MKG = books_MKG[block]
        q_OG = entry_sum(codes_OM, books_MKG)
        others_OG = q_OG - entry_sum(codes_OM[:, block], part_MKG)
        left_OG = linear_OG - dot(others_OG, metric_GG)
        return codes_OM.at[:, block].set(encode_exact(left_OG, metric_GG, part_MKG)), None

    return jax.lax.scan(visit, codes_OM, jnp.asarray(blocks))[0]
