# SPDX-License-Identifier: Apache-2.0
"""Makes a metric of a moment: shrinks away what the calibration inputs have by chance.

Dimension key:  N fan-in   P features of the held-out moment   C input channels   A window area
                E eigenvectors

Codes exploit every direction in which S is small. With few calibration rows many are small by
chance: error on other inputs is then several times that on these. Adding a ridge, or moving
towards a moment that has few parameters, removes them. How far to go is decided on images that
were held out.
"""

from typing import Literal, NamedTuple

import numpy as np

from vqjax.core import moments as moments_lib
from vqjax.core.moments import Moment, Split
from vqjax.errors import VqjaxError

Target = Literal["identity", "kronecker"]


class Shrinkage(NamedTuple):
    """S becomes (1 - share) S + share T + ridge tr(S)/N I.

    Attributes:
      target: T; "identity" is tr(S)/N I, "kronecker" the nearest product (channels x taps).
      share: of T.
      ridge: relative to the mean diagonal of S, positive.
    """

    target: Target
    share: float
    ridge: float


DEFAULT = Shrinkage("identity", 0.0, 0.02)
"""Where nothing was held out: costs nothing on the moment itself and gains on other inputs."""

_RIDGES: dict[tuple[Target, float], tuple[float, ...]] = {
    ("identity", 0.0): (0.005, 0.02, 0.06, 0.2, 0.6),
    ("kronecker", 0.3): (0.02, 0.05, 0.1),
    ("kronecker", 0.7): (0.02, 0.05, 0.1),
    ("kronecker", 0.9): (0.02, 0.05, 0.1),
    ("kronecker", 1.0): (0.02, 0.05, 0.1),
}
"""What is tried. A share of the identity is a ridge; ridges leave the eigenvectors alone."""

_KRONECKER_STEPS = 5
_BLOCK = 512


class Metric(NamedTuple):
    """What one layer's search minimizes.

    Attributes:
      metric_NN: float32, symmetric, positive definite.
      shrinkage: how it was made.
      centred: whether it is that of x - mean, to be used with a corrected bias.
      predicted: error expected on held-out inputs, relative to the output's energy, before and
        after centring; empty where nothing was held out or nothing can be centred.
    """

    metric_NN: np.ndarray
    shrinkage: Shrinkage
    centred: bool
    predicted: tuple[float, ...] = ()


def layer_metric(moment: Moment, window: int, *, has_bias: bool, bits: float = 2.0) -> Metric:
    """The metric with the least expected error on held-out inputs.

    Args:
      window: side of the convolution's window; 1 for linear layers.
      has_bias: whether the layer can take a corrected bias.
      bits: per weight, about.
    """
    chosen = choose(moment, window, bits=bits)
    split = moments_lib.split(moment, window)
    if not has_bias or split is None:
        return Metric(shrink(moment.second_NN, window, chosen), chosen, False)
    errors = tuple(
        predicted_error(split, window, chosen, bits=bits, centre=centre) for centre in (False, True)
    )
    second_NN, centre = moment.second_NN, errors[1] < errors[0]
    if centre:
        second_NN = moments_lib.centred(second_NN, moment.mean_N)
    return Metric(shrink(second_NN, window, chosen), chosen, centre, errors)


def choose(moment: Moment, window: int, *, bits: float = 2.0) -> Shrinkage:
    """The shrinkage whose codes are expected to do best on held-out images.

    A code that is optimal for a metric with eigenvalues l and eigenvectors u leaves the error
    D = min(1, theta / l) along u (reverse water-filling, Cover and Thomas, theorem 10.3.3; weights
    of unit variance, theta from the rate). Held-out inputs H make of it sum D u^T H u.

    Args:
      window: side of the convolution's window; 1 for linear layers. Only larger ones have taps.
      bits: the rate. Choices at 2 and at 4 bits hardly differ.

    Returns:
      `DEFAULT` where nothing was held out, or the inputs are all zero.

    Raises:
      VqjaxError: if the moment is not finite.
    """
    split = moments_lib.split(moment, window)
    if split is None:
        return DEFAULT
    if not all(np.isfinite(part).all() for part in split):
        raise VqjaxError("the moment holds NaN or infinite values; check the calibration")
    if not np.trace(split.fit_PP) > 0 or not np.trace(split.test_PP) > 0:
        return DEFAULT
    best, least = DEFAULT, np.inf
    for (target, share), ridges in _RIDGES.items():
        if target == "kronecker" and window == 1:
            continue
        base = shrink(split.fit_PP, window, Shrinkage(target, share, 0.0))
        for ridge, error in zip(ridges, _errors(base, split, ridges, bits)):
            if error < least:
                best, least = Shrinkage(target, share, ridge), error
    return best


