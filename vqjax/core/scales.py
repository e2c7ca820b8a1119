# SPDX-License-Identifier: Apache-2.0
"""Scales in five bits: powers of two at equal distances of the exponent.

Codes are chosen for the scales as they are stored, so that these need not be exact; where rows are
short, 16 bits each would cost as much as a tenth of the codes.

Dimension key:  S scales   Y bytes of their codes
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from vqjax.core.host import to_device
from vqjax.errors import VqjaxError
from vqjax.kernels import decode as decode_lib

LEVELS = 31
"""Sizes that a scale can have; one more code stands for 0."""

_OCTAVES = (8, 12, 16, 24)
"""Below the largest scale: where sizes may begin in place of the least."""

_RANGE_BITS = 64


def stored_bits(count: int) -> int:
    """Returns what `count` scales take: codes in whole bytes, and the numbers of their range."""
    return 8 * decode_lib.packed_bytes(count, LEVELS + 1) + _RANGE_BITS


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["codes", "range"], meta_fields=["count"]
)
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LogScales:
    """Scales of one axis of a weight matrix; memory in use equals the bits claimed.

    Attributes:
      codes: uint8 [Y], packed as in `kernels.decode`. Code 0 is the scale 0, code c the scale
        2^(range[0] + (c - 1) range[1]).
      range: float32 [2]: base-2 logarithm of the least size, and the step from size to size.
      count: S.
    """

    codes: jax.Array
    range: jax.Array
    count: int

    @classmethod
    def of(cls, scales_S: jax.typing.ArrayLike, *, up: bool = False) -> "LogScales":
        """Rounds scales to the nearest sizes between their least and their largest.

        Where few are far smaller than the others, sizes begin above them: they would cost all
        others their resolution. They become the least size.

        Args:
          scales_S: finite, not negative.
          up: round to the next larger size instead.

        Raises:
          VqjaxError: if a scale is negative or not finite.
        """
        scales_S = np.asarray(scales_S, np.float64)
        if scales_S.ndim != 1 or not np.isfinite(scales_S).all() or np.any(scales_S < 0):
            raise VqjaxError(
                f"scales {scales_S.shape}, least {np.min(scales_S, initial=np.inf):.3g}: expected "
                f"finite numbers of one axis, 0 or more"
            )
        sized_S = scales_S > 0
        logs_S = np.log2(scales_S, out=np.zeros_like(scales_S), where=sized_S)
        least, high = (
            float(pick(logs_S[sized_S])) if sized_S.any() else 0.0 for pick in (min, max)
        )
        tried = [least, *(high - octaves for octaves in _OCTAVES if high - octaves > least)]
        rounded = [_placed(scales_S, logs_S, low, high, up) for low in tried]
        errors = [float(np.sum((scales_S - sizes_S) ** 2)) for _, _, sizes_S in rounded]
        errors[0] -= 1e-8 * float(np.sum(scales_S**2))  # others must be worth it
        best = int(np.argmin(errors))
        codes_S, step, _ = rounded[best]
        return cls(
            codes=to_device(decode_lib.pack(codes_S[None], LEVELS + 1)[0]),
            range=jnp.asarray([tried[best], step], jnp.float32),
            count=len(scales_S),
        )

    @classmethod
    def on_grid(cls, scales_S: jax.typing.ArrayLike, range: jax.typing.ArrayLike) -> "LogScales":
        """Rounds scales to the nearest sizes of a given range, see `nearest_codes`."""
        range = jnp.asarray(range, jnp.float32)
        codes_S = np.asarray(nearest_codes(jnp.asarray(scales_S, jnp.float32), range))
        packed = decode_lib.pack(codes_S[None], LEVELS + 1)[0]
        return cls(codes=to_device(packed), range=range, count=len(codes_S))

    @property
    def nbytes(self) -> int:
        """Bytes of everything stored."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in (self.codes, self.range))

    def values(self) -> jax.Array:
        """Returns the scales, float32 [S]."""
        return _values(self)


def _placed(
    scales_S: np.ndarray, logs_S: np.ndarray, low: float, high: float, up: bool
) -> tuple[np.ndarray, np.float32, np.ndarray]:
    """Codes of scales among sizes from 2^low to 2^high, the step between them, and the sizes."""
    step = np.float32((high - low) / (LEVELS - 1))
    place_S = (logs_S - low) / (step if step > 0 else 1.0)
    # What lies on a size already stays there, rounding of the exponent apart.
    place_S = np.ceil(place_S - 1e-3) if up else np.round(place_S)
    codes_S = np.where(scales_S > 0, 1 + np.clip(place_S, 0, LEVELS - 1), 0).astype(np.int32)
    sizes_S = 2.0 ** (low + (codes_S - 1) * np.float64(step))
    return codes_S, step, np.where(codes_S > 0, sizes_S, 0.0)


@jax.jit
def _values(scales: LogScales) -> jax.Array:
    codes_S = decode_lib.unpack(scales.codes[None], scales.count, LEVELS + 1)[0]
    return sizes(codes_S, scales.range)


@jax.jit
def sizes(codes_S: jax.Array, range: jax.Array) -> jax.Array:
    """Returns the scales that integer codes stand for, float32 [S]; see `LogScales`."""
    sizes_S = jnp.exp2(range[0] + (codes_S - 1) * range[1])
    return jnp.where(codes_S == 0, 0.0, sizes_S)


@jax.jit
def nearest_codes(scales_S: jax.Array, range: jax.Array) -> jax.Array:
    """Returns the codes of the sizes whose exponents are nearest, int32 [S]; 0 for scales of 0."""
    logs_S = jnp.log2(jnp.where(scales_S > 0, scales_S, 1.0))
    place_S = (logs_S - range[0]) / jnp.where(range[1] > 0, range[1], 1.0)
    codes_S = 1 + jnp.clip(jnp.round(place_S), 0, LEVELS - 1).astype(jnp.int32)
    return jnp.where(scales_S > 0, codes_S, 0)
