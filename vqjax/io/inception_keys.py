# SPDX-License-Identifier: Apache-2.0
"""Names and shapes of the FID network's tensors, in both files that it is published as.

PyTorch names are those of `pt_inception-2015-12-05-6726825d.pth` (pytorch-fid, torch-fidelity),
TensorFlow names those of `classify_image_graph_def.pb`. How the two correspond is taken from
torch-fidelity's `util_convert_inception_weights.py`; the order of towers is regular.
"""

import dataclasses
from collections.abc import Iterator

from vqjax.io.keys import KeyEntry

CLASSES, POOLED = 1008, 2048
# Parts of a batch norm: our name, PyTorch's, TensorFlow's.
NORM = (
    ("scale", "weight", "gamma"),
    ("offset", "bias", "beta"),
    ("mean", "running_mean", "moving_mean"),
    ("variance", "running_var", "moving_variance"),
)


@dataclasses.dataclass(frozen=True)
class Convolution:
    """One convolution and its batch norm.

    Attributes:
      name: ours: "block/branch", or the layer's name in the stem.
      tensorflow: the scope in the TensorFlow graph.
      shape: PyTorch's [O, I, kH, kW].
    """

    name: str
    tensorflow: str
    shape: tuple[int, int, int, int]


Layer = tuple[int, int, int]  # outputs, kernel height, kernel width


def torch_entries() -> list[KeyEntry]:
    """Every tensor of the PyTorch file, as "name/kernel" and the four parts of "name/norm"."""
    entries = []
    for conv in convolutions():
        key = conv.name.replace("/", ".")
        entries.append(KeyEntry(f"{key}.conv.weight", f"{conv.name}/kernel", conv.shape, "conv"))
        entries += [
            KeyEntry(f"{key}.bn.{theirs}", f"{conv.name}/{ours}", conv.shape[:1], "plain")
            for ours, theirs, _ in NORM
        ]
    entries.append(KeyEntry("fc.weight", "fc/kernel", (CLASSES, POOLED), "linear"))
    entries.append(KeyEntry("fc.bias", "fc/bias", (CLASSES,), "plain"))
    return entries


def tensorflow_entries() -> list[KeyEntry]:
    """The same parameters in the TensorFlow graph, whose layout is ours already."""
    keys = {"fc/kernel": "softmax/weights", "fc/bias": "softmax/biases"}
    for conv in convolutions():
        keys[f"{conv.name}/kernel"] = f"{conv.tensorflow}/conv2d_params"
        for ours, _, theirs in NORM:
            keys[f"{conv.name}/{ours}"] = f"{conv.tensorflow}/batchnorm/{theirs}"
    return [
        KeyEntry(keys[entry.path], entry.path, entry.param_shape, "plain")
        for entry in torch_entries()
    ]


def convolutions() -> list[Convolution]:
    """All 94 convolutions, in the order of the network."""
    found = list(_stem())
    scopes = iter(["mixed", *(f"mixed_{index}" for index in range(1, 11))])
    for name, inputs, pool in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
        found += _named(name, next(scopes), _block_a(inputs, pool))
    found += _named("6a", next(scopes), _block_b(288))
    for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        found += _named(name, next(scopes), _block_c(768, width))
    found += _named("7a", next(scopes), _block_d(768))
    for name, inputs in (("7b", 1280), ("7c", 2048)):
        found += _named(name, next(scopes), _block_e(inputs))
    return found


def _named(name: str, scope: str, block: Iterator[Convolution]) -> Iterator[Convolution]:
    for conv in block:
        yield Convolution(f"Mixed_{name}/{conv.name}", f"{scope}/{conv.tensorflow}", conv.shape)


def _chain(branch: str, scope: str, inputs: int, *layers: Layer) -> Iterator[Convolution]:
    """Convolutions one after another: numbered from 1 by PyTorch, from nothing by TensorFlow."""
    for index, (outputs, height, width) in enumerate(layers):
        name = branch if len(layers) == 1 else f"{branch}_{index + 1}"
        yield Convolution(name, f"{scope}{_nth(index)}", (outputs, inputs, height, width))
        inputs = outputs


def _nth(index: int) -> str:
    return f"conv_{index}" if index else "conv"


def _stem() -> Iterator[Convolution]:
    names = ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3")
    layers = ((32, 3, 3), (32, 3, 3), (64, 3, 3), (80, 1, 1), (192, 3, 3))
    for name, conv in zip(names, _chain("stem", "", 3, *layers)):
        yield dataclasses.replace(conv, name=f"Conv2d_{name}")


def _block_a(inputs: int, pool: int) -> Iterator[Convolution]:
    yield from _chain("branch1x1", "", inputs, (64, 1, 1))
    yield from _chain("branch5x5", "tower/", inputs, (48, 1, 1), (64, 5, 5))
    yield from _chain("branch3x3dbl", "tower_1/", inputs, (64, 1, 1), (96, 3, 3), (96, 3, 3))
    yield from _chain("branch_pool", "tower_2/", inputs, (pool, 1, 1))


def _block_b(inputs: int) -> Iterator[Convolution]:
    yield from _chain("branch3x3", "", inputs, (384, 3, 3))
    yield from _chain("branch3x3dbl", "tower/", inputs, (64, 1, 1), (96, 3, 3), (96, 3, 3))


def _block_c(inputs: int, width: int) -> Iterator[Convolution]:
    single = ((width, 1, 1), (width, 1, 7), (192, 7, 1))
    double = ((width, 1, 1), (width, 7, 1), (width, 1, 7), (width, 7, 1), (192, 1, 7))
    yield from _chain("branch1x1", "", inputs, (192, 1, 1))
    yield from _chain("branch7x7", "tower/", inputs, *single)
    yield from _chain("branch7x7dbl", "tower_1/", inputs, *double)
    yield from _chain("branch_pool", "tower_2/", inputs, (192, 1, 1))


def _block_d(inputs: int) -> Iterator[Convolution]:
    triple = ((192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3))
    yield from _chain("branch3x3", "tower/", inputs, (192, 1, 1), (320, 3, 3))
    yield from _chain("branch7x7x3", "tower_1/", inputs, *triple)


def _block_e(inputs: int) -> Iterator[Convolution]:
    yield from _chain("branch1x1", "", inputs, (320, 1, 1))
    yield Convolution("branch3x3_1", "tower/conv", (384, inputs, 1, 1))
    yield from _fork("branch3x3_2", "tower/")
    yield Convolution("branch3x3dbl_1", "tower_1/conv", (448, inputs, 1, 1))
    yield Convolution("branch3x3dbl_2", "tower_1/conv_1", (384, 448, 3, 3))
    yield from _fork("branch3x3dbl_3", "tower_1/")
    yield from _chain("branch_pool", "tower_2/", inputs, (192, 1, 1))


def _fork(branch: str, scope: str) -> Iterator[Convolution]:
    """A row and a column side by side on the same 384 inputs."""
    yield Convolution(f"{branch}a", f"{scope}mixed/conv", (384, 384, 1, 3))
    yield Convolution(f"{branch}b", f"{scope}mixed/conv_1", (384, 384, 3, 1))
