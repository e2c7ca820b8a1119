# SPDX-License-Identifier: Apache-2.0
"""What calibration gathered of every layer. Moments are made of it when they are asked for: that of
a convolution takes three times the memory.

Dimension key:  N fan-in of a layer
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

from vqjax.core import row_sums, window_sums
from vqjax.core.moments import Moment
from vqjax.core.row_sums import RowSums
from vqjax.core.window_sums import WindowSums

Sums = RowSums | WindowSums


class Gathered(NamedTuple):
    """Means over what one layer saw, NumPy arrays.

    Attributes:
      whole: over all images.
      held: over the held-out images and the channels that `moments.held_columns` keeps, or None.
      held_share: share of the images that are held out.
    """

    whole: Sums
    held: Sums | None
    held_share: float

    def moment(self) -> Moment:
        """Returns the layer's moment."""
        if self.held is None:
            return Moment(*_moments(self.whole))
        held_NN, held_mean_N = _moments(self.held)
        return Moment(*_moments(self.whole), held_NN, self.held_share, held_mean_N)


class Moments(Mapping[str, Moment]):
    """Moments by kernel path, each made when it is asked for."""

    def __init__(self, gathered: Mapping[str, Gathered]) -> None:
        self._gathered = gathered

    def __getitem__(self, path: str) -> Moment:
        return self._gathered[path].moment()

    def __iter__(self) -> Iterator[str]:
        return iter(self._gathered)

    def __len__(self) -> int:
        return len(self._gathered)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything as named arrays, for storage."""
        arrays = {}
        for path, found in self._gathered.items():
            arrays[f"{path}/held_share"] = np.float64(found.held_share)
            for part, sums in (("whole", found.whole), ("held", found.held)):
                if sums is not None:
                    arrays |= {f"{path}/{part}.{name}": a for name, a in sums._asdict().items()}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Moments":
        """The inverse of `to_arrays`."""
        parts: dict[str, dict[str, dict[str, np.ndarray]]] = {}
        shares: dict[str, float] = {}
        for key, array in arrays.items():
            path, _, name = key.rpartition("/")
            part, _, field = name.rpartition(".")
            if part:
                parts.setdefault(path, {}).setdefault(part, {})[field] = array
            else:
                shares[path] = float(array)
        return cls(
            {
                path: Gathered(
                    _sums_of(of["whole"]),
                    _sums_of(of["held"]) if "held" in of else None,
                    shares[path],
                )
                for path, of in parts.items()
            }
        )


def mean(sums: Sums, count: float) -> Sums:
    """Returns sums over `count` rows' worth as means, NumPy arrays; of `RowSums` all blocks."""
    host = jax.tree.map(np.array, sums)
    if isinstance(host, RowSums):
        row_sums.complete(host.second_NN)
    for array in jax.tree.leaves(host):
        array /= np.float32(count)
    return host


def features(sums: Sums) -> int:
    """N."""
    if isinstance(sums, WindowSums):
        return sums.image_HWC.shape[-1] * window_sums.SIDE**2
    return len(sums.sum_N)


def _moments(sums: Sums) -> tuple[np.ndarray, np.ndarray]:
    return window_sums.moments(sums) if isinstance(sums, WindowSums) else tuple(sums)


def _sums_of(fields: Mapping[str, np.ndarray]) -> Sums:
    kind = RowSums if fields.keys() == set(RowSums._fields) else WindowSums
    return kind(**fields)
