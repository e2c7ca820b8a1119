# SPDX-License-Identifier: Apache-2.0
"""Uniform scalar quantization with learned steps, tuned like ours: what additive codes must beat.

Learned step size quantization (LSQ, arXiv 1902.08153; offsets as in LSQ+, arXiv 2004.09576): latent
weights, a step and an offset for each row, straight-through gradients.

Dimension key:  O outputs   N fan-in
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vqjax.core import grouping
from vqjax.core.rounding import straight_through


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["levels_ON", "log2_steps_O", "offsets_O"],
    meta_fields=["shape", "bits"],
)
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ScalarWeight:
    """A kernel whose every weight is one of 2^bits equidistant values of its row.

    Attributes:
      levels_ON: latent weights in steps, from 0 to 2^bits - 1 where they are not clipped.
      log2_steps_O: base-2 logarithm of each row's step.
      offsets_O: what level 0 stands for, in steps.
      shape: of the kernel, Linen layout.
      bits: 1 to 8.
    """

    levels_ON: jax.Array
    log2_steps_O: jax.Array
    offsets_O: jax.Array
    shape: tuple[int, ...]
    bits: int

    @classmethod
    def of(cls, quantized: jax.typing.ArrayLike, bits: int) -> "ScalarWeight":
        """Starts from a quantized kernel on such a grid, for example `core.scalar_baseline`'s.

        Args:
          quantized: Linen layout; tells each row's step and offset, and the first levels.
          bits: 1 to 8.
        """
        q_ON = grouping.to_matrix(np.asarray(quantized, np.float64))
        low_O, high_O = q_ON.min(axis=1), q_ON.max(axis=1)
        step_O = np.array([_step(row_N) for row_N in q_ON])
        # A row that uses no more than a part of its levels keeps as many free below as above.
        free_O = 2**bits - 1 - np.round((high_O - low_O) / step_O)
        offset_O = low_O / step_O - np.floor(free_O / 2)
        return cls(
            levels_ON=jnp.asarray(q_ON / step_O[:, None] - offset_O[:, None], jnp.float32),
            log2_steps_O=jnp.asarray(np.log2(step_O), jnp.float32),
            offsets_O=jnp.asarray(offset_O, jnp.float32),
            shape=tuple(np.shape(quantized)),
            bits=bits,
        )

    def decode(self) -> jax.Array:
        """The kernel, float32; differentiable straight through the rounding."""
        clipped_ON = jnp.clip(self.levels_ON, 0, 2**self.bits - 1)
        rounded_ON = straight_through(clipped_ON, jnp.round(clipped_ON))
        step_O1 = jnp.exp2(self.log2_steps_O)[:, None]
        return grouping.from_matrix((rounded_ON + self.offsets_O[:, None]) * step_O1, self.shape)


def _step(row_N: np.ndarray) -> float:
    """Distance of the values of a row: the least difference of two that is more than rounding."""
    differences = np.diff(np.unique(row_N))
    least = 1e-5 * float(np.max(np.abs(row_N), initial=0.0))
    real = differences[differences > least]
    return float(real.min()) if real.size else 1.0


def lsq(
    level_rate: optax.ScalarOrSchedule,
    step_rate: optax.ScalarOrSchedule,
    plain_rate: optax.ScalarOrSchedule,
) -> optax.GradientTransformation:
    """Adam on latent weights, steps and offsets, and on the plain leaves beside them.

    Gradients are those of the decoded kernels, as `pv.semi_pv` takes them.

    Args:
      level_rate: of latent weights, in steps.
      step_rate: of the base-2 logarithm of steps, and of offsets.
      plain_rate: of leaves that are arrays.
    """
    adam = optax.partition(
        {
            "levels": optax.adam(level_rate),
            "steps": optax.adam(step_rate),
            "plain": optax.adam(plain_rate),
        },
        _labels,
    )

    @jax.jit
    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("lsq needs the parameters: update(gradients, state, params)")
        pulled = jax.tree.map(_pull_back, params, updates, is_leaf=_is_scalar)
        return adam.update(pulled, state, params)

    return optax.GradientTransformation(adam.init, update)


def _is_scalar(leaf: Any) -> bool:
    return isinstance(leaf, ScalarWeight)


def _pull_back(leaf: Any, gradient: jax.Array) -> Any:
    if not _is_scalar(leaf):
        return gradient
    _, back = jax.vjp(ScalarWeight.decode, leaf)
    return back(gradient)[0]


def _labels(params: Any) -> Any:
    def label(leaf: Any) -> Any:
        if not _is_scalar(leaf):
            return "plain"
        return dataclasses.replace(
            leaf, levels_ON="levels", log2_steps_O="steps", offsets_O="steps"
        )

    return jax.tree.map(label, params, is_leaf=_is_scalar)
