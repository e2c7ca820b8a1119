# SPDX-License-Identifier: Apache-2.0
"""Reference files of the evaluation: what each is, by its contents, and the weights they assume."""

import functools
import json
import math
import zlib
from collections.abc import Iterable

import numpy as np
import pytest

from tests.conftest import GOLDEN_ROOT, golden_files
from vqjax.io.keys import KeyEntry

FOLDER = "golden_eval"
# A file is of the kind whose mark is among its names.
_MARKS = {
    "inception": "logits_unbiased_",
    "evaluator": "exp_fid_evaluator",
    "metrics": "exp_softmax_gen",
    "fidelity": "exp_psnr_u8",
    "lpips": "exp_lpips",
}


@functools.cache
def _kinds() -> dict:
    """{kind: paths} of every .npz; a file of no kind is left to other tests."""
    found = {}
    for path in golden_files(FOLDER, "*.npz"):
        with np.load(path) as file:
            for kind, mark in _MARKS.items():
                if any(name.startswith(mark) for name in file.files):
                    found.setdefault(kind, []).append(path)
    return found


def files(kind: str) -> list:
    """Parameters for `pytest.mark.parametrize`: the files of one kind, or a skip that says why."""
    return _params(_kinds().get(kind, []), f"fixture of kind {kind!r}")


def manifests() -> list:
    """The JSON lists of a network's tensors."""
    found = [p for p in golden_files(FOLDER, "*.json") if "shapes" in json.loads(p.read_text())]
    return _params(found, "manifest of tensors")


def load(path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def _params(paths: list, what: str) -> list:
    if not paths:
        reason = f"no {what} under {GOLDEN_ROOT / FOLDER} (set VQJAX_GOLDEN)"
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason))]
    return [pytest.param(path, id=path.stem) for path in paths]


def weight(key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The tensor `key`, float32, by the recipe of golden_eval/README.md (not that of golden/)."""
    z = np.random.default_rng(zlib.crc32(key.encode()) ^ seed).standard_normal(shape)
    z = z.astype(np.float32)
    tenth = np.float32(0.1)
    if key.endswith("running_var"):
        return np.float32(1) + tenth * np.abs(z)
    if key.endswith(("running_mean", ".bias")):
        return tenth * z
    if len(shape) == 1:
        return np.float32(1) + tenth * z
    value = z * np.float32(np.sqrt(2 / math.prod(shape[1:])))
    return np.abs(value) if key.startswith("lin") else value


def state_dict(entries: Iterable[KeyEntry], seed: int) -> dict[str, np.ndarray]:
    """Every tensor of a table in PyTorch's layout, by key."""
    return {entry.key: weight(entry.key, entry.shape, seed) for entry in entries}
