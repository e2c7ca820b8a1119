# SPDX-License-Identifier: Apache-2.0
"""One layer from a kernel and its input moment to a `VQTensor`.

Dimension key:  O outputs   N fan-in   P fan-in padded to J * G   J vectors of a row   M codebooks
                K entries   G weights of a vector

The recipe: first codebooks from a sample of the vectors; rounds of error feedback, each followed by
least squares in the codebooks and scales; rounds of coordinate descent, likewise. Large layers do
all that with a part of their rows, and then again, from the codebooks that it came to, with all of
them: few rounds over many vectors. Then rounding to the stored types, and sweeps for the codes that
the rounding moved. The best iterate is kept.
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
from vqjax.core import cores, grouping, scalar, sweep
from vqjax.core.coded import integer_codebooks
from vqjax.core.host import to_device
from vqjax.core.initialization import SAMPLE, initial_codebooks
from vqjax.core.plan import LayerSpec
from vqjax.core.scales import LogScales
from vqjax.core.tensor import VQTensor
from vqjax.errors import VqjaxError
from vqjax.kernels import decode as decode_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effort:
    """How hard to search. The defaults are where more time stops paying.

    Attributes:
      start_steps: rounds of search and least squares for the first codebooks of up to two bits per
        weight; beyond, as the square of the bits, up to four times as many.
      feedback_rounds, descent_rounds: most sweeps of each kind over the vectors that codebooks are
        made on. In large layers these are a part; all vectors then take one sweep of feedback, and
        descend likewise.
      store_rounds: sweeps for what rounding to the stored types has moved.
      least_gain: sweeps of one kind end once one lowers the loss by less than this share.
      beam: hypotheses per vector; 0 enumerates where K**M allows it.
      shrinkage: share of the moment's mean diagonal that is added to it where no metric is given.
        Against sampling noise: 0.02 costs nothing on the moment itself and gains on that of other
        inputs.
      damping: the same inside error feedback only.
    """

    start_steps: int = 30
    feedback_rounds: int = 64
    descent_rounds: int = 24
    store_rounds: int = 2
    least_gain: float = 1e-3
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
    """One layer in the order of its search, padded to one of few sizes to share compiled programs.

    The vectors that see the largest inputs come first: error feedback then passes large errors on
    to many later vectors. On correlated Gaussian inputs this lowers the loss by 2 to 5 % against
    the natural order, and rising sizes raise it by 2 %.
    """

    w_OP: jax.Array
    moment_PP: jax.Array  # what is minimized, its mean diagonal near 1
    order_J: np.ndarray  # natural place of each vector
    outputs: int
    fan_in: int


class _State(NamedTuple):
    codes_OJM: jax.Array
    books_MKG: jax.Array
    scales_O: jax.Array


class _Found(NamedTuple):
    best: _State
    history: tuple[float, ...]


def compress_layer(
    kernel: jax.Array,
    moment: jax.typing.ArrayLike | None,
    spec: LayerSpec,
    *,
    key: jax.Array,
    effort: Effort | None = None,
    metric: jax.typing.ArrayLike | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> tuple[VQTensor, LayerStats]:
    """Compresses one kernel. The same arguments give the same bytes.

    Args:
      kernel: [I, O] or [H, W, I, O], any float type.
      moment: S = mean of x x^T over the layer's inputs, [N, N], columns as in `grouping.to_matrix`;
        None weighs all inputs alike. It may be singular or, by sampling, not quite symmetric.
      spec: grouping and sizes. "scalar" rounds to the nearest of K equidistant values.
      key: decides the draw of the first codebooks.
      effort: how hard to search.
      metric: [N, N], minimized in place of the moment, positive definite: the moment as the caller
        shrank or centred it. The statistics are those of `moment` all the same.
      on_stage: called when one of the stages "factor", "start", "feedback", "descent",
        "least_squares" and "store" ends, each time that it does; with "part " before the name while
        codebooks are made on a part of the rows.

    Raises:
      VqjaxError: if the kernel, the moment or the metric is not finite, their sizes differ, or the
        moment is indefinite.
    """
    check_layer(kernel, moment, metric)
    effort = effort or Effort()
    if spec.grouping == "scalar":
        tensor, history = _round_scalar(kernel, moment if metric is None else metric, spec), ()
    else:
        inputs, scaled = None, _Given(kernel, moment, metric)
        if spec.input_scales:
            inputs, scaled = _without_input_scales(scaled)
        problem = _problem(scaled.kernel, scaled.moment, scaled.metric, spec, effort)
        state, history = _search(problem, spec, effort, key, on_stage)
        tensor = _store(problem, state, kernel.shape, spec, effort, inputs)
    stats = _statistics(kernel, moment, tensor, history)
    on_stage("store")
    return tensor, stats


class _Given(NamedTuple):
    kernel: jax.typing.ArrayLike
    moment: jax.typing.ArrayLike | None
    metric: jax.typing.ArrayLike | None


def _without_input_scales(given: _Given) -> tuple[LogScales, _Given]:
    """Returns scales of the input channels, and the same problem in weights divided by them.

    The scale of a channel is the root mean square of its weights: a codebook shared by all of them
    then meets one size instead of many. (W - Q) x = ((W - Q) / t) (t x): inputs take the scales
    over. Inputs of channels without weights no longer count.
    """
    kernel = np.asarray(given.kernel, np.float32)
    rows_CX = grouping.channel_rows(kernel).astype(np.float64)
    inputs = LogScales.of(np.sqrt(np.mean(rows_CX**2, axis=1)))
    scales_C = np.asarray(inputs.values())
    scales_N = np.repeat(scales_C, kernel.size // kernel.shape[-1] // scales_C.size)
    divisor_C = np.where(scales_C > 0, scales_C, 1.0)[:, None]

    used = given.moment if given.metric is None else given.metric
    used = np.eye(len(scales_N)) if used is None else used
    scaled_NN = np.array(used, np.float32)  # one copy: the widest layer's takes 1.2 GB
    scaled_NN *= scales_N[:, None]
    scaled_NN *= scales_N
    if given.metric is not None:
        return inputs, _Given(kernel / divisor_C, None, scaled_NN)
    return inputs, _Given(kernel / divisor_C, scaled_NN, None)


def _round_scalar(kernel: jax.Array, metric, spec: LayerSpec) -> VQTensor:
    return scalar.round_to_grid(grouping.to_matrix(kernel), kernel.shape, spec.entries, metric)


def _statistics(kernel, moment, tensor: VQTensor, history: tuple[float, ...]) -> LayerStats:
    w_ON = grouping.to_matrix(np.asarray(kernel, np.float32))
    rows, columns = _bucket(w_ON.shape[0], 4 * _tile_rows()), _bucket(w_ON.shape[1], 384)
    moment_NN = np.eye(w_ON.shape[1], dtype=np.float32) if moment is None else moment
    weight_mse, output_mse = scalar.relative_errors(
        grouping.padded(w_ON, (rows, columns)),
        grouping.padded(tensor.host_matrix(), (rows, columns)),
        grouping.padded(moment_NN, (columns, columns)),
    )
    return LayerStats(weight_mse, output_mse, tensor.bits_per_weight, history)


def check_layer(
    kernel: jax.Array,
    moment: jax.typing.ArrayLike | None,
    metric: jax.typing.ArrayLike | None = None,
) -> None:
    """Raises VqjaxError unless all are finite, fit together, and the moment can be one."""
    _, fan_in = grouping.matrix_shape(kernel.shape)
    arrays = {"kernel": kernel, "moment": moment, "metric": metric}
    for name, array in arrays.items():
        if array is None:
            continue
        bad = int(np.sum(~np.isfinite(np.asarray(array, np.float32))))
        if bad:
            raise VqjaxError(
                f"{name} of shape {np.shape(array)} holds {bad} NaN or infinite values; "
                f"it must be finite: check the checkpoint and the calibration"
            )
        if name != "kernel" and np.shape(array) != (fan_in, fan_in):
            raise VqjaxError(
                f"{name} {np.shape(array)} for a kernel {tuple(kernel.shape)}: expected "
                f"{(fan_in, fan_in)}, one row per weight that an output reads"
            )
        least = 0.0 if name == "kernel" else float(np.min(np.diagonal(np.asarray(array))))
        if least < 0:
            raise VqjaxError(
                f"{name} {np.shape(array)} has {least:.3g} on its diagonal: a mean of x x^T is "
                f"positive semidefinite; gather it again"
            )


def _bucket(count: int, least: int) -> int:
    """Returns the next of few sizes: multiples of `least`, from 8 * least on 12 % apart."""
    step = max(least, 1 << max(0, count.bit_length() - 4))
    return -(-count // step) * step


def _tile_rows() -> int:
    """Rows searched together: what fits a CPU's first-level cache, or enough to fill a GPU."""
    return 32 if jax.default_backend() == "cpu" else 1024


