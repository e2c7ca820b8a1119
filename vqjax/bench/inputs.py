# SPDX-License-Identifier: Apache-2.0
"""Matrix files: a weight and second moments of its inputs, calibration and held-out.

Dimension key:  O outputs   N fan-in   I images   C input channels   K window side   R rows

Two forms of .npz. Linear: `W` [O, N], `XTX` and `XTX_test` [N, N], each the mean of x x^T.
Convolution: `W` [O, C, K, K], `maps` and `maps_test` [I, C, height, width], the layer's inputs;
a row is then the K x K patch that one output reads, zeros around the edges, stride 1, ordered
(channel, ky, kx).
"""

import dataclasses
import functools
import hashlib
import io
import pathlib
import zipfile

import numpy as np

from vqjax.core import grouping
from vqjax.errors import VqjaxError, gathered

_EXPECTED = "expected W with XTX and XTX_test, or W with maps and maps_test"
_OTHERS = ({"codes", "codebooks", "scales"}, {"weight", "xtx"})
_ASYMMETRY = 1e-3


@dataclasses.dataclass(frozen=True, eq=False)
class Matrix:
    """One matrix file.

    Attributes:
      name: of the file.
      digest: SHA-256 of the file.
      kernel: float32, Linen layout.
      moment_NN, moment_test_NN: float64.
      rows_IRN: calibration inputs image by image, float32; None where the file has moments only.
    """

    name: str
    digest: str
    kernel: np.ndarray
    moment_NN: np.ndarray
    moment_test_NN: np.ndarray
    rows_IRN: np.ndarray | None

    @property
    def window(self) -> int:
        """Side of the convolution's window; 1 for linear layers."""
        return self.kernel.shape[0] if self.kernel.ndim == 4 else 1

    @functools.cached_property
    def w_ON(self) -> np.ndarray:
        """The kernel's matrix view, float64."""
        return grouping.to_matrix(self.kernel).astype(np.float64)

    @functools.cached_property
    def spectrum_N(self) -> np.ndarray:
        """Eigenvalues of the calibration moment."""
        return np.linalg.eigvalsh(self.moment_NN)


def read(folder: pathlib.Path) -> list[Matrix]:
    """Every matrix file in a folder, by name. Results of other programs and fixtures are skipped.

    Raises:
      VqjaxError: if there is none, or a file is not what its keys promise; all such are named.
    """
    if not folder.is_dir():
        raise VqjaxError(f"{folder}: no such folder; give --inputs a folder of matrix files (.npz)")
    matrices, problems = [], []
    for path in sorted(folder.glob("*.npz")):
        try:
            matrix = _read_file(path)
        except VqjaxError as error:
            problems.append(str(error))
        else:
            matrices += [] if matrix is None else [matrix]
    if len(problems) == 1:
        raise VqjaxError(problems[0])
    if problems:
        raise gathered(problems, f"{folder}: {len(problems)} files cannot be used")
    if not matrices:
        found = len(list(folder.iterdir()))
        raise VqjaxError(f"{folder}: no matrix file among {found} entries; {_EXPECTED} in an .npz")
    return matrices


def _read_file(path: pathlib.Path) -> Matrix | None:
    data = path.read_bytes()
    try:
        with np.load(io.BytesIO(data)) as file:
            keys = set(file.files)
            if any(other <= keys for other in _OTHERS):
                return None
            arrays = {name: file[name] for name in keys & _wanted(path, keys)}
    except VqjaxError:
        raise
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise VqjaxError(
            f"{path}: not a readable .npz of numbers ({error}); {_EXPECTED}: write it again with "
            "numpy.savez"
        ) from None
    problems = _problems(arrays)
    if problems:
        raise VqjaxError(f"{path}: {'; '.join(problems)}: write the file again or remove it")
    weight = arrays["W"].astype(np.float32)
    shape = weight.T.shape if weight.ndim == 2 else weight.transpose(2, 3, 1, 0).shape
    kernel = grouping.from_matrix(weight.reshape(len(weight), -1), shape)
    digest = hashlib.sha256(data).hexdigest()
    if "maps" not in arrays:
        seen_NN, held_NN = (_symmetric(arrays[name]) for name in ("XTX", "XTX_test"))
        return Matrix(path.name, digest, kernel, seen_NN, held_NN, None)
    rows_IRN = patches(arrays["maps"], weight.shape[-1])
    test_IRN = patches(arrays["maps_test"], weight.shape[-1])
    return Matrix(path.name, digest, kernel, _moment(rows_IRN), _moment(test_IRN), rows_IRN)


