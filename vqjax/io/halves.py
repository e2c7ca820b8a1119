# SPDX-License-Identifier: Apache-2.0
"""Real pictures in two halves: one that training may see, one for measuring alone.

Dimension key:  N pictures   H W rows and columns   C channels
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Halves:
    """Both halves of a data set, as images and as class labels; the arrays are read-only.

    Attributes:
      train_images: uint8 [N, H, W, 3], the only pictures any training here may see.
      train_labels: int32 [N], from 0 on.
      held_images: uint8 [N, H, W, 3], for measuring alone.
      held_labels: int32 [N].
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    held_images: np.ndarray
    held_labels: np.ndarray

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            getattr(self, field.name).setflags(write=False)
