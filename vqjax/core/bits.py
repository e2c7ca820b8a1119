# SPDX-License-Identifier: Apache-2.0
"""Exact byte accounting, before anything is compressed. Counts codes, codebooks and scales.

Dimension key:  O outputs   J vectors of a row   M codebooks   K entries   G weights of a vector
                X rows of codes
"""

import dataclasses
import math

import numpy as np

from vqjax.core import grouping, scales
from vqjax.kernels.decode import packed_bytes

SHARED_SCALE_BITS = 32
"""Bits of the one scale of int8 codebooks (float32)."""


@dataclasses.dataclass(frozen=True)
class StoredBits:
    """Stored bits of one kernel by part; `total` is 8 * VQTensor.nbytes.

    Attributes:
      codes: padding of vectors and bytes included.
      codebooks: entries and, for int8, their shared scale.
      scales: of the outputs and, where there are any, of the input channels.
      weights: weights of the kernel.
    """

    codes: int
    codebooks: int
    scales: int
    weights: int

    @property
    def total(self) -> int:
        """All stored bits."""
        return self.codes + self.codebooks + self.scales

    @property
    def per_weight(self) -> float:
        """All stored bits over the weights of the kernel."""
        return self.total / self.weights

    def __add__(self, other: "StoredBits") -> "StoredBits":
        ours, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return StoredBits(*(a + b for a, b in zip(ours, theirs)))


NOTHING = StoredBits(0, 0, 0, 0)
"""The sum of no kernels."""


def stored_bits(
    shape: tuple[int, ...],
    *,
    group: int,
    books: int,
    entries: int,
    codebook_bits: int,
    input_scales: bool = False,
) -> StoredBits:
    """Returns what a `VQTensor` of these sizes stores.

    Args:
      shape: kernel shape, Linen layout.
      codebook_bits: 16 (float16) or 8 (int8 with one shared scale).
      input_scales: whether input channels have scales too.
    """
    outputs, fan_in = grouping.matrix_shape(shape)
    codes = grouping.groups_per_row(fan_in, group) * books
    of_inputs = scales.stored_bits(grouping.channels(shape)) if input_scales else 0
    shared = SHARED_SCALE_BITS if codebook_bits == 8 else 0
    return StoredBits(
        codes=8 * outputs * packed_bytes(codes, entries),
        codebooks=books * entries * group * codebook_bits + shared,
        scales=scales.stored_bits(outputs) + of_inputs,
        weights=math.prod(shape),
    )


def entropy(codes_XM: np.ndarray) -> float:
    """Bits of one row of codes: the empirical entropy of each column, summed."""
    total = 0.0
    for codes_X in codes_XM.T:
        counts = np.unique(codes_X, return_counts=True)[1] / len(codes_X)
        total -= float(np.sum(counts * np.log2(counts)))
    return total


def entropy_coded_bits(codes_OJM: np.ndarray, stored: StoredBits) -> float:
    """Bits per weight if codes took their empirical entropy, and all else what is `stored`."""
    vectors = codes_OJM.shape[0] * codes_OJM.shape[1]
    coded = vectors * entropy(np.asarray(codes_OJM).reshape(vectors, -1))
    return (coded + stored.codebooks + stored.scales) / stored.weights
