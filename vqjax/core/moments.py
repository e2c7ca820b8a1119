# SPDX-License-Identifier: Apache-2.0
"""What calibration keeps of one layer's input, and the bias that centring leaves to correct.

Dimension key:  N fan-in   P fan-in of the kept channels   O outputs   I images   R rows of an image
                C input channels   K window side   X some columns of a moment

Shrinkage is chosen on inputs that the moment has not seen. Held out are whole images: rows of one
image, and its steps, resemble each other. How much a moment overfits is decided by its rows per
feature. A layer of many features would need a second matrix as large as the first and minutes of
eigenvalues; instead a share f of its input channels is kept, and the roles are swapped: a share f
of the images is what one fits, the others are what one tests on. Rows per feature are then those
of the whole layer, and so is the overfitting (a share of the channels alone would hide it).
"""

from typing import NamedTuple

import numpy as np

from vqjax.core import grouping
from vqjax.errors import VqjaxError

HELD_EVERY = 4
"""One image of so many is held out."""

HELD_FEATURES = 576
"""Most features of a held-out moment: 64 channels of a 3x3 window, tenths of a second each."""

_COLUMNS = 2048  # of a moment that are in float64 at a time


class Moment(NamedTuple):
    """Sums over one layer's calibration inputs, columns as in `grouping.to_matrix`.

    Attributes:
      second_NN: float32, mean of x x^T over all rows.
      mean_N: float32, mean of x over all rows.
      held_NN: the same over the held-out images only; [P, P], the columns `held_columns`, where
        the layer is large; None where there is one image alone.
      held_share: share of the rows that are held out.
      held_mean_N: mean of x over the held-out images, the columns of `held_NN`.
    """

    second_NN: np.ndarray
    mean_N: np.ndarray
    held_NN: np.ndarray | None = None
    held_share: float = 0.0
    held_mean_N: np.ndarray | None = None


class Split(NamedTuple):
    """Two moments of disjoint images, float64, over the same columns.

    Attributes:
      fit_PP, fit_mean_P: what a metric may be made from.
      test_PP, test_mean_P: what it is judged on.
    """

    fit_PP: np.ndarray
    fit_mean_P: np.ndarray
    test_PP: np.ndarray
    test_mean_P: np.ndarray

    def centred(self) -> "Split":
        """Both around the mean of the fit, which is what a corrected bias knows."""
        fit_P, test_P = self.fit_mean_P, self.test_mean_P
        test_PP = self.test_PP - np.outer(fit_P, test_P) - np.outer(test_P, fit_P)
        return Split(
            centred(self.fit_PP, fit_P),
            np.zeros_like(fit_P),
            test_PP + np.outer(fit_P, fit_P),
            test_P - fit_P,
        )


def centred(second_NN: np.ndarray, mean_N: np.ndarray) -> np.ndarray:
    """Covariance S - mu mu^T, in the dtype of S; zero for inputs that hardly change."""
    mean_N = mean_N.astype(second_NN.dtype)
    covariance_NN = second_NN - mean_N[:, None] * mean_N
    # The difference of two nearly equal numbers: rounding, which may be below zero.
    constant_N = np.diagonal(covariance_NN) <= 1e-6 * np.diagonal(second_NN)
    covariance_NN[constant_N], covariance_NN[:, constant_N] = 0, 0
    return covariance_NN


