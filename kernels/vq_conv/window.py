# SPDX-License-Identifier: Apache-2.0
"""Geometry of a convolution: what an output pixel sees."""

from collections.abc import Sequence
from typing import NamedTuple, Self

import jax

Pair = tuple[int, int]


class Window(NamedTuple):
    """A square window that moves over an image.

    Attributes:
      size: side of the window.
      strides: vertical and horizontal.
      padding: zeros (above, below) and (left, right).
    """

    size: int
    strides: Pair
    padding: tuple[Pair, Pair]

    @classmethod
    def of(
        cls,
        size: int,
        strides: Sequence[int],
        padding: str | Sequence[Sequence[int]],
        image: Sequence[int],
    ) -> Self:
        """Writes "SAME" and "VALID" out for an image of some height and width."""
        if isinstance(padding, str):
            padding = jax.lax.padtype_to_pads(image, (size, size), strides, padding)
        (above, below), (left, right) = padding
        return cls(size, (strides[0], strides[1]), ((above, below), (left, right)))

    def outputs(self, image: Sequence[int]) -> Pair:
        """Returns height and width of the output."""
        height, width = (
            (side + sum(pad) - self.size) // stride + 1
            for side, pad, stride in zip(image, self.padding, self.strides)
        )
        return height, width