def _problem(kernel, moment, metric, spec: LayerSpec, effort: Effort) -> _Problem:
    outputs, fan_in = grouping.matrix_shape(kernel.shape)
    groups = grouping.groups_per_row(fan_in, spec.group)
    used = groups * spec.group
    given = next((s for s in (metric, moment) if s is not None), np.eye(fan_in, dtype=np.float32))
    moment_NN = grouping.padded(given, (used, used))
    sizes_J = np.diagonal(moment_NN).reshape(groups, spec.group).sum(axis=1)
    order_J = np.argsort(-sizes_J, kind="stable")
    order_N = (order_J[:, None] * spec.group + np.arange(spec.group)).reshape(-1)
    columns = _bucket(groups, 48) * spec.group
    w_ON = grouping.to_matrix(np.asarray(kernel, np.float32))
    w_ON = grouping.padded(w_ON, (_bucket(outputs, 4 * _tile_rows()), used))[:, order_N]
    w_OP = grouping.padded(w_ON, (w_ON.shape[0], columns))
    moment_PP = grouping.padded(moment_NN[np.ix_(order_N, order_N)], (columns, columns))
    real_P = grouping.padded(order_N < fan_in, (columns,)) > 0
    shrinkage = effort.shrinkage if metric is None else 0.0
    shrunk_PP = _shrink(to_device(moment_PP), to_device(real_P), shrinkage)
    return _Problem(to_device(w_OP), shrunk_PP, order_J, outputs, fan_in)