def _share(fan_in: int, window: int) -> int:
    """One channel of so many is kept in the held-out moment."""
    channels = fan_in // window**2
    return -(-channels // max(1, HELD_FEATURES // window**2))


def held_size(fan_in: int, window: int) -> int:
    """P: features of the held-out moment, whole channels of it."""
    area = window**2
    return fan_in // area // _share(fan_in, window) * area


def held_every(fan_in: int, window: int, images: int) -> int:
    """One image of so many is held out; 0 for none, where there is one image alone."""
    share = _share(fan_in, window)
    return 0 if images < 2 else min(images, HELD_EVERY if share == 1 else share)


def held_columns(fan_in: int, size: int, window: int) -> np.ndarray:
    """Columns of a held-out moment [size, size]: channels at equal distances, their windows whole.

    Raises:
      VqjaxError: if the sizes are no multiples of the window's area.
    """
    area = window**2
    if fan_in % area or size % area or not 0 < size <= fan_in:
        raise VqjaxError(
            f"held-out moment of {size} features for a fan-in of {fan_in} and a "
            f"{window}x{window} window: expected whole channels of {area} features, at most all"
        )
    channels, kept = fan_in // area, size // area
    chosen = np.arange(kept) * channels // kept
    return (chosen[:, None] * area + np.arange(area)).reshape(-1)


def of_images(rows_IRN: np.ndarray, window: int = 1) -> Moment:
    """Moment of given inputs, image by image; the streamed version is in `pipeline.calibrate`."""
    images, _, fan_in = rows_IRN.shape
    columns = held_columns(fan_in, held_size(fan_in, window), window)
    every = held_every(fan_in, window, images)
    second_NN, mean_N = _mean(rows_IRN)
    if not every:
        return Moment(second_NN, mean_N)
    held_NN, held_mean_N = _mean(rows_IRN[every - 1 :: every][..., columns])
    return Moment(second_NN, mean_N, held_NN, (images // every) / images, held_mean_N)


def _mean(rows_IRN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows_SN = np.asarray(rows_IRN, np.float64).reshape(-1, rows_IRN.shape[-1])
    second_NN = rows_SN.T @ rows_SN / len(rows_SN)
    return second_NN.astype(np.float32), rows_SN.mean(0).astype(np.float32)


def split(moment: Moment, window: int) -> Split | None:
    """What to fit and what to test on, or None where no image was held out.

    Args:
      window: side of the convolution's window; 1 for linear layers.
    """
    if moment.held_NN is None or moment.held_mean_N is None:
        return None
    size, share = len(moment.held_NN), moment.held_share
    columns = held_columns(len(moment.mean_N), size, window)
    held = np.asarray(moment.held_NN, np.float64), np.asarray(moment.held_mean_N, np.float64)
    rest = (
        (moment.second_NN[np.ix_(columns, columns)] - share * held[0]) / (1 - share),
        (moment.mean_N[columns] - share * held[1]) / (1 - share),
    )
    whole = size == len(moment.mean_N)
    return Split(*rest, *held) if whole else Split(*held, *rest)


def output_energy(
    matrix_ON: np.ndarray, shift_O: np.ndarray | float, second_NN: np.ndarray, mean_N: np.ndarray
) -> float:
    """Mean of |A x + d|^2 over inputs x, from their moments alone, summed in float64.

    It is tr(A S A^T) + 2 d^T A mu + |d|^2, taken as tr(A (S - mu mu^T) A^T) + |A mu + d|^2: where
    d takes the mean away, what remains is no difference of large numbers.

    Args:
      matrix_ON: A; W - Q for an error, W for the output itself.
      shift_O: d; the bias before minus the bias after for an error, 0 for none.
      second_NN, mean_N: S and mu of the inputs.
    """
    matrix_ON, mean_N = np.asarray(matrix_ON, np.float64), np.asarray(mean_N, np.float64)
    spread = 0.0
    for low in range(0, len(mean_N), _COLUMNS):  # S of the widest layer fills a GB as it is
        part = slice(low, low + _COLUMNS)
        covariance_NX = second_NN[:, part] - np.outer(mean_N, mean_N[part])
        spread += float(np.vdot(matrix_ON @ covariance_NX, matrix_ON[:, part]))
    return max(spread, 0.0) + float(np.sum((matrix_ON @ mean_N + shift_O) ** 2))


def corrected_bias(
    bias_O: np.ndarray, kernel: np.ndarray, quantized: np.ndarray, mean_N: np.ndarray
) -> np.ndarray:
    """b + (W - Q) mu: the quantized layer's mean output is then that of the full-precision one.

    Args:
      kernel, quantized: the same kernel before and after, Linen layout, dense.
      mean_N: mean of the layer's inputs.

    Returns:
      float32. What remains is the error of the centred moment: tr((W - Q) (S - mu mu^T) (W - Q)^T).
    """
    error_ON = grouping.to_matrix(np.asarray(kernel, np.float64) - np.asarray(quantized))
    return (np.asarray(bias_O) + error_ON @ np.asarray(mean_N, np.float64)).astype(np.float32)
