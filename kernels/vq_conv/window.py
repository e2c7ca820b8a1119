# SPDX-License-Identifier: Apache-2.0
"""Geometry of a convolution: what an output pixel sees."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax

from vqjax.errors import VqjaxError
from vqjax.kernels.problem import Problem

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
        """Writes "SAME" and "VALID" out for an image of some height and width.

        Raises:
          VqjaxError: if padding is negative, or the padded image is smaller than the window.
        """
        if isinstance(padding, str):
            padding = jax.lax.padtype_to_pads(image, (size, size), strides, padding)
        (above, below), (left, right) = padding
        made = cls(size, (strides[0], strides[1]), ((above, below), (left, right)))
        if min(above, below, left, right) < 0 or min(made.outputs(image)) < 1:
            raise VqjaxError(
                f"a window of {size}x{size} on an image of {image[0]}x{image[1]}, padded by "
                f"{made.padding}: expected padding of 0 or more, and an image that then holds the "
                f"window"
            )
        return made

    def outputs(self, image: Sequence[int]) -> Pair:
        """Returns height and width of the output."""
        height, width = (
            (side + sum(pad) - self.size) // stride + 1
            for side, pad, stride in zip(image, self.padding, self.strides)
        )
        return height, width

    def keywords(self) -> dict[str, Any]:
        """Returns the arguments of `vq_conv` that say the same."""
        return {"window": self.size, "strides": self.strides, "padding": self.padding}


POINT = Window(1, (1, 1), ((0, 0), (0, 0)))
"""Of a 1x1 convolution that is a product."""


def for_trial(problem: Problem) -> tuple[Window, Pair]:
    """Returns how a small problem is tried, and the height and width of its image."""
    image, padding = (1, problem.rows), "SAME"
    if problem.integer:  # whose images were padded before
        image, padding = (problem.window, problem.rows + problem.window - 1), "VALID"
    return Window.of(problem.window, problem.strides, padding, image), image


_GROUPS = (1, 3, 9)


def unread(problem: Problem) -> list[str]:
    """Returns why GPU kernels cannot read a convolution's weight by channels; nothing if they can.

    A vector is a kernel of one channel (9 weights), a row of it (3) or one weight.
    """
    found = []
    if problem.window != 3:
        found.append(f"window of {problem.window}, the kernel has 3x3 weights")
    if problem.group not in _GROUPS:
        found.append(f"vectors of {problem.group}, kernels read one weight, a row of 3 or all 9")
    return found
