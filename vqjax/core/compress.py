# SPDX-License-Identifier: Apache-2.0
"""One layer from a kernel and its input moment to a `VQTensor`.

Dimension key:  O outputs   N fan-in   P fan-in padded to J * G   J vectors of a row   M codebooks
                K entries   G weights of a vector

The recipe: first codebooks from a sample of the vectors; rounds of error feedback, each followed by
least squares in the codebooks and scales; rounds of coordinate descent, likewise; rounding to the
stored types; one last sweep for the codes that the rounding moved. The best iterate is kept.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vqjax.core import codebooks as codebooks_lib
from vqjax.core import grouping, scalar, sweep
from vqjax.core.initialization import SAMPLE, initial_codebooks
from vqjax.core.plan import LayerSpec
from vqjax.core.tensor import VQTensor
from vqjax.errors import VqjaxError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effort:
    """How hard to search. The defaults are where more time stops paying.

    Attributes:
      start_steps: rounds of search and least squares for the first codebooks.
      feedback_rounds, descent_rounds: sweeps over all vectors of each kind.
      least_gain: descent ends early once a round lowers the loss by less than this share.
      beam: hypotheses per vector; 0 enumerates where K**M allows it.
      shrinkage: share of the moment's mean diagonal that is added to it, against sampling noise.
      damping: the same inside error feedback only.
    """

    start_steps: int = 40
    feedback_rounds: int = 4
    descent_rounds: int = 8
    least_gain: float = 2e-3
    beam: int = 0
    shrinkage: float = 1e-3
    damping: float = 0.02


class LayerStats(NamedTuple):
    """What compression did to one layer.

    Attributes:
      rel_weight_mse: ||W - Q||^2 / ||W||^2 of the stored tensor.
      rel_output_mse: tr((W - Q) S (W - Q)^T) / tr(W S W^T) with the given S; `rel_weight_mse`
        where no moment was given.
      bits_per_weight: all stored bits over the weights.
      history: rel_output_mse after each round, before rounding to the stored types.
    """

    rel_weight_mse: float
    rel_output_mse: float
    bits_per_weight: float
    history: tuple[float, ...] = ()


class _State(NamedTuple):
    codes_OJM: jax.Array
    books_MKG: jax.Array
    scales_O: jax.Array


def compress_layer(
    kernel: jax.Array,
    moment: jax.Array | None,
    spec: LayerSpec,
    *,
    key: jax.Array,
    effort: Effort | None = None,
) -> tuple[VQTensor, LayerStats]:
    """Compresses one kernel. The same arguments give the same bytes.

    Args:
      kernel: [I, O] or [H, W, I, O], any float type.
      moment: S = mean of x x^T over the layer's inputs, [N, N], columns as in `grouping.to_matrix`;
        None weighs all inputs alike. It may be singular.
      spec: grouping and sizes. "scalar" rounds to the nearest of K equidistant values.
      key: decides the draw of the first codebooks.
      effort: how hard to search.

    Raises:
      VqjaxError: if the kernel or the moment is not finite, or their sizes differ.
    """
    _check(kernel, moment)
    effort = effort or Effort()
    w_ON = grouping.to_matrix(jnp.asarray(kernel, jnp.float32))
    fan_in = w_ON.shape[1]
    moment_NN = jnp.eye(fan_in) if moment is None else jnp.asarray(moment, jnp.float32)
    moment_NN = (moment_NN + moment_NN.T) / 2
    if spec.grouping == "scalar":
        tensor, history = scalar.round_to_grid(w_ON, kernel.shape, spec.entries), ()
    else:
        tensor, history = _search(w_ON, moment_NN, kernel.shape, spec, effort, key)
    weight_mse, output_mse = scalar.relative_errors(w_ON, tensor.decode_matrix(), moment_NN)
    return tensor, LayerStats(weight_mse, output_mse, tensor.bits_per_weight, history)


def _check(kernel: jax.Array, moment: jax.Array | None) -> None:
    _, fan_in = grouping.matrix_shape(kernel.shape)
    for name, array in (("kernel", kernel), ("moment", moment)):
        bad = 0 if array is None else int(jnp.sum(~jnp.isfinite(array)))
        if bad:
            raise VqjaxError(
                f"{name} of shape {tuple(array.shape)} holds {bad} NaN or infinite values; "
                f"it must be finite: check the checkpoint and the calibration"
            )
    if moment is not None and moment.shape != (fan_in, fan_in):
        raise VqjaxError(
            f"moment {tuple(moment.shape)} for a kernel {tuple(kernel.shape)}: expected "
            f"{(fan_in, fan_in)}, one row per weight that an output reads"
        )


def _tile_rows() -> int:
    """Rows searched together: what fits a CPU's first-level cache, or enough to fill a GPU."""
    return 32 if jax.default_backend() == "cpu" else 1024


