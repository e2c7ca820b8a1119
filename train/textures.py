# SPDX-License-Identifier: Apache-2.0
"""Trains the model of the texture benchmark: python -m vqjax.train.textures

It sees one half of the cells of nine photographs (`vqjax.io.textures_data`), a variant being other
crops at random places, mirrored or not. The model is in no package: whoever measures trains it, on
a GPU for preference, and says with which settings.

Dimension key:  N crops   H W rows and columns   C channels   V variants
"""

import dataclasses
import pathlib
import sys

import numpy as np
import tyro

from vqjax.train.latent_diffusion import Training, fit

VARIANTS = 16  # sets of crops; the first is the one that scores know as the half to train


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(Training):
    """Trains the textures model from scratch and writes one .safetensors file.

    `python -m vqjax.quantize FILE` and `python -m vqjax.evaluate FILE` take it from there."""

    out: pathlib.Path = pathlib.Path("textures.safetensors")
    work: pathlib.Path = pathlib.Path("vqjax-runs/textures")
    autoencoder_steps: int = 20_000
    unet_steps: int = 60_000


def variants(count: int, *, per_class: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Several sets of crops of the training half, each class at the same indices in all.

    Args:
      count: V; the first set lies where `textures_data.load` has its own, and is not mirrored.
      per_class: crops of each class in a set.
      seed: of the mirroring.

    Returns:
      float32 [V, N, 32, 32, 3] in [-1, 1] and int32 [N].
    """
    from vqjax.io import textures_data

    rng = np.random.default_rng(seed)
    sets, labels_N = [], np.empty(0, np.int32)
    for number in range(count):
        images_NHWC, labels_N = textures_data.crops("train", per_class, seed=number)
        if number:
            mirrored_N = rng.random(len(images_NHWC)) < 0.5
            images_NHWC[mirrored_N] = images_NHWC[mirrored_N, :, ::-1]
        sets.append(images_NHWC.astype(np.float32) / 127.5 - 1)
    return np.stack(sets), labels_N


def main(argv: list[str] | None = None) -> int:
    """Trains both stages and writes the model. Returns the exit code."""
    args = tyro.cli(Args, args=argv, prog="python -m vqjax.train.textures")
    from vqjax.config import LatentDiffusionConfig
    from vqjax.errors import VqjaxError
    from vqjax.io import textures_data

    per_class = textures_data.PER_CLASS
    try:
        images_VNHWC, labels_N = variants(VARIANTS, per_class=per_class, seed=args.seed)
    except VqjaxError as error:  # the pictures are in a package that may not be there
        print(f"vqjax: {error}", file=sys.stderr)
        return error.exit_code
    config = LatentDiffusionConfig.textures()
    fit(config, images_VNHWC, labels_N, args, "python -m vqjax.train.textures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
