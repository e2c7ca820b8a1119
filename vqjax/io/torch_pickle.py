# SPDX-License-Identifier: Apache-2.0
"""Reads PyTorch checkpoints without PyTorch and without running anything that is in them.

Two containers: a zip file with `<root>/data.pkl` and one raw entry per storage (torch >= 1.6), and
consecutive pickles followed by the storages (before). Tensors stay in the file until they are read,
one at a time, and damage to a stored tensor is found then by its CRC-32 (zip only).
"""

import dataclasses
import functools
import math
import os
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from vqjax.errors import VqjaxError
from vqjax.io import pickle_machine, stored_zip
from vqjax.io.lazy import LazyTensor, widen_bfloat16
from vqjax.io.pickle_machine import Global, Stub

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
_MAX_DIMENSIONS = 16
_MAX_COUNT = 1 << 48
_MAX_EXPANDED = 4096  # elements of a tensor that repeats the values of a smaller storage
_MAX_STUB_NAMES = 100
_OTHER_STUB = Stub(f"an object whose name came after {_MAX_STUB_NAMES} others")
_MAX_KEY = 200  # characters of a storage name; PyTorch writes numbers

# Storage class -> type in the file (little endian). Others become stubs.
_STORED = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "bool",
}
_READ_AS = {"bfloat16": "<u2", "bool": "u1"}


@dataclasses.dataclass(frozen=True)
class TorchFile:
    """What was in the file.

    Attributes:
      contents: plain containers with `LazyTensor` where tensors were.
      stubs: names of the objects that were not built, sorted; at most 100, of 200 characters.
    """

    contents: Any
    stubs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Storage:
    """A run of `count` values beginning at value `start` of the file's storage `key`."""

    key: str
    stored: str
    start: int
    count: int
    total: int


def load(path: str | os.PathLike) -> TorchFile:
    """Opens a checkpoint of either container. The file must stay in place while tensors are read.

    Raises:
      VqjaxError: if it is no PyTorch checkpoint, or damaged, or asks for more than it holds.
    """
    path = pathlib.Path(path)
    try:
        with open(path, "rb") as file:
            head = file.read(16)
        reader = _ZipReader(path) if head.startswith(b"PK\x03\x04") else _LegacyReader(path, head)
        return reader.load()
    except OSError as error:
        raise VqjaxError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except VqjaxError as error:
        raise VqjaxError(
            f"{path}: not a readable PyTorch checkpoint: {error}; download it again, "
            f"or save it again with torch.save"
        ) from error


