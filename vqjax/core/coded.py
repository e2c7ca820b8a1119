# SPDX-License-Identifier: Apache-2.0
"""The trainable form of a `VQTensor`: codes one by one, codebooks and scales in floating point.

Dimension key:  O outputs   N fan-in   J vectors of a row   M codebooks   K entries   G weights of a
                vector

What is trained are numbers of full precision; what is decoded are these numbers rounded as they
will be stored, and gradients pass the rounding unchanged (straight-through, arXiv:1308.3432). Thus
nothing is lost when training ends.
"""

import dataclasses
import functools
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np

from vqjax.core import grouping as grouping_lib
from vqjax.core import scales as scales_lib
from vqjax.core.host import to_device
from vqjax.core.rounding import straight_through
from vqjax.core.scales import LogScales
from vqjax.core.tensor import VQTensor
from vqjax.errors import VqjaxError
from vqjax.kernels import decode as decode_lib

LARGEST = 127
"""What the int8 entries of one vector add up to at most, in size."""

_TINY = np.finfo(np.float32).tiny


@overload
def integer_codebooks(
    books_MKG: np.ndarray, codes_OJM: np.ndarray, step: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]: ...
@overload
def integer_codebooks(
    books_MKG: jax.Array, codes_OJM: jax.Array, step: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]: ...
def integer_codebooks(books_MKG, codes_OJM, step=None):
    """Rounds codebooks to int8 so that the sum of every vector in use fits into int8, too.

    Each of M roundings moves a sum by up to half a step, so the largest sum in use takes
    127 - M/2 steps; nor may an entry in use exceed 127 of them, or cutting it off would move its
    sums. Entries that no vector uses are cut off. The last vector of a row counts with its padding.

    NumPy arrays are rounded by NumPy, to the same bits: a model has too many shapes to compile for
    each.

    Args:
      books_MKG: float.
      codes_OJM: integers below K.
      step: of codebooks that were rounded before. It is kept where all still fits and no finer step
        is due, so that rounding a second time changes nothing.

    Returns:
      books_MKG: int8, within -127 ... 127.
      step: scalar of the type of the codebooks; an entry is its integer times the step.
    """
    xp = np if isinstance(codes_OJM, np.ndarray) else jnp
    books, entries, _ = books_MKG.shape
    room = LARGEST - books / 2
    codes_OJM = codes_OJM.astype(np.int32)
    used_MKG = xp.where(_used(codes_OJM, entries)[..., None], books_MKG, 0.0)
    largest_entry = _largest(used_MKG)
    add_up: Any = decode_lib.sum_entries if xp is np else decode_lib.sum_entries_at_once
    largest_sum = _largest(add_up(codes_OJM, books_MKG))

    def stored(step):
        return _whole(books_MKG / step).astype(np.int8), step

    # Products, not quotients: compiled or not, they have the same last bit.
    due = xp.maximum(largest_sum * (1 / room), largest_entry * (1 / LARGEST))
    due = xp.maximum(due, _TINY)
    if step is None:
        return stored(due)
    given = step.astype(books_MKG.dtype)
    # How far the roundings of one vector can move its sum: not at all where nothing is rounded.
    moves_MKG = xp.abs(xp.clip(used_MKG / given, -LARGEST, LARGEST) - _whole(used_MKG / given))
    moved = xp.sum(xp.max(moves_MKG, axis=(1, 2)))
    keep = largest_sum / given + moved < LARGEST + 0.5
    keep &= largest_entry <= (LARGEST + 0.49) * given
    # Rounded sums are up to M/2 below the real ones: so much larger is still the same step.
    keep &= given <= due * room / (room - books / 2 - 0.1)
    if xp is np:
        return stored(given if keep else due)
    # Not `where`: XLA would round each entry anew for every vector that uses it.
    return jax.lax.cond(keep, lambda: stored(given), lambda: stored(due))


