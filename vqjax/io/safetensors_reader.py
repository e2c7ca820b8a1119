# SPDX-License-Identifier: Apache-2.0
"""Tensors of any .safetensors file, read one at a time."""

import functools
import os
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from vqjax.errors import VqjaxError
from vqjax.io.lazy import LazyTensor

_DTYPES = {
    "F64": "f8",
    "F32": "f4",
    "F16": "f2",
    "BF16": "f4",
    "I64": "i8",
    "I32": "i4",
    "BOOL": "?",
}
_OTHER = np.dtype("V1")  # refused by everyone who wants numbers


def open_tensors(path: str | os.PathLike) -> dict[str, LazyTensor]:
    """Returns the tensors by name; bfloat16 is read as float32.

    Raises:
      VqjaxError: if the file is no .safetensors or is cut off.
    """
    try:
        file = safe_open(path, framework="numpy")
        return {name: _lazy(path, file, name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise VqjaxError(
            f"{path}: not a readable .safetensors file ({error}); download it again"
        ) from error


def _lazy(path: str | os.PathLike, file: Any, name: str) -> LazyTensor:
    about = file.get_slice(name)
    dtype = np.dtype(_DTYPES.get(about.get_dtype(), _OTHER))
    return LazyTensor(tuple(about.get_shape()), dtype, functools.partial(_read, path, file, name))


def _read(path: str | os.PathLike, file: Any, name: str) -> np.ndarray:
    try:
        values = file.get_tensor(name)
    except (SafetensorError, OSError, TypeError) as error:
        raise VqjaxError(f"{path}: {name} cannot be read ({error}); download it again") from error
    return values.astype(np.float32) if values.dtype.name == "bfloat16" else values
