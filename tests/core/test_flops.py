# SPDX-License-Identifier: Apache-2.0
"""Counted operations against hand counts and the published ratio."""

from vqjax.core.flops import Flops, layer_flops, total
from vqjax.core.plan import LayerSpec


def test_a_linear_layer_by_hand():
    spec = LayerSpec("attention", "linear", 8, 4, 16)
    # 12 vectors: tables 12 * 8 * 64 products, sums 4 * 12 additions for each of 96 outputs.
    expected = Flops(dense=2 * 96 * 96 * 5, lookup=(2 * 96 * 64 + 4 * 12 * 96) * 5)
    assert layer_flops((96, 96), spec, 5) == expected


def test_tables_are_used_only_where_they_save():
    spec = LayerSpec("conv3x3", "conv3x3", 9, 2, 256)
    narrow, wide = layer_flops((3, 3, 64, 64), spec, 1), layer_flops((3, 3, 64, 960), spec, 1)
    assert narrow.lookup == narrow.dense
    assert wide.lookup < wide.dense


def test_scalar_layers_are_dense_and_totals_add_up():
    scalar = layer_flops((3, 3, 3, 64), LayerSpec("first_last", "scalar", 1, 1, 256, 8), 10)
    assert scalar.ratio == 1
    assert total([scalar, scalar]) == Flops(2 * scalar.dense, 2 * scalar.lookup)
