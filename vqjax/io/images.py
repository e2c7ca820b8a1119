# SPDX-License-Identifier: Apache-2.0
"""Pictures to be scored, from whatever holds them."""

import os
import pathlib

from vqjax.errors import VqjaxError
from vqjax.io import adm_npz, image_folder, tfds_images
from vqjax.io.image_set import ImageSet


def open_images(path: str | os.PathLike) -> ImageSet:
    """Opens an ADM batch (.npz), a folder of picture files, or "tfds:NAME", a prepared dataset.

    Raises:
      VqjaxError: if it is none of them; else as `adm_npz.open_npz`, `image_folder.open_folder` or
        `tfds_images.open_dataset` say.
    """
    if str(path).startswith(tfds_images.PREFIX):
        return tfds_images.open_dataset(str(path))
    path = pathlib.Path(path)
    if path.is_dir():
        return image_folder.open_folder(path)
    if path.suffix == ".npz":
        return adm_npz.open_npz(path)
    if not path.exists():
        raise VqjaxError(f"{path}: no such file or folder")
    raise VqjaxError(
        f"{path}: expected an .npz file with arr_0 or a folder of pictures, "
        f"or {tfds_images.PREFIX}NAME"
    )
