# SPDX-License-Identifier: Apache-2.0
"""Plans: every budget is kept exactly, and every mistake in an edited plan is named."""

import json
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqjax.config import PRESETS
from vqjax.core import grouping
from vqjax.core import plan as plan_lib
from vqjax.core.plan import LayerSpec, Plan, make_plan
from vqjax.core.tensor import VQTensor
from vqjax.errors import VqjaxError
from vqjax.io import keys

SHAPES = {
    "unet/input_blocks_0/conv/kernel": (3, 3, 3, 64),
    "unet/input_blocks_0/conv/bias": (64,),
    "unet/input_blocks_1/res/conv1/kernel": (3, 3, 64, 96),
    "unet/input_blocks_1/res/emb/kernel": (128, 96),
    "unet/input_blocks_1/res/skip/kernel": (1, 1, 64, 96),
    "unet/input_blocks_1/attn/block_0/attn1/to_q/kernel": (96, 96),
    "unet/input_blocks_1/attn/block_0/attn2/to_q/kernel": (96, 96),
    "unet/input_blocks_1/attn/block_0/ff/proj/kernel": (96, 768),
    "unet/out/conv/kernel": (3, 3, 64, 3),
    "first_stage/conv_in/kernel": (3, 3, 3, 32),
    "cond_stage/embedding": (11, 64),
}


def _model_shapes(name):
    shapes = {}
    for entry in keys.table(PRESETS[name]()):
        shape = tuple(entry.shape)
        if entry.path.endswith("/kernel"):
            shape = (*shape[2:], shape[1], shape[0]) if len(shape) == 4 else shape[1::-1]
        shapes[entry.path] = shape
    return shapes


@pytest.mark.parametrize("name", ["digits", "cin256-v2", "lsun_churches"])
@pytest.mark.parametrize("bits", [1.5, 2.0, 4.0])
def test_budgets_are_used_and_never_exceeded(name, bits):
    shapes = _model_shapes(name)
    plan = make_plan(shapes, bits=bits)
    plan.check(shapes)
    total = plan.bits_report(shapes).total
    assert bits - 0.01 < total.per_weight <= bits


@pytest.mark.parametrize("megabytes", [0.45, 0.6])
def test_sizes_are_those_of_the_whole_stored_unet(megabytes):
    shapes = _model_shapes("digits")
    plan = make_plan(shapes, size=int(megabytes * 1e6))
    total = plan.bits_report(shapes).total
    unet = sum(math.prod(shape) for path, shape in shapes.items() if path.startswith("unet/"))
    stored = total.total / 8 + 2 * (unet - total.weights)
    assert 0.995 * megabytes < stored / 1e6 <= megabytes
    assert plan.bits == pytest.approx(total.per_weight, abs=0.01)


def test_candidates_suit_the_layer():
    wide = plan_lib.candidates("conv3x3", (3, 3, 640, 640))
    assert {spec.group for spec in wide} == {1, 3, 9}
    assert {spec.codebook_bits for spec in wide} == {8, 16}
    assert {spec.entries for spec in wide if spec.grouping == "scalar"} == {64, 128, 256}
    integer = plan_lib.candidates("conv3x3", (3, 3, 640, 640), input_scales=True, integer=True)
    assert integer
    assert all(spec.decodes_to_int8 for spec in integer)
    assert LayerSpec("conv3x3", "conv3x3", 9, 4, 16) in wide
    narrow = plan_lib.candidates("attention", (27, 6))  # the last vector of 27 inputs is padded
    assert {spec.grouping for spec in narrow} == {"linear", "scalar"}
    assert not [problem for spec in wide + narrow for problem in spec.problems()]
    assert plan_lib.candidates("first_last", (3, 3, 3, 8))[0].grouping == "scalar"
    # A grid of single weights is stored as int8: bits that say otherwise would be counted wrongly.
    grid = LayerSpec("first_last", "scalar", 1, 1, 256, 16)
    assert grid.problems() == ["codebook_bits 16, expected 8"]


