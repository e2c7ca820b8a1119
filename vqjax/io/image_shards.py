# SPDX-License-Identifier: Apache-2.0
"""Sampled pictures in many small files, so that a killed run loses one batch at most.

`images-00042.npy` holds uint8 pictures [B, H, W, 3], `latents-00042.npy` their latents. Latents are
written first: where the pictures are, the shard is whole.

Dimension key:  N pictures   B of one shard   H W picture   h w c latent
"""

import dataclasses
import io
import pathlib
from collections.abc import Iterator

import numpy as np

from vqjax.errors import VqjaxError
from vqjax.io import native
from vqjax.io.image_set import ImageSet


@dataclasses.dataclass(frozen=True)
class Shards:
    """A folder of shards, finished or not.

    Attributes:
      folder: its path.
      count: N pictures in all.
      shard: B pictures in each file; the last may have fewer.
      size: (H, W).
    """

    folder: pathlib.Path
    count: int
    shard: int
    size: tuple[int, int]

    @property
    def numbers(self) -> range:
        """Of all shards."""
        return range(-(-self.count // self.shard))

    def pictures_of(self, number: int) -> range:
        """Numbers of the pictures in one shard."""
        start = number * self.shard
        return range(start, min(start + self.shard, self.count))

    def missing(self) -> list[int]:
        """Numbers of the shards that are not there yet."""
        names = "images", "latents"
        return [n for n in self.numbers if not all(self._path(name, n).exists() for name in names)]

    def write(self, number: int, images_BHWC: np.ndarray, latents_BHWC: np.ndarray) -> None:
        """Writes one shard, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, array in (("latents", latents_BHWC), ("images", images_BHWC)):
            data = io.BytesIO()
            np.save(data, array, allow_pickle=False)
            native.write_atomically(self._path(name, number), data.getvalue())

    def latents(self) -> Iterator[np.ndarray]:
        """float32 [B, h, w, c] of each shard in turn."""
        return (self._read("latents", number) for number in self.numbers)

    def image_set(self, where: str, labels_N: np.ndarray | None) -> ImageSet:
        """The pictures as a set that is read from disk when it is asked for."""
        return ImageSet(where, self.count, self.size, self._batches, labels_N)

    def _batches(self, size: int) -> Iterator[np.ndarray]:
        waiting = np.empty((0, *self.size, 3), np.uint8)
        for number in self.numbers:
            waiting = np.concatenate([waiting, self._read("images", number)])
            while len(waiting) >= size:
                yield waiting[:size]
                waiting = waiting[size:]
        if len(waiting):
            yield waiting

    def _read(self, name: str, number: int) -> np.ndarray:
        path = self._path(name, number)
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise VqjaxError(
                f"{path}: unreadable ({error}); delete it, the same command samples it again"
            ) from error
        expected = len(self.pictures_of(number)), *(self.size if name == "images" else ())
        kinds = {"images": np.uint8, "latents": np.float32}
        if array.shape[: len(expected)] != expected or array.dtype != kinds[name]:
            raise VqjaxError(
                f"{path}: {array.dtype} {list(array.shape)}, expected {np.dtype(kinds[name])} "
                f"{list(expected)} and channels; delete it, the same command samples it again"
            )
        return array

    def _path(self, name: str, number: int) -> pathlib.Path:
        return self.folder / f"{name}-{number:05d}.npy"
