# SPDX-License-Identifier: Apache-2.0
"""A model as flat named arrays and one JSON document, which is what our two formats store.

Dimension key:  O outputs   J vectors of a row   M codebooks   K entries   G weights of a vector
                C codes of a row (J * M)   T timesteps
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from vqjax.config import LatentDiffusionConfig
from vqjax.core import grouping as grouping_lib
from vqjax.core import tree
from vqjax.core.activations import Activations, layer_bits
from vqjax.core.host import to_device
from vqjax.core.model import Model
from vqjax.core.scales import LEVELS, LogScales
from vqjax.core.tensor import VQTensor
from vqjax.errors import VqjaxError, gathered
from vqjax.io import keys
from vqjax.kernels import decode as decode_lib

DENSE_DTYPES = ("float16", "float32")
ACTIVATION_BITS = range(2, 9)
_PARTS = {
    "codes": ("uint8",),
    "codebooks": ("float16", "int8"),
    "scales": ("uint8",),
    "scale_range": ("float32",),
}
_OPTIONAL = {
    "input_scales": ("uint8",),
    "input_scale_range": ("float32",),
    "codebook_scale": ("float32",),
}
_TIMESTEPS = "activations.timesteps"
_RANGES = "activations/"
# With one context token these have no influence, and folding removes them (`core.folding`).
_FOLDABLE = re.compile(r"unet/.*/block_\d+/(norm2/(scale|bias)|attn2/to_[qk]/kernel)")


def to_arrays(params: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Splits a params tree into arrays by name and the description of its quantized leaves.

    A dense leaf is stored under its path; a quantized one as the arrays of `tensor_arrays`, their
    names behind the path and a dot; activation ranges as `_range_arrays` says.

    Returns:
      `{name: array}` in sorted order and `{path: {"shape": [...], "grouping": ...}}`.

    Raises:
      VqjaxError: if a dense leaf is neither float16 nor float32.
    """
    arrays, quantized, problems = {}, {}, []
    for path, leaf in tree.flatten(params).items():
        if isinstance(leaf, VQTensor):
            quantized[path] = {"shape": list(leaf.shape), "grouping": leaf.grouping}
            arrays |= {f"{path}.{part}": array for part, array in tensor_arrays(leaf).items()}
        elif isinstance(leaf, Activations):
            arrays |= _range_arrays(leaf)
        else:
            arrays[path] = np.asarray(leaf)
            if arrays[path].dtype.name not in DENSE_DTYPES:
                problems.append(f"{path}: {arrays[path].dtype}")
    if problems:
        raise gathered(problems, f"dense weights are stored as {' or '.join(DENSE_DTYPES)}; cast:")
    return dict(sorted(arrays.items())), quantized


