# SPDX-License-Identifier: Apache-2.0
"""Reference fixtures of whole models: their weights, configs and activations in our layout.

No weights are stored in a fixture. Each tensor is drawn from a generator seeded by its checkpoint
key, so a model of any size can be compared without a checkpoint.
"""

import json
import math
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import golden_files, golden_params
from vqjax.config import AutoencoderConfig, LatentDiffusionConfig, UNetConfig
from vqjax.core import tree
from vqjax.io import keys

SLOW_PARAMETERS = 10_000_000  # larger models take minutes on two cores
LIMIT = 1e-5  # relative RMS error allowed in float32 with full-precision products


class Fixture:
    """One reference file, read lazily: a mapping of arrays, with its JSON texts parsed."""

    def __init__(self, path: pathlib.Path):
        self._file = np.load(path)
        self.names = set(self._file.files)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._file[name]

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def get(self, name: str) -> np.ndarray | None:
        """The array `name`, or None where the file has none."""
        return self._file[name] if name in self.names else None

    def text(self, name: str, default: Any = None) -> Any:
        """The parsed JSON text `name`, or `default` where the file has none."""
        return json.loads(str(self[name])) if name in self else default

    @property
    def kind(self) -> str:
        """What the file holds, by its contents: its name says nothing."""
        config = self.text("config_json", {})
        if "model_channels" in config:
            return "unet"
        if "ddconfig" in config:
            return "first_stage"
        marks = {"x_T": "trajectories", "betas_f64": "schedule", "first8": "recipe"}
        return next((kind for mark, kind in marks.items() if mark in self), "unknown")

    @property
    def slow(self) -> bool:
        """Whether the model is too large for the fast tests."""
        if self.kind not in ("unet", "first_stage"):
            return False
        count = sum(math.prod(entry.shape) for entry in entries_of(self.text("config_json")))
        return count > SLOW_PARAMETERS


def fixtures(kind: str) -> list:
    """Parameters for `pytest.mark.parametrize`: the files of one kind, large models marked slow."""
    params = golden_params("golden", "*.npz")
    if not golden_files("golden", "*.npz"):
        return params
    chosen = []
    for param in params:
        (path,) = param.values
        fixture = Fixture(path)
        if fixture.kind == kind:
            marks = [pytest.mark.slow] if fixture.slow else []
            chosen.append(pytest.param(path, id=param.id, marks=marks))
    reason = f"no fixture of kind {kind}"
    return chosen or [pytest.param(None, marks=pytest.mark.skip(reason=reason))]


def weight(key: str, shape: tuple[int, ...], seed: int, gain_rules: Sequence = ()) -> np.ndarray:
    """The tensor `key` of a fixture, float32: drawn in float64, then rounded and scaled."""
    rng = np.random.default_rng(zlib.crc32(key.encode()) ^ seed)
    value = rng.standard_normal(shape).astype(np.float32)
    gain = np.float32(next((gain for part, gain in gain_rules if part in key), 1))
    if key.endswith("embedding.weight"):
        return value
    if len(shape) >= 2:
        return value * np.float32(1 / np.sqrt(math.prod(shape[1:]))) * gain
    if key.endswith(".weight"):
        return np.float32(1) + np.float32(0.1) * value
    return np.float32(0.1) * value * gain


def params(entries: list[keys.KeyEntry], seed: int, gain_rules: Sequence = ()) -> dict[str, Any]:
    """Our tree of the tensors `entries`, at the seed and gains of a fixture."""
    return tree.unflatten(
        {
            entry.path: jnp.asarray(
                entry.to_param(weight(entry.key, entry.shape, seed, gain_rules))
            )
            for entry in entries
        }
    )


def entries_of(text: dict[str, Any]) -> list[keys.KeyEntry]:
    """The tensors of the network that a fixture's config text describes."""
    if "ddconfig" in text:
        return keys.first_stage_entries(autoencoder_config(text))
    return keys.unet_entries(unet_config(text))


def unet_config(text: dict[str, Any]) -> UNetConfig:
    """From the original constructor's arguments; those it did not name keep its defaults."""
    found = {name: text[name] for name in UNetConfig.__dataclass_fields__ if name in text}
    if found.get("num_head_channels") == -1:
        found["num_head_channels"] = None
    return UNetConfig(**_tuples(found))


def autoencoder_config(text: dict[str, Any]) -> AutoencoderConfig:
    """From the original constructor's arguments, `ddconfig` among them."""
    dd = text["ddconfig"]
    found = {name: dd[name] for name in AutoencoderConfig.__dataclass_fields__ if name in dd}
    return AutoencoderConfig(
        **_tuples(found),
        kind="kl" if dd["double_z"] else "vq",
        out_channels=dd["out_ch"],
        embed_dim=text["embed_dim"],
        n_embed=text.get("n_embed", 0),
    )


def whole_config(
    *, unet: UNetConfig | None = None, first_stage: AutoencoderConfig | None = None, **fields
) -> LatentDiffusionConfig:
    """A whole model's config around the part under test."""
    return LatentDiffusionConfig(
        name="fixture",
        unet=unet or UNetConfig(),
        first_stage=first_stage or AutoencoderConfig(),
        **fields,
    )


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}


def nhwc(array: np.ndarray) -> jnp.ndarray:
    """Images or latents of a fixture (the last four axes are [N, C, H, W]) in our layout."""
    return jnp.asarray(np.moveaxis(array, -3, -1))


def nchw(array: Any) -> np.ndarray:
    """The inverse of `nhwc`; vectors and tokens stay as they are."""
    array = np.asarray(array)
    return np.moveaxis(array, -1, -3) if array.ndim >= 4 else array