@pytest.mark.parametrize(
    ("shape", "kind"), [((384, 96), "attention"), ((3, 3, 128, 64), "conv3x3")]
)
@pytest.mark.parametrize("limit", [1.5, 2, 4])
def test_the_best_code_of_a_lone_kernel_uses_its_limit(shape, kind, limit):
    spec = plan_lib.best_spec(shape, limit, kind)
    assert not spec.problems()
    assert 0.9 * limit < spec.stored(shape).per_weight <= limit
    more = plan_lib.best_spec(shape, limit + 0.5, kind)
    assert plan_lib.expected_distortion(more) < plan_lib.expected_distortion(spec)
    with pytest.raises(VqjaxError, match=r"stores 0\.1 bits per weight or less"):
        plan_lib.best_spec(shape, 0.1, kind)


def test_the_plan_is_the_best_of_all():
    """Against every combination, costs written out once more."""
    shapes = {
        "unet/a/res/conv1/kernel": (3, 3, 4, 16),
        "unet/a/res/emb/kernel": (64, 16),
        "unet/a/ff/out/kernel": (32, 48),
    }
    sensitivity = dict(zip(shapes, (1.0, 0.3, 4.0)))
    gain = dict(zip(shapes, (0.2, 1.0, 0.5)))
    kinds = ("conv3x3", "time", "feed_forward")
    choices = [plan_lib.candidates(k, shape) for k, shape in zip(kinds, shapes.values())]
    stored, costs = (
        [[f(path, spec) for spec in found] for (path, shape), found in zip(shapes.items(), choices)]
        for f in (
            lambda path, spec: spec.stored(shapes[path]).total,
            lambda path, spec: (
                sensitivity[path] * min(1, gain[path] * plan_lib.expected_distortion(spec))
            ),
        )
    )
    budget = int(3 * sum(math.prod(shape) for shape in shapes.values()))
    stored_XYZ, costs_XYZ = (
        np.array(v[0])[:, None, None] + np.array(v[1])[:, None] + np.array(v[2])
        for v in (stored, costs)
    )
    plan = make_plan(shapes, bits=3, sensitivity=sensitivity, gain=gain)
    found = sum(
        sensitivity[p] * min(1, gain[p] * plan_lib.expected_distortion(s)) for p, s in plan.items()
    )
    assert found == pytest.approx(np.min(costs_XYZ[stored_XYZ <= budget]), rel=1e-9)


def test_kinds_and_groupings():
    plan = make_plan(SHAPES, bits=3)
    found = {path.split("/", 2)[-1]: (spec.kind, spec.grouping) for path, spec in plan.items()}
    assert found == {
        "conv/kernel": ("first_last", "scalar"),
        "res/conv1/kernel": ("conv3x3", "conv3x3"),
        "res/emb/kernel": ("time", "linear"),
        "res/skip/kernel": ("conv1x1", "linear"),
        "attn/block_0/attn1/to_q/kernel": ("attention", "linear"),
        "attn/block_0/attn2/to_q/kernel": ("attention", "linear"),
        "attn/block_0/ff/proj/kernel": ("feed_forward", "linear"),
    }
    assert plan["unet/input_blocks_0/conv/kernel"].entries == 256


def test_sensitive_layers_get_more():
    path = "unet/input_blocks_1/res/conv1/kernel"
    plain = make_plan(SHAPES, bits=2)
    tilted = make_plan(SHAPES, bits=2, sensitivity={path: 1e9})
    code_bits = [p[path].codebooks * 4 / p[path].group for p in (tilted, plain)]
    assert code_bits[0] > code_bits[1]
    assert tilted.bits_report(SHAPES).total.per_weight <= 2


