# SPDX-License-Identifier: Apache-2.0
"""Ranges of what layers read: asymmetric, one step and one zero point per layer and timestep.

Dimension key:  B examples   T timesteps of the table   L layers   F candidate ranges

A number x is stored as the level q = clip(round(x / step) + zero, 0, 2^bits - 1) and stands for
(q - zero) step. The zero point is a whole number, so that 0.0, which convolutions pad with, is
exact. One range per layer and timestep is EfficientDM's choice (arXiv 2310.03270);
ranges between the table's timesteps are interpolated, so that a sampler may use any of them.

Derivatives are those of learned step sizes (LSQ, arXiv 1902.08153; with zero points LSQ+,
arXiv 2004.09576): rounding passes them on, and where a value is clipped they go to the range.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from vqjax.core.rounding import straight_through

_EIGHT_BIT = re.compile(r"unet/(time_embed/dense\d+|(input_blocks_0|out)/conv)/kernel")
"""First and last convolution and the time embedding read 8 bits at least: EfficientDM's code keeps
these four there in its models of 4 bits (github.com/ThisisBillhe/EfficientDM)."""

_SHRINK = 0.85 ** np.arange(8, dtype=np.float32)
"""Shares of the least and of the largest value seen that candidate ranges reach to."""
CANDIDATES = len(_SHRINK) ** 2
"""F of `candidate_ranges`."""
TRIED = 65_536
"""Numbers of an input in one call that ranges are tried on, at most: all of them would cost several
times what the U-Net does."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["step_B", "zero_B"], meta_fields=["bits"]
)
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class InputRange:
    """The range of one layer's input, example by example.

    Attributes:
      step_B: float32, above 0.
      zero_B: float32, whole numbers from 0 to 2^bits - 1.
      bits: of the levels.
    """

    step_B: jax.Array
    zero_B: jax.Array
    bits: int

    @property
    def shift(self) -> int:
        """What is taken from a level to make it a signed number of so many bits."""
        return 2 ** (self.bits - 1)

    def fake_quantize(self, x: jax.Array) -> jax.Array:
        """Returns the numbers that the levels of x [B, ...] stand for, in the dtype of x.

        Derivatives, with v = x / step, low = -zero, high = 2^bits - 1 - zero: to x, 1 inside and 0
        where clipped; to step, round(v) - v inside, low or high where clipped; to zero, 0 inside
        and -step where clipped.
        """
        return (self._multiples(x) * _per_example(self.step_B, x)).astype(x.dtype)

    def quantize(self, x: jax.Array) -> jax.Array:
        """Returns the levels of x [B, ...] minus `shift`, int8; bits must be 8 or less."""
        levels = self._multiples(x) + _per_example(self.zero_B - self.shift, x)
        return levels.astype(jnp.int8)

    def _multiples(self, x: jax.Array) -> jax.Array:
        """The level minus the zero point, float32."""
        zero = _per_example(self.zero_B, x)
        low, high = -zero, 2**self.bits - 1 - zero
        v = x.astype(jnp.float32) / _per_example(self.step_B, x)
        # Not `clip`, whose derivatives at the ends are halves; and before rounding, since many
        # values inside round to the ends.
        v = jnp.where(v <= low, low, jnp.where(v >= high, high, v))
        return straight_through(v, jnp.round(v))


def _per_example(values_B: jax.Array, x: jax.Array) -> jax.Array:
    return values_B.reshape(-1, *[1] * (x.ndim - 1))


