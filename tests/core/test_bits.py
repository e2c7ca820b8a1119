# SPDX-License-Identifier: Apache-2.0
"""Entropy of codes, beside what they take as they are stored."""

import numpy as np
import pytest

from vqjax.core.bits import entropy, entropy_coded_bits, stored_bits


def test_entropy_of_known_codes():
    codes = np.array([[0, 0], [0, 1], [0, 2], [0, 3]])
    assert entropy(codes) == pytest.approx(2.0)


def test_codes_that_use_all_entries_alike_take_what_is_stored():
    stored = stored_bits((64, 32), group=8, books=2, entries=16, codebook_bits=8)
    codes_OJM = np.arange(32 * 8 * 2).reshape(32, 8, 2) // 2 % 16
    assert entropy_coded_bits(codes_OJM, stored) == pytest.approx(stored.per_weight)
    # One of two codebooks is never asked: half of the codes' bits are left.
    codes_OJM[..., 1] = 3
    half = stored.per_weight - stored.codes / 2 / stored.weights
    assert entropy_coded_bits(codes_OJM, stored) == pytest.approx(half)