def _by_tiles(search, state: _State, w_OP: jax.Array) -> jax.Array:
    """Calls `search(w, codes, scales)` on tiles of rows of one size; returns all codes."""
    tile = _tile_rows()
    spans = [slice(first, first + tile) for first in range(0, w_OP.shape[0], tile)]
    parts = [search(w_OP[rows], state.codes_OJM[rows], state.scales_O[rows]) for rows in spans]
    return jnp.concatenate(parts)


def _search(w_ON, moment_NN, shape, spec: LayerSpec, effort: Effort, key):
    """Returns the stored tensor and the relative loss after each round."""
    outputs = w_ON.shape[0]
    missing = -outputs % _tile_rows()
    w_OP = jnp.pad(grouping.pad_columns(w_ON, spec.group), ((0, missing), (0, 0)))
    ridge = effort.shrinkage * jnp.mean(jnp.diagonal(moment_NN))
    # An input that is always zero would make every choice equal: then all weights count alike.
    ridge = jnp.where(ridge > 0, ridge, 1.0)
    shrunk_NN = moment_NN + ridge * jnp.eye(moment_NN.shape[0], dtype=jnp.float32)
    # Losses stay near 1 whatever the units of the layer's inputs are.
    shrunk_NN = shrunk_NN / jnp.mean(jnp.diagonal(shrunk_NN))
    moment_PP = grouping.pad_moment(shrunk_NN, spec.group)
    start_key, revive_key = jax.random.split(key)
    factors = sweep.feedback_factors(moment_PP, effort.damping, group=spec.group)
    state = _start(w_OP, factors[1], spec, effort, start_key)
    state, history = _alternate(w_OP, moment_PP, factors, state, effort, revive_key)
    tensor = _store(w_OP, moment_PP, state, outputs, shape, spec, effort)
    return tensor, history