def range_bytes(layers: int, timesteps: int) -> int:
    """Bytes of the ranges of so many layers: four of a timestep and of a step, one of a zero
    point."""
    return timesteps * (4 + 5 * layers)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["timesteps_T", "log2_steps", "zeros"],
    meta_fields=["bits"],
)
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Activations:
    """The ranges of all layers: what stands as "activations" in the tree of parameters.

    Attributes:
      timesteps_T: int32, ascending.
      log2_steps: float32 [T] by kernel path: base-2 logarithms, so that training cannot make a step
        negative.
      zeros: float32 [T] by kernel path, from 0 to 2^bits - 1. They may lie between whole numbers
        while they are trained; ranges and files have the nearest.
      bits: of the levels; see `bits_of`.
    """

    timesteps_T: jax.Array
    log2_steps: dict[str, jax.Array]
    zeros: dict[str, jax.Array]
    bits: int

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return range_bytes(len(self.log2_steps), len(self.timesteps_T))

    def bits_of(self, path: str) -> int:
        """Bits of one layer: first and last convolution and the time embedding have 8 or more."""
        return layer_bits(path, self.bits)

    def at(self, t_B: jax.Array) -> dict[str, InputRange]:
        """The ranges at timesteps t_B, by kernel path.

        Between two timesteps of the table, logarithms of steps and zero points lie on straight
        lines; outside, the first or last range holds. Differentiable in both tables: rounding of
        zero points passes derivatives on.
        """
        return _by_path(self.log2_steps, self.bits, *self._at(t_B))

    def tabulated(self, t_T: jax.Array) -> "RangeTable":
        """Returns the ranges at these timesteps alone: nothing is left to interpolate.

        Args:
          t_T: int32, each once.
        """
        step_LT, zero_LT = self._at(t_T)
        return RangeTable(
            timesteps_T=t_T,
            step_LT=step_LT,
            zero_LT=zero_LT,
            paths=tuple(self.log2_steps),
            bits=self.bits,
        )

    def _at(self, t_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Steps and zero points of all layers, [L, B]."""
        below_B = jnp.sum(t_B[:, None] >= self.timesteps_T[None], axis=1) - 1
        below_B = jnp.maximum(below_B, 0)
        above_B = jnp.minimum(below_B + 1, len(self.timesteps_T) - 1)
        start_B, end_B = self.timesteps_T[below_B], self.timesteps_T[above_B]
        share_B = (t_B - start_B) / jnp.maximum(end_B - start_B, 1)
        share_1B = jnp.clip(share_B.astype(jnp.float32), 0, 1)[None]

        def between(tables: dict[str, jax.Array]) -> jax.Array:
            # All layers at once: a program of a few operations, whatever their number.
            table_LT = jnp.stack([tables[path] for path in self.log2_steps])
            return (1 - share_1B) * table_LT[:, below_B] + share_1B * table_LT[:, above_B]

        most_L1 = np.array(
            [[2.0 ** self.bits_of(path) - 1] for path in self.log2_steps], np.float32
        )
        zero_LB = between(self.zeros)
        whole_LB = jnp.round(jnp.clip(zero_LB, 0, most_L1))
        return jnp.exp2(between(self.log2_steps)), straight_through(zero_LB, whole_LB)

    def rounded(self) -> "Activations":
        """What is left after storing: zero points rounded to the levels that there are."""
        zeros = {
            path: jnp.round(jnp.clip(zero_T, 0, 2 ** self.bits_of(path) - 1))
            for path, zero_T in self.zeros.items()
        }
        return dataclasses.replace(self, zeros=zeros)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["timesteps_T", "step_LT", "zero_LT"],
    meta_fields=["paths", "bits"],
)
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class RangeTable:
    """The ranges of all layers at some timesteps: stands where `Activations` stood while a sampler
    walks them, so that a step reads numbers and works none out.

    Attributes:
      timesteps_T: int32.
      step_LT, zero_LT: float32, as `InputRange` has them.
      paths: of the kernels, in the order of the rows.
      bits: as in `Activations`.
    """

    timesteps_T: jax.Array
    step_LT: jax.Array
    zero_LT: jax.Array
    paths: tuple[str, ...]
    bits: int

    def at(self, t_B: jax.Array) -> dict[str, InputRange]:
        """The ranges at timesteps t_B, each of which is in the table, by kernel path."""
        place_B = jnp.argmax(self.timesteps_T[None] == t_B[:, None], axis=1)
        return _by_path(self.paths, self.bits, self.step_LT[:, place_B], self.zero_LT[:, place_B])


def _by_path(
    paths: Iterable[str], bits: int, step_LB: jax.Array, zero_LB: jax.Array
) -> dict[str, InputRange]:
    return {
        path: InputRange(step_B=step_LB[row], zero_B=zero_LB[row], bits=layer_bits(path, bits))
        for row, path in enumerate(paths)
    }


def layer_bits(path: str, bits: int) -> int:
    """Returns the bits of the layer with the kernel `path` where most layers have `bits`."""
    return max(bits, 8) if _EIGHT_BIT.fullmatch(path) else bits


def candidate_ranges(low, high, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Ranges to choose from, for inputs between `low` and `high`.

    Each end of the range is a share of what was seen, from all of it down to a third, in all pairs:
    what is clipped costs error, what is not makes steps large. EfficientDM shrinks both ends alike;
    after SiLU or GELU one end is short and dense, the other long and sparse.

    Args:
      low, high: float [...], finite; 0 counts as seen.

    Returns:
      Steps and zero points, float32 [F, ...]; the first pair is everything seen.
    """
    low, high = np.minimum(low, 0).astype(np.float32), np.maximum(high, 0).astype(np.float32)
    pairs = [(low * a, high * b) for a in _SHRINK for b in _SHRINK]
    low_F, high_F = (np.stack(ends) for ends in zip(*pairs))
    step_F = (high_F - low_F) / np.float32(2**bits - 1)
    step_F = np.where(step_F > 0, step_F, np.float32(1))  # nothing but zeros: any step is exact
    return step_F, np.clip(np.round(-low_F / step_F), 0, 2**bits - 1)


def squared_errors(x: jax.Array, step_F: jax.Array, zero_F: jax.Array, bits: int) -> jax.Array:
    """Returns the summed squared error of x [B, ...] in each of several ranges, float32 [F]."""
    x = x.astype(jnp.float32)

    def one(candidate: tuple[jax.Array, jax.Array]) -> jax.Array:
        step, zero = candidate
        found = InputRange(step_B=step[None], zero_B=zero[None], bits=bits).fake_quantize(x)
        return jnp.sum((found - x) ** 2)

    return jax.lax.map(one, (step_F, zero_F))  # one after the other: x exists twice, not F times
