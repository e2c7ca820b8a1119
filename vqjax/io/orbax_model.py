# SPDX-License-Identifier: Apache-2.0
"""A model as an Orbax checkpoint, the `model/` of a run folder: quantized weights stay packed.

Two items: `params`, the tree with the arrays of `leaves.tensor_arrays` where a weight is quantized,
and `model`, a JSON document with the config and what is quantized how. Equal models give equal
bytes:
arrays are saved as files of their own, as numpy arrays (Orbax records the device of others), and
what Orbax notes about time and place of the writing is replaced.
"""

import contextlib
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from vqjax.core import tree
from vqjax.core.model import Model
from vqjax.errors import VqjaxError
from vqjax.io import leaves

VERSION = 1
_DONE = "commit_success.txt"
_METADATA = "_CHECKPOINT_METADATA"


def find(path: pathlib.Path) -> pathlib.Path | None:
    """The model folder of a run folder, `path` itself if it is a model folder, else None."""
    for folder in (path / "model", path):
        if (folder / "params").is_dir() and (folder / "model").is_dir():
            return folder
    return None


def save_model_folder(path: str | os.PathLike, model: Model) -> None:
    """Writes `model` as a folder, whole or not at all; an existing one is replaced.

    Raises:
      VqjaxError: if a dense weight is neither float16 nor float32, or the disk refuses.
    """
    path = pathlib.Path(path).absolute()
    arrays, document = leaves.of_model(model)
    document = {"version": VERSION, **document, "arrays": sorted(arrays)}
    document["sha256"] = leaves.content_hash(document, arrays)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with _quiet(), _checkpointer() as checkpointer:
            checkpointer.save(
                temporary,
                args=ocp.args.Composite(
                    params=ocp.args.PyTreeSave(_nest(arrays)),  # type: ignore[call-arg]
                    model=ocp.args.JsonSave(document),  # type: ignore[call-arg]
                ),
                force=True,
            )
        _fix_timestamps(temporary)
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except (OSError, ValueError) as error:  # Orbax reports a full disk as the latter
        for leftover in path.parent.glob(f"{temporary.name}*"):  # Orbax has names of its own
            shutil.rmtree(leftover, ignore_errors=True)
        said = str(error).partition("\n")[0]
        raise VqjaxError(f"{path}: cannot write ({said}); choose another place") from error


def load_model_folder(path: str | os.PathLike) -> Model:
    """Reads what `save_model_folder` wrote: the same leaves in the same types, codes still packed.

    Raises:
      VqjaxError: if it is not ours, is damaged, or does not fit its own config.
    """
    path = pathlib.Path(path).absolute()
    try:
        with _quiet(), _checkpointer() as checkpointer:
            document = _read_document(checkpointer, path)
            names = {name: name.replace(".", "/") for name in document["arrays"]}
            abstract = tree.unflatten(dict.fromkeys(names.values(), 0))
            restore_args = jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray), abstract
            )
            item = ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args)  # type: ignore[call-arg]
            restored = checkpointer.restore(path, args=ocp.args.Composite(params=item))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        if isinstance(error, VqjaxError):
            raise
        raise VqjaxError(f"{path}: not a readable model folder ({error}); remake it") from error
    flat = tree.flatten(restored["params"])
    arrays = {name: flat[place] for name, place in names.items()}
    if document.get("sha256") != leaves.content_hash(document, arrays):
        raise VqjaxError(f"{path}: damaged (content does not match its SHA-256); remake it")
    return leaves.from_arrays(arrays, document, where=str(path))


def _read_document(checkpointer: ocp.Checkpointer, path: pathlib.Path) -> dict[str, Any]:
    item = ocp.args.JsonRestore()  # type: ignore[call-arg]
    document = checkpointer.restore(path, args=ocp.args.Composite(model=item))["model"]
    if document.get("version") != VERSION:
        raise VqjaxError(
            f"{path}: format version {document.get('version')!r}, this vqjax reads {VERSION}; "
            f"use the vqjax that wrote it, or make it again"
        )
    return document


def _nest(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Names to a tree: `a/kernel.codes` lies in `a`, `kernel`, `codes`."""
    return tree.unflatten({name.replace(".", "/"): array for name, array in arrays.items()})


def _checkpointer() -> ocp.Checkpointer:
    # Orbax would wait for all processes that jax knows; models are saved and loaded by one. The
    # options do not reach the handlers by themselves: each that is not told holds barriers of all.
    this = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=this, active_processes={this})
    return ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(
            params=ocp.PyTreeCheckpointHandler(use_ocdbt=False, multiprocessing_options=alone),
            model=ocp.JsonCheckpointHandler(multiprocessing_options=alone),
            composite_options=ocp.CompositeOptions(multiprocessing_options=alone),
        ),
        multiprocessing_options=alone,
    )


def _fix_timestamps(path: pathlib.Path) -> None:
    """Replaces the clock readings and the place in the files that Orbax writes about itself."""
    for file in path.rglob(_DONE):
        file.write_text("Checkpoint commit was successful\n")
    file = path / _METADATA
    metadata = json.loads(file.read_text())
    metadata |= {name: 0 for name in metadata if name.endswith("timestamp_nsecs")}
    file.write_text(json.dumps(metadata, sort_keys=True))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back one warning: Orbax misses the files of a format that was not asked for."""
    logger = logging.getLogger("absl")

    def wanted(record: logging.LogRecord) -> bool:
        return "Skipping merge of OCDBT" not in record.getMessage()

    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)