@jax.jit
def _shrink(raw_PP, real_P, shrinkage):
    """Returns the moment, symmetric, shrunk towards its mean diagonal, and of mean diagonal 1.

    The scale keeps losses near 1 whatever the units of the layer's inputs are. An input that was
    never seen other than zero would leave all choices equal: then all weights count alike.
    """
    size = jnp.trace(raw_PP) / jnp.sum(real_P)
    scaled_PP = (raw_PP + raw_PP.T) / 2 / jnp.where(size > 0, size, 1.0)
    ridge = jnp.where(size > 0, shrinkage, 1.0)
    return scaled_PP + ridge * jnp.diag(real_P.astype(jnp.float32))


def _by_tiles(search: Callable[..., jax.Array], problem: _Problem, state: _State) -> jax.Array:
    """Calls `search(w, codes, scales)` on tiles of rows of one size; returns the codes of all."""
    tile, rows = _tile_rows(), problem.w_OP.shape[0]
    (device,) = problem.w_OP.devices()

    def search_tile(first: int) -> jax.Array:
        return search(*_rows(problem.w_OP, state.codes_OJM, state.scales_O, first, size=tile))

    used = cores.each(search_tile, range(0, problem.outputs, tile), device)
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
def _start(w_OP, fan_in, row_V, group_V, *, books: int, group: int):
    """Returns the state before any codebook, and the sample, rows scaled to size 1."""
    scales_O = jnp.sqrt(jnp.sum(w_OP**2, axis=1) / fan_in)
    scaled_OP = w_OP / jnp.where(scales_O > 0, scales_O, 1.0)[:, None]
    vectors_OJG = scaled_OP.reshape(w_OP.shape[0], -1, group)
    codes_OJM = jnp.zeros((*vectors_OJG.shape[:2], books), jnp.int32)
    return codes_OJM, scales_O, vectors_OJG[row_V, group_V]


def _search(problem: _Problem, spec: LayerSpec, effort: Effort, key, on_stage):
    """Returns the best state and the relative loss after each round over all rows.

    Codebooks are made on a part of the rows where that is less than half of them: many rounds over
    few vectors. What all rows then need is their codes, and few rounds.
    """
    first_key, *round_keys = jax.random.split(key, 3)
    factors = _factors(problem, spec, effort)
    on_stage("factor")
    start = _first_state(problem, spec, effort, factors, first_key)
    on_stage("start")
    count = part_rows(problem.outputs, problem.order_J.size, spec)
    if count < problem.outputs:
        rows_R = np.arange(count) * problem.outputs // count  # at equal distances
        part = _of_rows(problem, rows_R)
        state = _state_of_rows(start, rows_R)
        keys = [jax.random.fold_in(key, 1) for key in round_keys]
        found = _both_kinds(
            part, state, effort, factors, keys, lambda stage: on_stage(f"part {stage}")
        )
        start = _spread(start, state, found.best)
        effort = dataclasses.replace(effort, feedback_rounds=min(1, effort.feedback_rounds))
    found = _both_kinds(problem, start, effort, factors, round_keys, on_stage)
    return found.best, found.history


