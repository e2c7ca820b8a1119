# SPDX-License-Identifier: Apache-2.0
"""What an evaluation looks at: a model that samples, or pictures that are there already."""

import dataclasses
import hashlib
import pathlib

import numpy as np

from vqjax import io
from vqjax.config import LatentDiffusionConfig
from vqjax.core.model import Model
from vqjax.errors import VqjaxError
from vqjax.eval import judges
from vqjax.eval.judge import Judge
from vqjax.io import image_folder, images, leaves, orbax_model, published, tfds_images
from vqjax.io.image_set import ImageSet

EMBEDDED = "digits"
"""The model in the package."""


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """One side of an evaluation; exactly one of `model` and `pictures` is there.

    Attributes:
      where: as the user named it.
      sha256: of the model's weights and config, or of the pictures' files.
    """

    where: str
    sha256: str
    model: Model | None = None
    pictures: ImageSet | None = None

    @property
    def judge(self) -> Judge | None:
        """What else looks at its samples, where it is a model of small data."""
        return None if self.model is None else judges.of_model(self.model.config)


def open_source(where: str, config: str | None = None) -> Source:
    """Opens a model or a set of pictures.

    Args:
      where: what `vqjax.load` takes, a folder of picture files, or an ADM .npz.
      config: what a checkpoint was trained as, where its shapes do not tell (`vqjax.config.find`).

    Raises:
      VqjaxError: if it is neither, or damaged.
    """
    path = pathlib.Path(where)
    if path.suffix == ".npz" or (path.is_dir() and not _is_model_folder(path)):
        pictures = _open_pictures(path)  # first: it names every file that is no picture
        return Source(where, hash_of_pictures(where), pictures=pictures)
    model = io.load_model(where, config=config)
    arrays, _ = leaves.to_arrays(model.params)
    return Source(where, leaves.content_hash(model.config.to_dict(), arrays), model=model)


def class_ids(config: LatentDiffusionConfig, count: int, seed: int) -> np.ndarray:
    """Class of each sample, int64 [count]; that of sample i depends on the seed and i alone.

    Uniform at random, as the literature draws them: an inception score is taken in splits. Those
    of small data come in turn, since their scores take all samples at once.
    """
    classes = max(config.null_class, 1)
    if judges.of_model(config) is not None:
        return np.arange(count) % classes
    return np.random.default_rng(seed).integers(classes, size=count)


def _is_model_folder(path: pathlib.Path) -> bool:
    return orbax_model.find(path) is not None or (path / "unet").is_dir()


def _open_pictures(path: pathlib.Path) -> ImageSet:
    if path.is_dir() and not any(_is_picture(file) for file in path.iterdir()):
        raise VqjaxError(
            f"{path}: neither a model (run folder, diffusers folder) nor pictures "
            f"({', '.join(image_folder.FORMATS)})"
        )
    return images.open_images(path)


def _is_picture(file: pathlib.Path) -> bool:
    return file.suffix.lower() in image_folder.FORMATS


def hash_of_pictures(where: str) -> str:
    """SHA-256 of a file, or over the names and contents of a folder's picture files.

    Of a dataset, what `tfds_images.fingerprint` says.
    """
    if where.startswith(tfds_images.PREFIX):
        return tfds_images.fingerprint(where)
    path = pathlib.Path(where)
    if not path.is_dir():
        return published.sha256_of(path) if path.exists() else ""  # what opens it says so
    digest = hashlib.sha256()
    for file in sorted(filter(_is_picture, path.iterdir())):
        line = f"{file.name} {published.sha256_of(file)}\n"
        digest.update(line.encode(errors="surrogateescape"))  # names need not be UTF-8
    return digest.hexdigest()
