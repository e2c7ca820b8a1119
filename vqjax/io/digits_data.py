# SPDX-License-Identifier: Apache-2.0
"""The pictures behind the embedded model: 1797 handwritten digits, half to train, half held out.

They are the test part of the UCI "Optical Recognition of Handwritten Digits" set as bundled with
scikit-learn: 8x8 pixels, 17 grey levels. We enlarge them to 32x32; the information stays 8x8.

Dimension key:  N images   H W rows and columns   C channels (3, all equal)
"""

import functools
import hashlib

import numpy as np

from vqjax.io.halves import Halves

IMAGE_SIZE = 32
CLASSES = 10
SPLIT_SEED = 0
_LEVELS = 16  # brightest pixel value in the source


@functools.cache
def load(seed: int = SPLIT_SEED) -> Halves:
    """Reads the digits, enlarges them and splits every class in half.

    Args:
      seed: chooses the split. The embedded model and its evaluators belong to the default.

    Returns:
      898 pictures [32, 32, 3] to train and 899 held out, ten classes; no image occurs in both,
      class sizes differ by at most one.
    """
    from sklearn.datasets import load_digits  # a second of imports, needed only here

    pixels, classes = load_digits(return_X_y=True)
    small_NHW = np.asarray(pixels).reshape(-1, 8, 8)
    labels_N = np.asarray(classes, np.int32)
    images_NHWC = enlarge(small_NHW * (255 / _LEVELS))
    train_N = split_half(small_NHW.astype(np.uint8), labels_N, seed=seed)
    halves = (images_NHWC[train_N], labels_N[train_N], images_NHWC[~train_N], labels_N[~train_N])
    return Halves(*halves)


def enlarge(grey_NHW: np.ndarray, size: int = IMAGE_SIZE) -> np.ndarray:
    """Bilinear enlargement of grey pictures to uint8 [N, size, size, 3] with equal channels.

    Half-pixel convention (output centre i reads source position (i + 0.5) h / size - 0.5), edges
    repeated; the same as `align_corners=False` elsewhere. Values are 0..255, rounded to nearest.
    """
    rows = _weights(grey_NHW.shape[1], size)
    columns = _weights(grey_NHW.shape[2], size)
    large_NHW = np.einsum("ih,nhw,jw->nij", rows, grey_NHW.astype(np.float64), columns)
    large_NHW = np.clip(np.floor(large_NHW + 0.5), 0, 255).astype(np.uint8)
    return np.repeat(large_NHW[..., None], 3, axis=-1)


def split_half(images_NHW: np.ndarray, labels_N: np.ndarray, *, seed: int) -> np.ndarray:
    """Returns a bool mask [N] that puts half of every class (rounded in turns) in the first part.

    The order within a class is that of a hash of the pixels, so the split depends neither on the
    order of the rows nor on the generator of any numpy version.
    """
    keys = [hashlib.sha256(f"{seed}:".encode() + image.tobytes()).digest() for image in images_NHW]
    chosen_N = np.zeros(len(labels_N), bool)
    extra = 0
    for label in np.unique(labels_N):
        rows = sorted(np.flatnonzero(labels_N == label), key=keys.__getitem__)
        half, odd = divmod(len(rows), 2)
        chosen_N[rows[: half + (odd and extra)]] = True
        extra ^= odd  # the odd one goes to either side in turn, so the halves stay level
    return chosen_N


def _weights(source: int, size: int) -> np.ndarray:
    """Interpolation matrix [size, source]; each row sums to one."""
    position = np.clip((np.arange(size) + 0.5) * source / size - 0.5, 0, source - 1)
    low = np.minimum(np.floor(position).astype(int), source - 2)
    weights = np.zeros((size, source))
    weights[np.arange(size), low] = 1 - (position - low)
    weights[np.arange(size), low + 1] = position - low
    return weights