def _wanted(path: pathlib.Path, keys: set[str]) -> set[str]:
    for form in ({"W", "XTX", "XTX_test"}, {"W", "maps", "maps_test"}):
        if form <= keys:
            return form
    raise VqjaxError(
        f"{path}: found {', '.join(sorted(keys)) or 'nothing'}; {_EXPECTED}: add what is missing, "
        "or move the file elsewhere"
    )


def _problems(arrays: dict[str, np.ndarray]) -> list[str]:
    """What is wrong with the arrays of a file that has the right keys."""
    for name, array in sorted(arrays.items()):
        if array.dtype.kind not in "fiu":
            return [f"{name} is of type {array.dtype}, expected real numbers"]
        bad = int(np.sum(~np.isfinite(array)))
        if bad:
            return [f"{name} holds {bad} NaN or infinite values, expected finite ones"]
        if not array.size:
            return [f"{name} has shape {array.shape}, expected at least one number"]
    weight = arrays.pop("W")
    problems = _shape_problems(weight, arrays)
    for name, array in arrays.items():
        if not problems and name.startswith("XTX"):
            gap = np.max(np.abs(array - array.T)) / max(np.max(np.abs(array)), 1e-300)
            if gap > _ASYMMETRY:
                problems.append(f"{name} differs from its transpose by {gap:.2g} of its largest "
                                "entry, expected a symmetric matrix")  # fmt: skip
    arrays["W"] = weight
    return problems


def _shape_problems(weight: np.ndarray, others: dict[str, np.ndarray]) -> list[str]:
    if "maps" in others:
        sides = weight.shape[2:]
        if weight.ndim != 4 or sides[0] != sides[1] or sides[0] % 2 == 0:
            return [f"W has shape {weight.shape}, expected (outputs, channels, k, k), k odd"]
        return [
            f"{name} has shape {array.shape}, expected (images, {weight.shape[1]}, height, width)"
            for name, array in sorted(others.items())
            if array.ndim != 4 or array.shape[1] != weight.shape[1]
        ]
    if weight.ndim != 2:
        return [f"W has shape {weight.shape}, expected (outputs, inputs) beside XTX"]
    square = (weight.shape[1],) * 2
    return [
        f"{name} has shape {array.shape}, expected {square} for W of shape {weight.shape}"
        for name, array in sorted(others.items())
        if array.shape != square
    ]


def patches(maps_ICHW: np.ndarray, window: int) -> np.ndarray:
    """What each output pixel reads: float32 [I, R, N], columns (channel, ky, kx).

    Args:
      maps_ICHW: any real type.
      window: K, odd; zeros are added around the edges so that R = height * width.
    """
    edge = window // 2
    padded = np.pad(maps_ICHW.astype(np.float32), ((0, 0), (0, 0), (edge, edge), (edge, edge)))
    views = np.lib.stride_tricks.sliding_window_view(padded, (window, window), (2, 3))
    images, channels, height, width = maps_ICHW.shape
    return views.transpose(0, 2, 3, 1, 4, 5).reshape(images, height * width, channels * window**2)


def _symmetric(moment_NN: np.ndarray) -> np.ndarray:
    moment_NN = moment_NN.astype(np.float64)
    return (moment_NN + moment_NN.T) / 2


def _moment(rows_IRN: np.ndarray) -> np.ndarray:
    """Mean of x x^T over all rows, float64, one image in memory at a time."""
    total = np.zeros((rows_IRN.shape[-1],) * 2)
    for rows_RN in rows_IRN:
        total += rows_RN.astype(np.float64).T @ rows_RN.astype(np.float64)
    return total / (rows_IRN.shape[0] * rows_IRN.shape[1])
