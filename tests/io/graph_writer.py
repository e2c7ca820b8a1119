# SPDX-License-Identifier: Apache-2.0
"""Writes frozen TensorFlow graphs without TensorFlow: constants, and nodes that are none."""

import pathlib

import numpy as np


def save(path: pathlib.Path, constants: dict[str, np.ndarray]) -> None:
    """A GraphDef with one Const node per array, one integer constant and one operation."""
    with open(path, "wb") as file:
        for name, value in {"shape": np.array([1, 2], np.int32), **constants}.items():
            file.write(_bytes(1, _constant(name, value)))
        pool = _bytes(1, b"pool") + _bytes(2, b"MaxPool") + _bytes(3, b"x") + _bytes(5, _kind(b"T"))
        file.write(_bytes(1, pool))
        file.write(_bytes(4, _number(1, 21)))  # the graph's versions


def _constant(name: str, value: np.ndarray) -> bytes:
    kind = {"float32": 1, "int32": 3}[value.dtype.name]
    shape = b"".join(_bytes(2, _number(1, size)) for size in value.shape)
    tensor = _number(1, kind) + _bytes(2, shape) + _bytes(4, value.tobytes())
    attribute = _bytes(1, b"value") + _bytes(2, _bytes(8, tensor))
    return _bytes(1, name.encode()) + _bytes(2, b"Const") + _bytes(5, attribute)


def _kind(key: bytes) -> bytes:
    return _bytes(1, key) + _bytes(2, _number(6, 1))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out + bytes([value]))
