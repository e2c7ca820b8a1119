# SPDX-License-Identifier: Apache-2.0
"""Writes PyTorch checkpoints without PyTorch, opcode by opcode, honest ones and hostile ones."""

import dataclasses
import io
import pathlib
import struct
import zipfile
from typing import Any

import numpy as np

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_STORAGES = {
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "float16": "HalfStorage",
    "uint16": "BFloat16Storage",  # numpy has no bfloat16: its bits stand for it
    "int64": "LongStorage",
    "int32": "IntStorage",
    "bool": "BoolStorage",
    "uint8": "ByteStorage",
}


@dataclasses.dataclass(frozen=True)
class Raw:
    """Opcodes put into the pickle as they are."""

    code: bytes


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """A tensor that lies somewhere in a storage; by default all of it."""

    storage: np.ndarray
    offset: int = 0
    shape: tuple[int, ...] | None = None
    stride: tuple[int, ...] | None = None
    count: int | None = None  # number of values the pickle claims for the storage


@dataclasses.dataclass(frozen=True)
class Instance:
    """An object of any class: made with NEWOBJ and given a state, as callbacks are."""

    module: str
    name: str
    state: Any = None


class _Pickler:
    """Pickle protocol 2. `storages` collects the arrays, in the order of their keys "0", "1"..."""

    def __init__(self, *, legacy: bool):
        self.out = io.BytesIO()
        self.legacy = legacy
        self.storages: list[np.ndarray] = []

    def dump(self, value: Any) -> bytes:
        self.out.write(b"\x80\x02")
        self.write(value)
        self.out.write(b".")
        return self.out.getvalue()

    def write(self, value: Any) -> None:
        put = self.out.write
        if isinstance(value, Raw):
            put(value.code)
        elif value is None:
            put(b"N")
        elif isinstance(value, bool):
            put(b"\x88" if value else b"\x89")
        elif isinstance(value, int):
            size = value.bit_length() // 8 + 1
            small = -(2**31) <= value < 2**31
            put(b"J" + struct.pack("<i", value) if small else b"\x8a" + bytes([size]))
            put(b"" if small else value.to_bytes(size, "little", signed=True))
        elif isinstance(value, float):
            put(b"G" + struct.pack(">d", value))
        elif isinstance(value, str):
            put(b"X" + struct.pack("<I", len(value.encode())) + value.encode())
        elif isinstance(value, tuple):
            put(b"(")
            self.write_all(value)
            put(b"t")
        elif isinstance(value, list):
            put(b"](")
            self.write_all(value)
            put(b"e")
        elif isinstance(value, dict):
            put(b"}(")
            self.write_all(part for item in value.items() for part in item)
            put(b"u")
        elif isinstance(value, Instance):
            put(f"c{value.module}\n{value.name}\n)\x81".encode("latin-1"))
            self.write(value.state)
            put(b"b")
        elif isinstance(value, np.ndarray):
            self.write_tensor(View(np.ascontiguousarray(value).reshape(value.shape)))
        else:
            assert isinstance(value, View), type(value)
            self.write_tensor(value)

    def write_all(self, values) -> None:
        for value in values:
            self.write(value)

    def write_tensor(self, view: View) -> None:
        known = [index for index, array in enumerate(self.storages) if array is view.storage]
        index = known[0] if known else len(self.storages)
        if not known:
            self.storages.append(view.storage)
        shape = view.storage.shape if view.shape is None else view.shape
        stride = view.stride
        if stride is None:
            stride = tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
        count = view.storage.size if view.count is None else view.count
        kind = _STORAGES[view.storage.dtype.name]
        identity = ["storage", Raw(f"ctorch\n{kind}\n".encode()), str(index), "cpu", count]
        self.out.write(b"ctorch._utils\n_rebuild_tensor_v2\n((")
        self.write_all([*identity, None] if self.legacy else identity)
        self.out.write(b"tQ")
        self.write_all([view.offset, shape, stride, False])
        self.out.write(b"ccollections\nOrderedDict\n)RtR")


def save_zip(path: pathlib.Path, value: Any, *, root: str = "archive", compress=False) -> None:
    """The container of torch 1.6 and later."""
    pickler = _Pickler(legacy=False)
    data = pickler.dump(value)
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as file:
        file.writestr(f"{root}/data.pkl", data)
        file.writestr(f"{root}/byteorder", b"little")
        for index, array in enumerate(pickler.storages):
            file.writestr(f"{root}/data/{index}", array.tobytes())
        file.writestr(f"{root}/version", b"3\n")


def save_legacy(path: pathlib.Path, value: Any) -> None:
    """The container before torch 1.6."""
    pickler = _Pickler(legacy=True)
    data = pickler.dump(value)
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2}}
    with open(path, "wb") as file:
        for part in (LEGACY_MAGIC, 1001, system):
            file.write(_Pickler(legacy=True).dump(part))
        file.write(data)
        keys = [str(index) for index in range(len(pickler.storages))]
        file.write(_Pickler(legacy=True).dump(keys))
        for array in pickler.storages:
            file.write(struct.pack("<q", array.size) + array.tobytes())


def replace_entry(path: pathlib.Path, name: str, change) -> None:
    """Rewrites a zip file with one entry changed by `change(bytes)`, its CRC right again."""
    with zipfile.ZipFile(path) as file:
        parts = {entry: file.read(entry) for entry in file.namelist()}
    parts[name] = change(parts[name])
    with zipfile.ZipFile(path, "w") as file:
        for entry, data in parts.items():
            file.writestr(entry, data)


SAVERS = {"zip": save_zip, "legacy": save_legacy}
