# SPDX-License-Identifier: Apache-2.0
"""Batches of pictures as guided-diffusion's evaluator takes them: one .npz, streamed.

`arr_0` holds uint8 pictures [N, H, W, 3], `arr_1` labels [N] if there are any. A reference batch
such as `VIRTUAL_imagenet256_labeled.npz` also holds `mu`, `sigma`, `mu_s`, `sigma_s`: statistics of
the whole training set, which stand in for those of its pictures.

Dimension key:  N pictures   H W rows and columns   B batch
"""

import contextlib
import lzma
import math
import os
import pathlib
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from typing import IO

import numpy as np
from numpy.lib import format as npy

from vqjax.errors import VqjaxError, gathered
from vqjax.io.image_set import ImageSet, Statistics, check_shape

IMAGES, LABELS = "arr_0", "arr_1"
_SYMMETRY = 1e-5  # relative: sigma may have been stored in float32
_DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    # By headers, which NumPy reads as Python.
    tokenize.TokenError,
    MemoryError,
)


def open_npz(path: str | os.PathLike) -> ImageSet:
    """Reads headers, labels and statistics; pictures are read when they are asked for.

    Raises:
      VqjaxError: if it is no .npz or damaged, lacks `arr_0`, has one of the statistics but not all,
        or an array has the wrong dtype or shape. Nothing is unpickled.
    """
    path = pathlib.Path(path)
    with _readable(path), zipfile.ZipFile(path) as archive:
        members = archive.namelist()
        names = {name.removesuffix(".npy") for name in members if name.endswith(".npy")}
        if IMAGES not in names:
            raise VqjaxError(
                f"{path}: holds {', '.join(sorted(members)[:8]) or 'nothing'}, expected "
                f"{IMAGES}.npy (uint8 pictures [N, H, W, 3]); save it with numpy.savez(file, "
                "images, labels)"
            )
        with archive.open(f"{IMAGES}.npy") as member:
            shape, dtype = _header(member, f"{path}: {IMAGES}")
        check_shape(shape, dtype, f"{path}: {IMAGES}")
        labels = _labels(archive, path, shape[0]) if LABELS in names else None
        statistics = _statistics(archive, path, names)

    def batches(size: int) -> Iterator[np.ndarray]:
        with (
            _readable(path),
            zipfile.ZipFile(path) as again,
            again.open(f"{IMAGES}.npy") as member,
        ):
            yield from _batches(member, shape, size, path)

    return ImageSet(str(path), shape[0], (shape[1], shape[2]), batches, labels, statistics)


