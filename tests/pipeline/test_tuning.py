# SPDX-License-Identifier: Apache-2.0
"""Between what is stored and what is trained, and what is refused before work starts."""

import dataclasses
import functools
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vqjax
from tests.io import models as small
from vqjax import progress
from vqjax.core import grouping, scalar, tree
from vqjax.core.activations import Activations
from vqjax.core.model import Model
from vqjax.core.plan import LayerSpec, Plan, kernel_shapes, make_plan
from vqjax.errors import QualityGateError, VqjaxError
from vqjax.io import native
from vqjax.pipeline import quantize, tuning
from vqjax.settings import Calibration, QuantizeSettings, Tuning

pytestmark = pytest.mark.xdist_group("quantize tiny")


@functools.cache
def compressed() -> Model:
    """Every kernel rounded, everything else in float16, ranges of two timesteps."""
    flat = tree.flatten(small.dense(small.TINY, np.float16).params)
    kernels = kernel_shapes({path: leaf.shape for path, leaf in flat.items()})
    for path, shape in kernels.items():
        flat[path] = scalar.round_to_grid(grouping.to_matrix(np.asarray(flat[path])), shape, 16)
    activations = Activations(
        timesteps_T=jnp.array([1, 501], jnp.int32),
        log2_steps={path: jnp.array([-4.0, -3.5]) for path in kernels},
        zeros={path: jnp.array([100.0, 30.0]) for path in kernels},
        bits=8,
    )
    return Model(small.TINY, {**tree.unflatten(flat), "activations": activations})


def test_what_was_not_trained_is_stored_as_before():
    before = compressed()
    small.assert_equal(
        *(
            dataclasses.replace(m, params={k: v for k, v in m.params.items() if k != "activations"})
            for m in (tuning.model_of(tuning.student_of(before), before), before)
        )
    )
    after = tuning.model_of(tuning.student_of(before), before).params["activations"]
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before.params["activations"])):
        np.testing.assert_array_equal(a, b)


def test_without_ranges_there_are_none_to_train():
    plain = dataclasses.replace(
        compressed(), params={k: v for k, v in compressed().params.items() if k != "activations"}
    )
    student = tuning.student_of(plain)
    assert student.ranges is None
    assert "activations" not in tuning.model_of(student, plain).params
    optimizer: Any = tuning.ranges_optimizer(3, 1.0)
    assert optimizer.update(None, optimizer.init(None), None)[0] is None


def test_numbers_beyond_float16_are_cut_off_not_lost():
    student = tuning.student_of(compressed())
    bias = student.weights["unet"]["out"]["conv"]["bias"]
    student.weights["unet"]["out"]["conv"]["bias"] = bias + 1e6
    stored = tuning.model_of(student, compressed()).params["unet"]["out"]["conv"]["bias"]
    assert np.isfinite(np.asarray(stored)).all()


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "small.safetensors"
    native.save_model(path, small.dense(small.TINY))
    return str(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"act_bits": 9}, "--act-bits 9: expected 2 to 8, or 32"),
        ({"tune_steps": -1}, "--tune-steps -1: expected 0 or more"),
        ({"tuning": Tuning(rate=0.0)}, "a rate above 0"),
        ({"tuning": Tuning(rate=math.nan)}, "a rate above 0"),
        ({"tuning": Tuning(batch=0)}, "1 or more of batch"),
        ({"tuning": Tuning(trajectories=1), "tune_steps": 2}, "1 trajectories of 25 .* 25 pairs"),
        ({"calibration": Calibration(images=0)}, "--calibration: found .*images=0.*1 or more"),
        ({"calibration": Calibration(batch=0)}, "1 or more of images and batch"),
        ({"calibration": Calibration(guidance=math.nan)}, "a finite guidance"),
        ({"calibration": Calibration(steps=0)}, "--calibration.steps: found 0, expected 1 to 999"),
        ({"seed": -1}, "--seed -1: expected 0 to 4294967295"),
        ({"seed": 1.5}, "--seed 1.5: expected 0 to"),
        ({"seed": np.int64(-1)}, "--seed -1: expected 0 to"),
        ({"memory": math.nan}, "--memory nan: expected a number of GB above 0"),
        ({"export": pathlib.Path("model.npz")}, r"--export model.npz: .*\.safetensors"),
        ({"export": pathlib.Path("absent/m.safetensors")}, "no folder absent; make it first"),
        ({"bits": 9.0, "samples": 1}, "--bits 9: .*; --samples 1: "),
    ],
)
def test_unusable_settings_are_refused(source, settings, message):
    with pytest.raises(VqjaxError, match=message):
        quantize.prepare(QuantizeSettings(source=source, **settings))


def test_other_tunings_start_from_the_same_compressed_layers(source):
    def record(**changes) -> dict[str, Any]:
        return quantize.record_of(quantize.prepare(QuantizeSettings(source=source, **changes)))

    first = record(tune_steps=3)
    for other in (record(tune_steps=2), record(tune_steps=3, tuning=Tuning(rate=0.3))):
        assert other["fingerprint"] == first["fingerprint"]
        assert other["last_stages"] != first["last_stages"]
    assert record(tune_steps=3, seed=1)["fingerprint"] != first["fingerprint"]