class _Reader:
    """Builds tensors; where a storage's bytes are is left to the two containers."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.stubs: dict[str, Stub] = {}
        self.last: tuple[str, np.ndarray] | None = None

    def storage_bytes(self, storage: _Storage) -> tuple[int, int | None]:
        """Position in the file and CRC-32 where there is one, of the whole storage."""
        raise NotImplementedError

    def run(self, data: bytes, position: int) -> tuple[Any, int]:
        return pickle_machine.run(data, position, call=self.call, persistent=self.persistent)

    def finish(self, contents: Any) -> TorchFile:
        return TorchFile(contents, tuple(sorted(self.stubs)))

    def call(self, name: str, args: tuple) -> Any:
        if name in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
            return self.tensor(args)
        if name in _FIRST_ARGUMENT and args:
            return args[0]
        return self.stub(name)

    def stub(self, name: str) -> Stub:
        """One for each name, however often it is called, so that names take bounded memory."""
        made = Stub(name)
        if len(self.stubs) < _MAX_STUB_NAMES:
            return self.stubs.setdefault(made.name, made)
        return self.stubs.get(made.name, _OTHER_STUB)

    def persistent(self, identity: Any) -> Any:
        if not isinstance(identity, tuple) or len(identity) < 2:
            _fail(f"a persistent id that is no tuple: {type(identity).__name__}")
        if identity[0] == "module":
            return identity[1]
        if identity[0] != "storage" or len(identity) < 5:
            _fail(f"a persistent id of {len(identity)} parts that names no storage")
        _, kind, key, _, count, *view = identity
        name = kind.name if isinstance(kind, Global) else type(kind).__name__
        if name not in _STORED:
            return self.stub(f"torch.{name}")
        if not isinstance(key, str) or len(key) > _MAX_KEY or not _is_count(count):
            _fail(f"a storage named {_shown(key)} of {_shown(count)} values")
        start, size = 0, count
        if view and view[0] is not None:  # (key, offset, size), legacy container only
            if not (isinstance(view[0], tuple) and len(view[0]) == 3):
                _fail(f"storage {key!r} with a malformed view")
            _, start, size = view[0]
            if not (_is_count(start) and _is_count(size) and start + size <= count):
                _fail(f"a view outside storage {key!r} of {count} values")
        return self.checked(_Storage(key, _STORED[name], start, size, count))

    def checked(self, storage: _Storage) -> _Storage:
        """Returns the storage if the file can hold it, where that can be known by now."""
        return storage

    def tensor(self, args: tuple) -> LazyTensor | Stub:
        if len(args) < 4:
            _fail(f"a tensor described by {len(args)} values")
        storage, offset, shape, stride = args[:4]
        if isinstance(storage, Stub):
            return self.stub(f"a tensor on {storage.name}")
        if not isinstance(storage, _Storage):
            _fail(f"a tensor on a {type(storage).__name__}")
        _check_view(storage, offset, shape, stride)
        dtype = np.dtype({"bfloat16": np.float32}.get(storage.stored, storage.stored))
        read = functools.partial(self.read, storage, offset, shape, stride)
        return LazyTensor(tuple(shape), dtype, read)

    def read(self, storage: _Storage, offset: int, shape: tuple, stride: tuple) -> np.ndarray:
        values = self.values(storage)[storage.start : storage.start + storage.count]
        steps = [step * values.itemsize for step in stride]
        if 0 in shape:
            found = np.empty(shape, values.dtype)
        else:
            found = np.lib.stride_tricks.as_strided(values[offset:], shape, steps)
        if storage.stored == "bfloat16":
            return widen_bfloat16(found)
        if storage.stored == "bool":
            return found != 0
        # A part of a storage is copied, so that it does not keep the whole in memory.
        whole = found.size == storage.total and found.flags.c_contiguous
        return found if whole else np.array(found, order="C")

    def values(self, storage: _Storage) -> np.ndarray:
        """All values of the storage; the last one is kept, as neighbours often share it."""
        identity = f"{storage.stored} {storage.key}"
        if self.last is None or self.last[0] != identity:
            self.last = None  # freed before the next one is read
            self.last = identity, self.read_storage(storage)
        return self.last[1]

    def read_storage(self, storage: _Storage) -> np.ndarray:
        dtype = np.dtype(_READ_AS.get(storage.stored, storage.stored))
        position, crc = self.storage_bytes(storage)
        try:
            values = np.fromfile(self.path, dtype, storage.total, offset=position)
        except OSError as error:
            raise VqjaxError(f"{self.path}: cannot be read ({error})") from error
        if values.size != storage.total:
            raise VqjaxError(f"{self.path}: changed while it was read; load it again")
        if crc is not None and zlib.crc32(values.view(np.uint8).data) != crc:
            raise VqjaxError(
                f"{self.path}: storage {storage.key!r} is damaged (CRC-32 differs); "
                f"download it again"
            )
        return values


class _ZipReader(_Reader):
    def load(self) -> TorchFile:
        with open(self.path, "rb") as file:
            self.entries = stored_zip.read_directory(file)
            found = [name for name in self.entries if name.endswith("/data.pkl")]
            if len(found) != 1:
                _fail(f"a zip file with {len(found)} entries named data.pkl, expected one")
            self.root = found[0].removesuffix("data.pkl")
            if f"{self.root}constants.pkl" in self.entries:
                _fail("it is a TorchScript program, not a state dict")
            order = self.entries.get(f"{self.root}byteorder")
            if order is not None and _entry_bytes(file, order, "byteorder") != b"little":
                _fail("its numbers are not little endian")
            data = _entry_bytes(file, self.entries[found[0]], "data.pkl")
        contents, _ = self.run(data, 0)
        return self.finish(contents)

    def checked(self, storage: _Storage) -> _Storage:
        entry = self.entries.get(f"{self.root}data/{storage.key}")
        needed = storage.total * _itemsize(storage.stored)
        if entry is None or entry.size != needed:
            found = "missing" if entry is None else f"{entry.size} bytes"
            _fail(f"storage {storage.key!r} is {found}, its tensors need {needed} bytes")
        return storage

    def storage_bytes(self, storage: _Storage) -> tuple[int, int | None]:
        entry = self.entries[f"{self.root}data/{storage.key}"]
        return entry.start, entry.crc


class _LegacyReader(_Reader):
    def __init__(self, path: pathlib.Path, head: bytes):
        super().__init__(path)
        self.head = head
        self.storages: dict[str, _Storage] = {}
        self.positions: dict[str, int] = {}

    def load(self) -> TorchFile:
        if not self.head.startswith(b"\x80"):
            _fail(f"it begins with {self.head!r}")
        with open(self.path, "rb") as file:
            data = file.read(pickle_machine.MAX_BYTES)
            length = file.seek(0, os.SEEK_END)
        magic, position = self.run(data, 0)
        protocol, position = self.run(data, position)
        if (magic, protocol) != (LEGACY_MAGIC, LEGACY_PROTOCOL):
            _fail("it is a pickle, but not one that torch.save wrote")
        system, position = self.run(data, position)
        if isinstance(system, Mapping) and system.get("little_endian") is False:
            _fail("its numbers are not little endian")
        contents, position = self.run(data, position)
        keys, position = self.run(data, position)
        if not isinstance(keys, list):
            _fail("the list of storages is missing")
        with open(self.path, "rb") as file:
            self.find_storages(file, keys, position, length)
        missing = sorted(set(self.storages) - set(self.positions))
        if missing:
            _fail(f"{len(missing)} storages are missing, the first is {missing[0]!r}")
        return self.finish(contents)

    def find_storages(self, file: Any, keys: list, position: int, length: int) -> None:
        """Walks over the storages: each is its number of values in 8 bytes, then the values."""
        for key in keys:
            storage = self.storages.get(key) if isinstance(key, str) else None
            if storage is None:
                _fail(f"storage {_shown(key)} is used by no tensor of a known type")
            file.seek(position)
            count = int.from_bytes(file.read(8), "little")
            if count != storage.total:
                _fail(f"storage {key!r} has {count} values, its tensors need {storage.total}")
            self.positions[key] = position + 8
            position += 8 + count * _itemsize(storage.stored)
            if position > length:
                _fail(f"the file ends within storage {key!r}")

    def checked(self, storage: _Storage) -> _Storage:
        known = self.storages.setdefault(storage.key, storage)
        if (known.stored, known.total) != (storage.stored, storage.total):
            _fail(f"storage {storage.key!r} is described in two ways")
        return storage

    def storage_bytes(self, storage: _Storage) -> tuple[int, int | None]:
        return self.positions[storage.key], None


_FIRST_ARGUMENT = frozenset(
    {
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch.Size",
    }
)


def _shown(value: Any) -> str:
    """Text and numbers; of containers the kind alone: a short file can nest them without end."""
    if isinstance(value, str):
        return repr(value[:80])
    small = isinstance(value, int) and value.bit_length() < 256
    return str(value) if small else f"({type(value).__name__})"


def _fail(what: str) -> NoReturn:
    raise VqjaxError(what)


def _entry_bytes(file: Any, entry: stored_zip.Entry, name: str) -> bytes:
    if entry.size > pickle_machine.MAX_BYTES:
        _fail(f"{name} has {entry.size} bytes, at most {pickle_machine.MAX_BYTES} make sense")
    file.seek(entry.start)
    data = file.read(entry.size)
    if zlib.crc32(data) != entry.crc:
        _fail(f"{name} is damaged (CRC-32 differs)")
    return data


def _itemsize(stored: str) -> int:
    return np.dtype(_READ_AS.get(stored, stored)).itemsize


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_COUNT


def _check_view(storage: _Storage, offset: Any, shape: Any, stride: Any) -> None:
    """Refuses a tensor that would reach outside its storage or be far larger than it."""
    sizes_fit = isinstance(shape, tuple) and isinstance(stride, tuple)
    if not sizes_fit or len(shape) != len(stride) or len(shape) > _MAX_DIMENSIONS:
        _fail(f"a tensor on storage {storage.key!r} without matching shape and strides")
    if not all(map(_is_count, (offset, *shape, *stride))):
        _fail(f"a tensor on storage {storage.key!r} with negative or absurd shape or strides")
    count = math.prod(shape)
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    # The product without zeros is what numpy computes even for an empty tensor.
    absurd = math.prod(size or 1 for size in shape) >= _MAX_COUNT
    outside = count and (last >= storage.count or count > max(storage.count, _MAX_EXPANDED))
    if absurd or outside:
        _fail(
            f"a tensor of shape {shape}, strides {stride} and offset {offset} "
            f"does not lie within storage {storage.key!r} of {storage.count} values"
        )


def load_tensors(path: str | os.PathLike) -> dict[str, LazyTensor]:
    """The tensors of a checkpoint by key: those below "state_dict" if there is one, else the top's.

    Entries that are no tensors (counters, settings, stubs) are left out.

    Raises:
      VqjaxError: as `load` does, and if there are no tensors.
    """
    contents = load(path).contents
    found = contents
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    items = found.items() if isinstance(found, dict) else ()
    tensors = {
        key: value for key, value in items if isinstance(key, str) and isinstance(value, LazyTensor)
    }
    if not tensors:
        names = [str(key)[:40] for key in contents][:10] if isinstance(contents, dict) else []
        what = f"a dict with {names}" if names else f"a {type(contents).__name__}"
        raise VqjaxError(
            f"{path}: no tensors found in {what}; expected a state dict at the top "
            f"or below 'state_dict'"
        )
    return tensors