def of_model(model: Model) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the arrays of a model and the document that `from_arrays` reads.

    Raises:
      VqjaxError: as `to_arrays`, or if its activations have other than 2 to 8 bits.
    """
    arrays, quantized = to_arrays(model.params)
    document = {"config": model.config.to_dict(), "quantized": quantized}
    activations = model.params.get("activations")
    if activations is not None:  # a model without them is stored as it was before there were any
        document["activations"] = {"bits": activations.bits}
        if activations.bits not in ACTIVATION_BITS:
            raise VqjaxError(f"activations of {activations.bits} bits: 2 to 8 can be stored")
    return arrays, document


def from_arrays(arrays: Mapping[str, Any], document: Mapping[str, Any], *, where: str) -> Model:
    """The inverse of `of_model`. Every array is checked against what the config asks for.

    Args:
      arrays: numpy or jax arrays by name.
      document: as `of_model` returns it.
      where: names the file in errors.

    Raises:
      VqjaxError: lists every missing, unknown or misshapen array.
    """
    rest, leaves, problems = dict(arrays), {}, []
    quantized = document["quantized"]
    config, expected = _read_config(document, where)
    ranges = _take_ranges(rest) if "activations" in document else None
    for path, about in quantized.items():
        parts = {part: rest.pop(f"{path}.{part}", None) for part in (*_PARTS, *_OPTIONAL)}
        misfits = _misfits(parts, about, expected.get(path))
        problems += [f"{path}: {misfit}" for misfit in misfits]
        if not misfits:
            leaves[path] = tensor_of(parts, about)
    for path, array in rest.items():
        problems += _dense_misfits(path, array, expected.get(path))
        leaves[path] = to_device(array)
    if ranges is not None:
        kernels = {p for p in expected if p.startswith("unet/") and p.endswith("/kernel")}
        kernels &= set(rest) | set(quantized)
        problems += _range_misfits(ranges, document["activations"], kernels)
    missing = set(expected) - set(rest) - set(quantized)
    problems += [f"{path}: missing" for path in sorted(missing) if not _FOLDABLE.fullmatch(path)]
    if problems:
        raise gathered(problems, f"{where} does not hold the model its config describes; remake it")
    params = tree.unflatten(leaves)
    if ranges is not None:
        params["activations"] = _activations_of(ranges, document["activations"]["bits"])
    return Model(config=config, params=params)


def tensor_arrays(tensor: VQTensor) -> dict[str, np.ndarray]:
    """The arrays of a quantized kernel by name: "codes", "codebooks", "scales", "scale_range" and,
    where there are any, "input_scales", "input_scale_range" and "codebook_scale"."""
    parts = {
        "codes": tensor.codes,
        "codebooks": tensor.codebooks,
        "scales": tensor.scales.codes,
        "scale_range": tensor.scales.range,
    }
    if tensor.input_scales is not None:
        parts |= {"input_scales": tensor.input_scales.codes}
        parts |= {"input_scale_range": tensor.input_scales.range}
    if tensor.codebook_scale is not None:
        parts |= {"codebook_scale": tensor.codebook_scale}
    return {name: np.asarray(array) for name, array in parts.items()}


def tensor_of(parts: Mapping[str, Any], about: Mapping[str, Any]) -> VQTensor:
    """The inverse of `tensor_arrays`; `about` is the description that `to_arrays` returns."""
    given = {name: to_device(array) for name, array in parts.items() if array is not None}
    shape = tuple(about["shape"])
    outputs, channels = shape[-1], grouping_lib.channels(shape)
    inputs = None
    if "input_scales" in given:
        inputs = LogScales(
            codes=given["input_scales"], range=given["input_scale_range"], count=channels
        )
    return VQTensor(
        codes=given["codes"],
        codebooks=given["codebooks"],
        scales=LogScales(codes=given["scales"], range=given["scale_range"], count=outputs),
        input_scales=inputs,
        codebook_scale=given.get("codebook_scale"),
        shape=shape,
        grouping=about["grouping"],
    )


def _range_arrays(activations: Activations) -> dict[str, np.ndarray]:
    """Stored arrays of activation ranges: no weight's name begins like theirs."""
    arrays: dict[str, np.ndarray] = {_TIMESTEPS: np.asarray(activations.timesteps_T, np.int32)}
    for path, zero_T in activations.rounded().zeros.items():
        step_T = np.asarray(activations.log2_steps[path], np.float32)
        arrays[f"{_RANGES}{path}.log2_steps"] = step_T
        arrays[f"{_RANGES}{path}.zeros"] = np.asarray(zero_T).astype(np.uint8)
    return arrays


def _take_ranges(rest: dict[str, Any]) -> dict[str, np.ndarray]:
    """Removes the arrays of activation ranges from all others."""
    names = [name for name in rest if name == _TIMESTEPS or name.startswith(_RANGES)]
    return {name: np.asarray(rest.pop(name)) for name in names}


def _activations_of(ranges: dict[str, np.ndarray], bits: int) -> Activations:
    """The inverse of `_range_arrays`."""

    def tables(part: str) -> dict[str, jnp.ndarray]:
        end = f".{part}"
        names = sorted(name for name in ranges if name.endswith(end))
        return {
            name.removeprefix(_RANGES).removesuffix(end): to_device(ranges[name].astype(np.float32))
            for name in names
        }

    return Activations(
        timesteps_T=to_device(ranges[_TIMESTEPS]),
        log2_steps=tables("log2_steps"),
        zeros=tables("zeros"),
        bits=bits,
    )


def _range_misfits(ranges: dict[str, np.ndarray], about: Any, kernels: set[str]) -> list[str]:
    """What is wrong with activation ranges: every kernel of the U-Net has one, nothing else has."""
    bits = about.get("bits") if isinstance(about, Mapping) else None
    if type(bits) is not int or bits not in ACTIVATION_BITS:
        return [f"activations described as {about!r}, expected 2 to 8 bits"]
    timesteps_T = ranges.get(_TIMESTEPS, np.zeros(0))
    rising = timesteps_T.ndim == 1 and timesteps_T.size and np.all(np.diff(timesteps_T) > 0)
    if timesteps_T.dtype.name != "int32" or not rising:
        return [f"{_TIMESTEPS}: missing, or not int32 numbers of one axis in rising order"]
    dtypes = {"log2_steps": "float32", "zeros": "uint8"}
    expected = {f"{_RANGES}{path}.{part}": (path, part) for path in kernels for part in dtypes}
    unknown = sorted(ranges.keys() - expected.keys() - {_TIMESTEPS})
    found = [f"{name}: no such layer in this model" for name in unknown]
    for name, (path, part) in sorted(expected.items()):
        array = ranges.get(name)
        if array is None:
            found.append(f"{name}: missing")
        elif (array.dtype.name, array.shape) != (dtypes[part], timesteps_T.shape):
            wanted = f"{dtypes[part]} {timesteps_T.shape}"
            found.append(f"{name}: {array.dtype} {array.shape}, expected {wanted}")
        elif part == "zeros" and array.max() >= 2 ** layer_bits(path, bits):
            found.append(f"{name}: {array.max()} is no level of {layer_bits(path, bits)} bits")
        else:
            found += [f"{name}: {bad}" for bad in not_finite(array)]
    return found


