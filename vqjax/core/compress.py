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
from collections.abc import Callable
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
      shrinkage: share of the moment's mean diagonal that is added to it. Against sampling noise:
        0.02 costs nothing on the moment itself and gains on that of other inputs.
      damping: the same inside error feedback only.
    """

    start_steps: int = 40
    feedback_rounds: int = 4
    descent_rounds: int = 8
    least_gain: float = 2e-3
    beam: int = 0
    shrinkage: float = 0.02
    damping: float = 0.02


class LayerStats(NamedTuple):
    """What compression did to one layer.

    Attributes:
      rel_weight_mse: ||W - Q||^2 / ||W||^2 of the stored tensor.
      rel_output_mse: tr((W - Q) S (W - Q)^T) / tr(W S W^T) with the given S; `rel_weight_mse`
        where no moment was given.
      bits_per_weight: all stored bits over the weights.
      history: relative loss under the shrunk moment after each round, before rounding to the
        stored types.
    """

    rel_weight_mse: float
    rel_output_mse: float
    bits_per_weight: float
    history: tuple[float, ...] = ()


class _Problem(NamedTuple):
    """One layer, padded with zeros to one of few sizes so that layers share compiled programs."""

    w_OP: jax.Array
    moment_PP: jax.Array  # shrunk, its mean diagonal near 1
    raw_PP: jax.Array  # as given
    outputs: int
    fan_in: int


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
    check_layer(kernel, moment)
    effort = effort or Effort()
    problem = _problem(kernel, moment, spec, effort)
    if spec.grouping == "scalar":
        tensor = scalar.round_to_grid(grouping.to_matrix(kernel), kernel.shape, spec.entries)
        quantized_OP, history = tensor.decode_matrix(), ()
    else:
        state, history = _search(problem, spec, effort, key)
        state, tensor = _store(problem, state, kernel.shape, spec, effort)
        quantized_OP = sweep.reconstruct(*state)
    quantized_OP = grouping.padded(
        np.asarray(quantized_OP)[: problem.outputs, : problem.fan_in], problem.w_OP.shape
    )
    weight_mse, output_mse = scalar.relative_errors(problem.w_OP, quantized_OP, problem.raw_PP)
    return tensor, LayerStats(weight_mse, output_mse, tensor.bits_per_weight, history)


def check_layer(kernel: jax.Array, moment: jax.Array | None) -> None:
    """Raises VqjaxError unless both are finite and fit together."""
    _, fan_in = grouping.matrix_shape(kernel.shape)
    arrays = {"kernel": kernel} if moment is None else {"kernel": kernel, "moment": moment}
    for name, array in arrays.items():
        bad = int(np.sum(~np.isfinite(np.asarray(array, np.float32))))
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


def _bucket(count: int, least: int) -> int:
    """Returns the next of few sizes: multiples of `least`, from 8 * least on 12 % apart."""
    step = max(least, 1 << max(0, count.bit_length() - 4))
    return -(-count // step) * step


def _tile_rows() -> int:
    """Rows searched together: what fits a CPU's first-level cache, or enough to fill a GPU."""
    return 32 if jax.default_backend() == "cpu" else 1024


def _problem(kernel, moment, spec: LayerSpec, effort: Effort) -> _Problem:
    outputs, fan_in = grouping.matrix_shape(kernel.shape)
    groups = grouping.groups_per_row(fan_in, spec.group)
    columns = _bucket(groups, 48) * spec.group
    w_ON = grouping.to_matrix(np.asarray(kernel, np.float32))
    raw_NN = np.eye(fan_in, dtype=np.float32) if moment is None else np.asarray(moment, np.float32)
    raw_PP = jnp.asarray(grouping.padded(raw_NN, (columns, columns)))
    w_OP = grouping.padded(w_ON, (_bucket(outputs, 4 * _tile_rows()), columns))
    shrunk_PP = _shrink(raw_PP, fan_in, effort.shrinkage)
    return _Problem(jnp.asarray(w_OP), shrunk_PP, raw_PP, outputs, fan_in)


@jax.jit
def _shrink(raw_PP, fan_in, shrinkage):
    """Returns the moment, symmetric, shrunk towards its mean diagonal, and of mean diagonal 1.

    The scale keeps losses near 1 whatever the units of the layer's inputs are. An input that was
    never seen other than zero would leave all choices equal: then all weights count alike.
    """
    real_P = jnp.arange(raw_PP.shape[0]) < fan_in
    size = jnp.trace(raw_PP) / fan_in
    scaled_PP = (raw_PP + raw_PP.T) / 2 / jnp.where(size > 0, size, 1.0)
    ridge = jnp.where(size > 0, shrinkage, 1.0)
    return scaled_PP + ridge * jnp.diag(real_P.astype(jnp.float32))


