# SPDX-License-Identifier: Apache-2.0
"""The documented example for models of other kinds runs, and shows what it promises."""

import importlib.util
import pathlib

import jax
import pytest

EXAMPLE = pathlib.Path(__file__).parents[1] / "docs" / "example_transformer.py"


@pytest.mark.slow
def test_a_transformer_block_at_two_bits(quick_search):
    spec = importlib.util.spec_from_file_location("example_transformer", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    with jax.numpy_rank_promotion("allow"):  # users may
        found = example.main(steps=150)
    ours, rounded = found["compress_tree"], found["round to nearest"]
    assert found["full precision"] == {"error": 0, "accuracy": found["full precision"]["accuracy"]}
    assert found["full precision"]["accuracy"] > 0.8
    assert ours["error"] < 0.3 * rounded["error"]
    assert ours["accuracy"] > found["full precision"]["accuracy"] - 0.05
