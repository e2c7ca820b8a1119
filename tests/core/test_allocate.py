# SPDX-License-Identifier: Apache-2.0
"""Allocation: the optimum of small instances, a good choice of large ones, never over budget."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqjax.core.allocate import Option, allocate
from vqjax.errors import VqjaxError


def _sums(options, chosen):
    picked = [options[name][place] for name, place in chosen.items()]
    return sum(o.bits for o in picked), sum(o.cost for o in picked)


def _brute(options, budget):
    costs = [
        sum(option.cost for option in combination)
        for combination in itertools.product(*options.values())
        if sum(option.bits for option in combination) <= budget
    ]
    return min(costs, default=math.inf)


option = st.builds(Option, st.integers(1, 40), st.floats(0, 10, width=32))
instances = st.lists(st.lists(option, min_size=1, max_size=5), min_size=1, max_size=5)


@settings(max_examples=200, deadline=None)
@given(instances, st.integers(1, 150))
def test_small_instances_are_solved_exactly(instance, budget):
    options = {str(i): layer for i, layer in enumerate(instance)}
    best = _brute(options, budget)
    if best == math.inf:
        with pytest.raises(VqjaxError, match="is too little: the least possible is"):
            allocate(options, budget)
        return
    chosen = allocate(options, budget)
    assert list(chosen) == list(options)
    bits, cost = _sums(options, chosen)
    assert bits <= budget
    assert cost == pytest.approx(best, rel=1e-9, abs=1e-9)


def _network(seed, layers, choices):
    """Layers whose costs fall as 2^(-2 R), with weights and sensitivities over many octaves."""
    rng = np.random.default_rng(seed)
    options = {}
    for i in range(layers):
        weights, sensitivity = int(2 ** rng.uniform(8, 20)), 2 ** rng.uniform(-10, 2)
        rates = np.sort(rng.uniform(0.4, 5, choices))
        options[f"layer{i}"] = [
            Option(int(weights * r), sensitivity * 2 ** (-2 * r) * rng.uniform(1, 1.3))
            for r in rates
        ]
    return options


@pytest.mark.parametrize("seed", range(5))
def test_middle_sized_instances_are_solved_exactly(seed):
    options = _network(seed, layers=8, choices=5)
    budget = int(0.5 * sum(layer[-1].bits for layer in options.values()))
    bits, cost = _sums(options, allocate(options, budget))
    assert bits <= budget
    assert cost == pytest.approx(_brute(options, budget), rel=1e-9)


def test_large_instances_use_the_budget_and_reach_the_bound():
    options = _network(0, layers=300, choices=30)
    budget = int(0.4 * sum(layer[-1].bits for layer in options.values()))
    bits, cost = _sums(options, allocate(options, budget))
    assert bits <= budget
    # Any price gives a bound; a fine grid of prices nearly gives the best one.
    prices = np.exp2(np.linspace(-30, -10, 4000))[:, None]
    bounds = -prices[:, 0] * budget
    for layer in options.values():
        bounds += np.min([o.cost for o in layer] + prices * [o.bits for o in layer], axis=1)
    assert np.max(bounds) <= cost <= np.max(bounds) * 1.001


def test_more_budget_never_costs_more():
    options = _network(1, layers=40, choices=12)
    total = sum(layer[-1].bits for layer in options.values())
    costs = [_sums(options, allocate(options, int(share * total)))[1] for share in (0.3, 0.31, 0.5)]
    assert costs[0] >= costs[1] >= costs[2]


def test_useless_options_are_never_chosen():
    options = {"a": [Option(10, 1.0), Option(20, 2.0), Option(10, 3.0)], "b": [Option(5, 0.0)]}
    assert allocate(options, 100) == {"a": 0, "b": 0}
    with pytest.raises(VqjaxError, match=r"a budget of 14 bits is too little.*possible is 15"):
        allocate(options, 14)