def _used(codes_OJM, entries: int):
    """Returns which entries any vector uses, bool [M, K]."""
    books = codes_OJM.shape[-1]
    book_11M = np.arange(books, dtype=np.int32).reshape(1, 1, books)
    if isinstance(codes_OJM, np.ndarray):
        used_MK = np.zeros((books, entries), bool)
        used_MK[book_11M, codes_OJM] = True
        return used_MK
    return jnp.zeros((books, entries), bool).at[book_11M, codes_OJM].set(True)


def _whole(steps):
    return steps.round().clip(-LARGEST, LARGEST)


def _largest(values):
    return abs(values).max(initial=0.0)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "codes_OJM",
        "codebooks_MKG",
        "scales_O",
        "scale_range",
        "input_scales",
        "codebook_scale",
    ],
    meta_fields=["shape", "grouping", "codebook_bits"],
)
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class CodedWeight:
    """Stands where a kernel stood in a tree of parameters while codes are trained.

    Attributes:
      codes_OJM: uint8 up to 256 entries, else uint16.
      codebooks_MKG: float32. Trained, but for grouping "scalar", whose codebook is a fixed grid.
      scales_O: float32, not negative. Trained; rows of scale 0 stay zero.
      scale_range: float32 [2], range of the `LogScales` that the scales are rounded to, or None: no
        rounding before `to_tensor`.
      input_scales: of the input channels, constant, or None.
      codebook_scale: float32 scalar, step of the int8 codebooks that these started from, constant,
        or None. Another step takes its place as soon as it no longer fits (`integer_codebooks`).
      shape: kernel shape in Linen layout.
      grouping: as in `VQTensor`.
      codebook_bits: 16 rounds codebooks to float16, 8 to int8 with one step, None not at all.
    """

    codes_OJM: jax.Array
    codebooks_MKG: jax.Array
    scales_O: jax.Array
    scale_range: jax.Array | None = None
    input_scales: LogScales | None = None
    codebook_scale: jax.Array | None = None
    shape: tuple[int, ...]
    grouping: str
    codebook_bits: int | None = None

    @classmethod
    def of(cls, tensor: VQTensor) -> "CodedWeight":
        """Returns the trainable form; it decodes to the same weights.

        int8 codebooks whose sums do not fit into int8 are the exception: they are rounded anew.

        Raises:
          VqjaxError: if the codebooks are of another type than float32, float16 or int8.
        """
        bits = {"float32": None, "float16": 16, "int8": 8}
        name = str(tensor.codebooks.dtype)
        if name not in bits:
            raise VqjaxError(f"codebooks in {name}: only {', '.join(bits)} can be trained")
        host = jax.device_get(tensor)
        books_MKG = decode_lib.real_codebooks(host.codebooks, host.codebook_scale)
        codes_OJM = host.unpack().astype(np.uint8 if books_MKG.shape[1] <= 256 else np.uint16)
        return cls(
            codes_OJM=to_device(codes_OJM),
            codebooks_MKG=to_device(books_MKG),
            scales_O=tensor.scales.values(),
            scale_range=tensor.scales.range,
            input_scales=tensor.input_scales,
            codebook_scale=tensor.codebook_scale,
            shape=tensor.shape,
            grouping=tensor.grouping,
            codebook_bits=bits[name],
        )

    def to_tensor(self) -> VQTensor:
        """Packs what `decode` returns. Scales without a range are rounded to one. Runs on the host.

        Raises:
          VqjaxError: if the parts do not fit together; see `VQTensor.pack`.
        """
        stored, step = jax.device_get(self)._stored_codebooks()
        scales = LogScales.of(self.scales_O)
        if self.scale_range is not None:
            scales = LogScales.on_grid(self.scales_O, self.scale_range)
        return VQTensor.pack(
            np.asarray(self.codes_OJM).astype(np.int32),
            to_device(stored),
            scales,
            shape=self.shape,
            grouping=self.grouping,
            input_scales=self.input_scales,
            codebook_scale=None if step is None else to_device(step),
        )

    @property
    def ndim(self) -> int:
        """Axes of the kernel."""
        return len(self.shape)

    @property
    def fan_in(self) -> int:
        """N, columns of the matrix view."""
        return grouping_lib.matrix_shape(self.shape)[1]

    @property
    def input_scales_N(self) -> jax.Array | None:
        """Factors of the columns, float32, or None."""
        if self.input_scales is None:
            return None
        return jnp.repeat(self.input_scales.values(), self.fan_in // self.input_scales.count)

    def _stored_codebooks(self) -> tuple[jax.Array, jax.Array | None]:
        """Returns the codebooks in the type that is stored, and the step of int8 ones."""
        if self.codebook_bits == 16:
            return self.codebooks_MKG.astype(np.float16), None
        if self.codebook_bits is None:
            return self.codebooks_MKG, None
        if self.grouping == "scalar" and self.codebook_scale is not None:
            grid_MKG = (self.codebooks_MKG / self.codebook_scale).round()
            return grid_MKG.astype(np.int8), self.codebook_scale
        return integer_codebooks(self.codebooks_MKG, self.codes_OJM, self.codebook_scale)

    def rounded_codebooks(self) -> jax.Array:
        """Returns the codebooks as they will be stored, float [M, K, G], straight-through.

        The grid of "scalar" has no gradient.
        """
        if self.codebook_bits is None:
            return self.codebooks_MKG
        stored, step = self._stored_codebooks()
        rounded_MKG = decode_lib.real_codebooks(stored, step)
        if self.grouping == "scalar":
            return jax.lax.stop_gradient(rounded_MKG)
        return straight_through(self.codebooks_MKG, rounded_MKG)

    def rounded_scales(self) -> jax.Array:
        """Returns the row scales as they will be stored, float [O], straight-through."""
        if self.scale_range is None:
            return self.scales_O
        codes_O = scales_lib.nearest_codes(self.scales_O, self.scale_range)
        return straight_through(self.scales_O, scales_lib.sizes(codes_O, self.scale_range))

    def rounded(self) -> "CodedWeight":
        """Returns the weight as it will be stored, with nothing left to round."""
        return dataclasses.replace(
            self,
            codebooks_MKG=self.rounded_codebooks(),
            scales_O=self.rounded_scales(),
            codebook_bits=None,
            scale_range=None,
        )

    def sums(self) -> jax.Array:
        """Returns the sums of the chosen entries, float [O, J, G], 0 where a row is padded."""
        books_MKG = self.rounded_codebooks()
        sums_OJG = decode_lib.sum_entries_at_once(self.codes_OJM, books_MKG)
        if self.fan_in == sums_OJG[0].size:
            return sums_OJG
        rows_ON = grouping_lib.to_rows(sums_OJG, self.fan_in)
        return grouping_lib.to_vectors(rows_ON, sums_OJG.shape[2])

    def vectors(self) -> jax.Array:
        """Returns the weights without input scales, float [O, J, G]: what codes are chosen for."""
        return self.sums() * self.rounded_scales()[:, None, None]

    def host_vectors(self) -> np.ndarray:
        """Returns `vectors`, rounding errors apart, made by NumPy; see `VQTensor.host_matrix`."""
        host = jax.device_get(self)
        books_MKG = host.codebooks_MKG
        if self.codebook_bits is not None:
            books_MKG = decode_lib.real_codebooks(*host._stored_codebooks())
        sums_OJG = decode_lib.sum_entries(host.codes_OJM.astype(np.int32), books_MKG)
        sums_OJG.reshape(len(sums_OJG), -1)[:, self.fan_in :] = 0
        return sums_OJG * np.asarray(self.rounded_scales())[:, None, None]

    def matrix(self) -> jax.Array:
        """Returns the matrix view, float [O, N], differentiable in codebooks and scales."""
        scales_N = self.input_scales_N
        matrix_ON = grouping_lib.to_rows(self.vectors(), self.fan_in)
        return matrix_ON if scales_N is None else matrix_ON * scales_N[None]

    def decode(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        """Returns the kernel in its own shape, as `VQTensor.decode` will."""
        return grouping_lib.from_matrix(self.matrix(), self.shape).astype(dtype)
