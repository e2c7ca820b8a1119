# SPDX-License-Identifier: Apache-2.0
"""How the weights of a quantized model stand in memory while it samples.

Where a kernel multiplies by packed codes faster than by decoded weights, a weight stays packed.
Elsewhere it is decoded once, at load, as far as a limit allows; what is left is read by a kernel if
there is one, and else decoded in every step of the sampler. Small weights that a GPU kernel would
decode in every step are decoded at load, too, up to `MEMORY_SHARE` of the dense memory.
"""

import functools
import logging
import math
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vqjax import models
from vqjax.config import LatentDiffusionConfig
from vqjax.core import tree
from vqjax.core.integer import integerize
from vqjax.core.tensor import VQTensor
from vqjax.errors import VqjaxError
from vqjax.kernels import device, dispatch, tuned
from vqjax.kernels.books import Books
from vqjax.kernels.problem import FLOATS
from vqjax.models import packed as packed_layers

LOADED = "decoded at load"
"""Path of a weight that `place` decodes; "xla" decodes in every step."""

MEMORY_SHARE = 0.155
"""What quantized weights may take on a GPU of what they would take in bfloat16: with tables of
kernels, biases and norms the full-size U-Net at two bits stays below a sixth."""

_log = logging.getLogger("vqjax.sampling")


