# SPDX-License-Identifier: Apache-2.0
"""Uniform scalar quantization: 8 bits for the first and last layer, and the baseline of reports.

Dimension key:  O rows   N fan-in   X columns of a block
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vqjax.core import grouping, sweep
from vqjax.core.encode import dot
from vqjax.core.host import to_device
from vqjax.core.scales import LogScales
from vqjax.core.tensor import VQTensor
from vqjax.errors import VqjaxError

_SHRINKS = tuple(np.linspace(1.0, 0.4, 13))
_TINY = np.finfo(np.float32).tiny
_ROWS, _COLUMNS, _BLOCK = 128, 384, 64
DAMPING = 0.01
"""Of error feedback, over the mean diagonal."""


def round_to_grid(
    w_ON: jax.typing.ArrayLike,
    shape: tuple[int, ...],
    entries: int,
    metric_NN: jax.typing.ArrayLike | None = None,
) -> VQTensor:
    """Rounds each weight to one of `entries` multiples of its row's step.

    The grid is a codebook like any other (M = 1, G = 1, int8), so that the result is an ordinary
    `VQTensor`. A row's step is the one of least squared error among thirteen. With a metric the
    error of a weight moves the targets of those that follow (GPTQ, arXiv 2210.17323). Runs in
    NumPy: it is a moment's work, and each shape would have to be compiled.

    Args:
      entries: K, 2 to 256; the grid is -K/2 ... K/2 - 1.
      metric_NN: positive semidefinite; None rounds to nearest.
    """
    w_ON = np.asarray(w_ON, np.float32)
    half = entries // 2
    grid_K = np.arange(-half, entries - half)
    shared = np.float32(1 / half)  # row scales are then near the largest weight
    largest_O = np.max(np.abs(w_ON), axis=1) * half / max(half - 1, 1)
    scales_RO = np.stack([largest_O * shrink for shrink in _SHRINKS])
    errors_RO = [
        np.sum((w_ON - _rounded(w_ON, s_O * shared, grid_K)[1]) ** 2, 1) for s_O in scales_RO
    ]
    best_O = np.argmin(errors_RO, axis=0)
    scales = LogScales.of(scales_RO[best_O, np.arange(len(w_ON))], up=True)
    step_O = np.asarray(scales.values()) * shared
    if metric_NN is None:
        codes_ON, _ = _rounded(w_ON, step_O, grid_K)
    else:
        codes_ON = _fed_back(w_ON, step_O, grid_K, np.asarray(metric_NN, np.float32))
    return VQTensor.pack(
        (codes_ON.astype(np.int32) + half)[..., None],
        to_device(grid_K.astype(np.int8).reshape(1, -1, 1)),
        scales,
        shape=tuple(shape),
        grouping="scalar",
        codebook_scale=to_device(shared),
    )


def _rounded(w_ON: np.ndarray, step_O: np.ndarray, grid_K: np.ndarray):
    """Returns multiples of each row's step, and what they stand for."""
    step_O1 = np.maximum(step_O, _TINY)[:, None]
    codes_ON = np.clip(np.round(w_ON / step_O1), grid_K[0], grid_K[-1])
    return codes_ON, codes_ON * step_O1


def _fed_back(
    w_ON: np.ndarray, step_O: np.ndarray, grid_K: np.ndarray, metric_NN: np.ndarray
) -> np.ndarray:
    """Multiples of each row's step, chosen column by column, the largest inputs first."""
    order_N, sorted_NN = _by_size(metric_NN)
    passed_NN = np.asarray(sweep.feedback_factors(to_device(sorted_NN), DAMPING, group=1)[0])
    fan_in = len(order_N)
    target_ON, codes_ON = w_ON[:, order_N], np.empty(w_ON.shape, np.float32)
    for start in range(0, fan_in, _BLOCK):
        stop = min(start + _BLOCK, fan_in)
        target_OX = target_ON[:, start:stop].copy()
        error_OX = np.empty_like(target_OX)
        for x, column in enumerate(range(start, stop)):
            rounded = _rounded(target_OX[:, x : x + 1], step_O, grid_K)
            codes_ON[:, order_N[column]] = rounded[0][:, 0]
            error_OX[:, x] = target_OX[:, x] - rounded[1][:, 0]
            target_OX -= np.outer(error_OX[:, x], passed_NN[column, start:stop])
        target_ON[:, stop:] -= error_OX @ passed_NN[start:stop, stop:fan_in]
    return codes_ON


