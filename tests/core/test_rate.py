# SPDX-License-Identifier: Apache-2.0
"""The rate-distortion bound against closed forms and against the reference's own figures."""

import json

import numpy as np
import pytest

from tests.conftest import golden_params
from vqjax.core.rate import relative_bound, reverse_water_filling


@pytest.mark.parametrize("bits", [0.0, 0.5, 2.0, 4.0])
def test_equal_eigenvalues_give_the_distortion_of_one_gaussian(bits):
    found = reverse_water_filling(np.full(7, 3.0), bits)
    assert found == pytest.approx(3 * 2 ** (-2 * bits), rel=1e-9)


def test_a_component_below_the_water_gets_no_bits():
    # All bits go to the first of two: 1/2 * 1/2 log2(4 / theta) = 1/2 gives theta = 1.
    assert reverse_water_filling(np.array([4.0, 0.5]), 0.5) == pytest.approx((1.0 + 0.5) / 2)


def test_many_bits_reach_every_component():
    spectrum_N = np.array([9.0, 1.0, 0.1])
    theta = np.exp(np.mean(np.log(spectrum_N))) * 2 ** (-2 * 6)
    assert reverse_water_filling(spectrum_N, 6) == pytest.approx(theta, rel=1e-9)


def test_zero_and_slightly_negative_eigenvalues_cost_nothing():
    # Half of the components are silent: the others have twice the bits.
    found = reverse_water_filling(np.array([1.0, 1.0, 0.0, -1e-9]), 1.0)
    assert found == pytest.approx(0.5 * 2**-4)
    assert reverse_water_filling(np.zeros(3), 2.0) == 0.0


def test_the_relative_bound_does_not_know_the_units_of_the_inputs():
    spectrum_N = np.array([4.0, 0.5])
    assert relative_bound(spectrum_N, 0.5) == pytest.approx((1.0 + 0.5) / 4.5)
    assert relative_bound(1e6 * spectrum_N, 0.5) == pytest.approx(1.5 / 4.5)
    assert relative_bound(np.full(5, 7.0), 2) == pytest.approx(2**-4)
    assert relative_bound(np.array([0.0, -1e-9]), 2) == 0.0


@pytest.mark.parametrize("path", golden_params("aq", "reference_results.json"))
def test_the_bounds_of_the_reference_are_found_again(path):
    content = json.loads(path.read_text())
    cases = [case for case in content.values() if "input" in case]
    inputs = {tuple(case["shape"]): case["input"] for case in cases}
    checked = 0
    for bounds in content["_bounds"].values():
        with np.load(path.parent / inputs[tuple(bounds["shape"])]) as arrays:
            if "XTX" not in arrays:
                continue
            spectrum_N = np.linalg.eigvalsh(arrays["XTX"].astype(np.float64))
        for bits in (2, 4):
            found = relative_bound(spectrum_N, bits)
            assert found == pytest.approx(bounds[f"rd{bits}"]["rel_act"], rel=0.01)
            checked += 1
    assert checked
