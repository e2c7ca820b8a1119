# SPDX-License-Identifier: Apache-2.0
"""Tensors of an LDM checkpoint to a model: averaged weights first, every misfit named at once."""

import dataclasses
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from vqjax.config import PRESETS, LatentDiffusionConfig
from vqjax.core import tree
from vqjax.core.host import to_device
from vqjax.core.model import Model
from vqjax.errors import VqjaxError, gathered
from vqjax.io import checked, keys
from vqjax.io.lazy import LazyTensor

_AVERAGE_COUNTERS = ("model_ema.decay", "model_ema.num_updates")
# Buffers and training leftovers that hold no weights of the model.
_IGNORED = re.compile(
    r"(first_stage_model\.)?loss\..*|logvar|lvlb_weights|ddim_\w+|scale_factor|log_one_minus_.*"
    r"|(sqrt_)?(one_minus_)?(recip_|recipm1_)?alphas_cumprod(_prev)?|betas|posterior_\w+"
    r"|model_ema\.(decay|num_updates)|first_stage_model\.colorize"
)
_SCHEDULE_TOLERANCE = 1e-5  # of float32; half precision has its own, see `_resolution`
_ENOUGH_TO_RECOGNIZE = 0.9


def build_model(
    tensors: Mapping[str, LazyTensor],
    config: LatentDiffusionConfig | None,
    *,
    where: str,
    names: Mapping[str, str] | None = None,
) -> Model:
    """Makes a model of checkpoint tensors, all float32.

    Where averaged weights (`model_ema.*`) are present they are taken in place of the raw ones. A
    `scale_factor` in the checkpoint goes into the config; noise-schedule buffers must agree with
    the config.

    Args:
      tensors: by LDM key. Read one at a time.
      config: None takes the published model whose shapes fit.
      where: names the file in errors.
      names: what to call a key in errors, where the file has names of its own.

    Raises:
      VqjaxError: lists every missing, unknown, misshapen, mistyped and non-finite tensor.
    """
    config = config or recognize(tensors, where=where)
    names = names or {}
    entries = keys.table(config)
    averaged = any(k.startswith("model_ema.") and k not in _AVERAGE_COUNTERS for k in tensors)
    known = {entry.key for entry in entries} | {entry.ema_key for entry in entries}
    problems = [
        f"{key}: unknown" for key in tensors if key not in known and not _IGNORED.fullmatch(key)
    ]
    params: dict[str, jax.Array] = {}
    for entry in entries:
        key = entry.ema_key if averaged and entry.ema_key else entry.key
        found, misfits = checked.read_parameter(tensors.get(key), entry)
        problems += [f"{names.get(key, key)}: {misfit}" for misfit in misfits]
        # After the first misfit values are only checked, not kept.
        if found is not None and not problems:
            params[entry.path] = to_device(found)
    problems += _schedule_misfits(tensors, config)
    factor, misfits = _scale_factor(tensors, config)
    problems += misfits
    if problems:
        raise gathered(
            problems,
            f"{where} does not fit the config {config.name!r}; pass the config that it was trained "
            f"with (published ones: {', '.join(PRESETS)}) or a complete checkpoint:",
        )
    config = dataclasses.replace(config, scale_factor=factor)
    return Model(config=config, params=tree.unflatten(params))


def recognize(tensors: Mapping[str, LazyTensor], *, where: str) -> LatentDiffusionConfig:
    """The published config that nearly all shapes fit. Misfits are left to `build_model` to name.

    Configs that differ by their name alone share it: "celebahq or ffhq or lsun_bedrooms".

    Raises:
      VqjaxError: if none comes close.
    """
    scores: dict[str, float] = {}
    for name, make in PRESETS.items():
        entries = keys.table(make())
        fits = [_shape_of(tensors, entry) == entry.shape for entry in entries]
        scores[name] = sum(fits) / len(fits)
    best = max(scores, key=lambda name: scores[name])
    if scores[best] < _ENOUGH_TO_RECOGNIZE:
        examples = ", ".join(sorted(tensors)[:3])
        raise VqjaxError(
            f"{where}: {len(tensors)} tensors ({examples}, ...) fit no published model; pass the "
            f"config that it was trained with (published ones: {', '.join(PRESETS)}), or a JSON "
            "file of its own (docs/import.md)"
        )
    config = PRESETS[best]()
    same = [
        name
        for name, make in PRESETS.items()
        if dataclasses.replace(make(), name=config.name) == config
    ]
    return dataclasses.replace(config, name=" or ".join(same))


def _shape_of(tensors: Mapping[str, LazyTensor], entry: keys.KeyEntry) -> tuple[int, ...] | None:
    found = tensors.get(entry.key) or tensors.get(entry.ema_key or "")
    return None if found is None else found.shape


def _schedule_misfits(
    tensors: Mapping[str, LazyTensor], config: LatentDiffusionConfig
) -> list[str]:
    start, end = np.sqrt(config.linear_start), np.sqrt(config.linear_end)
    betas = np.linspace(start, end, config.timesteps) ** 2
    expected = {"betas": betas, "alphas_cumprod": np.cumprod(1 - betas)}
    found = []
    for name, values in expected.items():
        if name not in tensors:
            continue
        tensor = tensors[name]
        if tensor.shape != values.shape:
            found.append(f"{name}: {tensor.shape} steps, the config has {config.timesteps}")
            continue
        stored = tensor.read()
        if not np.allclose(stored, values, rtol=_resolution(stored), atol=0):
            found.append(
                f"{name}: runs from {stored[0]:.6g} to {stored[-1]:.6g}, "
                f"the config's from {values[0]:.6g} to {values[-1]:.6g}"
            )
    return found


def _resolution(values: np.ndarray) -> float:
    """How well numbers are known that may have passed through half precision, relative."""
    for dtype in (jnp.bfloat16, jnp.float16):
        with np.errstate(over="ignore"):
            rounded = values.astype(dtype).astype(values.dtype)
        if np.array_equal(values, rounded):
            return float(jnp.finfo(dtype).eps)
    return _SCHEDULE_TOLERANCE


def _scale_factor(
    tensors: Mapping[str, LazyTensor], config: LatentDiffusionConfig
) -> tuple[float, list[str]]:
    tensor = tensors.get("scale_factor")
    if tensor is None:
        return config.scale_factor, []
    if tensor.shape not in ((), (1,)) or tensor.dtype.kind != "f":
        return 1.0, [f"scale_factor: {tensor.dtype} {tensor.shape}, expected one number"]
    factor = float(tensor.read().reshape(()))
    if not 0 < factor < float("inf"):
        return 1.0, [f"scale_factor: {factor}, expected a positive number"]
    return factor, []
