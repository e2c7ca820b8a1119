# SPDX-License-Identifier: Apache-2.0
"""Pictures of a dataset that the user has prepared with tensorflow-datasets; nothing is downloaded.

    tfds:NAME[/CONFIG][:VERSION][?split=SPLIT][&size=SIDE]

Files in the array_record format are read without TensorFlow, those in its older tfrecord format by
TensorFlow where that is installed. Either way Pillow decodes the pictures, so that the pixels do
not depend on the path. The folder is what the package says: `TFDS_DATA_DIR`, else
`~/tensorflow_datasets`.

Dimension key:  N pictures   S side of a picture that was cropped
"""

import dataclasses
import hashlib
import importlib.util
import io
import pathlib
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from vqjax.errors import VqjaxError
from vqjax.io import adm_crop
from vqjax.io.image_set import ImageSet

PREFIX = "tfds:"
SPLIT = "train"
SIDE = 256
"""Of pictures whose dataset has several sizes, unless `size` says otherwise."""
MANIFOLD = 10_000
"""Pictures that precision and recall look at, as many as the published ImageNet reference holds."""
_SYNTAX = f"{PREFIX}NAME[/CONFIG][:VERSION][?split=SPLIT][&size=SIDE]"


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a name asks for.

    Attributes:
      name: as `tfds.builder` takes it.
      split: such as "train" or "train[:10000]".
      side: pixels, or None where only datasets of several sizes are cropped.
    """

    name: str
    split: str
    side: int | None


@dataclasses.dataclass(frozen=True, eq=False)
class _Dataset:
    """What was found: the package, the builder, and the picture among its features."""

    where: str
    wanted: Wanted
    tfds: Any
    builder: Any
    feature: str
    side: int | None


def parse(where: str) -> Wanted:
    """Takes a name apart.

    Raises:
      VqjaxError: if it has another form, an unknown option, or a size that is none.
    """
    name, _, query = where.removeprefix(PREFIX).partition("?")
    # Not parse_qsl, which reads the + of "train+validation" as a space.
    parts = [part.partition("=") for part in query.split("&") if part]
    options = {option: urllib.parse.unquote(value) for option, _, value in parts}
    unknown = sorted(options.keys() - {"split", "size"})
    if not name or unknown or (query and not options) or "" in options.values():
        raise VqjaxError(f"{where}: expected {_SYNTAX}, quoted for the shell")
    size = options.get("size")
    if size is not None and not (size.isdecimal() and int(size) > 0):
        raise VqjaxError(f"{where}: size={size}, expected pixels, such as {SIDE}")
    return Wanted(name, options.get("split", SPLIT), None if size is None else int(size))


def open_dataset(where: str) -> ImageSet:
    """Opens a prepared dataset; pictures are read and decoded when they are asked for.

    Pictures of a dataset that has one size stay as they are; those of others, such as ImageNet, and
    all of them where `size` is given, are cropped by `adm_crop.center_crop`.

    Raises:
      VqjaxError: if the package, the dataset or the split is not there, the dataset has no 8-bit
        RGB picture, or its files need TensorFlow and that is not there.
    """
    dataset = _find(where)
    records, count = _records(dataset)
    height, width = dataset.builder.info.features[dataset.feature].shape[:2]
    if dataset.side is not None:
        height = width = dataset.side

    def batches(size: int) -> Iterator[np.ndarray]:
        waiting = []
        for number, record in enumerate(records()):
            waiting.append(_pixels(record[dataset.feature], dataset, number))
            if len(waiting) == size:
                yield np.stack(waiting)
                waiting = []
        if waiting:
            yield np.stack(waiting)

    manifold = MANIFOLD if count > MANIFOLD else None
    return ImageSet(where, count, (height, width), batches, manifold=manifold)


def fingerprint(where: str) -> str:
    """SHA-256 that stands for the pictures: of what is asked for and of the dataset's own record.

    `dataset_info.json` holds version, sizes and checksums; hashing the files of ImageNet itself
    would take as long as reading it.

    Raises:
      VqjaxError: as `open_dataset` does.
    """
    dataset = _find(where)
    record = pathlib.Path(dataset.builder.data_dir) / "dataset_info.json"
    asked = repr((dataset.builder.info.full_name, dataset.wanted.split, dataset.side))
    return hashlib.sha256(asked.encode() + record.read_bytes()).hexdigest()


def _find(where: str) -> _Dataset:
    wanted = parse(where)
    try:
        import tensorflow_datasets as tfds  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise VqjaxError(
            f"{where} is read by tensorflow-datasets, which cannot be imported ({error}); "
            f"pip install 'vqjax[tfds]'"
        ) from error
    try:
        builder = tfds.builder(wanted.name)
    except Exception as error:  # the package raises many kinds, some of them only of its parts
        raise VqjaxError(
            f"{where}: tensorflow-datasets knows no {wanted.name!r} "
            f"({type(error).__name__}: {_first_line(error)}); prepared ones are looked for in "
            f"TFDS_DATA_DIR, or ~/tensorflow_datasets"
        ) from error
    splits = builder.info.splits
    if not (pathlib.Path(builder.data_dir) / "dataset_info.json").exists() or not splits:
        raise VqjaxError(
            f"{where}: not prepared in {builder.data_dir}, and nothing is downloaded here; prepare "
            f"it once: tfds.builder({wanted.name!r}, file_format='array_record')"
            f".download_and_prepare(), or set TFDS_DATA_DIR"
        )
    feature = _picture_feature(where, tfds, builder.info.features)
    # None in the shape: the pictures have several sizes.
    several = None in builder.info.features[feature].shape
    side = SIDE if several and wanted.side is None else wanted.side
    return _Dataset(where, wanted, tfds, builder, feature, side)


def _picture_feature(where: str, tfds: Any, features: Any) -> str:
    """The feature named image, else the only picture there is."""
    named = {name: f for name, f in features.items() if isinstance(f, tfds.features.Image)}
    chosen = "image" if "image" in named else next(iter(named), "")
    if not chosen or (chosen != "image" and len(named) > 1):
        raise VqjaxError(
            f"{where}: expected one picture per example, or one named image; its features are "
            f"{', '.join(sorted(features))}"
        )
    feature = named[chosen]
    if feature.shape[-1] != 3 or np.dtype(feature.np_dtype) != np.uint8:
        raise VqjaxError(
            f"{where}: pictures {list(feature.shape)} of {np.dtype(feature.np_dtype)}; scores need "
            f"8-bit RGB, [height, width, 3] of uint8"
        )
    return chosen


def _records(dataset: _Dataset) -> tuple[Callable[[], Iterator[Any]], int]:
    """What starts to read all examples, pictures still encoded, and how many there are."""
    where, split, builder = dataset.where, dataset.wanted.split, dataset.builder
    try:
        count = builder.info.splits[split].num_examples
    except Exception as error:  # an unknown name, or bad slicing
        raise VqjaxError(
            f"{where}: no split {split!r} ({_first_line(error)}); there are "
            f"{', '.join(builder.info.splits)}, and slices such as {SPLIT}[:10000]"
        ) from error
    decoders = {dataset.feature: dataset.tfds.decode.SkipDecoding()}
    try:
        source = builder.as_data_source(split=split, decoders=decoders)
    except ImportError as error:
        raise VqjaxError(
            f"{where}: array_record files need the package array-record ({error}); "
            f"pip install 'vqjax[tfds]'"
        ) from error
    except NotImplementedError as error:
        if importlib.util.find_spec("tensorflow") is None:
            raise VqjaxError(
                f"{where}: prepared as {builder.info.file_format.value}, which only TensorFlow "
                f"reads; pip install tensorflow-cpu, or prepare it again with "
                f"file_format='array_record'"
            ) from error
        read = builder.as_dataset(split=split, decoders=decoders, shuffle_files=False)
        return lambda: iter(dataset.tfds.as_numpy(read)), count
    return lambda: (source[number] for number in range(len(source))), count


def _pixels(encoded: bytes, dataset: _Dataset, number: int) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(encoded)) as picture:
            if dataset.side is not None:
                return adm_crop.center_crop(picture, dataset.side)
            return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise VqjaxError(
            f"{dataset.where}: picture {number} cannot be read ({error}); prepare the dataset again"
        ) from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")
