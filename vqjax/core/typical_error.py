# SPDX-License-Identifier: Apache-2.0
"""What compression will do to a layer, told from its weights and its metric alone.

Dimension key:  O outputs   N fan-in

A good code at a high rate leaves an error that is white as the metric sees it: its covariance is
theta S^-1, with theta from the rate (the dual of reverse water-filling: Cover and Thomas, Elements
of Information Theory, 2nd edition, section 10.3.3). Its size then is

    tr(E S E^T) = ||W||^2 det(S)^(1/N) D        D: what the code leaves of a unit Gaussian

and its directions are known up to chance, which is enough to see what the network makes of it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from vqjax.core import draw, grouping


class TypicalError(NamedTuple):
    """A random error like that of a code.

    Attributes:
      error: of the kernel's shape, float32, with tr(E S E^T) = tr(W S W^T): a relative output error
        of 1. Zero where the output is always zero.
      gain: relative output error of a code over its distortion of unit Gaussians: what weights
        and inputs make easy (or hard) about this layer.
    """

    error: jax.Array
    gain: float


def typical_error(
    kernel: jax.typing.ArrayLike,
    moment_NN: jax.typing.ArrayLike,
    metric_NN: jax.typing.ArrayLike,
    key: jax.Array,
) -> TypicalError:
    """Draws an error of the covariance that compressing under a metric leaves.

    Args:
      kernel: [I, O] or [H, W, I, O].
      moment_NN: S of the statistics, the mean of x x^T.
      metric_NN: what the search minimizes, positive definite.
      key: decides the draw.
    """
    w_ON = grouping.to_matrix(jnp.asarray(kernel, jnp.float32))
    error_ON, gain = _draw(w_ON, jnp.asarray(moment_NN), jnp.asarray(metric_NN), key)
    return TypicalError(grouping.from_matrix(error_ON, jnp.shape(kernel)), float(gain))


@jax.jit
def _draw(w_ON, moment_NN, metric_NN, key):
    size = jnp.trace(metric_NN) / metric_NN.shape[0]
    lower_NN = jnp.linalg.cholesky(metric_NN / size)
    rows_O = jnp.sum(w_ON**2, axis=1, keepdims=True)
    white_ON = jnp.sqrt(rows_O) * draw.normal(key, w_ON.shape)
    error_ON = jax.scipy.linalg.solve_triangular(lower_NN, white_ON.T, lower=True, trans=1).T
    wanted, found = (jnp.sum((m @ moment_NN) * m) for m in (w_ON, error_ON))
    scale = jnp.where(found > 0, jnp.sqrt(wanted / jnp.where(found > 0, found, 1.0)), 0.0)
    # In expectation tr(E M E^T) of the draw is sum(rows) N: its gain in units of the moment.
    level = jnp.exp(2 * jnp.mean(jnp.log(jnp.diagonal(lower_NN))))
    gain = level * found / lower_NN.shape[0] / jnp.where(wanted > 0, wanted, 1.0)
    return error_ON * scale, jnp.where(wanted > 0, gain, 0.0)
