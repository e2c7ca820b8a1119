# SPDX-License-Identifier: Apache-2.0
"""When scales of input channels are expected to pay, and what plans make of it."""

import numpy as np
import pytest

from vqjax.core.granularity import input_scale_gain
from vqjax.core.plan import best_spec, expected_distortion, make_plan


@pytest.mark.parametrize("shape", [(40, 64), (3, 3, 40, 64)])
def test_gain_grows_with_the_spread_of_channels(shape):
    rng = np.random.default_rng(0)
    kernel = rng.choice([-1.0, 1.0], shape)
    assert input_scale_gain(kernel) == 1.0
    sizes = np.where(np.arange(40) % 2, 1.2, 0.8)[:, None]
    assert input_scale_gain(kernel * sizes) == pytest.approx(1 / (1 + 3.5 * 0.2**2))
    assert input_scale_gain(np.zeros(shape)) == 1.0


def test_plans_buy_input_scales_where_they_gain_more_than_they_store():
    shape = (256, 256)
    assert best_spec(shape, 4.2, "attention", input_gain=0.7).input_scales
    assert not best_spec(shape, 4.2, "attention").input_scales
    shapes = {f"unet/block_{i}/attn1/to_q/kernel": shape for i in range(4)}
    first, *others = shapes
    plan = make_plan(shapes, bits=2.2, input_gain={first: 0.7})
    assert plan[first].input_scales
    assert not any(plan[path].input_scales for path in others)
    assert plan.bits_report(shapes).total.per_weight <= 2.2


def test_gain_counts_only_with_the_scales():
    spec = best_spec((256, 256), 2.0, "attention", input_gain=0.5)
    assert spec.input_scales
    assert expected_distortion(spec, 0.5) == pytest.approx(0.5 * expected_distortion(spec))
