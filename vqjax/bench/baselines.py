# SPDX-License-Identifier: Apache-2.0
"""What additive codes are measured against: rounding, and one k-means codebook.

Dimension key:  O rows   N fan-in   J vectors of a row   V all vectors (O * J)   K entries
                G weights of a vector
"""

import math
from typing import NamedTuple

import numpy as np

from vqjax.core import grouping
from vqjax.core.bits import entropy

_SHRINKS = np.linspace(1.0, 0.3, 8)
_FITS = 10
_STEPS = 30
_CHUNK = 32_768  # vectors compared with all entries at once


class Quantized(NamedTuple):
    """A matrix after quantization.

    Attributes:
      q_ON: dequantized, float64.
      bits_per_weight: everything stored, over the weights.
      codes_entropy: the same if the codes were stored in their empirical entropy.
    """

    q_ON: np.ndarray
    bits_per_weight: float
    codes_entropy: float


def round_to_nearest(w_ON: np.ndarray, bits: int) -> Quantized:
    """Each row to 2^bits equidistant values; step and offset, float16, of least squared error.

    Codes and least squares in turn, from several ranges around the middle of the row.
    """
    levels = 2**bits
    low_O1, high_O1 = w_ON.min(axis=1, keepdims=True), w_ON.max(axis=1, keepdims=True)
    middle_O1, half_O1 = (low_O1 + high_O1) / 2, (high_O1 - low_O1) / 2
    best_O1, q_ON, codes_ON = np.full(low_O1.shape, np.inf), w_ON, np.zeros(w_ON.shape)
    for shrink in _SHRINKS:
        start_O1 = _float16(middle_O1 - half_O1 * shrink)
        step_O1 = _float16(2 * half_O1 * shrink / (levels - 1))
        for _ in range(_FITS):
            safe_O1 = np.where(step_O1 > 0, step_O1, 1.0)
            found_ON = np.clip(np.round((w_ON - start_O1) / safe_O1), 0, levels - 1)
            value_ON = start_O1 + step_O1 * found_ON
            error_O1 = np.sum((w_ON - value_ON) ** 2, axis=1, keepdims=True)
            better_O1 = error_O1 < best_O1
            q_ON = np.where(better_O1, value_ON, q_ON)
            codes_ON = np.where(better_O1, found_ON, codes_ON)
            best_O1 = np.minimum(error_O1, best_O1)
            start_O1, step_O1 = _line(found_ON, w_ON)
    overhead = 32 / w_ON.shape[1]
    return Quantized(q_ON, bits + overhead, entropy(codes_ON.reshape(-1, 1)) + overhead)


def _line(codes_ON: np.ndarray, w_ON: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns offset and step of least squared error for the codes of each row."""
    mean_O1, level_O1 = w_ON.mean(axis=1, keepdims=True), codes_ON.mean(axis=1, keepdims=True)
    centred_ON = codes_ON - level_O1
    spread_O1 = np.sum(centred_ON**2, axis=1, keepdims=True)
    along_O1 = np.sum(centred_ON * w_ON, axis=1, keepdims=True)
    step_O1 = _float16(along_O1 / np.where(spread_O1 > 0, spread_O1, 1.0))
    return _float16(mean_O1 - step_O1 * level_O1), step_O1


def _float16(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).astype(np.float64)


def product_quantization(
    w_ON: np.ndarray, *, group: int, entries: int, rng: np.random.Generator
) -> Quantized:
    """Vectors of G weights to one codebook of K entries, by Lloyd's k-means; rows scaled to one.

    Stored: codes, the codebook and one scale per row, both float16. Entries that lose all their
    vectors move to those that are worst off.
    """
    outputs, fan_in = w_ON.shape
    groups = grouping.groups_per_row(fan_in, group)
    scales_O1 = _float16(np.sqrt(np.mean(w_ON**2, axis=1, keepdims=True)))
    scaled_ON = w_ON / np.where(scales_O1 > 0, scales_O1, 1.0)
    padded = np.pad(scaled_ON, ((0, 0), (0, groups * group - fan_in)))
    vectors_VG = padded.reshape(-1, group).astype(np.float32)
    book_KG = vectors_VG[rng.choice(len(vectors_VG), entries, replace=len(vectors_VG) < entries)]
    for _ in range(_STEPS):
        codes_V, error_V = _nearest(vectors_VG, book_KG)
        counts_K = np.bincount(codes_V, minlength=entries)
        sums_KG = np.stack(
            [np.bincount(codes_V, column_V, entries) for column_V in vectors_VG.T], axis=1
        )
        book_KG = (sums_KG / np.maximum(counts_K, 1)[:, None]).astype(np.float32)
        empty = np.flatnonzero(counts_K == 0)
        worst = np.argsort(-error_V, kind="stable")[: len(empty)]
        book_KG[empty[: len(worst)]] = vectors_VG[worst]
    book_KG = book_KG.astype(np.float16).astype(np.float32)
    codes_V, _ = _nearest(vectors_VG, book_KG)
    q_ON = book_KG[codes_V].astype(np.float64).reshape(outputs, -1)[:, :fan_in] * scales_O1
    overhead = entries * group * 16 / w_ON.size + 16 / fan_in
    codes = groups / fan_in
    return Quantized(
        q_ON,
        codes * math.ceil(math.log2(entries)) + overhead,
        codes * entropy(codes_V[:, None]) + overhead,
    )


def _nearest(vectors_VG: np.ndarray, book_KG: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the nearest entry of each vector and its squared distance."""
    own_K = np.sum(book_KG**2, axis=1) / 2
    codes, errors = [], []
    for first in range(0, len(vectors_VG), _CHUNK):
        cost_VK = own_K - vectors_VG[first : first + _CHUNK] @ book_KG.T
        codes.append(np.argmin(cost_VK, axis=1))
        errors.append(np.take_along_axis(cost_VK, codes[-1][:, None], axis=1)[:, 0])
    codes_V, cost_V = np.concatenate(codes), np.concatenate(errors)
    return codes_V, 2 * cost_V + np.sum(vectors_VG**2, axis=1)
