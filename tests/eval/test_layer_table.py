# SPDX-License-Identifier: Apache-2.0
"""The table of layers: every column, three digits, means by weights, medians."""

import math

import pytest

from vqjax.eval import layer_table

SMALL = {
    "path": "unet/input_blocks_1/res/conv1/kernel",
    "shape": [3, 3, 10, 10],
    "group": 9,
    "codebooks": 4,
    "entries": 16,
    **dict.fromkeys(layer_table.FIGURES, 1.0),
    "rel_output_mse": 4.0,
    "bound": 3.0,
    "ratio_to_bound": 1.5,
    "rel_output_mse_test": 0.01234567,
    "seconds": 2.0,
    "flops_dense": 800,
    "flops_lookup": 200,
    "flops_ratio": 0.25,
}
LARGE = SMALL | {
    "path": "unet/out/conv/kernel",
    "shape": [10, 10, 27, 1],
    "bits_per_weight": 4.0,
    "ratio_to_bound": None,
    "bound": None,
    "seconds": 1999.4,
    "flops_dense": 400,
    "flops_lookup": 400,
    "flops_ratio": 1.0,
}


def row(cells) -> dict[str, str]:
    return dict(zip(layer_table.COLUMNS, cells, strict=True))


def test_a_row_has_every_column():
    found = row(layer_table.cells(SMALL))
    assert found["layer"] == "input_blocks_1/res/conv1"
    assert found["shape"] == "3×3×10×10"
    assert found["code"] == "4×16 / 9"
    assert found["held-out"] == "0.0123"
    assert found["tables"] == "0.250"
    assert found["×\u00a0bound"] == "1.50"
    assert row(layer_table.cells(LARGE))["×\u00a0bound"] == "–"


def test_the_last_rows_weigh_by_weights_and_skip_what_is_missing():
    mean, median = map(row, layer_table.summary([SMALL, LARGE, SMALL]))
    assert mean["shape"] == "4,500"
    assert mean["bits"] == "2.80"  # (900 * 1 + 2700 * 4 + 900 * 1) / 4500
    assert mean["×\u00a0bound"] == "1.33"  # 4 / 3, errors over bounds
    assert mean["tables"] == "0.400"  # (200 + 400 + 200) / (800 + 400 + 800)
    assert mean["s"] == "2,003"
    assert median["×\u00a0bound"] == "1.50"
    assert median["bits"] == "1.00"
    assert median["tables"] == "0.250"
    assert median["s"] == "2.00"
    nothing, _ = map(row, layer_table.summary([LARGE]))
    assert nothing["bound"] == "–"


def test_the_note_says_which_layers_have_no_bound():
    assert "No bound" not in layer_table.note([SMALL])
    assert "No bound from 2,700 inputs on" in layer_table.note([SMALL, LARGE])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "–"),
        (math.nan, "–"),
        (math.inf, "∞"),
        (0.0, "0"),
        (0.000123456, "0.000123"),
        (0.0000123456, "1.23e-5"),
        (1.23456e-12, "1.23e-12"),
        (1295805.0, "1.30e6"),
        (2.0, "2.00"),
        (123.4, "123"),
        (999.7, "1,000"),
        (12345.6, "12,346"),
    ],
)
def test_three_digits(value, expected):
    assert layer_table.three_digits(value) == expected
