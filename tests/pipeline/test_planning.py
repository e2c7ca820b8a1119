# SPDX-License-Identifier: Apache-2.0
"""Plans from measurements, and plans that a user got wrong."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.io import models as small
from vqjax.core import grouping
from vqjax.core.compress import Effort, compress_layer
from vqjax.core.plan import LayerSpec, Plan, expected_distortion, make_plan
from vqjax.core.shrinkage import DEFAULT
from vqjax.errors import VqjaxError
from vqjax.io import native
from vqjax.pipeline import activations, planning, quantize
from vqjax.settings import QuantizeSettings

QUICK = Effort(start_steps=4, feedback_rounds=1, descent_rounds=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "small.safetensors"
    native.save_model(path, small.dense(small.CLASSES))
    return path


@pytest.fixture(scope="module")
def job(source) -> quantize.Job:
    return quantize.prepare(QuantizeSettings(source=str(source), bits=2.5))


def _measured(job, **sensitive):
    outlooks = {path: planning.Outlook(DEFAULT, False, 0.3, 0.2, 1.0, {}) for path in job.plan}
    costs = {path: sensitive.get(path.split("/")[-2], 1.0) for path in job.plan}
    return outlooks, costs


def test_measured_plans_keep_the_budget_and_favour_the_sensitive(job):
    planned = planning.planned(job, *_measured(job, to_v=100.0))
    assert planned.plan.bits_report(job.shapes).total.per_weight <= 2.5
    values, outs = (
        [s.stored(job.shapes[p]).per_weight for p, s in planned.plan.items() if name in p]
        for name in ("attn1/to_v", "attn1/to_out")
    )
    assert min(values) > max(outs)


def test_a_users_plan_is_not_replaced(job, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(job.plan.to_json())
    wanted = dataclasses.replace(job.settings, plan=path)
    given = dataclasses.replace(job, settings=wanted)
    assert planning.planned(given, *_measured(job, to_v=100.0)) is given


def test_bits_of_an_edited_plan_are_those_that_it_stores(source, job, tmp_path):
    """Rates of tuning and the baseline's codes follow them."""
    rich = make_plan(job.shapes, bits=4.5, integer=True)
    path = tmp_path / "plan.json"
    path.write_text(Plan(dict(rich.items()), bits=2.0).to_json())
    given = quantize.prepare(QuantizeSettings(source=str(source), plan=path))
    assert given.bits == rich.bits_report(job.shapes).total.per_weight > 4
    assert given.scalar_bits == 5


def test_the_record_says_what_the_plan_was_made_from(job, capsys):
    outlooks, costs = _measured(job)
    rows = planning.record(job.plan, job.shapes, outlooks, costs)
    assert json.loads(planning.to_json(rows)) == rows
    assert len(planning.to_json(rows).splitlines()) == len(rows) + 2
    path, spec = list(job.plan.items())[5]
    assert rows[path]["expected_output_mse"] == min(1, 0.3 * expected_distortion(spec))
    planning.show(job.plan, rows)
    printed = capsys.readouterr().out
    assert printed.count(f"{spec.codebooks} x {spec.entries}") > 0
    assert printed.count("\n") > len(rows)


def test_sizes_bound_the_stored_unet(source, job):
    megabytes = 0.15
    sized = quantize.prepare(QuantizeSettings(source=str(source), size=megabytes))
    kernels = sized.plan.bits_report(job.shapes).total
    rest = sum(
        int(np.prod(shape))
        for path, shape in job.shapes.items()
        if path.startswith("unet/") and path not in job.plan
    )
    ranges = activations.stored_bytes(job.model.config, job.shapes, job.settings.calibration)
    assert 0.9 * megabytes < (kernels.total / 8 + 2 * rest + ranges) / 1e6 <= megabytes
    assert sized.bits == sized.plan.bits


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": -1}, "--size -1: expected a number of MB above 0"),
        ({"size": 0.001}, r"0.001 MB is too little: the least possible is [\d.]+ bits per weight"),
        ({"bits": 0.5}, r"0.5 bits per weight is too little: the least possible is [\d.]+ bits"),
    ],
)
def test_budgets_that_cannot_be_kept_are_refused_before_any_work(source, settings, message):
    with pytest.raises(VqjaxError, match=message):
        quantize.prepare(QuantizeSettings(source=str(source), **settings))


def test_plans_that_do_not_fit_are_refused_before_any_work(source, job, tmp_path):
    path = tmp_path / "plan.json"
    wanted = QuantizeSettings(source=str(source), plan=path)
    with pytest.raises(VqjaxError, match=r"--plan .*plan.json: No such file"):
        quantize.prepare(wanted)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(VqjaxError, match=r"--plan .*plan.json: no text; expected the plan.json"):
        quantize.prepare(wanted)
    layers = dict(job.plan)
    spec = layers.pop("unet/out/conv/kernel")
    path.write_text(Plan({**layers, "unet/novel/kernel": spec}).to_json())
    with pytest.raises(VqjaxError) as caught:
        quantize.prepare(wanted)
    assert "unet/out/conv/kernel: missing in the plan" in str(caught.value)
    assert "unet/novel/kernel: the model has no such kernel" in str(caught.value)
    text = job.plan.to_json().replace('"codebooks": 3', '"codebooks": 99')
    assert text != job.plan.to_json()
    path.write_text(text)
    with pytest.raises(VqjaxError, match="codebooks 99, expected a whole number from 1 to 16"):
        quantize.prepare(wanted)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((27, 6), LayerSpec("conv1x1", "linear", 8, 2, 16)),
        ((3, 3, 3, 6), LayerSpec("conv3x3", "conv3x3", 18, 2, 16)),
        ((16, 4), LayerSpec("attention", "linear", 8, 1, 256)),
    ],
    ids=["27 inputs in vectors of 8", "3 windows in vectors of 18", "8 vectors, 256 entries"],
)
def test_awkward_sizes_are_compressed_correctly(shape, spec):
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal(shape).astype(np.float32)
    outputs, fan_in = grouping.matrix_shape(shape)
    x_RN = rng.standard_normal((200, fan_in)).astype(np.float32)
    moment_NN = x_RN.T @ x_RN / len(x_RN)
    tensor, stats = compress_layer(
        jnp.asarray(kernel), moment_NN, spec, key=jax.random.key(0), effort=QUICK
    )
    decoded = np.asarray(tensor.decode(jnp.float32))
    assert decoded.shape == shape
    assert 8 * tensor.nbytes == spec.stored(shape).total
    error_ON, w_ON = grouping.to_matrix(kernel - decoded), grouping.to_matrix(kernel)
    error = np.vdot(error_ON @ moment_NN, error_ON) / np.vdot(w_ON @ moment_NN, w_ON)
    assert stats.rel_output_mse == pytest.approx(error, rel=1e-3, abs=1e-6)
    # More entries than vectors: each can have one of its own, up to what float16 rounds.
    assert error < (0.6 if spec.entries == 16 else 1e-2)
    assert outputs == len(w_ON)
