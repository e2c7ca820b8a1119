# SPDX-License-Identifier: Apache-2.0
"""The V step of PV-Tuning (arXiv:2405.14852): which vectors are searched, and which may move.

Dimension key:  O rows   J vectors of a row   V vectors that are searched   M codebooks   K entries
                G weights of a vector
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vqjax.core.coded import CodedWeight
from vqjax.core.encode import entry_sum
from vqjax.core.nearest import nearest_codes
from vqjax.errors import VqjaxError


class Limits(NamedTuple):
    """How far one V step may go, per weight.

    Attributes:
      max_code_change: share of the vectors that are searched, rounded up to whole vectors.
      trust_ratio: vectors are accepted in their order while the change of the weights is below so
        many times the weights' norm, and then one more; None accepts all.
      temperature: None searches those furthest from their target, furthest first. A number draws
        without replacement, with probabilities as the distance to the power of 1 / temperature.
      beam, force_change: the search; see `core.nearest`.
    """

    max_code_change: float = 1.0
    trust_ratio: float | None = None
    temperature: float | None = None
    beam: int = 0
    force_change: bool = False


class Move(NamedTuple):
    """What a V step did.

    Attributes:
      codes_OJM: of the type that they came in.
      moved_OJ: bool, vectors of which any code changed.
      weights_OJG: what the codes stand for, as `weight.vectors()`.
      places_V: searched vectors, o * J + j.
      before_VM, after_VM: their codes, int32.
    """

    codes_OJM: jax.Array
    moved_OJ: jax.Array
    weights_OJG: jax.Array
    places_V: jax.Array
    before_VM: jax.Array
    after_VM: jax.Array


def v_step(
    weight: CodedWeight, target_OJG: jax.Array, limits: Limits, key: jax.Array | None = None
) -> Move:
    """Moves codes towards a target, codebooks and scales held.

    Args:
      target_OJG: as `weight.vectors()`.
      key: needed where `limits.temperature` is a number.

    Raises:
      VqjaxError: if it is missing there, or codes have to differ without a beam.
    """
    rows, groups, books = weight.codes_OJM.shape
    group = weight.codebooks_MKG.shape[-1]
    codes_XM = weight.codes_OJM.reshape(-1, books)
    weight = weight.rounded()
    books_MKG, scales_O, present_OJG = weight.codebooks_MKG, weight.scales_O, weight.vectors()
    present_XG = present_OJG.reshape(-1, group)

    error_OJ = jnp.sum((target_OJG - present_OJG) ** 2, axis=-1)
    # Rows of zeros stay what they are: any code would do, so none need change.
    error_OJ = jnp.where(scales_O[:, None] > 0, error_OJ, -1.0)
    places_V = _places(error_OJ.reshape(-1), limits, key)
    alive_V = scales_O[places_V // groups] > 0
    scales_V1 = jnp.where(alive_V, scales_O[places_V // groups], 1.0)[:, None]
    before_VM = codes_XM[places_V].astype(jnp.int32)
    tail = weight.fan_in - (groups - 1) * group
    short_V = places_V % groups == groups - 1 if tail < group else None
    found_VM = nearest_codes(
        target_OJG.reshape(-1, group)[places_V] / scales_V1,
        before_VM,
        books_MKG,
        beam=limits.beam,
        short_V=short_V,
        tail=tail,
        differ=limits.force_change,
    )
    found_VG = scales_V1 * entry_sum(found_VM, books_MKG)
    if short_V is not None:
        found_VG = jnp.where(short_V[:, None] & (jnp.arange(group)[None] >= tail), 0.0, found_VG)
    accepted_V = alive_V
    if limits.trust_ratio is not None:
        change_V = jnp.sum((found_VG - present_XG[places_V]) ** 2, axis=-1)
        change_V = jnp.where(alive_V, change_V, 0.0)
        # The norm that all vectors before each one have changed by; the first always goes.
        so_far_V = jnp.sqrt(jnp.cumsum(change_V)).at[-1].set(0.0)
        so_far_V = jnp.roll(so_far_V, 1)
        allowed = limits.trust_ratio * jnp.linalg.norm(present_XG.reshape(-1))
        accepted_V &= (so_far_V < allowed).at[0].set(True)
    after_VM = jnp.where(accepted_V[:, None], found_VM, before_VM)
    moved_V = jnp.any(after_VM != before_VM, axis=-1)
    after_VG = jnp.where(moved_V[:, None], found_VG, present_XG[places_V])
    return Move(
        codes_XM.at[places_V].set(after_VM.astype(codes_XM.dtype)).reshape(rows, groups, books),
        jnp.zeros(rows * groups, bool).at[places_V].set(moved_V).reshape(rows, groups),
        present_XG.at[places_V].set(after_VG).reshape(rows, groups, group),
        places_V,
        before_VM,
        after_VM,
    )


def _places(error_X: jax.Array, limits: Limits, key: jax.Array | None) -> jax.Array:
    """Returns which vectors to search, in order."""
    # Less a rounding error, so that a share that was meant to be whole is.
    count = max(1, math.ceil(limits.max_code_change * error_X.size - 1e-6))
    if limits.temperature is None:
        return jax.lax.top_k(error_X, count)[1]
    if key is None:
        raise VqjaxError("vectors are drawn where a temperature is given: pass a key")
    # The largest of log p + Gumbel noise are a draw without replacement.
    log_X = jnp.log(jnp.maximum(error_X, 0.0)) / (2 * limits.temperature)
    return jax.lax.top_k(log_X + jax.random.gumbel(key, error_X.shape, error_X.dtype), count)[1]
