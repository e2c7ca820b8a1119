# SPDX-License-Identifier: Apache-2.0
"""Constants of a frozen TensorFlow graph (`GraphDef`, protocol buffers), read without TensorFlow.

A message is a sequence of fields, each a tag (number * 8 + wire type) and a value. Only the fields
on the way to a float32 constant are looked at. Numbers are from tensorflow/core/framework:
graph.proto, node_def.proto, attr_value.proto, tensor.proto, tensor_shape.proto.
"""

import functools
import math
import mmap
import os
import pathlib
from collections.abc import Iterator

import numpy as np

from vqjax.errors import VqjaxError
from vqjax.io.lazy import LazyTensor

_FLOAT = 1  # DT_FLOAT
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_NODE = 1
_NODE_NAME, _NODE_OP, _NODE_ATTR = 1, 2, 5
_MAP_KEY, _MAP_VALUE = 1, 2
_ATTR_TENSOR = 8
_TENSOR_DTYPE, _TENSOR_SHAPE, _TENSOR_CONTENT, _TENSOR_FLOATS = 1, 2, 4, 5
_SHAPE_DIM, _DIM_SIZE = 2, 1


class _Malformed(Exception):
    """Not a message of this kind."""


def constants(path: str | os.PathLike) -> dict[str, LazyTensor]:
    """The float32 constants by node name.

    Others (strings, integers, one number that stands for many) are no weights and are left out.

    Raises:
      VqjaxError: if the file is not there, no graph, or cut off.
    """
    path = pathlib.Path(path)
    found = {}
    try:
        with open(path, "rb") as file:
            # Mapped: the arrays keep the file's pages, not copies of them.
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        for number, node in _fields(data):
            if number == _NODE and isinstance(node, memoryview):
                found |= _constant(node)
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise VqjaxError(f"{path}: cannot be read ({error}); check the path") from error
    except _Malformed as error:
        raise VqjaxError(f"{path}: not a TensorFlow graph ({error}); download it again") from error
    return found


def _constant(node: memoryview) -> dict[str, LazyTensor]:
    name, operation, value = "", "", None
    for number, field in _fields(node):
        if number == _NODE_NAME:
            name = _text(field)
        elif number == _NODE_OP:
            operation = _text(field)
        elif number == _NODE_ATTR and isinstance(field, memoryview):
            attribute = dict(_fields(field))
            if _text(attribute.get(_MAP_KEY, b"")) == "value":
                value = attribute.get(_MAP_VALUE)
    if operation != "Const" or not isinstance(value, memoryview):
        return {}
    tensor = dict(_fields(value)).get(_ATTR_TENSOR)
    return {} if not isinstance(tensor, memoryview) else _tensor(name, tensor)


def _tensor(name: str, tensor: memoryview) -> dict[str, LazyTensor]:
    fields = dict(_fields(tensor))
    # Packed floats are the same bytes as raw content.
    content = fields.get(_TENSOR_CONTENT, fields.get(_TENSOR_FLOATS))
    sizes = fields.get(_TENSOR_SHAPE, memoryview(b""))
    if not isinstance(content, memoryview) or not isinstance(sizes, memoryview):
        return {}
    dims = [dim for number, dim in _fields(sizes) if number == _SHAPE_DIM]
    found = [dict(_fields(dim)).get(_DIM_SIZE, 0) for dim in dims if isinstance(dim, memoryview)]
    shape = tuple(size for size in found if isinstance(size, int))
    if fields.get(_TENSOR_DTYPE) != _FLOAT or 4 * math.prod(shape) != len(content):
        return {}
    read = functools.partial(_read, content, shape)
    return {name: LazyTensor(shape, np.dtype(np.float32), read)}


def _read(content: memoryview, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(content, "<f4").reshape(shape)


def _text(field: object) -> str:
    if not isinstance(field, memoryview | bytes):
        raise _Malformed("a name that is no text")
    return bytes(field).decode("utf-8", "replace")


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """(field number, value) of a message; fixed-size numbers are passed over."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire not in (_BYTES, _FIXED32, _FIXED64):
            raise _Malformed(f"wire type {wire}")
        size = {_FIXED32: 4, _FIXED64: 8}.get(wire, 0)
        if wire == _BYTES:
            size, position = _varint(data, position)
        if position + size > len(data):
            raise _Malformed("it ends early")
        if wire == _BYTES:
            yield number, data[position : position + size]
        position += size


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        if position >= len(data):
            raise _Malformed("it ends early")
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
    raise _Malformed("a number of more than 64 bits")
