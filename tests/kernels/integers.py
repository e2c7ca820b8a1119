# SPDX-License-Identifier: Apache-2.0
"""Operands of integer products, and what they have to give: for tests of every kernel.

Dimension key:  P rows of the output   O outputs   N fan-in
"""

import jax
import numpy as np

from vqjax.kernels import decode, specs
from vqjax.kernels.problem import IntegerOperands, Problem
from vqjax.kernels.vq_conv.window import Window


def random_operands(problem: Problem, x_shape: tuple[int, ...]) -> IntegerOperands:
    """All of int8 in the levels; no sum of entries exceeds it.

    Scales and steps are powers of two and biases are whole: float32 holds the outputs exactly.
    """
    rng, rows, outputs = np.random.default_rng(1), problem.rows, problem.outputs
    exact = {
        "scales_O": rng.integers(1, 3, outputs).astype(np.float32),
        "codebook_scale": np.float32(0.5),
        "bias_O": rng.integers(-99, 100, outputs).astype(np.float32),
        "steps_P": rng.integers(1, 3, rows).astype(np.float32),
    }
    operands = specs.random_integer_operands(problem, x_shape)
    return operands._replace(**jax.device_put(exact))  # which compiles nothing


def exact(operands: IntegerOperands, problem: Problem, window: Window) -> np.ndarray:
    """Sums in 64 bits, then scaled in float64, [P, O]."""
    scaling = (np.asarray(array, np.float64) for array in operands.scaling())
    factors_O, biases_O, steps_P, zeros_P, totals_O = scaling
    sums_PO = _sums(operands, problem, window)
    shifted_PO = sums_PO - zeros_P[:, None] * totals_O
    y_PO = shifted_PO * steps_P[:, None] * factors_O + biases_O
    assert np.abs(sums_PO).max() > 100
    assert np.abs(y_PO).max() < 2**22  # in halves: float32 has them all
    return y_PO


def _sums(operands: IntegerOperands, problem: Problem, window: Window) -> np.ndarray:
    stored = jax.device_get((operands.packed_OY, operands.codebooks_MKG))
    w_OP = decode.decode_integers(*stored, groups=problem.groups)
    w_ON = np.asarray(w_OP, np.int64)[:, : problem.fan_in]
    x = np.asarray(operands.x, np.int64)
    if problem.op == "vq_matmul":
        return x @ w_ON.T
    lines, columns = window.outputs(x.shape[1:3])
    w_OIyx = w_ON.reshape(problem.outputs, problem.inputs, 3, 3)
    down, right = window.strides
    sums = sum(
        x[:, ky::down, kx::right][:, :lines, :columns] @ w_OIyx[:, :, ky, kx].T
        for ky in range(3)
        for kx in range(3)
    )
    return np.asarray(sums).reshape(problem.rows, problem.outputs)
