# SPDX-License-Identifier: Apache-2.0
"""How real pictures of any size become square ones: as guided-diffusion prepared ImageNet.

Its `image_datasets.py` (`center_crop_arr`) halves a picture by boxes of 2 x 2 while the shorter
side is at least twice the wanted one, then resizes bicubically and cuts out the middle. Another
filter gives other high frequencies, and another FID of the same pictures.

Dimension key:  S side of the result
"""

import numpy as np
from PIL import Image


def center_crop(picture: Image.Image, side: int) -> np.ndarray:
    """The middle of a picture whose shorter side was brought to `side` pixels.

    Args:
      picture: of any mode; grayscale, palette and CMYK are converted to RGB first, as there.
      side: S, in pixels.

    Returns:
      uint8 [S, S, 3].
    """
    picture = picture.convert("RGB")
    while min(picture.size) >= 2 * side:
        width, height = picture.size
        picture = picture.resize((width // 2, height // 2), Image.Resampling.BOX)
    scale = side / min(picture.size)
    width, height = (round(length * scale) for length in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return np.asarray(picture.crop((left, top, left + side, top + side)))