def _read_config(
    document: Mapping[str, Any], where: str
) -> tuple[LatentDiffusionConfig, dict[str, tuple[int, ...]]]:
    """The config, and the shape of every weight it asks for."""
    try:
        config = LatentDiffusionConfig.from_dict(document["config"])
        return config, {entry.path: entry.param_shape for entry in keys.table(config)}
    except VqjaxError as error:
        raise VqjaxError(f"{where}: {error}") from error
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise VqjaxError(f"{where}: its config is damaged ({error}); export it again") from error


def content_hash(document: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over the document without its own "sha256", then name and bytes of every array.

    The document counts as `json.dumps(document, sort_keys=True)`, the arrays in order of name.
    """
    rest = {name: value for name, value in document.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _dense_misfits(path: str, array: Any, expected: tuple[int, ...] | None) -> list[str]:
    if expected is None:
        return [f"{path}: no such weight in this model"]
    found = []
    if tuple(array.shape) != expected:
        found.append(f"{path}: shape {tuple(array.shape)}, expected {expected}")
    if array.dtype.name not in DENSE_DTYPES:
        found.append(f"{path}: {array.dtype}, expected {' or '.join(DENSE_DTYPES)}")
    return found or [f"{path}: {bad}" for bad in not_finite(np.asarray(array))]


def not_finite(array: np.ndarray) -> list[str]:
    """Returns one sentence if the array holds NaN or infinity, else nothing."""
    if array.dtype.kind != "f" or np.isfinite(array).all():
        return []
    return [f"{np.count_nonzero(~np.isfinite(array))} of {array.size} values are NaN or infinite"]


def _misfits(parts: Mapping[str, Any], about: Any, expected: tuple[int, ...] | None) -> list[str]:
    """What is wrong with one quantized leaf; types first, since the sizes need them."""
    if expected is None:
        return ["no such weight in this model"]
    if not isinstance(about, Mapping) or about.get("grouping") not in grouping_lib.GROUPS:
        return [f"described as {about!r}, expected a shape and one of {list(grouping_lib.GROUPS)}"]
    if about.get("shape") != list(expected):
        return [f"shape {about.get('shape')}, expected {list(expected)}"]
    found = [f"{part} missing" for part in _PARTS if parts[part] is None]
    found += [
        f"{part} {parts[part].dtype}, expected {' or '.join(dtypes)}"
        for part, dtypes in (_PARTS | _OPTIONAL).items()
        if parts[part] is not None and parts[part].dtype.name not in dtypes
    ]
    return found or _size_misfits(parts, about["grouping"], expected)


def _size_misfits(parts: Mapping[str, Any], grouping: str, shape: tuple[int, ...]) -> list[str]:
    books_MKG, scale = parts["codebooks"], parts["codebook_scale"]
    if books_MKG.ndim != 3 or 0 in books_MKG.shape:
        return [f"codebooks {books_MKG.shape}, expected [M, K, G]"]
    group = books_MKG.shape[2]
    if not grouping_lib.fits(grouping, group):
        return [f"vectors of {group} weights do not go with grouping {grouping!r}"]
    outputs, fan_in = grouping_lib.matrix_shape(shape)
    books, entries, _ = books_MKG.shape
    count = grouping_lib.groups_per_row(fan_in, group) * books
    if entries > decode_lib.MAX_ENTRIES:
        return [f"{entries} codebook entries, expected at most {decode_lib.MAX_ENTRIES}"]
    sizes = {
        "codes": (outputs, decode_lib.packed_bytes(count, entries)),
        "scales": (decode_lib.packed_bytes(outputs, LEVELS + 1),),
        "scale_range": (2,),
        "input_scales": (decode_lib.packed_bytes(grouping_lib.channels(shape), LEVELS + 1),),
        "input_scale_range": (2,),
    }
    found = [
        f"{part} {tuple(parts[part].shape)}, expected {size}"
        for part, size in sizes.items()
        if parts[part] is not None and tuple(parts[part].shape) != size
    ]
    if (parts["input_scales"] is None) != (parts["input_scale_range"] is None):
        found.append("input_scales and input_scale_range go together")
    if (books_MKG.dtype.name == "int8") != (scale is not None):
        found.append(f"{books_MKG.dtype} codebooks; int8 and codebook_scale go together")
    elif scale is not None and scale.shape != ():
        found.append(f"codebook_scale {scale.dtype} {scale.shape}, expected a float32 scalar")
    for part in ("codebooks", "scale_range", "input_scale_range", "codebook_scale"):
        if parts[part] is not None:
            found += [f"{part}: {bad}" for bad in not_finite(np.asarray(parts[part]))]
    if not found and entries & (entries - 1):
        stored = np.asarray(parts["codes"])
        codes_OC = decode_lib.unpack(stored, count, entries)
        if np.any(decode_lib.pack(codes_OC, entries) != stored):
            found.append(f"codes beyond the {entries} codebook entries")
    return found
