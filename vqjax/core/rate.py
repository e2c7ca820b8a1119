# SPDX-License-Identifier: Apache-2.0
"""What a given number of bits can reach: at best, and by an additive code.

Dimension key:  N fan-in   M codebooks   K entries   G weights of a vector
"""

import math

import jax
import numpy as np

from vqjax.core.encode import EXACT_LIMIT

_STEPS = 100  # bisection steps: more than float64 can tell apart


def reverse_water_filling(eigenvalues_N: jax.typing.ArrayLike, bits: float) -> float:
    """Least mean distortion of a Gaussian source at a rate: the bound for every quantizer.

    A row of W with independent weights of variance 1, its error measured by (w - q) S (w - q)^T,
    is N independent Gaussian sources with the eigenvalues of S as variances. The rate-distortion
    function of such a source fills the components up to one level theta,

        R(theta) = 1/N sum_i max(0, 1/2 log2(l_i / theta)),   D(theta) = 1/N sum_i min(theta, l_i)

    (Cover and Thomas, Elements of Information Theory, 2nd edition, section 10.3.3). Over the mean
    eigenvalue it bounds the relative output error tr((W - Q) S (W - Q)^T) / tr(W S W^T). For
    weights that are not Gaussian it is no bound, but what a Gaussian of their variance would need.

    Args:
      eigenvalues_N: of S. Small negative ones, which rounding causes, count as zero.
      bits: R, per weight.

    Returns:
      D, in the units of the eigenvalues: the distortion per weight for weights of variance 1.
    """
    spectrum_N = np.maximum(np.asarray(eigenvalues_N, np.float64), 0.0)
    positive = spectrum_N[spectrum_N > 0]
    if positive.size == 0:
        return 0.0
    logs = np.log2(positive)
    # With all components active the rate is at least `bits` at the lower end, 0 at the upper one.
    low, high = float(logs.min()) - 2 * bits * spectrum_N.size / positive.size, float(logs.max())
    for _ in range(_STEPS):
        middle = (low + high) / 2
        rate = np.sum(np.maximum(logs - middle, 0.0)) / 2 / spectrum_N.size
        low, high = (middle, high) if rate > bits else (low, middle)
    return float(np.mean(np.minimum(spectrum_N, math.exp2(high))))


def relative_bound(eigenvalues_N: jax.typing.ArrayLike, bits: float) -> float:
    """Least relative output error of Gaussian weights at a rate: `reverse_water_filling` over the
    mean eigenvalue; 0 where all eigenvalues are.

    Args:
      eigenvalues_N: of S, as in `reverse_water_filling`.
      bits: all stored bits, per weight.
    """
    mean = float(np.mean(np.maximum(np.asarray(eigenvalues_N, np.float64), 0.0)))
    return reverse_water_filling(eigenvalues_N, bits) / mean if mean > 0 else 0.0


def code_distortion(group: int, books: int, entries: int) -> float:
    """Mean squared error that an additive code leaves of Gaussian weights of variance 1.

    The rate-distortion function 2^(-2 R), R = M log2(K) / G, times what a code of G dimensions
    loses: more in few dimensions and at high rates, where the fixed length of codes cannot follow
    the density, and more where K**M sums are too many to enumerate. The three factors are fitted to
    26 codes trained by `initial_codebooks` on 8,192 Gaussian vectors and applied to others
    (G 1 to 8, M 1 to 8, K 16 to 256); all are met within 20 %.

    Args:
      group: G.
      books: M.
      entries: K.
    """
    length = books * math.log2(entries)
    rate = length / group
    shape = 1.72 * group**-0.5 * (1 - 2 ** (-1.2 * rate))
    sums = 0.1 * max(0.0, rate - 2) if books > 1 else 0.0
    # Fitted where 2^16 sums were enumerated; beyond today's limit, beams lose what they lost then.
    search = 0.043 * (length - 16) if length > math.log2(EXACT_LIMIT) else 0.0
    return 2.0 ** (-2 * rate) * (1 + shape) * (1 + sums) * (1 + search)
