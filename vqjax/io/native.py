# SPDX-License-Identifier: Apache-2.0
"""Our single-file format: one .safetensors with packed codes and a JSON document (docs/format.md).

The document is one metadata entry, because the library writes several in an order that differs from
run to run, and equal models shall give equal files.
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors import numpy as safetensors_numpy

from vqjax.core.model import Model
from vqjax.errors import VqjaxError
from vqjax.io import leaves

METADATA_KEY = "vqjax"
VERSION = 1


def save_model(
    path: str | os.PathLike,
    model: Model,
    extra_metadata: Mapping[str, Any] | None = None,
) -> int:
    """Writes `model` as one file, whole or not at all. Equal models give equal bytes.

    Args:
      path: replaced if it exists; its folder must exist.
      model: dense weights in float16 or float32, stored in the type they come in.
      extra_metadata: JSON values kept beside ours, for example `plan`.

    Returns:
      The size of the file in bytes.

    Raises:
      VqjaxError: if a weight has another type, or a name in `extra_metadata` is one of ours.
    """
    arrays, document = leaves.of_model(model)
    document = {"version": VERSION, **document}
    taken = sorted({*document, "activations", "sha256"} & set(extra_metadata or {}))
    if taken:
        raise VqjaxError(f"extra_metadata uses the names {taken}, which the format needs; rename")
    document |= dict(extra_metadata or {})
    document["sha256"] = leaves.content_hash(document, arrays)
    text = json.dumps(document, sort_keys=True)
    data = safetensors_numpy.save(arrays, metadata={METADATA_KEY: text})
    write_atomically(path, data)
    return len(data)


def load(path: str | os.PathLike) -> Model:
    """Reads what `save_model` wrote: the same leaves in the same types, codes still packed.

    Raises:
      VqjaxError: if the file is not ours, is damaged, or does not fit its own config.
    """
    document = metadata(path)
    if document is None:
        raise VqjaxError(f"{path}: no {METADATA_KEY!r} metadata, so no model that vqjax exported")
    if document.get("version") != VERSION:
        raise VqjaxError(
            f"{path}: format version {document.get('version')!r}, this vqjax reads {VERSION}; "
            f"use the vqjax that wrote it, or export again"
        )
    try:
        arrays = safetensors_numpy.load_file(path)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise VqjaxError(f"{path}: damaged ({error}); export or download it again") from error
    if document.get("sha256") != leaves.content_hash(document, arrays):
        raise VqjaxError(
            f"{path}: damaged (content does not match its SHA-256); export or download it again"
        )
    return leaves.from_arrays(arrays, document, where=str(path))


def metadata(path: str | os.PathLike) -> dict[str, Any] | None:
    """Returns the JSON document of a file of ours, or None for any other .safetensors.

    Raises:
      VqjaxError: if the file is no .safetensors, or its document cannot be read.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
    except (SafetensorError, OSError) as error:
        raise VqjaxError(
            f"{path}: not a readable .safetensors file ({error}); download or export it again"
        ) from error
    if text is None:
        return None
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise VqjaxError(f"{path}: its {METADATA_KEY!r} metadata is not JSON ({error})") from error
    if not (
        isinstance(document, dict)
        and isinstance(document.get("config"), dict)
        and isinstance(document.get("quantized"), dict)
    ):
        raise VqjaxError(f"{path}: its {METADATA_KEY!r} metadata lacks config or quantized")
    return document


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Writes beside `path`, flushes to disk, renames: a killed process leaves the old file."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise VqjaxError(f"{path}: cannot write ({error}); choose another place") from error
