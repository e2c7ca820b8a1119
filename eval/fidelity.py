# SPDX-License-Identifier: Apache-2.0
"""How near each picture or latent is to its twin from the full-precision model, in numpy.

Twins share the starting noise, the class and the sampler, so every difference is the model's.

Dimension key:  N pictures   H W C picture   T window taps
"""

import numpy as np

PEAK = 255.0
SSIM_VARIANT = "gaussian window sigma 1.5 (11 taps), K1 0.01, K2 0.03, population covariance"
_SIGMA, _TAPS, _K1, _K2 = 1.5, 11, 0.01, 0.03
_TOGETHER = 8  # pictures whose maps are in memory at once: ten each, of 8 bytes a number


def psnr(a_NHWC: np.ndarray, b_NHWC: np.ndarray, *, peak: float = PEAK) -> np.ndarray:
    """Peak signal-to-noise ratio in dB, float64 [N]; infinite for identical pictures."""
    error_N = mean_squared_error(a_NHWC, b_NHWC)
    with np.errstate(divide="ignore"):  # identical twins
        return 10 * np.log10(peak**2 / error_N)


def mean_psnr(psnr_N: np.ndarray) -> tuple[float, int]:
    """Mean over the pictures that differ, and how many were identical and left out.

    With every picture identical the mean is infinite.
    """
    finite = psnr_N[np.isfinite(psnr_N)]
    return (float(finite.mean()) if finite.size else float("inf")), int(psnr_N.size - finite.size)


def mean_squared_error(a_NHWC: np.ndarray, b_NHWC: np.ndarray) -> np.ndarray:
    """Mean squared difference per picture or latent, float64 [N].

    Raises:
      ValueError: if the shapes differ.
    """
    if a_NHWC.shape != b_NHWC.shape:
        raise ValueError(f"twins must have one shape, found {a_NHWC.shape} and {b_NHWC.shape}")
    difference = a_NHWC.astype(np.float64) - b_NHWC.astype(np.float64)
    return (difference**2).reshape(len(a_NHWC), -1).mean(1)


def ssim(a_NHWC: np.ndarray, b_NHWC: np.ndarray, *, peak: float = PEAK) -> np.ndarray:
    """Structural similarity per picture, float64 [N] (Wang et al. 2004), variant `SSIM_VARIANT`.

    The mean runs over channels and over the interior, where the window lies inside the picture.

    Raises:
      ValueError: if the shapes differ or a side is shorter than the window.
    """
    if a_NHWC.shape != b_NHWC.shape:
        raise ValueError(f"twins must have one shape, found {a_NHWC.shape} and {b_NHWC.shape}")
    if min(a_NHWC.shape[1:3]) < _TAPS:
        raise ValueError(f"SSIM needs sides of at least {_TAPS} pixels, found {a_NHWC.shape[1:3]}")
    starts = range(0, len(a_NHWC), _TOGETHER)
    parts = ((a_NHWC[s : s + _TOGETHER], b_NHWC[s : s + _TOGETHER]) for s in starts)
    return np.concatenate([np.empty(0), *(_ssim(a, b, peak) for a, b in parts)])


def _ssim(a_NHWC: np.ndarray, b_NHWC: np.ndarray, peak: float) -> np.ndarray:
    a, b = a_NHWC.astype(np.float64), b_NHWC.astype(np.float64)
    mean_a, mean_b = _blur(a), _blur(b)
    variance_a = _blur(a * a) - mean_a**2
    variance_b = _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    c1, c2 = (_K1 * peak) ** 2, (_K2 * peak) ** 2
    likeness = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    energy = (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    return (likeness / energy).reshape(len(a), -1).mean(1)


def latent_mse(a_NHWC: np.ndarray, b_NHWC: np.ndarray) -> float:
    """Mean squared difference of latents over their mean square in `a`, the full-precision one."""
    scale = float(np.mean(a_NHWC.astype(np.float64) ** 2))
    if scale == 0:
        raise ValueError("the full-precision latents are all zero: nothing to compare with")
    return float(mean_squared_error(a_NHWC, b_NHWC).mean()) / scale


def _blur(images_NHWC: np.ndarray) -> np.ndarray:
    """Gaussian mean over each full window: [N, H - 10, W - 10, C]."""
    offsets = np.arange(_TAPS) - _TAPS // 2
    taps_T = np.exp(-0.5 * (offsets / _SIGMA) ** 2)
    taps_T /= taps_T.sum()
    for axis in (1, 2):
        windows = np.lib.stride_tricks.sliding_window_view(images_NHWC, _TAPS, axis=axis)
        images_NHWC = windows @ taps_T
    return images_NHWC