class Placed(NamedTuple):
    """A model's weights, ready to sample.

    Attributes:
      params: the tree, `VQTensor` leaves where weights stay packed; for integers the kernels of
        `core.integer`.
      paths: of every quantized weight by its path in the tree: `LOADED`, or what the dispatcher
        says of it.
    """

    params: models.Params
    paths: dict[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of the U-Net's arrays in memory."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.params["unet"]))

    def counts(self) -> dict[str, int]:
        """Number of quantized weights by path."""
        return dict(Counter(self.paths.values()))


def place(
    config: LatentDiffusionConfig,
    params: models.Params,
    *,
    rows: int,
    dtype: str = "float32",
    limit: float | None = None,
    integer: bool = False,
) -> Placed:
    """Decodes the weights that are not better left as they are stored.

    Args:
      params: as they are stored. Placed once more, those that stayed packed would count as all
        that are quantized, and more than `MEMORY_SHARE` be taken.
      rows: latents that the U-Net sees at a time, both branches of guidance counted.
      dtype: "float32", "bfloat16" or "float16": of the U-Net's computation and decoded weights.
      limit: most GB (10^9 bytes) of decoded weights, or None. Weights that do not fit stay packed
        (`say_what_stays`). The largest are decoded first: where no kernel reads the others, a step
        saves time in proportion to what is decoded, and the buffer in which it decodes is as large
        as the largest of them.
      integer: for products of int8; decoded weights then take a byte.

    Raises:
      VqjaxError: if the limit or the dtype makes no sense, if `VQJAX_KERNELS` names a path that
        cannot run a layer, or if integers were asked for and some weight is none.
    """
    if limit is not None and not limit >= 0:
        raise VqjaxError(f"weight memory of {limit} GB: expected 0 or more")
    if dtype not in FLOATS:
        raise VqjaxError(f"dtype {dtype!r}: expected one of {', '.join(FLOATS)}")
    flat = tree.flatten(params)
    packed = {path: leaf for path, leaf in flat.items() if isinstance(leaf, VQTensor)}
    look = functools.partial(choices, config, params, rows=rows, dtype=dtype, integer=integer)
    found = {} if dispatch.keeps_none() else look()
    types = {path: "int8" if integer else _dtype(path, dtype) for path in packed}
    paths = {path: choice.path for path, choice in found.items() if choice.keeps}
    for path in _better_decoded(packed, types, found):
        del paths[path]
    room = math.inf if limit is None else limit * 1e9
    waiting = [path for path in packed if path not in paths]
    for path in sorted(waiting, key=lambda path: -packed[path].size):
        size = packed[path].size * jnp.dtype(types[path]).itemsize
        if size <= room:
            room -= size
            paths[path] = LOADED
    if len(paths) < len(packed):
        found = found or look()
        how = {path: found[path].path if path in found else "xla" for path in packed}
        paths = how | paths
    kept = [path for path in packed if paths[path] != LOADED]
    read = {path: found[path] for path in kept if path in found}
    flat |= _prepared(packed, read)
    if integer:
        flat = tree.flatten(integerize(tree.unflatten(flat), kept))
    else:
        chosen = {path: packed[path] for path in packed if paths[path] == LOADED}
        flat |= _decode(chosen, tuple(types[path] for path in sorted(chosen)))
    flat |= _in_types(flat, dtype, read)
    return Placed(jax.tree.map(jnp.asarray, tree.unflatten(flat)), paths)


def _better_decoded(
    packed: dict[str, VQTensor], types: dict[str, str], choices: dict[str, dispatch.Choice]
) -> list[str]:
    """The smallest weights that a kernel would decode whole in every step, while memory lasts.

    What starting a kernel takes is the same for all of them, and for small ones it is most: by
    arithmetic, an H200 reads and writes a weight of 192 x 192 x 3 x 3 within a microsecond. Memory
    is what `MEMORY_SHARE` leaves. Where a path was asked for by name, it is taken.
    """
    if dispatch.wanted() != "auto":
        return []
    decoded = {path: leaf.size * jnp.dtype(types[path]).itemsize for path, leaf in packed.items()}
    room, staged = 0.0, []
    for path, leaf in packed.items():
        room += 2 * MEMORY_SHARE * leaf.size
        choice = choices.get(path)
        if choice is None or not choice.keeps:
            room -= decoded[path]
            continue
        room -= leaf.nbytes
        if choice.schedule is not None and choice.schedule.kind == "staged":
            staged.append(path)
    found = []
    for path in sorted(staged, key=lambda path: packed[path].size):
        room -= decoded[path] - packed[path].nbytes
        if room < 0:
            break
        found.append(path)
    return found


def choices(
    config: LatentDiffusionConfig,
    params: models.Params,
    *,
    rows: int,
    dtype: str,
    integer: bool = False,
) -> dict[str, dispatch.Choice]:
    """Returns what the dispatcher chooses for every packed weight, by its path."""
    leaves, structure = jax.tree.flatten(params)
    shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    asked = dispatch.wanted(), device.current()
    return _traced_choices(config, structure, shapes, rows, dtype, integer, asked)


@functools.lru_cache(maxsize=32)
def _traced_choices(
    config: LatentDiffusionConfig,
    structure: Any,
    shapes: tuple[jax.ShapeDtypeStruct, ...],
    rows: int,
    dtype: str,
    integer: bool,
    asked: tuple[str, device.Device],
) -> dict[str, dispatch.Choice]:
    """Kept, since tracing a large network takes seconds, and every call of `sample` asks."""
    del asked  # by the dispatcher, which knows
    found: dict[str, dispatch.Choice] = {}

    def predict(params: models.Params, x_BHWC: jax.Array, t_B: jax.Array, ids_B: jax.Array) -> Any:
        flat = tree.flatten(params)

        def look(path: str, x: jax.Array, window: dict[str, Any]) -> None:
            if isinstance(flat[path], VQTensor):
                found[path] = packed_layers.choice(x, flat[path], integer=integer, **window)

        context = models.embed_classes(config, params, ids_B)
        return models.capture_inputs(config, params, x_BHWC, t_B, context, look)[0]

    x_BHWC = jax.ShapeDtypeStruct((rows, *config.latent_shape), dtype)
    t_B = ids_B = jax.ShapeDtypeStruct((rows,), jnp.int32)
    jax.eval_shape(predict, structure.unflatten(shapes), x_BHWC, t_B, ids_B)
    return found


def _dtype(path: str, dtype: str) -> str:
    """The first stage computes in float32, whatever the U-Net does."""
    return dtype if path.startswith("unet/") else "float32"


@functools.partial(jax.jit, static_argnames="dtypes")
def _decode(tensors: dict[str, VQTensor], dtypes: tuple[str, ...]) -> dict[str, jax.Array]:
    """All at once: they have many shapes."""
    return {path: tensors[path].decode(dtype) for path, dtype in zip(sorted(tensors), dtypes)}


def _prepared(
    packed: dict[str, VQTensor], choices: dict[str, dispatch.Choice]
) -> dict[str, VQTensor]:
    """The weights that GPU kernels read, made ready for them: no step of a sampler then does it."""
    books = {path: choice.books for path, choice in choices.items() if choice.books is not None}
    if not books:
        return {}
    return _prepare({path: packed[path] for path in books}, tuple(books[p] for p in sorted(books)))


@functools.partial(jax.jit, static_argnames="books")
def _prepare(tensors: dict[str, VQTensor], books: tuple[Books, ...]) -> dict[str, VQTensor]:
    """All at once: they have many shapes."""
    return {path: tensors[path].prepared_for(own) for path, own in zip(sorted(tensors), books)}


def _in_types(
    flat: dict[str, Any], dtype: str, choices: dict[str, dispatch.Choice]
) -> dict[str, Any]:
    """Dense kernels and all biases of the U-Net in the types in which its layers read them.

    Converted where they are read, each takes a kernel of its own in every step on a GPU. By NumPy:
    a model has too many shapes to compile for each.

    Args:
      choices: of the weights that stay packed.
    """
    found = {}
    for path, leaf in flat.items():
        if not path.startswith("unet/") or not path.endswith("/kernel"):
            continue
        if hasattr(leaf, "dtype"):
            found[path] = dtype
        biases = choices[path].bias_dtype if path in choices else dtype
        found[path.removesuffix("kernel") + "bias"] = biases
    other = {p: flat[p] for p, wanted in found.items() if p in flat and flat[p].dtype != wanted}
    cast = {path: leaf.astype(found[path]) for path, leaf in jax.device_get(other).items()}
    return jax.device_put(cast)


def say_what_stays(placed: Placed, limit: float | None) -> None:
    """Logs in one line that a limit makes every step decode weights, where it does.

    For users who set a limit; a benchmark that sets one in order to measure this does not call it.
    On a CPU it says, too, how to find out whether native code would be faster.
    """
    here = device.current()
    unknown = not here.refuses("native") and not tuned.knows(here.kind)
    hint = f" ({tuned.COMMAND} finds out whether native code is faster)" if unknown else ""
    flat = tree.flatten(placed.params)
    sizes = {path: math.prod(flat[path].shape) for path in placed.paths}
    stays = [path for path, how in placed.paths.items() if how == "xla"]
    if stays:
        _log.warning(
            "%d of %d quantized weights (%.0f %% of their numbers) stay packed and are decoded in "
            "every step: decoded, they exceed the limit of %g GB%s",
            len(stays),
            len(sizes),
            100 * sum(sizes[path] for path in stays) / sum(sizes.values()),
            limit,
            hint,
        )
