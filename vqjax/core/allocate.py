# SPDX-License-Identifier: Apache-2.0
"""One option for every layer, least cost under a total of bits: a multiple-choice knapsack.

Dimension key:  S states, partial choices that could still become the best one

A Lagrange multiplier, the price of a bit, splits the problem into layers: at the right price each
takes the option of least cost + price * bits (Everett, Operations Research 11, 1963; for bits of a
coder: Shoham and Gersho, IEEE TASSP 36, 1988). What is left between the best of these choices and
the bound that the price implies is closed by a dynamic programme over the few choices whose own
bound does not exceed it.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vqjax.errors import VqjaxError

_MOST_STATES = 4096


class Option(NamedTuple):
    """What one layer may take.

    Attributes:
      bits: stored bits.
      cost: what the layer then adds to the sum that is minimized.
    """

    bits: int
    cost: float


class _Lowered(NamedTuple):
    """One layer at a price: its useful options, least cost + price * bits first.

    Attributes:
      options: their places in what the caller gave.
      bits, cost: of the options.
      excess: cost + price * bits above the least.
    """

    options: np.ndarray
    bits: np.ndarray
    cost: np.ndarray
    excess: np.ndarray


def allocate(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, int]:
    """Chooses one option of every layer so that the sum of costs is least.

    Exact where few choices are near the optimum. Where more than 4096 partial choices are left at
    a layer, of those with nearly the same bits the one with the best bound goes on; the result then
    is at least as good as what the price alone gives, one option of one layer away from the bound.

    Args:
      options: by layer, at least one each; costs finite.
      budget: most bits of all layers together.

    Returns:
      The place of the chosen option, by layer.

    Raises:
      VqjaxError: if even the smallest options exceed the budget.
    """
    frontiers = {name: _frontier(found) for name, found in options.items()}
    least = sum(options[name][front[0]].bits for name, front in frontiers.items())
    if least > budget:
        raise VqjaxError(f"a budget of {budget} bits is too little: the least possible is {least}")
    chosen, price = _greedy(options, frontiers, budget)
    layers = {name: _lowered(options[name], frontiers[name], price) for name in options}
    spent = sum(options[name][place].cost for name, place in chosen.items())
    bound = sum(float(np.min(layer.cost + price * layer.bits)) for layer in layers.values())
    better = _search(layers, budget, spent - (bound - price * budget))
    cost = sum(options[name][place].cost for name, place in better.items())
    return better if better and cost < spent else chosen


def _frontier(options: Sequence[Option]) -> list[int]:
    """Places of the options that no other one beats, by rising bits and falling cost."""
    order = sorted(range(len(options)), key=lambda place: (*options[place], place))
    kept: list[int] = []
    for place in order:
        if not kept or options[place].cost < options[kept[-1]].cost:
            kept.append(place)
    return kept


def _hull(options: Sequence[Option], frontier: list[int]) -> list[int]:
    """The lower convex hull of a frontier."""
    hull: list[int] = []
    for place in frontier:
        while len(hull) > 1 and _gain(options, hull[-2], hull[-1]) <= _gain(
            options, hull[-1], place
        ):
            hull.pop()
        hull.append(place)
    return hull


def _gain(options: Sequence[Option], first: int, then: int) -> float:
    """Cost saved by each further bit."""
    a, b = options[first], options[then]
    return (a.cost - b.cost) / (b.bits - a.bits)


def _greedy(
    options: Mapping[str, Sequence[Option]], frontiers: Mapping[str, list[int]], budget: int
) -> tuple[dict[str, int], float]:
    """Steps along the hulls, best gain for a bit first; returns the choice and the final price.

    Steps that do not fit are left out, later ones may still fit. The price is the gain of the first
    that did not fit: at it, the bound is that of the linear relaxation.
    """
    steps = []
    for name, frontier in frontiers.items():
        hull = _hull(options[name], frontier)
        for first, then in itertools.pairwise(hull):
            steps.append((-_gain(options[name], first, then), name, first, then))
    chosen = {name: frontier[0] for name, frontier in frontiers.items()}
    left = budget - sum(options[name][place].bits for name, place in chosen.items())
    price = 0.0
    for gain, name, first, then in sorted(steps):
        needed = options[name][then].bits - options[name][first].bits
        if chosen[name] == first and needed <= left:
            chosen[name], left = then, left - needed
        elif price == 0:
            price = -gain
    return chosen, price


def _lowered(options: Sequence[Option], frontier: list[int], price: float) -> _Lowered:
    bits = np.array([options[place].bits for place in frontier], np.int64)
    cost = np.array([options[place].cost for place in frontier], np.float64)
    total = cost + price * bits
    order = np.argsort(total, kind="stable")
    excess = total - total[order[0]]
    return _Lowered(np.array(frontier)[order], bits[order], cost[order], excess[order])


def _search(layers: dict[str, _Lowered], budget: int, gap: float) -> dict[str, int]:
    """Dynamic programme over all choices whose excess stays below `gap`; empty if there is none.

    A better choice than one whose cost is `gap` above the bound cannot be outside of them.
    """
    slack = gap * (1 - 1e-9)
    least = np.array([layer.bits.min() for layer in layers.values()])
    later = np.append(np.cumsum(least[::-1])[::-1][1:], 0)  # least bits of the layers after each
    bits_S, cost_S, excess_S = np.zeros(1, np.int64), np.zeros(1), np.zeros(1)
    trail = []
    for layer, needed in zip(layers.values(), later):
        states, places = np.nonzero(excess_S[:, None] + layer.excess <= slack)
        bits_S, cost_S = bits_S[states] + layer.bits[places], cost_S[states] + layer.cost[places]
        excess_S = excess_S[states] + layer.excess[places]
        kept = _undominated(bits_S, cost_S, budget - int(needed))
        kept = kept[_thinned(bits_S[kept], excess_S[kept])]
        bits_S, cost_S, excess_S = bits_S[kept], cost_S[kept], excess_S[kept]
        trail.append((states[kept], layer.options[places[kept]]))
    if not len(cost_S):
        return {}
    state, chosen = int(np.argmin(cost_S)), {}
    for name, (before, options) in zip(reversed(layers), reversed(trail)):
        chosen[name], state = int(options[state]), int(before[state])
    return {name: chosen[name] for name in layers}


def _undominated(bits_S: np.ndarray, cost_S: np.ndarray, most: int) -> np.ndarray:
    """States within the budget that no other one beats in both bits and cost."""
    order = np.lexsort((cost_S, bits_S))
    order = order[bits_S[order] <= most]
    before = np.minimum.accumulate(cost_S[order])
    return order[np.append(True, cost_S[order][1:] < before[:-1])] if len(order) else order


def _thinned(bits_S: np.ndarray, excess_S: np.ndarray) -> np.ndarray:
    """The best of the states of nearly the same bits, where there are too many of them."""
    if len(bits_S) <= _MOST_STATES:
        return np.arange(len(bits_S))
    bins_S = (bits_S - bits_S.min()) * _MOST_STATES // (np.ptp(bits_S) + 1)
    order = np.lexsort((excess_S, bins_S))
    return order[np.append(True, np.diff(bins_S[order]) > 0)]
