# SPDX-License-Identifier: Apache-2.0
"""The pictures behind the texture benchmark: crops of nine photographs that scikit-image carries.

Each is in the public domain or under CC0, by what scikit-image's documentation of it says; those
without such a statement (immunohistochemistry, motorcycle) are left out. A class is a photograph.
Cells of 96 x 96 pixels alternate like a checkerboard between the two halves, and a crop lies
within one cell, so that no pixel is in both. The benchmark tells how well textures of known
pictures are reproduced, high frequencies above all; crops of one picture are alike, and say nothing
about others.

Dimension key:  N crops   H W rows and columns   S side of a crop (32)
"""

import functools
import hashlib
import importlib.util
import pathlib
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from vqjax.errors import VqjaxError
from vqjax.io.halves import Halves

IMAGE_SIZE = 32
CELL = 96
PER_CLASS = 300
"""Crops of each class in each half, where nobody says how many."""
Half = Literal["train", "held"]


class Photograph(NamedTuple):
    """A file of scikit-image.

    Attributes:
      file: its name.
      licence: as scikit-image states it.
      sha256: how the file's hash begins; another file would be another benchmark.
    """

    file: str
    licence: str
    sha256: str


PHOTOGRAPHS = (
    Photograph("astronaut.png", "public domain (NASA)", "88431cd9653ccd53"),
    Photograph("brick.png", "CC0", "7966caf324f6ba84"),
    Photograph("chelsea.png", "CC0", "596aa1e7cb875eb7"),
    Photograph("coffee.png", "CC0", "cc02f8ca188b167c"),
    Photograph("grass.png", "CC0", "b6b6022426b38936"),
    Photograph("gravel.png", "CC0", "c48615b451bf1e60"),
    Photograph("hubble_deep_field.jpg", "public domain (NASA)", "3a19c5dd8a927a93"),
    Photograph("retina.jpg", "CC0", "38a07f36f27f095e"),
    Photograph("rocket.jpg", "public domain (SpaceX)", "c2dd0de7c538df8d"),
)
CLASSES = len(PHOTOGRAPHS)


@functools.cache
def load() -> Halves:
    """`PER_CLASS` crops of every class in each half.

    Raises:
      VqjaxError: as `photographs` does.
    """
    return Halves(*crops("train", PER_CLASS), *crops("held", PER_CLASS))


def crops(half: Half, count: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Crops at random places of one half, the same number of each class, classes in turn.

    Places follow from hashes, so that they do not depend on the generator of any numpy version.

    Args:
      count: of each class.
      seed: another one gives other places.

    Returns:
      uint8 [count * 9, 32, 32, 3] and int32 [count * 9].

    Raises:
      VqjaxError: as `photographs` does.
    """
    found_NHWC = np.empty((count, CLASSES, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for label, pixels_HWC in enumerate(photographs()):
        places = _places(pixels_HWC.shape[0], pixels_HWC.shape[1], half)
        for number in range(count):
            text = f"{seed}:{half}:{PHOTOGRAPHS[label].file}:{number}"
            drawn = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
            top, left = places[drawn % len(places)]
            found_NHWC[number, label] = pixels_HWC[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]
    labels_N = np.tile(np.arange(CLASSES, dtype=np.int32), count)
    return found_NHWC.reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 3), labels_N


@functools.cache
def photographs() -> tuple[np.ndarray, ...]:
    """The pictures, uint8 [H, W, 3] each; gray ones have three equal channels.

    Files are read as they lie in the package: nothing is downloaded, and it is not imported.

    Raises:
      VqjaxError: if scikit-image is not installed, or carries another file or none of that name.
    """
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise VqjaxError(
            "the texture benchmark is made of pictures in scikit-image, which is not installed; "
            "pip install 'vqjax[textures]'"
        )
    folder = pathlib.Path(spec.submodule_search_locations[0]) / "data"
    return tuple(_read(folder / photograph.file, photograph) for photograph in PHOTOGRAPHS)


def _read(path: pathlib.Path, photograph: Photograph) -> np.ndarray:
    advice = "the benchmark was defined with scikit-image 0.26; pip install 'scikit-image==0.26.*'"
    if not path.exists():
        raise VqjaxError(f"{path}: not in this version of scikit-image; {advice}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if not found.startswith(photograph.sha256):
        raise VqjaxError(
            f"{path}: sha256 {found[: len(photograph.sha256)]}, expected {photograph.sha256}: "
            f"another picture, whose scores would not compare; {advice}"
        )
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


@functools.cache
def _places(height: int, width: int, half: Half) -> list[tuple[int, int]]:
    """Top left corners of all crops that lie within one cell of a half."""
    rows, columns = (
        [i for i in range(side - IMAGE_SIZE + 1) if _fits(i)] for side in (height, width)
    )
    parity = 0 if half == "train" else 1
    return [(i, j) for i in rows for j in columns if (i // CELL + j // CELL) % 2 == parity]


def _fits(start: int) -> bool:
    return start // CELL == (start + IMAGE_SIZE - 1) // CELL
