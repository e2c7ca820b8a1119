# SPDX-License-Identifier: Apache-2.0
"""Decodes a vqjax export to dense arrays with numpy alone: python read_vqjax.py FILE.safetensors"""

import json
import struct
import sys

import numpy as np

DTYPES = {"U8": "u1", "I8": "i1", "F16": "<f2", "F32": "<f4"}
GROUP = {"conv3x3": 9, "linear": 8, "scalar": 1}


def read(path):
    """Returns {path: float32 array}, kernels as [kH, kW, in, out] or [in, out]."""
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
    parts = {p: {k: arrays.pop(f"{p}.{k}") for k in ("codes", "codebooks", "scales")}
             for p in document["quantized"]}  # fmt: skip
    books_scale = {p: arrays.pop(f"{p}.codebook_scale", np.float32(1)) for p in parts}
    dense = {path: array.astype(np.float32) for path, array in arrays.items()}
    for path, about in document["quantized"].items():
        dense[path] = decode(parts[path], books_scale[path], about["shape"], about["grouping"])
    return dense


def decode(part, books_scale, shape, grouping):
    books = part["codebooks"].astype(np.float32) * books_scale
    count, entries, _ = books.shape
    *window, inputs, outputs = shape
    fan_in, bits = int(np.prod([*window, inputs])), max(1, (entries - 1).bit_length())
    groups = -(-fan_in // GROUP[grouping])
    codes = np.unpackbits(part["codes"], axis=1, count=groups * count * bits, bitorder="little")
    codes = codes.reshape(outputs, groups, count, bits) @ (1 << np.arange(bits))
    weights = sum(books[m][codes[:, :, m]] for m in range(count))
    matrix = weights.reshape(outputs, -1)[:, :fan_in] * part["scales"].astype(np.float32)[:, None]
    return matrix.reshape([outputs, inputs, *window]).transpose([*range(2, len(shape)), 1, 0])


if __name__ == "__main__":
    for name, array in sorted(read(sys.argv[1]).items()):
        print(name, array.shape)
