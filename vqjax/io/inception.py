# SPDX-License-Identifier: Apache-2.0
"""The weights behind FID from a file that the user has; nothing is downloaded.

Batch norms are folded into the convolutions in float64: what is left is one kernel and one bias.
"""

import dataclasses
import hashlib
import os
import pathlib
import re
import warnings

import jax
import numpy as np

from vqjax.core.host import to_device
from vqjax.errors import gathered
from vqjax.io import checked, graph_def, inception_keys

NORM_EPSILON = 1e-3  # not PyTorch's 1e-5, which moves features by a hundredth
PUBLISHED = "6726825d"  # how the sha256 of the published PyTorch file begins; it is in its name
_COUNTER = re.compile(r".*\.num_batches_tracked")
_GRAPH_WEIGHT = re.compile(
    r".*/(conv2d_params|gamma|beta|moving_mean|moving_variance)|softmax/(weights|biases)"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """The network that looks at pictures.

    Attributes:
      params: float32 arrays by path, as `vqjax.models.inception.features` takes them.
      sha256: of the file; scores of different files must not be compared.
      published: whether the file is the published PyTorch conversion, bit by bit.
    """

    params: dict[str, jax.Array]
    sha256: str
    published: bool


def load(path: str | os.PathLike) -> Weights:
    """Reads the FID network, and warns (UserWarning) if the file is not the published one.

    Args:
      path: `pt_inception-2015-12-05-6726825d.pth` in either PyTorch container, a .safetensors file
        with the same keys, or TensorFlow's `classify_image_graph_def.pb`.

    Raises:
      VqjaxError: if it cannot be read; lists every missing, unknown or misshapen tensor.
    """
    path = pathlib.Path(path)
    if path.suffix == ".pb":
        tensors, entries = graph_def.constants(path), inception_keys.tensorflow_entries()
        tensors = {name: t for name, t in tensors.items() if _GRAPH_WEIGHT.fullmatch(name)}
    else:
        tensors, entries = checked.open_tensors(path), inception_keys.torch_entries()
    arrays = checked.read_all(
        tensors,
        entries,
        ignored=_COUNTER.fullmatch,
        heading=f"{path}: not the FID network (Inception-v3 of 2015-12-05 with 1008 classes, not "
        f"torchvision's); get pt_inception-2015-12-05-{PUBLISHED}.pth of pytorch-fid:",
    )
    params = fold(arrays, where=str(path))
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    published = sha256.startswith(PUBLISHED)
    if not published:
        warnings.warn(
            f"{path}: sha256 {sha256[:8]}... is not that of the published weights "
            f"({PUBLISHED}...): a conversion, a damaged copy or another network. Scores compare "
            f"with published ones only if the weights are the same",
            stacklevel=2,
        )
    return Weights({name: to_device(value) for name, value in params.items()}, sha256, published)


def fold(arrays: dict[str, np.ndarray], *, where: str) -> dict[str, np.ndarray]:
    """Kernels and biases that do what convolution and batch norm did.

    Args:
      arrays: float32 by path, all of `inception_keys.torch_entries`.
      where: names the file in errors.

    Returns:
      "name/kernel" [kH, kW, I, O] and "name/bias" [O] of each convolution, and the last layer.

    Raises:
      VqjaxError: if a variance is negative.
    """
    folded = {name: arrays[name] for name in ("fc/kernel", "fc/bias")}
    problems = []
    for conv in inception_keys.convolutions():
        scale, offset, mean, variance = (
            arrays[f"{conv.name}/{part}"].astype(np.float64) for part, *_ in inception_keys.NORM
        )
        if variance.min() < 0:
            problems.append(f"{conv.name}: negative variance {variance.min():.3g}")
            continue
        gain = scale / np.sqrt(variance + NORM_EPSILON)
        folded[f"{conv.name}/kernel"] = (arrays[f"{conv.name}/kernel"] * gain).astype(np.float32)
        folded[f"{conv.name}/bias"] = (offset - mean * gain).astype(np.float32)
    if problems:
        raise gathered(problems, f"{where}: damaged; download it again:")
    return folded