def _by_size(moment_NN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns in the order of falling second moment, and the moment so, padded to few sizes: layers
    then share compiled programs. Padded inputs have no moment."""
    columns = -(-len(moment_NN) // _COLUMNS) * _COLUMNS
    order_N = np.argsort(-np.diagonal(moment_NN), kind="stable")
    return order_N, grouping.padded(moment_NN[order_N][:, order_N], (columns, columns))


class ScalarLayer(NamedTuple):
    """A kernel after scalar quantization.

    Attributes:
      kernel: dequantized, float32, original shape.
      bits_per_weight: codes, and a float16 step and offset per row, over the weights.
      rel_weight_mse, rel_output_mse: as in `compress.LayerStats`.
    """

    kernel: jax.Array
    bits_per_weight: float
    rel_weight_mse: float
    rel_output_mse: float


def scalar_baseline(
    kernel: jax.Array, moment: jax.Array | None, bits: int, *, damping: float = DAMPING
) -> ScalarLayer:
    """Uniform quantization with error feedback (GPTQ, arXiv:2210.17323), on the same moments.

    Columns are visited in the order of falling second moment. Each row takes, out of several
    ranges, the step and offset whose quantized row has the least output error.

    Args:
      kernel: [I, O] or [H, W, I, O].
      moment: S [N, N], or None for plain rounding error.
      bits: of one code, 1 to 8.

    Raises:
      VqjaxError: if bits is out of range.
    """
    if not 1 <= bits <= 8:
        raise VqjaxError(f"scalar baseline at {bits} bits: 1 to 8 whole bits are possible")
    w_ON = grouping.to_matrix(np.asarray(kernel, np.float32))
    outputs, fan_in = w_ON.shape
    moment_NN = np.eye(fan_in) if moment is None else np.asarray(moment, np.float32)
    order_N, sorted_NN = _by_size(moment_NN)
    columns, rows = len(sorted_NN), -(-outputs // _ROWS) * _ROWS
    sorted_ON = w_ON[:, order_N]
    passed_NN, *_ = sweep.feedback_factors(to_device(sorted_NN), damping, group=1)
    ranges = [_ranges(sorted_ON, shrink, 2**bits) for shrink in _SHRINKS[::3]]
    # All ranges at once, as if each were a layer's rows.
    step_RO = grouping.padded(np.stack([step for step, _ in ranges]), (len(ranges), rows))
    low_RO = grouping.padded(np.stack([low for _, low in ranges]), (len(ranges), rows))
    padded_ON = grouping.padded(sorted_ON, (rows, columns))
    found_RON = _feed_back(
        to_device(np.tile(padded_ON, (len(ranges), 1))),
        passed_NN,
        to_device(step_RO.reshape(-1)),
        to_device(low_RO.reshape(-1)),
        2**bits,
    ).reshape(len(ranges), rows, columns)
    q_ON = np.asarray(_best_rows(found_RON, padded_ON, sorted_NN))[:outputs, :fan_in]
    q_ON = q_ON[:, np.argsort(order_N)]
    raw_NN = grouping.padded(moment_NN, (columns, columns))
    weight_mse, output_mse = relative_errors(
        grouping.padded(w_ON, (rows, columns)), grouping.padded(q_ON, (rows, columns)), raw_NN
    )
    per_weight = (8 * math.ceil(fan_in * bits / 8) + 32) / fan_in
    shaped = to_device(grouping.from_matrix(q_ON, kernel.shape))
    return ScalarLayer(shaped, per_weight, weight_mse, output_mse)


@jax.jit
def _best_rows(found_RON, w_ON, moment_NN):
    loss_RO = jax.vmap(lambda q_ON: sweep.loss_rows(w_ON - q_ON, moment_NN))(found_RON)
    best_O = jnp.argmin(loss_RO, axis=0)
    return jnp.take_along_axis(found_RON, best_O[None, :, None], axis=0)[0]


def relative_errors(
    w_ON: jax.typing.ArrayLike, q_ON: jax.typing.ArrayLike, moment_NN: jax.typing.ArrayLike
) -> tuple[float, float]:
    """Returns (rel_weight_mse, rel_output_mse) of Q against W.

    Where W itself is or gives nothing, the error is returned as it is.
    """
    weight, weight_error, output, output_error = (
        float(value) for value in _energies(w_ON, q_ON, moment_NN)
    )
    return (
        weight_error / weight if weight > 0 else weight_error,
        output_error / output if output > 0 else output_error,
    )


@jax.jit
def _energies(w_ON, q_ON, moment_NN):
    error_ON = w_ON - q_ON
    return (
        jnp.sum(w_ON**2),
        jnp.sum(error_ON**2),
        jnp.sum(sweep.loss_rows(w_ON, moment_NN)),
        jnp.sum(sweep.loss_rows(error_ON, moment_NN)),
    )


def _ranges(w_ON: np.ndarray, shrink: float, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns float16-exact step and offset of each row; the range shrinks towards its middle."""
    low_O, high_O = np.min(w_ON, axis=1), np.max(w_ON, axis=1)
    middle_O, half_O = (low_O + high_O) / 2, (high_O - low_O) / 2 * shrink
    step_O = (2 * half_O / (levels - 1)).astype(np.float16).astype(np.float32)
    return step_O, (middle_O - half_O).astype(np.float16).astype(np.float32)


def _feed_back(w_ON, passed_NN, step_O, low_O, levels: int) -> jax.Array:
    found, target_ON = [], w_ON
    for start in range(0, w_ON.shape[1], _BLOCK):
        target_ON, q_OX = _round_block(target_ON, passed_NN, step_O, low_O, start, levels=levels)
        found.append(q_OX)
    return jnp.concatenate(found, axis=1)


@functools.partial(jax.jit, static_argnames="levels")
def _round_block(target_ON, passed_NN, step_O, low_O, start, *, levels: int):
    passed_XN, passed_XX = sweep.square(passed_NN, start, size=_BLOCK)
    target_OX = jax.lax.dynamic_slice_in_dim(target_ON, start, _BLOCK, 1)
    q_OX, error_OX = _round_columns(target_OX, passed_XX, step_O, low_O, levels)
    return target_ON - dot(error_OX, passed_XN), q_OX


def _round_columns(target_OX, passed_XX, step_O, low_O, levels: int):
    safe_O = jnp.maximum(step_O, _TINY)

    def step(target_OX, at):
        target_O = target_OX[:, at]
        code_O = jnp.clip(jnp.round((target_O - low_O) / safe_O), 0, levels - 1)
        q_O = low_O + code_O * step_O
        error_O1 = (target_O - q_O)[:, None]
        return target_OX - dot(error_O1, passed_XX[at][None]), (q_O, error_O1[:, 0])

    _, (q_XO, error_XO) = jax.lax.scan(step, target_OX, jnp.arange(target_OX.shape[1]))
    return q_XO.T, error_XO.T
