# SPDX-License-Identifier: Apache-2.0
"""Lookup tables: the same numbers as the definition, and the operations that the formula counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqjax.core.flops import layer_flops
from vqjax.core.plan import LayerSpec
from vqjax.kernels import specs
from vqjax.kernels.lut_matmul import counts
from vqjax.kernels.lut_matmul import ref as lut
from vqjax.kernels.problem import Problem
from vqjax.kernels.vq_conv.ref import vq_conv
from vqjax.kernels.vq_matmul.ref import vq_matmul


@pytest.mark.parametrize("limit", [1 << 24, 200], ids=["at once", "in parts"])
def test_products_agree(limit, monkeypatch):
    monkeypatch.setattr(lut, "_MOST_GATHERED", limit)
    problem = Problem("vq_matmul", 5, 37, 12, 3, 16, 8, "float32", "int8")
    operands = specs.random_operands(problem, (5, 37))
    found = lut.lut_matmul(*operands.defining)
    np.testing.assert_allclose(found, vq_matmul(*operands.defining), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
@pytest.mark.parametrize("group", [9, 3])
def test_convolutions_agree(strides, group):
    problem = Problem("vq_conv", 40, 6, 8, 2, 16, group, "float32", "float16", 3, strides)
    operands = specs.random_operands(problem, (2, 5, 4, 6), bias=False)
    geometry = {"window": 3, "strides": strides, "padding": [(1, 1), (1, 1)]}
    found = lut.lut_conv(*operands.defining, **geometry)
    np.testing.assert_allclose(found, vq_conv(*operands.defining, **geometry), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "name", "group"), [((40, 24), "linear", 8), ((3, 3, 5, 24), "conv3x3", 9)]
)
def test_xla_counts_what_the_formula_counts(shape, name, group):
    rows, books, entries = 7, 4, 2
    outputs, groups = shape[-1], int(np.prod(shape[:-1])) // group
    spec = LayerSpec("attention", name, group, books, entries)
    counted = layer_flops(shape, spec, rows)
    assert counted.lookup < counted.dense  # else the formula would answer with the dense count

    def by_xla(run, *shapes) -> float:
        shapes = [jax.ShapeDtypeStruct(s, t) for s, t in shapes]
        analysis = jax.jit(run).lower(*shapes).cost_analysis()
        assert analysis is not None
        return analysis["flops"]

    tables = by_xla(
        lut.tables, ((rows, groups, group), jnp.float32), ((books, entries, group), jnp.float32)
    )
    sums = by_xla(
        lut.add_up,
        ((groups * books * entries, rows), jnp.float32),
        ((outputs, groups * books), jnp.int32),
    )
    scaling = outputs * rows  # the one multiplication that stands in for the first addition
    assert tables + sums + scaling == counted.lookup
    window = 3 if name == "conv3x3" else 1
    problem = Problem(
        "any", rows, shape[-2], outputs, books, entries, group, "float32", "float16", window
    )
    assert counts.operations(problem) == (counted.dense, counted.lookup)
    assert counts.refusal(problem) is None