class _Factors(NamedTuple):
    """See `sweep.feedback_factors`."""

    passed_PP: jax.Array
    metric_JGG: jax.Array
    mean_GG: jax.Array


def _factors(problem: _Problem, spec: LayerSpec, effort: Effort) -> _Factors:
    factors = sweep.feedback_factors(problem.moment_PP, effort.damping, group=spec.group)
    factors = _Factors(*jax.block_until_ready(factors))
    if not np.isfinite(np.asarray(factors.mean_GG)).all():
        raise VqjaxError(
            f"the moment of {problem.fan_in} inputs is indefinite: a mean of x x^T, shrunk, has a "
            f"Cholesky factor; gather it again, or in more precision"
        )
    return factors


def _first_state(
    problem: _Problem, spec: LayerSpec, effort: Effort, factors: _Factors, key
) -> _State:
    """First codebooks, rows of their own sizes, no codes yet."""
    draw_key, start_key = jax.random.split(key)
    places = _draw(draw_key, problem.outputs, problem.order_J.size)
    codes_OJM, scales_O, sample_VG = _start(
        problem.w_OP, problem.fan_in, *places, books=spec.codebooks, group=spec.group
    )
    books_MKG = initial_codebooks(
        sample_VG,
        factors.mean_GG,
        start_key,
        books=spec.codebooks,
        entries=spec.entries,
        steps=start_steps(spec, effort),
        beam=effort.beam,
    )
    return jax.block_until_ready(_State(codes_OJM, books_MKG, scales_O))


_PART = 512  # vectors for each entry of the codebooks, about


