# SPDX-License-Identifier: Apache-2.0
"""Tensors of a file to the parameters of a table; what does not fit is said, not guessed."""

import os
import pathlib
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from vqjax.errors import VqjaxError, gathered
from vqjax.io import leaves, safetensors_reader, torch_pickle
from vqjax.io.keys import KeyEntry
from vqjax.io.lazy import LazyTensor


def open_tensors(path: str | os.PathLike) -> dict[str, LazyTensor]:
    """The tensors of a .safetensors file or of a PyTorch checkpoint (both containers), by key.

    Raises:
      VqjaxError: if there is no such file or it is neither.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise VqjaxError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return safetensors_reader.open_tensors(path)
    return torch_pickle.load_tensors(path)


def read_parameter(
    tensor: LazyTensor | None, entry: KeyEntry
) -> tuple[np.ndarray | None, list[str]]:
    """The parameter float32 in our layout, or what is wrong with the tensor."""
    if tensor is None:
        return None, ["missing"]
    misfits = []
    if tensor.shape != entry.shape:
        misfits.append(f"shape {tensor.shape}, expected {entry.shape}")
    if tensor.dtype.kind != "f":
        misfits.append(f"type {tensor.dtype}, expected floating point")
    if misfits:
        return None, misfits
    with np.errstate(over="ignore"):  # a double beyond float32 becomes infinite, and is reported
        values = tensor.read().astype(np.float32, copy=False)
    misfits = leaves.not_finite(values)
    return None if misfits else entry.to_param(values), misfits


def read_all(
    tensors: Mapping[str, LazyTensor],
    entries: Iterable[KeyEntry],
    *,
    ignored: Callable[[str], object],
    heading: str,
) -> dict[str, np.ndarray]:
    """Every parameter by path.

    Args:
      tensors: by key.
      entries: what is needed; the table is complete.
      ignored: says of a key outside the table whether it may be there.
      heading: of the error: names the file and what to do.

    Raises:
      VqjaxError: lists every missing, unknown, misshapen, mistyped and non-finite tensor.
    """
    entries = list(entries)
    known = {entry.key for entry in entries}
    problems = [f"{key}: unknown" for key in tensors if key not in known and not ignored(key)]
    params = {}
    for entry in entries:
        found, misfits = read_parameter(tensors.get(entry.key), entry)
        if found is not None:
            params[entry.path] = found
        problems += [f"{entry.key}: {misfit}" for misfit in misfits]
    if problems:
        raise gathered(problems, heading)
    return params
