# SPDX-License-Identifier: Apache-2.0
"""The nearest sum of entries to given vectors: the code search of PV-Tuning (arXiv:2405.14852).

Dimension key:  V vectors   M codebooks   K entries   G weights of a vector   B hypotheses

Follows `beam_search_l2` of the reference but for one thing: residuals move with their hypotheses.
There they stay behind, which with three codebooks and more makes wide beams worse than narrow ones.
"""

import jax
import jax.numpy as jnp

from vqjax.core.encode import dot, encode, entry_sum
from vqjax.errors import VqjaxError


def nearest_codes(
    wanted_VG: jax.Array,
    previous_VM: jax.Array,
    books_MKG: jax.Array,
    *,
    beam: int,
    short_V: jax.Array | None = None,
    tail: int = 0,
    differ: bool = False,
) -> jax.Array:
    """Returns codes int32 [V, M] of a sum near to each vector.

    Unless `differ`, no vector ends further from its sum than with the codes it had, and one that
    gains nothing keeps these.

    Args:
      wanted_VG: float; anything in places that do not count.
      previous_VM: codes to start from, int32.
      books_MKG: float.
      beam: hypotheses; 0 is `encode.encode`, which enumerates up to 262,144 sums.
      short_V: bool, vectors of which the first `tail` weights count and no others; None: there are
        none.
      differ: return the nearest other codes found where the nearest are the previous ones.

    Raises:
      VqjaxError: if codes have to differ without a beam.
    """
    if differ and not beam:
        raise VqjaxError("codes that must differ need a beam of at least 1 hypothesis, not 0")
    count, group = wanted_VG.shape
    lengths_V1 = jnp.full((count, 1), group)
    if short_V is not None:
        lengths_V1 = jnp.where(short_V[:, None], tail, group)
    real_VG = jnp.arange(group)[None] < lengths_V1
    wanted_VG = jnp.where(real_VG, wanted_VG, 0.0)
    if not beam:
        found_VM = _enumerate(wanted_VG, previous_VM, books_MKG, group)
        if short_V is None:
            return found_VM
        # One metric serves all vectors of a call: the short ones take a second.
        short_VM = _enumerate(wanted_VG, previous_VM, books_MKG, tail)
        return jnp.where(short_V[:, None], short_VM, found_VM)
    found_VBM = _beam(wanted_VG, previous_VM, books_MKG, real_VG, beam, 2 if differ else 1)
    found_VM = found_VBM[:, 0]
    if differ:
        same_V1 = jnp.all(found_VM == previous_VM, axis=-1, keepdims=True)
        return jnp.where(same_V1, found_VBM[:, 1], found_VM)

    def distance(codes_VM: jax.Array) -> jax.Array:
        left_VG = jnp.where(real_VG, wanted_VG - entry_sum(codes_VM, books_MKG), 0.0)
        return jnp.sum(left_VG**2, axis=-1, keepdims=True)

    return jnp.where(distance(found_VM) < distance(previous_VM), found_VM, previous_VM)


def _enumerate(wanted_VG, previous_VM, books_MKG, length: int) -> jax.Array:
    """Counts the first `length` weights of each vector."""
    counts_G = jnp.arange(wanted_VG.shape[-1]) < length
    return encode(wanted_VG, jnp.diag(counts_G.astype(wanted_VG.dtype)), books_MKG, previous_VM)


def _beam(wanted_VG, previous_VM, books_MKG, real_VG, beam: int, last: int) -> jax.Array:
    """Visits every codebook once; returns the `last` best hypotheses, best first, [V, B, M]."""
    count, (books, entries, _) = len(wanted_VG), books_MKG.shape
    real_VG = real_VG.astype(wanted_VG.dtype)
    real_V1G = real_VG[:, None]
    codes_VBM = previous_VM[:, None]
    left_VBG = (wanted_VG - entry_sum(previous_VM, books_MKG))[:, None] * real_V1G
    for m in range(books):  # M is 1 to 8: unrolled, since the beam grows from 1
        book_KG = books_MKG[m]
        left_VBG = left_VBG + book_KG[codes_VBM[..., m]] * real_V1G
        score_VBK = (
            jnp.sum(left_VBG**2, axis=-1, keepdims=True)
            - 2 * dot(left_VBG, book_KG.T)
            + dot(real_VG, (book_KG**2).T)[:, None]
        )
        width = min(beam if m < books - 1 else last, score_VBK.shape[1] * entries)
        _, flat_VB = jax.lax.top_k(-score_VBK.reshape(count, -1), width)
        source_VB1, code_VB = (flat_VB // entries)[..., None], flat_VB % entries
        left_VBG = jnp.take_along_axis(left_VBG, source_VB1, axis=1) - book_KG[code_VB] * real_V1G
        codes_VBM = jnp.take_along_axis(codes_VBM, source_VB1, axis=1).at[..., m].set(code_VB)
    return codes_VBM
