# SPDX-License-Identifier: Apache-2.0
"""Files to models and back. PyTorch is never imported.

`load_model` takes every kind of source; the submodules are one format each.
"""

import dataclasses
import os
import pathlib
from importlib import resources
from typing import TYPE_CHECKING

from vqjax import config as config_lib
from vqjax.config import LatentDiffusionConfig
from vqjax.errors import VqjaxError
from vqjax.io import published

if TYPE_CHECKING:
    from vqjax.core.model import Model

__all__ = ["load_model"]

_PYTORCH = (".ckpt", ".pth", ".pt", ".bin")


def load_model(
    source: str | os.PathLike, *, config: LatentDiffusionConfig | str | os.PathLike | None = None
) -> "Model":
    """Loads a latent diffusion model, dense weights in float32, quantized ones packed as stored.

    Args:
      source: "digits" (the model in the package), an LDM checkpoint (.ckpt, .pth, .pt, .bin, or
        .safetensors with the same keys), a file from `--export`, a run folder, or a folder in
        diffusers layout. An existing file or folder goes before the name "digits".
      config: what the checkpoint was trained as, itself or as `vqjax.config.find` takes it. None
        recognizes the published models by their shapes; our own files carry theirs.

    Returns:
      A `vqjax.core.model.Model`.

    Raises:
      VqjaxError: if there is no such source, or its content does not make the model.
    """
    # Imported here, so that a command line can print its help without jax.
    from vqjax.io import diffusers, ldm, native, orbax_model, safetensors_reader, torch_pickle

    path = pathlib.Path(source)
    config = None if config is None else config_lib.find(config)
    if not path.exists():
        if str(source) == "digits":
            return _checked(_load_digits(), config, "digits")
        known = published.FILES.get(path.name)
        if known is not None:
            raise VqjaxError(f"{source}: no such file or folder; published as {known.describe()}")
        raise VqjaxError(f"{source}: no such file or folder, nor the model in the package, digits")
    if path.is_dir():
        folder = orbax_model.find(path)
        if folder is not None:
            return _checked(orbax_model.load_model_folder(folder), config, str(path))
        return diffusers.load_folder(path, config)
    if path.suffix == ".safetensors":
        if native.metadata(path) is not None:
            return _checked(native.load(path), config, str(path))
        return ldm.build_model(safetensors_reader.open_tensors(path), config, where=str(path))
    if path.suffix in _PYTORCH:
        return ldm.build_model(torch_pickle.load_tensors(path), config, where=str(path))
    raise VqjaxError(
        f"{path}: unknown kind of file; expected one of {', '.join(_PYTORCH)}, .safetensors, "
        f"a run folder or a diffusers folder"
    )


def _load_digits() -> "Model":
    from vqjax.io import native

    asset = resources.files("vqjax.assets") / "digits.safetensors"
    with resources.as_file(asset) as path:
        if not path.exists():
            raise VqjaxError(
                "this installation has no embedded model (vqjax/assets/digits.safetensors); "
                "install the package again, or train it: python -m vqjax.train.digits"
            )
        return native.load(path)


def _differing(own: LatentDiffusionConfig, given: LatentDiffusionConfig) -> list[str]:
    """What makes another model; checkpoints may have a scale factor of their own."""
    from vqjax.core import tree

    given = dataclasses.replace(
        given, name=own.name, scale_factor=own.scale_factor, guidance=own.guidance
    )
    here, there = (tree.flatten(config.to_dict()) for config in (own, given))
    return [
        f"{field} ({here[field]}, given {there[field]})"
        for field in here
        if here[field] != there[field]
    ]


def _checked(model: "Model", config: LatentDiffusionConfig | None, where: str) -> "Model":
    """Our own files know their config. Their half-precision dense weights are computed with."""
    import numpy as np

    from vqjax.core import tree
    from vqjax.core.activations import Activations
    from vqjax.core.host import to_device
    from vqjax.core.tensor import VQTensor

    if config is not None and (differing := _differing(model.config, config)):
        raise VqjaxError(
            f"{where} holds {model.config.name!r} with a config of its own, which differs from the "
            f"one given ({config.name!r}) in {', '.join(differing)}; leave it out"
        )
    flat = {
        # Cast by numpy: jax would compile a cast for every shape.
        path: leaf
        if isinstance(leaf, VQTensor | Activations)
        else to_device(np.asarray(leaf, np.float32))
        for path, leaf in tree.flatten(model.params).items()
    }
    return dataclasses.replace(model, params=tree.unflatten(flat))