def _by_tiles(search: Callable[..., jax.Array], problem: _Problem, state: _State) -> jax.Array:
    """Calls `search(w, codes, scales)` on tiles of rows of one size; returns the codes of all."""
    tile, rows = _tile_rows(), problem.w_OP.shape[0]
    used = [
        search(*_rows(problem.w_OP, state.codes_OJM, state.scales_O, first, size=tile))
        for first in range(0, problem.outputs, tile)
    ]
    spare = [jnp.zeros_like(used[0])] * (rows // tile - len(used))
    return jnp.concatenate(used + spare)


@functools.partial(jax.jit, static_argnames="size")
def _rows(w_OP, codes_OJM, scales_O, first, *, size):
    return tuple(
        jax.lax.dynamic_slice_in_dim(values, first, size, 0)
        for values in (w_OP, codes_OJM, scales_O)
    )


@jax.jit
def _draw(key, outputs, groups):
    """Returns the places (row, vector) of a sample of the vectors."""
    row_key, group_key = jax.random.split(key)
    row_V = jax.random.randint(row_key, (SAMPLE,), 0, outputs)
    return row_V, jax.random.randint(group_key, (SAMPLE,), 0, groups)


@functools.partial(jax.jit, static_argnames=("books", "group"))
def _start(problem: _Problem, row_V, group_V, *, books: int, group: int):
    """Returns the state before any codebook, and the sample, rows scaled to size 1."""
    w_OP = problem.w_OP
    scales_O = jnp.sqrt(jnp.sum(w_OP**2, axis=1) / problem.fan_in)
    scaled_OP = w_OP / jnp.where(scales_O > 0, scales_O, 1.0)[:, None]
    vectors_OJG = scaled_OP.reshape(w_OP.shape[0], -1, group)
    codes_OJM = jnp.zeros((*vectors_OJG.shape[:2], books), jnp.int32)
    return codes_OJM, scales_O, vectors_OJG[row_V, group_V]


def _search(problem: _Problem, spec: LayerSpec, effort: Effort, key):
    """Returns the best state and the relative loss after each round."""
    draw_key, start_key, key = jax.random.split(key, 3)
    passed_PP, metric_JGG, mean_GG = sweep.feedback_factors(
        problem.moment_PP, effort.damping, group=spec.group
    )
    groups = grouping.groups_per_row(problem.fan_in, spec.group)
    places = _draw(draw_key, problem.outputs, groups)
    codes_OJM, scales_O, sample_VG = _start(
        problem, *places, books=spec.codebooks, group=spec.group
    )
    books_MKG = initial_codebooks(
        sample_VG,
        mean_GG,
        start_key,
        books=spec.codebooks,
        entries=spec.entries,
        steps=effort.start_steps,
        beam=effort.beam,
    )
    state = _State(codes_OJM, books_MKG, scales_O)
    best, history, total = state, [], _total(problem)

    def fed_back(w_TP, _, scales_T):
        return sweep.feedback(
            w_TP,
            passed_PP,
            metric_JGG,
            state.books_MKG,
            scales_T,
            beam=effort.beam,
            groups=groups,
        )

    for index in range(effort.feedback_rounds + effort.descent_rounds):
        feeding = index < effort.feedback_rounds
        if index == effort.feedback_rounds:
            state = best
        descended = functools.partial(_descend, problem, state, effort, groups)
        codes = _by_tiles(fed_back if feeding else descended, problem, state)
        state = state._replace(codes_OJM=codes)
        fit = codebooks_lib.improve(
            problem.w_OP, problem.moment_PP, *state, jax.random.fold_in(key, index)
        )
        state = _State(codes, fit.books_MKG, fit.scales_O)
        previous = min(history, default=math.inf)
        history.append(float(fit.loss) / total)
        if history[-1] < previous:
            best = state
        if not feeding and history[-1] > previous * (1 - effort.least_gain):
            break
        if feeding:
            state = state._replace(books_MKG=fit.revived_MKG)
    return best, tuple(history)


def _total(problem: _Problem) -> float:
    total = float(jnp.sum(sweep.loss_rows(problem.w_OP, problem.moment_PP)))
    return total if total > 0 else 1.0


def _descend(problem, state: _State, effort: Effort, groups: int, w_TP, codes_TJM, scales_T):
    """Returns the codes of one tile of rows after a sweep of coordinate descent."""
    return sweep.descend(
        w_TP,
        problem.moment_PP,
        codes_TJM,
        state.books_MKG,
        scales_T,
        beam=effort.beam,
        groups=groups,
    )


def _store(problem: _Problem, state: _State, shape, spec: LayerSpec, effort: Effort):
    """Rounds to the stored types, lets codes and scales answer to the rounding, and packs."""
    groups = grouping.groups_per_row(problem.fan_in, spec.group)
    books_MKG, scales_O, stored, shared = _round(
        state.books_MKG, state.scales_O, codebook_bits=spec.codebook_bits
    )
    for _ in range(2):
        state = _State(state.codes_OJM, books_MKG, scales_O)
        descended = functools.partial(_descend, problem, state, effort, groups)
        codes = _by_tiles(descended, problem, state)
        scales_O = codebooks_lib.refit_scales(
            problem.w_OP, problem.moment_PP, codes, books_MKG, scales_O
        )
        state = _State(codes, books_MKG, scales_O)
    tensor = VQTensor.pack(
        np.asarray(state.codes_OJM)[: problem.outputs, :groups],
        stored,
        state.scales_O[: problem.outputs].astype(jnp.float16),
        shape=tuple(shape),
        grouping=spec.grouping,
        codebook_scale=shared,
    )
    return state, tensor


@functools.partial(jax.jit, static_argnames="codebook_bits")
def _round(books_MKG, scales_O, *, codebook_bits: int):
    """Returns rounded codebooks and scales in float32, the stored codebooks, their shared scale."""
    tiny = np.finfo(np.float32).tiny
    # Half of the layer's magnitude goes to each factor (a power of two: exact), which keeps both
    # inside float16 for weights from 1e-9 to 1e9.
    size = jnp.maximum(jnp.max(jnp.abs(scales_O)), tiny)
    moved = jnp.exp2(jnp.floor(jnp.log2(size) / 2))
    books_MKG, scales_O = books_MKG * moved, (scales_O / moved).astype(jnp.float16)
    if codebook_bits == 8:
        shared = jnp.maximum(jnp.max(jnp.abs(books_MKG)) / 127, tiny)
        stored = jnp.round(books_MKG / shared).astype(jnp.int8)
        real = stored.astype(jnp.float32) * shared
    else:
        shared, stored = None, books_MKG.astype(jnp.float16)
        real = stored.astype(jnp.float32)
    return real, scales_O.astype(jnp.float32), stored, shared