@settings(max_examples=20, deadline=None)
@given(
    shape=st.sampled_from([(3, 3, 5, 7), (1, 1, 9, 3), (17, 6)]),
    codebooks=st.integers(1, 5),
    entries=st.sampled_from([2, 5, 16, 300]),
    codebook_bits=st.sampled_from([8, 16]),
)
def test_dry_run_bytes_are_the_stored_bytes(shape, codebooks, entries, codebook_bits):
    group = 9 if shape[0] == 3 else 8
    spec = LayerSpec("attention", "linear", group, codebooks, entries, codebook_bits)
    outputs, fan_in = grouping.matrix_shape(shape)
    small = codebook_bits == 8
    tensor = VQTensor.pack(
        jnp.zeros((outputs, -(-fan_in // group), codebooks), jnp.int32),
        jnp.zeros((codebooks, entries, group), jnp.int8 if small else jnp.float16),
        jnp.zeros(outputs, jnp.float16),
        shape=shape,
        grouping="linear",
        codebook_scale=jnp.float32(1) if small else None,
    )
    assert spec.stored(shape).total == 8 * tensor.nbytes


def test_json_round_trips_and_is_one_line_per_layer():
    plan = make_plan(SHAPES, bits=2.5)
    text = plan.to_json()
    assert Plan.from_json(text) == plan
    assert len(text.splitlines()) == len(plan) + 6


def test_impossible_budgets_say_what_is_possible():
    with pytest.raises(VqjaxError, match=r"0.5 bits per weight is too little: the least pos") as e:
        make_plan(SHAPES, bits=0.5)
    least = float(re.findall(r"possible is ([\d.]+) bits", str(e.value))[0])
    assert make_plan(SHAPES, bits=least).bits_report(SHAPES).total.per_weight <= least
    with pytest.raises(VqjaxError, match=r"0.005 MB is too little: the least pos") as e:
        make_plan(SHAPES, size=5000)
    least = float(re.findall(r"([\d.]+) MB with all else", str(e.value))[0])
    assert len(make_plan(SHAPES, size=round(least * 1e6)))
    with pytest.raises(VqjaxError, match="a plan needs a budget: bits per weight or a size"):
        make_plan(SHAPES)
    with pytest.raises(VqjaxError, match="no U-Net kernels found"):
        make_plan({"first_stage/conv_in/kernel": (3, 3, 3, 8)}, bits=2)
    with pytest.raises(VqjaxError, match="no rule says what kind"):
        plan_lib.make_plan({"unet/novel/kernel": (8, 8)}, bits=2)


def test_edited_plans_are_checked_field_by_field():
    data = json.loads(make_plan(SHAPES, bits=2.5).to_json())
    names = list(data["layers"])
    data["layers"][names[1]]["codebooks"] = 0
    data["layers"][names[2]]["entries"] = "many"
    data["layers"][names[3]]["colour"] = 3
    data["layers"][names[5]]["grouping"] = ["linear"]
    del data["layers"][names[4]]["kind"]
    with pytest.raises(VqjaxError) as caught:
        Plan.from_json(json.dumps(data))
    text = str(caught.value)
    assert f"{names[1]}: codebooks 0, expected a whole number from 1 to 16" in text
    assert f"{names[2]}: entries 'many', expected a whole number from 2 to 4096" in text
    assert f"{names[3]}: unknown field 'colour'" in text
    assert f"{names[5]}: grouping ['linear'], expected one of" in text
    assert f"{names[4]}: missing field 'kind'" in text
    with pytest.raises(VqjaxError, match=r"the plan is no JSON: .*; take the plan\.json of a run"):
        Plan.from_json("{")
    with pytest.raises(VqjaxError, match=r'no "layers" object; take the plan\.json of a run'):
        Plan.from_json("[]")
    with pytest.raises(VqjaxError, match="plan version 9, expected 1"):
        Plan.from_json('{"version": 9, "layers": {}}')


def test_plans_for_other_models_name_every_layer():
    plan = make_plan(SHAPES, bits=2.5)
    other = {**SHAPES, "unet/extra/kernel": (8, 8), "unet/input_blocks_1/res/conv1/kernel": (8, 8)}
    del other["unet/out/conv/kernel"]
    with pytest.raises(VqjaxError) as caught:
        plan.check(other)
    text = str(caught.value)
    assert "unet/extra/kernel: missing in the plan" in text
    assert "unet/out/conv/kernel: the model has no such kernel" in text
    assert "res/conv1/kernel: grouping conv3x3 for a kernel (8, 8)" in text
