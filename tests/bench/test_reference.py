# SPDX-License-Identifier: Apache-2.0
"""The reference's stored bits by formula, and its results by file."""

import json

import pytest

from tests.conftest import golden_params
from vqjax.bench import reference
from vqjax.errors import VqjaxError


@pytest.mark.parametrize("path", golden_params("aq", "reference_results.json"))
def test_the_formula_gives_the_bits_that_the_reference_states(path):
    content = json.loads(path.read_text())
    for cases in reference.read(path.parent).values():
        for case in cases:
            given = content[case["case"]]
            assert case["bits_per_weight"] == pytest.approx(given["bits_per_weight"], abs=6e-3)
            outputs, fan_in = given["shape"]
            window = (3, 3, fan_in // 9) if given["group"] == 9 else (fan_in,)
            limit = reference.limit((*window, outputs), round(case["nominal_bits"]))
            assert limit == pytest.approx(case["bits_per_weight"])


@pytest.mark.parametrize("path", golden_params("aq", "reference_results.json"))
def test_one_beam_is_what_is_compared(path):
    for cases in reference.read(path.parent).values():
        for objective in "SI":
            for nominal in (2, 4):
                case = reference.matching(cases, objective, nominal)
                assert case is not None
                assert case["beam"] == 1


def test_a_folder_without_results_has_none(tmp_path):
    assert reference.read(tmp_path) == {}


@pytest.mark.parametrize("text", ["{", "[]", '{"case": {}}', '{"case": 3}'])
def test_wrong_results_are_named(tmp_path, text):
    (tmp_path / "reference_results.json").write_text(text)
    with pytest.raises(VqjaxError, match=r"reference_results\.json: not the results"):
        reference.read(tmp_path)
