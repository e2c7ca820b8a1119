# SPDX-License-Identifier: Apache-2.0
"""Each picture beside its twin from full precision: how near they are, and the worst pairs.

Dimension key:  N pairs   B batch   H W picture
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from vqjax import progress
from vqjax.core import cores
from vqjax.errors import VqjaxError
from vqjax.eval import fidelity, metrics, perceptual
from vqjax.io.image_set import ImageSet

WORST = 12
_BATCH = 64
_SSIM_SIDE = 11  # pixels that its window needs


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """Two pictures that should be alike.

    Attributes:
      number: of the pair in its set.
      psnr: dB.
      ssim: None where pictures are too small for it.
      before, after: uint8 [H, W, 3], of full precision and of the other model.
    """

    number: int
    psnr: float
    ssim: float | None
    before: np.ndarray
    after: np.ndarray


def check(source: ImageSet, against: ImageSet, *, with_lpips: bool) -> None:
    """Raises VqjaxError unless the sets are as many pictures of one size, large enough for LPIPS
    where that is asked for."""
    if source.count != against.count or source.size != against.size:
        described = (
            f"{s.where} has {s.count:,} of {s.size[1]} x {s.size[0]}" for s in (source, against)
        )
        raise VqjaxError(
            f"pictures are compared one by one: {' and '.join(described)}; give the same number of "
            f"one size"
        )
    if with_lpips and min(source.size) < perceptual.SMALLEST:
        raise VqjaxError(
            f"--lpips: {source.where} has pictures of {source.size[1]} x {source.size[0]}, "
            f"expected sides of at least {perceptual.SMALLEST}; leave it out"
        )


def compare(
    source: ImageSet, against: ImageSet, lpips_params: Mapping[str, jax.Array] | None
) -> tuple[dict[str, Any], list[Pair]]:
    """Reads both sets once, side by side.

    Args:
      against: the full-precision twins.
      lpips_params: as `vqjax.io.lpips.load` returns them, or None to leave LPIPS out.

    Returns:
      `psnr` (dB, mean over pairs that differ), `identical` (pairs), `ssim`, `lpips`, each with the
      standard error of the mean as `<score>_se`, `n` and `ssim_variant`; and up to `WORST` pairs
      that differ, lowest PSNR first. What was not measured is None.
    """
    check(source, against, with_lpips=lpips_params is not None)
    found: dict[str, list[np.ndarray]] = {"psnr": [], "ssim": [], "lpips": []}
    worst: list[Pair] = []
    with_ssim = min(source.size) >= _SSIM_SIDE
    places = None if lpips_params is None else cores.placed(lpips_params)
    with progress.stage("compare", source.count) as advance:
        for after, before in zip(source.batches(_BATCH), against.batches(_BATCH)):
            first = sum(map(len, found["psnr"]))
            found["psnr"].append(fidelity.psnr(before, after))
            if with_ssim:
                found["ssim"].append(fidelity.ssim(before, after))
            if places is not None:
                found["lpips"].append(perceptual.lpips(places, before, after))
            psnr_B = found["psnr"][-1]
            for index in np.argsort(psnr_B, kind="stable")[:WORST]:
                if np.isfinite(psnr_B[index]):
                    likeness = float(found["ssim"][-1][index]) if with_ssim else None
                    pair = before[index], after[index]
                    worst.append(Pair(first + int(index), float(psnr_B[index]), likeness, *pair))
            worst = sorted(worst, key=lambda pair: (pair.psnr, pair.number))[:WORST]
            advance(len(after))
    return _summary(found), worst


def latent_mse(source: Iterable[np.ndarray], against: Iterable[np.ndarray]) -> float:
    """Mean squared difference of latents over their mean square in `against`, over all batches.

    Raises:
      ValueError: if those of `against` are all zero.
    """
    difference = energy = 0.0
    for after, before in zip(source, against):
        difference += float(fidelity.mean_squared_error(before, after).sum())
        energy += float(fidelity.mean_squared_error(before, np.zeros_like(before)).sum())
    if energy == 0:
        raise ValueError("the full-precision latents are all zero: nothing to compare with")
    return difference / energy


def _summary(found: Mapping[str, list[np.ndarray]]) -> dict[str, Any]:
    psnr_N = np.concatenate(found["psnr"])
    psnr, identical = fidelity.mean_psnr(psnr_N)
    summary: dict[str, Any] = {
        "psnr": psnr,
        "psnr_se": _error(psnr_N[np.isfinite(psnr_N)]),
        "identical": identical,
        "n": len(psnr_N),
        "ssim_variant": fidelity.SSIM_VARIANT,
    }
    for score in ("ssim", "lpips"):
        values_N = np.concatenate(found[score]) if found[score] else None
        summary[score] = None if values_N is None else float(values_N.mean())
        summary[f"{score}_se"] = None if values_N is None else _error(values_N)
    return summary


def _error(values_N: np.ndarray) -> float | None:
    return metrics.standard_error(values_N) if len(values_N) > 1 else None
