# SPDX-License-Identifier: Apache-2.0
"""Trains the embedded model `digits`: real data, every part of the LDM-4 path, at small size.

One half of the 1,797 images trains, the other is never seen.

Dimension key:  B batch   H W image   C channels   V variants of an image
"""

import dataclasses
import pathlib
import sys

import numpy as np
import tyro

from vqjax.train.latent_diffusion import Training, fit

VARIANTS = 8  # copies of each training image; the first is the image itself


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(Training):
    """Trains the embedded digits model from scratch and writes one .safetensors file."""

    out: pathlib.Path = pathlib.Path("digits.safetensors")
    work: pathlib.Path = pathlib.Path("vqjax-runs/digits")
    autoencoder_steps: int = 2000
    unet_steps: int = 7000


def augment(images_BHWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Small random rotations, scalings and shifts of uint8 images, edges continued.

    Returns:
      float32 [V, B, H, W, C] in [-1, 1]; variant 0 is the image itself.
    """
    from scipy import ndimage

    count, height, width, _ = images_BHWC.shape
    centre = np.array([(height - 1) / 2, (width - 1) / 2])
    out = np.repeat(images_BHWC[None].astype(np.float32) / 127.5 - 1, VARIANTS, axis=0)
    for variant in range(1, VARIANTS):
        for i in range(count):
            angle, zoom = rng.normal(0, np.deg2rad(3)), np.exp(rng.normal(0, 0.03))
            turn = (
                np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / zoom
            )
            offset = centre - turn @ centre + rng.normal(0, 0.6, 2)
            grey = ndimage.affine_transform(
                out[0, i, ..., 0], turn, offset, order=1, mode="nearest"
            )
            out[variant, i] = grey[..., None]
    return out


def main(argv: list[str] | None = None) -> int:
    """Trains both stages and writes the model. Returns the exit code."""
    args = tyro.cli(Args, args=argv, prog="python -m vqjax.train.digits")
    from vqjax.config import LatentDiffusionConfig
    from vqjax.io import digits_data

    data = digits_data.load()
    images_VNHWC = augment(data.train_images, np.random.default_rng(args.seed))
    config = LatentDiffusionConfig.digits()
    fit(config, images_VNHWC, data.train_labels, args, "python -m vqjax.train.digits")
    return 0


if __name__ == "__main__":
    sys.exit(main())