def save_npz(
    path: str | os.PathLike,
    batches: Iterable[np.ndarray],
    *,
    count: int,
    labels_N: np.ndarray | None = None,
) -> None:
    """Writes pictures as they arrive; the file appears whole or not at all.

    Args:
      path: ends in .npz; its folder is made if needed.
      batches: uint8 [B, H, W, 3] each, all of one size.
      count: pictures in all: the header comes before them.
      labels_N: integer [count].

    Raises:
      VqjaxError: if a batch has another size or dtype, or the counts do not agree.
    """
    path = pathlib.Path(path)
    if labels_N is not None and labels_N.shape != (count,):
        raise VqjaxError(f"{path}: {count} pictures, labels of shape {labels_N.shape}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with zipfile.ZipFile(temporary, "w") as archive:
            with archive.open(f"{IMAGES}.npy", "w", force_zip64=True) as member:
                _write_batches(member, batches, count, path)
            if labels_N is not None:
                with archive.open(f"{LABELS}.npy", "w") as member:
                    npy.write_array(member, labels_N, allow_pickle=False)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write_batches(
    member: IO[bytes], batches: Iterable[np.ndarray], count: int, path: pathlib.Path
) -> None:
    size, written = None, 0
    for batch in batches:
        check_shape(batch.shape, batch.dtype, str(path))
        if size is None:
            size = batch.shape[1:]
            about = {"descr": "|u1", "fortran_order": False, "shape": (count, *size)}
            npy.write_array_header_1_0(member, about)
        if batch.shape[1:] != size:
            raise VqjaxError(f"{path}: pictures of sizes {size} and {batch.shape[1:]}")
        member.write(np.ascontiguousarray(batch).data)
        written += len(batch)
    if written != count or size is None:
        raise VqjaxError(f"{path}: {count} pictures were announced, {written} came")


@contextlib.contextmanager
def _readable(path: pathlib.Path) -> Iterator[None]:
    """Turns what a damaged or missing file raises into one sentence."""
    try:
        yield
    except FileNotFoundError as error:
        raise VqjaxError(f"{path}: no such file") from error
    except VqjaxError:
        raise
    except _DAMAGE as error:
        raise VqjaxError(f"{path}: not a readable .npz file ({error}); save it again") from error


def _header(member: IO[bytes], where: str) -> tuple[tuple[int, ...], np.dtype]:
    version = npy.read_magic(member)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(member)
    if (fortran and len(shape) > 1) or dtype.hasobject:
        raise VqjaxError(f"{where}: objects or columns-first order; save a plain C-ordered array")
    return shape, dtype


def _batches(
    member: IO[bytes], shape: tuple[int, ...], size: int, path: pathlib.Path
) -> Iterator[np.ndarray]:
    _header(member, str(path))
    for start in range(0, shape[0], size):
        batch = (min(size, shape[0] - start), *shape[1:])
        data = member.read(math.prod(batch))
        if len(data) < math.prod(batch):
            raise VqjaxError(f"{path}: {IMAGES} ends before picture {shape[0]}; save it again")
        yield np.frombuffer(data, np.uint8).reshape(batch)


def _array(
    archive: zipfile.ZipFile,
    path: pathlib.Path,
    name: str,
    shape: tuple[int | str, ...],
    kinds: str,
) -> np.ndarray:
    """A small array, read whole once its header fits: a letter in `shape` is any one length."""
    with archive.open(f"{name}.npy") as member:
        found, dtype = _header(member, f"{path}: {name}")
        lengths = dict(zip(shape, found))
        fits = len(found) == len(shape) and tuple(lengths[want] for want in shape) == found
        fits = fits and all(lengths[want] == want for want in shape if isinstance(want, int))
        if not fits or dtype.kind not in kinds:
            kind = "integers" if "i" in kinds else "floating point"
            raise VqjaxError(
                f"{path}: {name} is {dtype} {list(found)}, expected {kind} "
                f"[{', '.join(map(str, shape))}]"
            )
        data = member.read(math.prod(found) * dtype.itemsize)
        return np.frombuffer(data, dtype).reshape(found)


def _labels(archive: zipfile.ZipFile, path: pathlib.Path, count: int) -> np.ndarray:
    return _array(archive, path, LABELS, (count,), "iu").astype(np.int64)


def _statistics(archive: zipfile.ZipFile, path: pathlib.Path, names: set[str]) -> Statistics | None:
    fields = Statistics._fields
    if not names & set(fields):
        return None
    problems = [f"{name}: missing" for name in fields if name not in names]
    found = {}
    for mean, covariance in (fields[:2], fields[2:]):
        size: int | str = "D"
        for name, axes in ((mean, 1), (covariance, 2)):
            if name in names:
                shape = (size,) * axes
                found[name] = _array(archive, path, name, shape, "f").astype(np.float64)
                size = len(found[name])  # the covariance is large: what does not fit is not read
                if not np.isfinite(found[name]).all():
                    problems.append(f"{name}: NaN or infinite values")
        if {mean, covariance} <= found.keys():
            problems += _misfits(mean, found[mean], covariance, found[covariance])
    if problems:
        raise gathered(problems, f"{path}: the stored statistics do not serve; leave them out or:")
    return Statistics(**found)


def _misfits(mean: str, mu: np.ndarray, covariance: str, sigma: np.ndarray) -> list[str]:
    if not np.allclose(sigma, sigma.T, rtol=0, atol=_SYMMETRY * max(np.abs(sigma).max(), 1e-300)):
        return [f"{covariance}: not symmetric"]
    if (np.diag(sigma) < 0).any():
        return [f"{covariance}: negative variances"]
    return []
