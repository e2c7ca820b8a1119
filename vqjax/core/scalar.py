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
from vqjax.core.tensor import VQTensor
from vqjax.errors import VqjaxError

_SHRINKS = tuple(np.linspace(1.0, 0.4, 13))
_TINY = np.finfo(np.float32).tiny


def round_to_grid(w_ON: jax.Array, shape: tuple[int, ...], entries: int) -> VQTensor:
    """Rounds each weight to the nearest of `entries` multiples of its row's step.

    The grid is a codebook like any other (M = 1, G = 1, int8), so that the result is an ordinary
    `VQTensor`. A row's step is the one of least squared error among thirteen.

    Args:
      entries: K, 2 to 256; the grid is -K/2 ... K/2 - 1.
    """
    half = entries // 2
    grid_K = jnp.arange(-half, entries - half, dtype=jnp.int32)
    # The shared scale brings row scales near the largest weight, well inside float16.
    shared = jnp.float32(1 / half)
    largest_O = jnp.max(jnp.abs(w_ON), axis=1) * half / max(half - 1, 1)

    def rounded(shrink: float):
        scales_O = (largest_O * shrink).astype(jnp.float16)
        step_O1 = jnp.maximum(scales_O.astype(jnp.float32) * shared, _TINY)[:, None]
        codes_ON = jnp.clip(jnp.round(w_ON / step_O1), grid_K[0], grid_K[-1])
        error_O = jnp.sum((w_ON - codes_ON * step_O1) ** 2, axis=1)
        return error_O, scales_O, codes_ON.astype(jnp.int32) + half

    error_RO, scales_RO, codes_RON = (
        jnp.stack(parts) for parts in zip(*(rounded(shrink) for shrink in _SHRINKS))
    )
    best_1O = jnp.argmin(error_RO, axis=0)[None]
    codes_ON = jnp.take_along_axis(codes_RON, best_1O[..., None], axis=0)[0]
    return VQTensor.pack(
        codes_ON[..., None],
        grid_K.astype(jnp.int8).reshape(1, -1, 1),
        jnp.take_along_axis(scales_RO, best_1O, axis=0)[0],
        shape=shape,
        grouping="scalar",
        codebook_scale=shared,
    )


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
    kernel: jax.Array, moment: jax.Array | None, bits: int, *, damping: float = 0.01
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
    w_ON = grouping.to_matrix(jnp.asarray(kernel, jnp.float32))
    fan_in = w_ON.shape[1]
    moment_NN = jnp.eye(fan_in) if moment is None else jnp.asarray(moment, jnp.float32)
    order_N = jnp.argsort(-jnp.diagonal(moment_NN))
    sorted_ON, sorted_NN = w_ON[:, order_N], moment_NN[order_N][:, order_N]
    passed_NN, _ = sweep.feedback_factors(sorted_NN, damping, group=1)
    found_RON, loss_RO = [], []
    for shrink in _SHRINKS[::3]:
        step_O, low_O = _ranges(sorted_ON, shrink, 2**bits)
        found_RON.append(_feed_back(sorted_ON, passed_NN, step_O, low_O, 2**bits))
        loss_RO.append(sweep.loss_rows(sorted_ON - found_RON[-1], sorted_NN))
    best_O = jnp.argmin(jnp.stack(loss_RO), axis=0)
    q_ON = jnp.take_along_axis(jnp.stack(found_RON), best_O[None, :, None], axis=0)[0]
    q_ON = q_ON[:, jnp.argsort(order_N)]
    weight_mse, output_mse = relative_errors(w_ON, q_ON, moment_NN)
    per_weight = (8 * math.ceil(fan_in * bits / 8) + 32) / fan_in
    shaped = grouping.from_matrix(q_ON, kernel.shape)
    return ScalarLayer(shaped, per_weight, weight_mse, output_mse)


def relative_errors(w_ON: jax.Array, q_ON: jax.Array, moment_NN: jax.Array) -> tuple[float, float]:
    """Returns (rel_weight_mse, rel_output_mse) of Q against W; 0 where W itself gives nothing."""

    def ratio(above: jax.Array, below: jax.Array) -> float:
        return float(above / below) if float(below) > 0 else float(above)

    error_ON = w_ON - q_ON
    output = jnp.sum(sweep.loss_rows(error_ON, moment_NN))
    return (
        ratio(jnp.sum(error_ON**2), jnp.sum(w_ON**2)),
        ratio(output, jnp.sum(sweep.loss_rows(w_ON, moment_NN))),
    )


def _ranges(w_ON, shrink: float, levels: int):
    """Returns float16-exact step and offset of each row; the range shrinks towards its middle."""
    low_O, high_O = jnp.min(w_ON, axis=1), jnp.max(w_ON, axis=1)
    middle_O, half_O = (low_O + high_O) / 2, (high_O - low_O) / 2 * shrink
    step_O = (2 * half_O / (levels - 1)).astype(jnp.float16).astype(jnp.float32)
    low_O = (middle_O - half_O).astype(jnp.float16).astype(jnp.float32)
    return step_O, low_O


def _feed_back(w_ON, passed_NN, step_O, low_O, levels: int) -> jax.Array:
    fan_in = w_ON.shape[1]
    size = next(size for size in (64, 32, 16, 8, 4, 2, 1) if fan_in % size == 0)
    found, target_ON = [], w_ON
    for start in range(0, fan_in, size):
        passed_XN, passed_XX = sweep.square(passed_NN, start, size=size)
        q_OX, error_OX = _round_columns(
            target_ON[:, start : start + size], passed_XX, step_O, low_O, levels=levels
        )
        target_ON = sweep.pass_on(target_ON, error_OX, passed_XN)
        found.append(q_OX)
    return jnp.concatenate(found, axis=1)


@functools.partial(jax.jit, static_argnames="levels")
def _round_columns(target_OX, passed_XX, step_O, low_O, *, levels: int):
    safe_O = jnp.maximum(step_O, _TINY)

    def step(target_OX, at):
        target_O = target_OX[:, at]
        code_O = jnp.clip(jnp.round((target_O - low_O) / safe_O), 0, levels - 1)
        q_O = low_O + code_O * step_O
        error_O1 = (target_O - q_O)[:, None]
        return target_OX - dot(error_O1, passed_XX[at][None]), (q_O, error_O1[:, 0])

    _, (q_XO, error_XO) = jax.lax.scan(step, target_OX, jnp.arange(target_OX.shape[1]))
    return q_XO.T, error_XO.T
