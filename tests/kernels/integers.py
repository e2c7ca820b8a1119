# SPDX-License-Identifier: Apache-2.0
"""Operands of integer products, and what they have to give: for tests of every kernel.

Dimension key:  P rows of the output   O outputs   N fan-in
"""

from typing import Any

import jax
import numpy as np

from vqjax.kernels import decode
from vqjax.kernels.problem import IntegerOperands, Problem
from vqjax.kernels.vq_conv.window import Window


def random_operands(problem: Problem, x_shape: tuple[int, ...]) -> IntegerOperands:
    """All of int8 in the levels; no sum of entries exceeds it.

    Scales and steps are powers of two and biases are whole: float32 holds the outputs exactly.
    """
    rng = np.random.default_rng(0)
    most = 127 // problem.books
    size = (problem.books, problem.entries, problem.group)
    codes = rng.integers(0, problem.entries, (problem.outputs, problem.groups * problem.books))
    books_MKG: Any = rng.integers(-most, most + 1, size).astype(np.int8)
    packed_OY: Any = decode.pack(codes, problem.entries)
    w_ON = decode.decode_integers(packed_OY, books_MKG, groups=problem.groups)
    rows, outputs = problem.rows, problem.outputs
    put = jax.device_put  # which compiles nothing
    return IntegerOperands(
        x=put(rng.integers(-128, 128, x_shape).astype(np.int8)),
        packed_OY=put(packed_OY),
        codebooks_MKG=put(books_MKG),
        scales_O=put(rng.integers(1, 3, outputs).astype(np.float32)),
        codebook_scale=put(np.float32(0.5)),
        bias_O=put(rng.integers(-99, 100, outputs).astype(np.float32)),
        steps_P=put(rng.integers(1, 3, rows).astype(np.float32)),
        zeros_P=put(rng.integers(-128, 128, rows).astype(np.int32)),
        totals_O=put(np.asarray(w_ON)[:, : problem.fan_in].sum(axis=1).astype(np.int32)),
    )


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
