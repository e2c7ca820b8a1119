# SPDX-License-Identifier: Apache-2.0
"""Features of the FID network, kept on disk block by block: on a CPU they take hours.

Dimension key:  N pictures
"""

import pathlib
from collections.abc import Iterator

import safetensors.numpy

from vqjax import progress
from vqjax.core import cores
from vqjax.errors import VqjaxError
from vqjax.eval import adm
from vqjax.io import native
from vqjax.io.image_set import ImageSet
from vqjax.io.inception import Weights

BLOCK = 512  # pictures in one file: 40 seconds of two cores


def look(
    images: ImageSet, weights: Weights, folder: pathlib.Path, title: str, *, block: int = BLOCK
) -> adm.Seen:
    """What the scores need of a set, from the blocks that are there and the pictures of the rest.

    Args:
      folder: belongs to these pictures and this network alone.
      title: for the progress shown.

    Raises:
      VqjaxError: if the pictures, or features that were kept, cannot be read, do not belong
        together or are fewer than two.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, images.count, block)
    paths = [folder / f"{number:05d}.safetensors" for number in range(len(starts))]
    kept = {path for path in paths if path.exists()}
    done = sum(min(block, images.count - s) for s, path in zip(starts, paths) if path in kept)

    def rows() -> Iterator[adm.Rows]:
        # Pictures are not even read where all their features are there.
        complete = len(kept) == len(paths)
        batches = iter(()) if complete else images.batches(block)
        places = {} if complete else cores.placed(weights.params)
        with progress.stage(title, images.count, done=done) as advance:
            for path in paths:
                pictures = next(batches, None)
                if path in kept:
                    yield _kept(path)
                    continue
                assert pictures is not None
                seen = adm.rows_of(pictures, places)
                native.write_atomically(path, safetensors.numpy.save(seen._asdict()))
                advance(len(pictures))
                yield seen

    return adm.gather(rows(), images)


def _kept(path: pathlib.Path) -> adm.Rows:
    try:
        return adm.Rows(**safetensors.numpy.load_file(path))
    except (safetensors.SafetensorError, TypeError) as error:
        raise VqjaxError(
            f"{path}: no features of a block of pictures ({error}); delete it, the same command "
            "makes it again"
        ) from error
