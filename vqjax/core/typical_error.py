# SPDX-License-Identifier: Apache-2.0
"""What compression will do to a layer, told from its weights and its metric alone.

Dimension key:  O outputs   N fan-in

A good code at a high rate leaves an error that is white as the metric sees it: its covariance is
theta S^-1, with theta from the rate (the dual of reverse water-filling: Cover and Thomas, Elements
of Information Theory, 2nd edition, section 10.3.3). Its size then is

    tr(E S E^T) = ||W||^2 det(S)^(1/N) D        D: what the code leaves of a unit Gaussian

and its directions are known up to chance, which is enough to see what the network makes of it.
Codes do not hide all that S lets them hide: where it is near zero, an error there would have to be
larger than the weights, and vectors reach across directions. What is expected of them is therefore
told from a metric with a ridge of its own.

Single weights on a grid, with error feedback (GPTQ), leave an error that is white before it is fed
back. With S = R R^T, R triangular, it is

    tr(E S E^T) = ||W||^2 mean(R_jj^2) D
"""

from typing import NamedTuple

import jax
import numpy as np
import scipy.linalg

from vqjax.core import grouping, scalar
from vqjax.errors import VqjaxError


class TypicalError(NamedTuple):
    """A random error like that of a code.

    Attributes:
      error: of the kernel's shape, float32, with tr(E S E^T) = tr(W S W^T): a relative output error
        of 1. Zero where the output is always zero.
      gain: relative output error of a code over its distortion of unit Gaussians: what weights
        and inputs make easy (or hard) about this layer.
      scalar_gain: the same for single weights on a grid.
    """

    error: np.ndarray
    gain: float
    scalar_gain: float


_RIDGE = 0.06
"""Of the expectation, over the mean diagonal of the metric: without it layers that few inputs reach
leave many times what is expected of them (tests/core/test_typical_error.py)."""


def typical_error(
    kernel: jax.typing.ArrayLike,
    moment_NN: jax.typing.ArrayLike,
    metric_NN: jax.typing.ArrayLike,
    rng: np.random.Generator,
) -> TypicalError:
    """Draws an error of the covariance that compressing under a metric leaves.

    Args:
      kernel: [I, O] or [H, W, I, O].
      moment_NN: S of the statistics, the mean of x x^T.
      metric_NN: what the search minimizes, positive definite.
      rng: decides the draw.

    Raises:
      VqjaxError: if the metric is not positive definite.
    """
    # By NumPy: a model has too many shapes to compile for each.
    w_ON = grouping.to_matrix(np.asarray(kernel, np.float32))
    moment_NN, metric_NN = (np.asarray(s, np.float32) for s in (moment_NN, metric_NN))
    fan_in = len(metric_NN)
    rest_N = np.diagonal(_factor(metric_NN, scalar.DAMPING)).astype(np.float64)
    lower_NN = _factor(metric_NN, _RIDGE)
    rows_O1 = np.sum(w_ON**2, axis=1, keepdims=True)
    white_ON = np.sqrt(rows_O1) * rng.standard_normal(w_ON.shape, np.float32)
    error_ON = scipy.linalg.solve_triangular(lower_NN, white_ON.T, lower=True, trans=1).T
    wanted, found = (float(np.vdot(m @ moment_NN, m)) for m in (w_ON, error_ON))
    scale = np.sqrt(wanted / found) if found > 0 else 0.0
    # In expectation tr(E M E^T) of the draw is sum(rows) N: its gain in units of the moment.
    level = float(np.exp(2 * np.mean(np.log(np.diagonal(lower_NN)))))
    gain = level * found / fan_in / wanted if wanted > 0 else 0.0
    size = np.trace(metric_NN) / fan_in * np.sum(rows_O1) * np.mean(rest_N**2)
    scalar_gain = float(size / wanted) if wanted > 0 else 0.0
    error = grouping.from_matrix(error_ON * np.float32(scale), np.shape(kernel))
    return TypicalError(np.ascontiguousarray(error), gain, scalar_gain)


def _factor(metric_NN: np.ndarray, ridge: float) -> np.ndarray:
    """The lower Cholesky factor of the metric over its mean diagonal, plus a ridge."""
    fan_in = len(metric_NN)
    scaled_NN = metric_NN / (np.trace(metric_NN) / fan_in)
    scaled_NN[np.diag_indices(fan_in)] += np.float32(ridge)
    try:
        # Not NumPy's: beyond 16,000 inputs OpenBLAS 0.3.31 of its wheels writes past its buffers.
        # Of a symmetric matrix the transpose is the same, in the order that LAPACK works in.
        return scipy.linalg.cholesky(scaled_NN.T, lower=True, overwrite_a=True, check_finite=False)
    except np.linalg.LinAlgError:
        raise VqjaxError(
            f"a metric of {fan_in} inputs is not positive definite; gather the moment again, or "
            f"shrink it more"
        ) from None
