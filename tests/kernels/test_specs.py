# SPDX-License-Identifier: Apache-2.0
"""The layers that kernels are tested and measured on are those of the models."""

import json

import pytest

from tests.kernels.layers_of_models import FILE, layers
from vqjax.kernels import specs


@pytest.mark.parametrize("name", ["digits", pytest.param("cin256-v2", marks=pytest.mark.slow)])
def test_layers_are_those_of_the_model(name):
    stored = [layer for layer in json.loads(FILE.read_text()) if layer["model"] == name]
    assert stored == layers(name), "run: python -m tests.kernels.layers_of_models"


def test_problems_count_rows_as_the_layers_compute_them():
    for op in ("vq_matmul", "vq_conv"):
        for layer in specs.layers(op):
            one, two = (layer.problem(batch, "bfloat16") for batch in (1, 2))
            assert two.rows == 2 * one.rows
            assert layer.operands_shape(2)[-1] == one.inputs
