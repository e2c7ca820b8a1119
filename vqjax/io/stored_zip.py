# SPDX-License-Identifier: Apache-2.0
"""The directory of a zip file whose entries are stored as they are, as PyTorch writes them.

Python's zipfile would serve, but it builds the whole directory before it can be asked how large it
is, and it unpacks. Here nothing is unpacked: a compressed entry is refused, so that no file can be
larger in memory than it is on disk. Layout: PKWARE APPNOTE 6.3.
"""

import dataclasses
import struct
from typing import BinaryIO

from vqjax.errors import VqjaxError

MAX_ENTRIES = 200_000
_MAX_DIRECTORY = 64 << 20
_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_ENCRYPTED = 1


@dataclasses.dataclass(frozen=True)
class Entry:
    """Bytes of one entry: where they start in the file, how many, and their CRC-32."""

    start: int
    size: int
    crc: int


def read_directory(file: BinaryIO) -> dict[str, Entry]:
    """Returns every entry by name. Reads headers only.

    Raises:
      VqjaxError: if the file is cut off or malformed, or an entry is compressed, encrypted, given
        twice or outside the file.
    """
    length = file.seek(0, 2)
    count, size, start = _find_directory(file, length)
    if count > MAX_ENTRIES or size > _MAX_DIRECTORY:
        raise VqjaxError(f"a zip directory of {count} entries and {size} bytes is too large")
    directory, position = _read(file, start, size), 0
    headers: dict[str, tuple[int, int, int]] = {}
    for _ in range(count):
        name, header, position = _parse_entry(directory, position)
        if name in headers:
            raise VqjaxError(f"zip entry {name!r} is given twice")
        headers[name] = header
    return {name: _locate(file, length, name, *header) for name, header in headers.items()}


def _read(file: BinaryIO, start: int, size: int) -> bytes:
    if start < 0 or start > 1 << 62:
        raise VqjaxError(f"zip offset {start} is outside the file")
    file.seek(start)
    data = file.read(size)
    if len(data) < size:
        raise VqjaxError(f"the zip file ends early: {size} bytes wanted at byte {start}")
    return data


def _find_directory(file: BinaryIO, length: int) -> tuple[int, int, int]:
    """Number of entries, bytes and position of the directory, from the record at the end."""
    tail_start = max(0, length - _END.size - 0xFFFF)
    tail = _read(file, tail_start, length - tail_start)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + _END.size > len(tail):
        raise VqjaxError("the zip directory at the end of the file is missing: it is cut off")
    _, _, _, _, count, size, start, _ = _END.unpack_from(tail, at)
    locator = tail_start + at - _END64_LOCATOR.size
    if locator >= 0:
        raw = _read(file, locator, _END64_LOCATOR.size)
        if raw.startswith(b"PK\x06\x07"):
            end64 = _END64_LOCATOR.unpack(raw)[2]
            record = _END64.unpack(_read(file, end64, _END64.size))
            if record[0] != b"PK\x06\x06":
                raise VqjaxError("the zip64 directory record is damaged")
            count, size, start = record[7:10]
    return count, size, start


def _parse_entry(directory: bytes, position: int) -> tuple[str, tuple[int, int, int], int]:
    """Name, (header position, size, CRC) and the position of the next entry."""
    if position + _ENTRY.size > len(directory):
        raise VqjaxError("the zip directory ends early")
    fields = _ENTRY.unpack_from(directory, position)
    signature, _, _, flags, method, _, _, crc, packed, size = fields[:10]
    name_size, extra_size, comment_size, *_, header = fields[10:]
    name_end = position + _ENTRY.size + name_size
    name = directory[position + _ENTRY.size : name_end].decode("utf-8", "replace")
    if signature != b"PK\x01\x02":
        raise VqjaxError("the zip directory is damaged")
    if method != 0 or flags & _ENCRYPTED:
        raise VqjaxError(
            f"zip entry {name!r} is compressed or encrypted; PyTorch stores it plainly"
        )
    extra = directory[name_end : name_end + extra_size]
    size, packed, header = _wide_fields(extra, [size, packed, header])
    if size != packed:
        raise VqjaxError(f"zip entry {name!r} claims {size} bytes and stores {packed}")
    return name, (header, size, crc), name_end + extra_size + comment_size


def _wide_fields(extra: bytes, values: list[int]) -> list[int]:
    """Replaces 32-bit fields that are full by the 64-bit ones of the zip64 extra field."""
    position = 0
    while position + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, position)
        body = extra[position + 4 : position + 4 + size]
        if kind == 1:
            wide = [struct.unpack_from("<Q", body, i)[0] for i in range(0, len(body) - 7, 8)]
            full = [index for index, value in enumerate(values) if value == 0xFFFFFFFF]
            for index, value in zip(full, wide, strict=False):
                values[index] = value
        position += 4 + size
    return values


def _locate(file: BinaryIO, length: int, name: str, header: int, size: int, crc: int) -> Entry:
    fields = _LOCAL.unpack(_read(file, header, _LOCAL.size))
    if fields[0] != b"PK\x03\x04":
        raise VqjaxError(f"zip entry {name!r} points to no entry")
    start = header + _LOCAL.size + fields[9] + fields[10]
    if start + size > length:
        raise VqjaxError(f"zip entry {name!r} of {size} bytes reaches beyond the end of the file")
    return Entry(start, size, crc)
