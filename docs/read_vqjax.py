# SPDX-License-Identifier: Apache-2.0
"""Decodes a vqjax export to dense arrays with numpy alone: python read_vqjax.py FILE.safetensors"""

import json
import struct
import sys

import numpy as np

DTYPES = {"U8": "u1", "I8": "i1", "F16": "<f2", "F32": "<f4", "I32": "<i4"}


def read(path):
    """Returns {path: float32 array}, kernels as [kH, kW, in, out] or [in, out]; ranges of
    activations, which are no weights, under the names in the file."""
    with open(path, "rb") as file:
        raw = file.read()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    document = json.loads(header.pop("__metadata__")["vqjax"])
    arrays = {}
    for name, about in header.items():
        start, stop = (8 + size + offset for offset in about["data_offsets"])
        array = np.frombuffer(raw[start:stop], DTYPES[about["dtype"]])
        arrays[name] = array.reshape(about["shape"])
    names = ("codes", "codebooks", "scales", "scale_range", "input_scales", "input_scale_range")
    parts = {p: {k: arrays.pop(f"{p}.{k}", None) for k in names} for p in document["quantized"]}
    books_scale = {p: arrays.pop(f"{p}.codebook_scale", np.float32(1)) for p in parts}
    dense = {path: array.astype(np.float32) for path, array in arrays.items()}
    for path, about in document["quantized"].items():
        dense[path] = decode(parts[path], books_scale[path], about["shape"])
    return dense


def decode(part, books_scale, shape):
    books = part["codebooks"].astype(np.float32) * books_scale
    count, entries, group = books.shape
    *window, inputs, outputs = shape
    fan_in = int(np.prod([*window, inputs]))
    groups = -(-fan_in // group)
    rows = [unpack(row, groups * count, entries) for row in part["codes"]]
    codes = np.array(rows).reshape(outputs, groups, count)
    weights = sum(books[m][codes[:, :, m]] for m in range(count))
    matrix = weights.reshape(outputs, -1)[:, :fan_in]
    matrix = matrix * scales(part["scales"], part["scale_range"], outputs)[:, None]
    if part["input_scales"] is not None:
        factors = scales(part["input_scales"], part["input_scale_range"], inputs)
        matrix = matrix * np.repeat(factors, fan_in // inputs)
    return matrix.reshape([outputs, inputs, *window]).transpose([*range(2, len(shape)), 1, 0])


def scales(packed, low_step, count):
    codes = np.array(unpack(packed, count, 32))
    return np.where(codes > 0, np.exp2(low_step[0] + (codes - 1) * low_step[1]), 0)


def unpack(row, count, entries):
    """Codes are the digits, to the base K, of words that follow each other in a row's bits."""
    size, bits = word(entries)
    number, codes = int.from_bytes(row.tobytes(), "little"), []
    for _ in range(-(-count // size)):
        digits, number = number & ((1 << bits) - 1), number >> bits
        for _ in range(size):
            digits, code = divmod(digits, entries)
            codes.append(code)
    return codes[:count]


def word(entries):
    """Codes and bits of one word: one code where K is a power of two, else the tightest."""
    if entries & (entries - 1) == 0:
        return 1, max(1, entries.bit_length() - 1)
    words = [(d, (entries**d - 1).bit_length()) for d in range(1, 17)]
    return min((w for w in words if w[1] <= 64), key=lambda w: w[1] / w[0])


if __name__ == "__main__":
    for name, array in sorted(read(sys.argv[1]).items()):
        print(name, array.shape)
