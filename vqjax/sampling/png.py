# SPDX-License-Identifier: Apache-2.0
"""Pictures on disk: a grid as PNG that carries the parameters it was made with.

Dimension key:  N images   H W C picture
"""

import json
import os
import pathlib
import tempfile
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from vqjax.errors import VqjaxError

CHUNK = "vqjax"
_MAX_SIDE = 2**16 - 1  # beyond it many viewers refuse a PNG
_GAP = 2  # pixels between pictures


def tile(images_NHWC: np.ndarray, columns: int, *, gap: int = _GAP) -> np.ndarray:
    """Lays pictures out row by row on white: uint8 [rows * (H + gap) - gap, ..., C].

    Raises:
      VqjaxError: if there is no picture, the dtype is not uint8 or `columns` is below one.
    """
    if images_NHWC.dtype != np.uint8 or images_NHWC.ndim != 4 or not len(images_NHWC):
        raise VqjaxError(
            f"a grid needs uint8 pictures [N, H, W, 3], found {images_NHWC.dtype} "
            f"{list(images_NHWC.shape)}"
        )
    if columns < 1:
        raise VqjaxError(f"a grid needs at least one column, found {columns}")
    count, height, width, channels = images_NHWC.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    canvas = np.full(
        (rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, np.uint8
    )
    for index, image in enumerate(images_NHWC):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


def check_grid(count: int, columns: int, height: int, width: int) -> None:
    """Says, before pictures are made, that `save_grid` would refuse a grid of them.

    Args:
      height, width: of a picture.

    Raises:
      VqjaxError: naming the size that the grid would have.
    """
    columns = min(columns, count)
    whole = columns * (width + _GAP) - _GAP, -(-count // columns) * (height + _GAP) - _GAP
    if max(whole) > _MAX_SIDE:
        raise VqjaxError(
            f"the grid would be {whole[0]} x {whole[1]} pixels, the limit is {_MAX_SIDE}; choose "
            "another number of columns or fewer pictures"
        )


def save_grid(
    path: str | os.PathLike, images_NHWC: np.ndarray, columns: int, metadata: dict[str, Any]
) -> None:
    """Writes a grid of pictures; the file appears whole or not at all.

    Args:
      path: of the PNG; its folder is made if needed.
      images_NHWC: uint8 [N, H, W, 3].
      columns: pictures per row.
      metadata: generation parameters, anything JSON takes; `read_metadata` gives them back.
    """
    canvas = tile(images_NHWC, columns)
    check_grid(len(images_NHWC), columns, *images_NHWC.shape[1:3])
    info = PngImagePlugin.PngInfo()
    info.add_itxt(CHUNK, json.dumps(metadata, sort_keys=True, ensure_ascii=False))
    info.add_text("Software", "vqjax")
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=".png")
    try:
        with os.fdopen(handle, "wb") as file:
            Image.fromarray(canvas).save(file, format="PNG", pnginfo=info, optimize=True)
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp hides the file from everyone else
        os.replace(temporary, target)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """The parameters that `save_grid` wrote.

    Raises:
      VqjaxError: if the file is no PNG or was not written by vqjax.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = dict(image.text)  # type: ignore[attr-defined]
    except FileNotFoundError:
        raise
    except (OSError, ValueError, SyntaxError) as error:
        raise VqjaxError(f"{path}: not a readable PNG ({error})") from error
    if CHUNK not in text:
        raise VqjaxError(f"{path}: holds no {CHUNK} parameters; it was not written by vqjax")
    return json.loads(text[CHUNK])


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
