# SPDX-License-Identifier: Apache-2.0
"""A folder of picture files as a set of one size; every file that does not fit is named at once.

Dimension key:  N pictures   H W rows and columns
"""

import collections
import os
import pathlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from vqjax.errors import VqjaxError, gathered
from vqjax.io.image_set import ImageSet

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".bmp": "BMP", ".webp": "WEBP"}
_PNG_DEPTH_AT = 24  # byte of a PNG file: bits per sample, in the IHDR chunk


def open_folder(path: str | os.PathLike) -> ImageSet:
    """Reads the header of every picture directly in the folder; pixels are read when asked for.

    Files are taken in the order of their names; other kinds of files are passed over.

    Raises:
      VqjaxError: if there is no picture; lists every file that is not 8-bit RGB, has another size
        than most, or cannot be read. Converting silently would change the scores.
    """
    path = pathlib.Path(path)
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in FORMATS)
    if not files:
        raise VqjaxError(f"{path}: no pictures ({', '.join(FORMATS)}) in this folder")
    sizes, problems = {}, []
    for file in files:
        try:
            sizes[file] = _header(file)
        except VqjaxError as error:
            problems.append(f"{file.name}: {error}")
    counts = collections.Counter(sizes.values())
    width, height = counts.most_common(1)[0][0] if counts else (0, 0)
    for file, size in sizes.items():
        if size != (width, height):
            problems.append(f"{file.name}: {size[0]} x {size[1]}, most are {width} x {height}")
    if problems:
        raise gathered(problems, f"{path}: pictures must be 8-bit RGB of one size; convert these:")

    def batches(size: int) -> Iterator[np.ndarray]:
        for start in range(0, len(files), size):
            yield np.stack([_pixels(file) for file in files[start : start + size]])

    return ImageSet(str(path), len(files), (height, width), batches)


def _header(file: pathlib.Path) -> tuple[int, int]:
    """(width, height) of an 8-bit RGB picture."""
    try:
        with Image.open(file, formats=[FORMATS[file.suffix.lower()]]) as image:
            mode, size = image.mode, image.size
            frames, transparent = getattr(image, "n_frames", 1), "transparency" in image.info
        with open(file, "rb") as raw:
            start = raw.read(_PNG_DEPTH_AT + 1)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise VqjaxError(f"cannot be read ({error})") from error
    # Pillow reads a PNG of 16 bits per sample as if it had 8, and calls it RGB.
    if (start.startswith(b"\x89PNG") and start[_PNG_DEPTH_AT] == 16) or mode.startswith("I;16"):
        raise VqjaxError("16 bits per sample")
    if start.startswith(b"\x89PNG") and start[_PNG_DEPTH_AT - 12 : _PNG_DEPTH_AT - 8] != b"IHDR":
        raise VqjaxError("a PNG file whose header does not come first")
    if frames > 1:
        raise VqjaxError(f"{frames} pictures in one file")
    if mode == "RGB" and transparent:
        raise VqjaxError("a color that stands for transparent")
    if mode != "RGB":
        names = {"L": "grayscale", "1": "black and white", "P": "palette", "RGBA": "with alpha"}
        raise VqjaxError(f"{names.get(mode, 'not RGB')} (mode {mode})")
    return size


def _pixels(file: pathlib.Path) -> np.ndarray:
    try:
        with Image.open(file, formats=[FORMATS[file.suffix.lower()]]) as image:
            return np.asarray(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise VqjaxError(f"{file}: cannot be read ({error}); make it again") from error