def predicted_error(
    split: Split, window: int, shrinkage: Shrinkage, *, bits: float = 2.0, centre: bool = False
) -> float:
    """The expected held-out error of `choose`, relative to the (not centred) output's energy."""
    energy = np.trace(split.test_PP)
    if centre:
        split = split.centred()
    base = shrink(split.fit_PP, window, shrinkage._replace(ridge=0.0))
    error = _errors(base, split, (shrinkage.ridge,), bits)[0]
    return float(error * np.trace(split.test_PP) / energy) if energy > 0 else 0.0


def _errors(base_PP: np.ndarray, split: Split, ridges, bits: float) -> list[float]:
    """Expected errors on `split.test_PP`, relative to its trace, for one base and many ridges."""
    found_E, vectors_PE = np.linalg.eigh(base_PP)
    seen_E = np.einsum("pe,pe->e", vectors_PE, split.test_PP @ vectors_PE)
    size = max(np.trace(split.fit_PP) / len(base_PP), np.finfo(np.float32).tiny)
    energy = max(np.trace(split.test_PP), np.finfo(np.float32).tiny)
    errors = []
    for ridge in ridges:
        values_E = np.maximum(found_E, 0) + ridge * size
        left_E = np.minimum(1, _water_level(values_E, bits) / values_E)
        errors.append(float(left_E @ seen_E / energy))
    return errors


def _water_level(values_E: np.ndarray, bits: float) -> float:
    """theta with mean(max(0, log2(l / theta) / 2)) = bits, in closed form."""
    logs_E = np.sort(np.log2(values_E))[::-1]
    count_E = np.arange(1, len(logs_E) + 1)
    # With the e largest above the water, log2 theta = mean of those - 2 bits N / e.
    level_E = (np.cumsum(logs_E) - 2 * bits * len(logs_E)) / count_E
    below_E = level_E <= logs_E
    return float(np.exp2(level_E[below_E][-1]))


def shrink(second_NN: np.ndarray, window: int, shrinkage: Shrinkage) -> np.ndarray:
    """The shrunk moment, symmetric and positive definite, in the dtype of `second_NN`.

    Args:
      second_NN: positive semidefinite up to rounding; it is not modified. All zero makes I.
      window: side of the convolution's window; 1 for linear layers.

    Raises:
      VqjaxError: for the Kronecker target where `window`**2 does not divide N.
    """
    result_NN = np.array(second_NN)
    fan_in = len(result_NN)
    size = float(np.trace(result_NN, dtype=np.float64)) / fan_in
    if not size > 0:
        return np.eye(fan_in, dtype=result_NN.dtype)
    for first in range(0, fan_in, _BLOCK):  # in place: the widest layer's moment has 1.2 GB
        rows = slice(first, first + _BLOCK)
        mean = (result_NN[rows, first:] + result_NN[first:, rows].T) / 2
        result_NN[rows, first:], result_NN[first:, rows] = mean, mean.T
    if shrinkage.share > 0 and shrinkage.target == "kronecker":
        channel_CC, tap_AA = nearest_kronecker(result_NN, window)
        area = len(tap_AA)
        result_NN *= 1 - shrinkage.share
        for i, j in np.ndindex(area, area):
            part = shrinkage.share * tap_AA[i, j] * channel_CC
            result_NN[i::area, j::area] += part.astype(result_NN.dtype)
        added = shrinkage.ridge
    else:
        result_NN *= 1 - shrinkage.share
        added = shrinkage.ridge + shrinkage.share
    result_NN[np.diag_indices(fan_in)] += result_NN.dtype.type(added * size)
    return result_NN


def nearest_kronecker(second_NN: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns A [C, C], B [A, A] with A x B nearest to a symmetric S in the Frobenius norm.

    Alternating least squares (Van Loan and Pitsianis, 1993), from the mean over taps: each step
    keeps both factors positive semidefinite.

    Raises:
      VqjaxError: if `window`**2 does not divide N.
    """
    area = window**2
    if len(second_NN) % area:
        raise VqjaxError(
            f"moment of {len(second_NN)} features: expected a multiple of {area} "
            f"for a {window}x{window} window"
        )
    parts = {
        (i, j): second_NN[i::area, j::area].astype(np.float64)
        for i, j in np.ndindex(area, area)
        if i <= j
    }
    tap_AA = np.eye(area)
    for _ in range(_KRONECKER_STEPS):
        channel_CC = np.zeros_like(parts[0, 0])
        for (i, j), part_CC in parts.items():
            channel_CC += tap_AA[i, j] * (part_CC if i == j else part_CC + part_CC.T)
        channel_CC /= np.sum(tap_AA**2)
        for (i, j), part_CC in parts.items():
            tap_AA[i, j] = tap_AA[j, i] = np.sum(part_CC * channel_CC)
        tap_AA /= np.sum(channel_CC**2)
    return channel_CC, tap_AA