def test_one_of_several_connected_processes_does_not_tune(source, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)  # also of processes that left each other
    quantize.prepare(QuantizeSettings(source=source, tune_steps=1))
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    with pytest.raises(VqjaxError, match=r"--tune-steps 1: not below jax\.distributed; ask for 0"):
        quantize.prepare(QuantizeSettings(source=source, tune_steps=1))
    quantize.prepare(QuantizeSettings(source=source, tune_steps=0))


def test_an_export_does_not_replace_the_source(source):
    with pytest.raises(VqjaxError, match=r"--export .*small.safetensors: would replace the source"):
        quantize.prepare(QuantizeSettings(source=source, export=pathlib.Path(source)))


def test_a_plan_that_integers_cannot_run_is_refused(source, tmp_path):
    job = quantize.prepare(QuantizeSettings(source=source, bits=3))
    assert all(spec.decodes_to_int8 for spec in job.plan.values())
    path = "unet/time_embed/dense2/kernel"
    layers = job.plan.layers | {path: LayerSpec("time", "linear", 8, 4, 16, 16)}
    file = tmp_path / "plan.json"
    file.write_text(Plan(layers).to_json())
    with pytest.raises(VqjaxError, match="--act-bits 32") as error:
        quantize.prepare(QuantizeSettings(source=source, plan=file))
    assert f"{path}: codebook_bits 16" in str(error.value)
    quantize.prepare(QuantizeSettings(source=source, plan=file, act_bits=32))


@pytest.mark.slow
def test_tuning_is_a_stage_of_a_run(tmp_path, monkeypatch, quick_search):
    """With inputs of four bits; those of eight have tests of the whole elsewhere."""
    source, file = tmp_path / "tiny.safetensors", tmp_path / "plan.json"
    native.save_model(source, small.dense(small.TINY))
    kernels = kernel_shapes(quantize.prepare(QuantizeSettings(source=str(source))).shapes)
    layers = dict.fromkeys(kernels, LayerSpec("first_last", "scalar", 1, 1, 256, 8))
    searched, bias = "unet/middle_block/res1/conv1/kernel", "unet/out/conv/bias"
    layers[searched] = LayerSpec("conv3x3", "conv3x3", 9, 2, 16, 8)
    file.write_text(Plan(layers).to_json())
    untuned, student_of = [], tuning.student_of
    monkeypatch.setattr(tuning, "student_of", lambda m: (untuned.append(m), student_of(m))[1])
    units = []
    with progress.watched(units.append):
        run = vqjax.quantize(
            source,
            plan=file,
            out=tmp_path / "out",
            samples=4,
            act_bits=4,
            calibration=Calibration(images=2, steps=3, batch=2),
            tuning=Tuning(batch=2, trajectories=2, rate=1.0),  # that of eight bits moves no float16
            tune_steps=2,
        )
    assert units.count("tune") == 2
    assert run.report["tuning"] == {"steps": 2}
    assert run.report["seconds"]["tune"] > 0
    old, new = (tree.flatten(model.params) for model in (*untuned, vqjax.load(run.out)))
    assert np.any(np.asarray(old[bias]) != np.asarray(new[bias]))
    moved = [np.any(np.asarray(old[path].codes) != np.asarray(new[path].codes)) for path in layers]
    assert sum(moved) > 0
    assert old[searched].nbytes == new[searched].nbytes
    assert vqjax.load(run.out).params["activations"].bits == 4
    rounded, integers = (
        vqjax.sample(run.out, [1, 2], steps=2, integer=integer).astype(int)
        for integer in (False, True)
    )
    assert np.abs(rounded - integers).max() <= 2  # levels, of 255


def test_rates_shrink_with_the_errors_of_codes():
    for bits, rate in ((1.5, 1.0), (2.0, 1.0), (4.0, 0.125), (6.0, 0.125**2)):
        assert tuning.rate_of(Tuning(), bits) == rate
        assert tuning.rate_of(Tuning(rate=0.7), bits) == 0.7


def test_many_bits_are_spent_on_single_weights():
    shapes = {"unet/a/conv1/kernel": (3, 3, 64, 64), "unet/out/conv/kernel": (3, 3, 64, 3)}
    spec = make_plan(shapes, bits=8.2, integer=True)["unet/a/conv1/kernel"]
    assert (spec.grouping, spec.entries) == ("scalar", 256)


def test_a_missed_quality_gate_has_its_own_exit_code(tmp_path):
    wanted = QuantizeSettings(out=tmp_path, least_psnr=30.0)
    quantize._check_quality(wanted, {"fidelity": {"psnr": 30.5}})
    with pytest.raises(QualityGateError, match=r"PSNR 29.50 dB .* --least-psnr 30") as error:
        quantize._check_quality(wanted, {"fidelity": {"psnr": 29.5}})
    assert error.value.exit_code == 4
