# SPDX-License-Identifier: Apache-2.0
"""Counted operations against hand counts and the published ratio."""

from vqjax.core.flops import Flops, layer_flops, total
from vqjax.core.plan import LayerSpec
from vqjax.kernels import specs


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


def test_tables_take_less_than_two_fifths_of_ldm_4():
    """Its U-Net, one call on one image, four codebooks of 16 vectors in every layer."""
    counted = []
    for layer in (*specs.layers("vq_matmul"), *specs.layers("vq_conv")):
        if layer.model == "cin256-v2":
            problem = layer.problem(1, "float32")
            shape = (problem.window, problem.window, problem.inputs, problem.outputs)
            grouping = "conv3x3" if problem.window == 3 else "linear"
            if layer.scalar:
                grouping = "scalar"
            spec = LayerSpec(grouping, grouping, problem.group, problem.books, problem.entries)
            counted += [layer_flops(shape, spec, problem.rows)] * layer.count
    whole = total(counted)
    assert len(counted) == 251
    assert whole == Flops(dense=193_410_490_368, lookup=75_147_900_928)
    assert whole.ratio <= 0.40