def _start(w_OP, metric_JGG, spec: LayerSpec, effort: Effort, key) -> _State:
    scales_O = jnp.sqrt(jnp.mean(w_OP**2, axis=1))
    safe_O = jnp.where(scales_O > 0, scales_O, 1.0)
    vectors_VG = (w_OP / safe_O[:, None]).reshape(-1, spec.group)
    draw_key, key = jax.random.split(key)
    # Rows of zeros (padding included) say nothing about the codebooks.
    weight_V = jnp.repeat(scales_O > 0, w_OP.shape[1] // spec.group).astype(jnp.float32)
    weight_V = jnp.where(jnp.sum(weight_V) > 0, weight_V, 1.0)
    chance_V = weight_V / jnp.sum(weight_V)
    drawn_S = jax.random.choice(draw_key, vectors_VG.shape[0], (SAMPLE,), p=chance_V)
    books_MKG = initial_codebooks(
        vectors_VG[drawn_S],
        jnp.mean(metric_JGG, axis=0),
        key,
        books=spec.codebooks,
        entries=spec.entries,
        steps=effort.start_steps,
        beam=effort.beam,
    )
    codes_OJM = jnp.zeros((w_OP.shape[0], metric_JGG.shape[0], spec.codebooks), jnp.int32)
    return _State(codes_OJM, books_MKG, scales_O)


def _alternate(w_OP, moment_PP, factors, state: _State, effort: Effort, key):
    """Returns the best state and the relative loss after each round."""
    passed_PP, metric_JGG = factors
    total = max(float(jnp.sum(sweep.loss_rows(w_OP, moment_PP))), np.finfo(np.float32).tiny)
    best, history = state, []

    def fed_back(w_TP, _, scales_T):
        books = state.books_MKG
        return sweep.feedback(w_TP, passed_PP, metric_JGG, books, scales_T, beam=effort.beam)

    def descended(w_TP, codes_TJM, scales_T):
        books = state.books_MKG
        return sweep.descend(w_TP, moment_PP, codes_TJM, books, scales_T, beam=effort.beam)

    rounds = [fed_back] * effort.feedback_rounds + [descended] * effort.descent_rounds
    for index, search in enumerate(rounds):
        if search is descended and rounds[index - 1] is fed_back:
            state = best
        state = state._replace(codes_OJM=_by_tiles(search, state, w_OP))
        state = _least_squares(w_OP, moment_PP, state)
        found = float(codebooks_lib.loss(w_OP, moment_PP, *state)) / total
        previous = min(history, default=math.inf)
        if found < previous:
            best = state
        history.append(found)
        if search is descended and found > previous * (1 - effort.least_gain):
            break
        if search is fed_back:
            books = codebooks_lib.revive(
                state.codes_OJM, state.books_MKG, jax.random.fold_in(key, index)
            )
            state = state._replace(books_MKG=books)
    return best, tuple(history)


def _least_squares(w_OP, moment_PP, state: _State) -> _State:
    """Returns better codebooks, then scales, or what was given where float32 gained nothing."""
    books = codebooks_lib.fit_codebooks(w_OP, moment_PP, *state)
    fitted = state._replace(books_MKG=books)
    before = codebooks_lib.loss(w_OP, moment_PP, *state)
    state = fitted if codebooks_lib.loss(w_OP, moment_PP, *fitted) < before else state
    return state._replace(scales_O=codebooks_lib.fit_scales(w_OP, moment_PP, *state))


def _store(w_OP, moment_PP, state: _State, outputs, shape, spec: LayerSpec, effort: Effort):
    """Rounds to the stored types, then lets codes and scales answer to the rounding."""
    books_MKG, scales_O, stored, shared = _round(state.books_MKG, state.scales_O, spec)

    def descended(w_TP, codes_TJM, scales_T):
        return sweep.descend(w_TP, moment_PP, codes_TJM, books_MKG, scales_T, beam=effort.beam)

    state = _State(state.codes_OJM, books_MKG, scales_O)
    codes_OJM = _by_tiles(descended, state, w_OP)
    scales_O = codebooks_lib.fit_scales(w_OP, moment_PP, codes_OJM, books_MKG, scales_O)
    scales_O = scales_O.astype(jnp.float16)
    state = _State(codes_OJM, books_MKG, scales_O.astype(jnp.float32))
    return VQTensor.pack(
        _by_tiles(descended, state, w_OP)[:outputs],
        stored,
        scales_O[:outputs],
        shape=shape,
        grouping=spec.grouping,
        codebook_scale=shared,
    )


@functools.partial(jax.jit, static_argnames="spec")
def _round(books_MKG, scales_O, spec: LayerSpec):
    """Returns rounded codebooks and scales in float32, the stored codebooks, their shared scale."""
    # Half of the layer's magnitude goes to each factor (a power of two: exact), which keeps both
    # inside float16 for weights from 1e-9 to 1e9.
    size = jnp.maximum(jnp.max(jnp.abs(scales_O)), np.finfo(np.float32).tiny)
    moved = jnp.exp2(jnp.floor(jnp.log2(size) / 2))
    books_MKG, scales_O = books_MKG * moved, (scales_O / moved).astype(jnp.float16)
    if spec.codebook_bits == 8:
        shared = jnp.maximum(jnp.max(jnp.abs(books_MKG)) / 127, np.finfo(np.float32).tiny)
        stored = jnp.round(books_MKG / shared).astype(jnp.int8)
        real = stored.astype(jnp.float32) * shared
    else:
        shared, stored = None, books_MKG.astype(jnp.float16)
        real = stored.astype(jnp.float32)
    return real, scales_O.astype(jnp.float32), stored, shared
