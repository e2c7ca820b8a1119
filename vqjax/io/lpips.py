# SPDX-License-Identifier: Apache-2.0
"""The weights of LPIPS from files that the user has: VGG16's convolutions and the channel weights.

Keys are those of torchvision's `vgg16-397923af.pth` ("features.0.weight") and of the LPIPS file
`vgg.pth`, version 0.1 ("lin0.model.1.weight"); one file may hold both.
"""

import os
import pathlib
import re

import jax

from vqjax.core.host import to_device
from vqjax.errors import VqjaxError
from vqjax.io import checked
from vqjax.io.keys import KeyEntry

# Index in torchvision's `features` and output channels of each convolution.
_CONVOLUTIONS = (
    (0, 64),
    (2, 64),
    (5, 128),
    (7, 128),
    (10, 256),
    (12, 256),
    (14, 256),
    (17, 512),
    (19, 512),
    (21, 512),
    (24, 512),
    (26, 512),
    (28, 512),
)
_COMPARED = (64, 128, 256, 512, 512)
_CLASSIFIER = re.compile(r"classifier\..*")


def entries() -> list[KeyEntry]:
    """Every tensor: "conv0" ... "conv12" and the channel weights "lin0" ... "lin4"."""
    found, inputs = [], 3
    for number, (index, outputs) in enumerate(_CONVOLUTIONS):
        key, path, shape = f"features.{index}", f"conv{number}", (outputs, inputs, 3, 3)
        found.append(KeyEntry(f"{key}.weight", f"{path}/kernel", shape, "conv"))
        found.append(KeyEntry(f"{key}.bias", f"{path}/bias", (outputs,), "plain"))
        inputs = outputs
    for level, channels in enumerate(_COMPARED):
        shape = (1, channels, 1, 1)
        found.append(KeyEntry(f"lin{level}.model.1.weight", f"lin{level}", shape, "conv"))
    return found


def load(*paths: str | os.PathLike) -> dict[str, jax.Array]:
    """Reads one file with all tensors, or VGG16's and the channel weights' one.

    Returns:
      Float32 arrays as `vqjax.models.lpips.distance` takes them: "conv0/kernel" [3, 3, I, O],
      "conv0/bias" [O], "lin0" [C].

    Raises:
      VqjaxError: if a file cannot be read or two hold the same tensor; lists every missing, unknown
        or misshapen tensor.
    """
    where = " and ".join(str(pathlib.Path(path)) for path in paths)
    tensors = {}
    for path in paths:
        found = checked.open_tensors(path)
        twice = sorted(tensors.keys() & found.keys())
        if twice:
            raise VqjaxError(f"{where}: both hold {twice[0]}; give VGG16 and LPIPS weights once")
        tensors |= found
    arrays = checked.read_all(
        tensors,
        entries(),
        ignored=_CLASSIFIER.fullmatch,
        heading=f"{where}: not the weights of LPIPS 0.1 on VGG16; give torchvision's "
        f"vgg16-397923af.pth and the LPIPS file vgg.pth:",
    )
    params = {
        path: value[0, 0, :, 0] if path.startswith("lin") else value
        for path, value in arrays.items()
    }
    return {path: to_device(value) for path, value in params.items()}