def part_rows(outputs: int, groups: int, spec: LayerSpec) -> int:
    """Returns how many rows codebooks are made on: a part of at most half, or all.

    Args:
      outputs: O, rows of the layer.
      groups: J, vectors of a row.
    """
    tile, vectors = _tile_rows(), _PART * spec.codebooks * spec.entries
    count = -(-vectors // (groups * tile)) * tile
    return count if 2 * count <= outputs else outputs


def _of_rows(problem: _Problem, rows_R: np.ndarray) -> _Problem:
    return problem._replace(w_OP=problem.w_OP[rows_R], outputs=len(rows_R))


def _state_of_rows(state: _State, rows_R: np.ndarray) -> _State:
    return state._replace(codes_OJM=state.codes_OJM[rows_R], scales_O=state.scales_O[rows_R])


def _spread(start: _State, before: _State, after: _State) -> _State:
    """The start of all rows with the codebooks of a part; scales move as its own did, in sum."""
    sum_before, sum_after = jnp.sum(before.scales_O), jnp.sum(after.scales_O)
    change = jnp.where(sum_before > 0, sum_after / sum_before, 1.0)  # 0: rows without weights
    return start._replace(books_MKG=after.books_MKG, scales_O=start.scales_O * change)


def _both_kinds(
    problem: _Problem, start: _State, effort: Effort, factors: _Factors, keys, on_stage
) -> _Found:
    """Rounds of error feedback, then of coordinate descent."""

    def feed_back(state: _State) -> jax.Array:
        def of_rows(w_TP, _, scales_T):
            return sweep.feedback(
                w_TP,
                factors.passed_PP,
                factors.metric_JGG,
                state.books_MKG,
                scales_T,
                beam=effort.beam,
                groups=problem.order_J.size,
            )

        return _by_tiles(of_rows, problem, state)

    descend = functools.partial(_descend, problem, effort)
    rounds = effort.feedback_rounds
    found = _Found(start, ())
    found = _rounds("feedback", feed_back, rounds, found, problem, effort, keys[0], on_stage)
    rounds = effort.descent_rounds
    return _rounds("descent", descend, rounds, found, problem, effort, keys[1], on_stage)


def start_steps(spec: LayerSpec, effort: Effort) -> int:
    """Returns the steps that first codebooks take: `effort.start_steps` up to two bits of codes per
    weight, beyond as the square of the bits, four times as many at most."""
    bits = spec.codebooks * math.log2(spec.entries) / spec.group
    return round(effort.start_steps * min(max(1.0, bits / 2), 2.0) ** 2)


def _rounds(
    stage: str,
    search: Callable[[_State], jax.Array],
    rounds: int,
    found: _Found,
    problem: _Problem,
    effort: Effort,
    key,
    on_stage: Callable[[str], None],
) -> _Found:
    """Codes by `search` and least squares in turn, until a round gains too little."""
    (state, history), total = found, _total(problem)
    best = state
    last_MKG, momentum = state.books_MKG, 0.0
    for index in range(rounds):
        codes_OJM = jax.block_until_ready(search(state))
        on_stage(stage)
        fit = codebooks_lib.improve(
            problem.w_OP,
            problem.moment_PP,
            codes_OJM,
            state.books_MKG,
            state.scales_O,
            jax.random.fold_in(key, index),
            problem.outputs,
            last_MKG,
            momentum,
            rows=codebooks_lib.fit_rows(problem.w_OP.shape[0], problem.order_J.size),
        )
        state = _State(codes_OJM, fit.books_MKG, fit.scales_O)
        last_MKG, momentum = fit.books_MKG, codebooks_lib.MOMENTUM
        previous = min(history, default=math.inf)
        history = (*history, float(fit.loss) / total)
        on_stage("least_squares")
        if history[-1] < previous:
            best = state
        if history[-1] > previous * (1 - effort.least_gain):
            break
        if stage == "feedback":  # it starts from no codes, so that codebooks may move freely
            state = state._replace(books_MKG=fit.onward_MKG)
    return _Found(best, history)


def _total(problem: _Problem) -> float:
    total = float(jnp.sum(sweep.loss_rows(problem.w_OP, problem.moment_PP)))
    return total if total > 0 else 1.0


def _descend(problem: _Problem, effort: Effort, state: _State) -> jax.Array:
    """Returns the codes after a sweep of coordinate descent."""

    def of_rows(w_TP, codes_TJM, scales_T):
        return sweep.descend(
            w_TP,
            problem.moment_PP,
            codes_TJM,
            state.books_MKG,
            scales_T,
            beam=effort.beam,
            groups=problem.order_J.size,
        )

    return _by_tiles(of_rows, problem, state)


def _store(
    problem: _Problem, state: _State, shape, spec: LayerSpec, effort: Effort, inputs
) -> VQTensor:
    """Rounds to the stored types, lets codes answer to the rounding, and packs."""
    groups = problem.order_J.size
    real_MKG = state.books_MKG
    scales = LogScales.of(state.scales_O[: problem.outputs])
    scales_O = to_device(grouping.padded(scales.values(), state.scales_O.shape))
    stored, shared = _round(real_MKG, state.codes_OJM, spec.codebook_bits)
    state = _State(state.codes_OJM, decode_lib.real_codebooks(stored, shared), scales_O)
    for _ in range(effort.store_rounds):
        state = state._replace(codes_OJM=_descend(problem, effort, state))
    if spec.codebook_bits == 8:  # sums that came into use must fit, too
        stored, shared = _to_int8(real_MKG, state.codes_OJM, shared)
    codes_OJM = np.empty((problem.outputs, groups, spec.codebooks), np.int32)
    codes_OJM[:, problem.order_J] = np.asarray(state.codes_OJM)[: problem.outputs, :groups]
    return VQTensor.pack(
        codes_OJM,
        stored,
        scales,
        shape=tuple(shape),
        grouping=spec.grouping,
        input_scales=inputs,
        codebook_scale=shared,
    )


def _round(
    books_MKG: jax.Array, codes_OJM: jax.Array, codebook_bits: int
) -> tuple[jax.Array, jax.Array | None]:
    """Returns codebooks in the type that is stored, and the step of int8 ones."""
    if codebook_bits == 8:
        return _to_int8(books_MKG, codes_OJM)
    return books_MKG.astype(jnp.float16), None


def _to_int8(books_MKG, codes_OJM, step=None) -> tuple[jax.Array, jax.Array]:
    stored, step = integer_codebooks(*jax.device_get((books_MKG, codes_OJM, step)))
    return to_device(stored), to_device(step)
