# SPDX-License-Identifier: Apache-2.0
"""Figures of layers against numpy on explicit rows; killed in between, they are the same."""

import dataclasses

import numpy as np
import pytest

from tests.io import models as small
from tests.pipeline import test_calibrate
from vqjax.core import grouping, tree
from vqjax.core.compress import LayerStats
from vqjax.core.moments import corrected_bias, of_images
from vqjax.core.plan import LayerSpec, Plan
from vqjax.core.scalar import ScalarLayer, round_to_grid
from vqjax.core.shrinkage import DEFAULT
from vqjax.io import native
from vqjax.pipeline import calibrate, estimate, layer_figures, planning, quantize
from vqjax.pipeline.journal import Journal
from vqjax.settings import Calibration, QuantizeSettings

CALIBRATION = Calibration(images=2, steps=4, batch=2)
PATHS = (
    "unet/input_blocks_0/conv/kernel",
    "unet/output_blocks_0/res/skip/kernel",
    "unet/input_blocks_1/res/conv1/kernel",
)
CODED = LayerSpec("first_last", "scalar", 1, 1, 256, 8)


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> quantize.Job:
    path = tmp_path_factory.mktemp("source") / "small.safetensors"
    native.save_model(path, small.dense(small.TINY))
    job = quantize.prepare(QuantizeSettings(source=str(path), calibration=CALIBRATION, bits=3))
    return dataclasses.replace(job, plan=Plan(dict.fromkeys(PATHS, CODED)))


@pytest.fixture
def journal(tmp_path) -> Journal:
    return Journal(tmp_path, {"status": "running", "seconds": {}})


@pytest.fixture(scope="module")
def done(job) -> quantize.Layers:
    """Layers rounded to few values; biases corrected for some mean, as if calibrated on it."""
    flat, rng = tree.flatten(job.model.params), np.random.default_rng(0)
    done = quantize.Layers({}, {}, {}, {}, {})
    for path in PATHS:
        kernel = np.asarray(flat[path])
        w_ON = grouping.to_matrix(kernel)
        done.quantized[path] = round_to_grid(w_ON, kernel.shape, 8)
        coarse = round_to_grid(w_ON, kernel.shape, 4)
        done.scalar[path] = ScalarLayer(coarse.decode(), 2.0, 0.1, 0.1)
        bias = path.replace("kernel", "bias")
        if path.endswith(("conv/kernel", "conv1/kernel")):
            q = np.asarray(done.quantized[path].decode())
            mean_N = rng.normal(size=w_ON.shape[1])
            found = corrected_bias(np.asarray(flat[bias]), kernel, q, mean_N)
            done.biases[bias] = found.astype(np.float16)
    assert 0 < len(done.biases) < len(PATHS)
    return done


def _visited() -> dict[str, np.ndarray]:
    """Two timesteps of two images, as if sampled."""
    x_TBHWC = np.random.default_rng(5).normal(size=(2, 2, *small.TINY.latent_shape))
    return {"x": x_TBHWC.astype(np.float32), "t": np.array([501, 1]), "ids": np.array([2, 0])}


def _weigh_alike(journal) -> None:
    journal.store("timesteps", {"weights": np.ones(2), "timesteps": np.array([501, 1])}, {})


def test_held_out_errors_are_those_of_the_rows(job, done, journal, monkeypatch):
    arrays = _visited()
    journal.store("held-out-trajectories", arrays, {})
    _weigh_alike(journal)
    found = layer_figures.held_out(job, journal, done)
    assert list(found) == list(job.plan)
    monkeypatch.setattr(test_calibrate, "PATHS", PATHS)
    flat = tree.flatten(job.model.params)
    rows = test_calibrate._rows_by_image(job.model, [tuple(arrays.values())])
    for path, rows_IRN in rows.items():
        rows_RN = rows_IRN.reshape(-1, rows_IRN.shape[-1])
        bias = path.replace("kernel", "bias")
        before_O = np.asarray(flat[bias], np.float64) if bias in done.biases else 0.0
        after_O = done.biases.get(bias, 0.0)

        def outputs(kernel, bias_O, rows_RN=rows_RN):
            return rows_RN @ grouping.to_matrix(np.asarray(kernel, np.float64)).T + bias_O

        energy = np.sum(outputs(flat[path], 0.0) ** 2)
        error_RO = outputs(flat[path], before_O) - outputs(done.quantized[path].decode(), after_O)
        assert found[path].quantized == pytest.approx(np.sum(error_RO**2) / energy, rel=1e-3)
        error_RO = outputs(flat[path], 0.0) - outputs(done.scalar[path].kernel, 0.0)
        assert found[path].scalar == pytest.approx(np.sum(error_RO**2) / energy, rel=1e-3)


def test_held_out_inputs_are_no_calibration_inputs(job, journal):
    """Neither noise nor, where there are enough, classes nor, but for a few, timesteps."""
    x_TBHWC, t_T, ids_B = layer_figures._trajectories(job, journal)
    seed = job.settings.seed + quantize.CALIBRATION_SEED
    seen = list(calibrate.trajectories(job.model, CALIBRATION, seed))
    noise = np.concatenate([x[0] for x, _, _ in seen])
    assert np.abs(x_TBHWC[0][:, None] - noise).max((2, 3, 4)).min() > 1
    # Three classes: numbers go on where calibration ended.
    assert np.concatenate([ids for _, _, ids in seen]).tolist() == [0, 1]
    assert ids_B.tolist() == [2, 0]
    assert set(t_T.tolist()) & set(seen[0][1].tolist()) == {1}


def test_large_models_are_tested_on_few_images():
    plenty = Calibration()
    large = dataclasses.replace(small.STAGE, resolution=256)
    images = [
        layer_figures.held_out_settings(dataclasses.replace(small.TINY, first_stage=s), plenty)
        for s in (small.STAGE, large)
    ]
    assert [(w.images, w.batch, w.steps) for w in images] == [(16, 16, 13), (4, 4, 13)]


def test_a_killed_run_measures_only_what_is_missing(job, done, journal, monkeypatch):
    two = Plan({path: job.plan[path] for path in PATHS[:2]})
    small_memory = dataclasses.replace(job.division, moments=1)
    job = dataclasses.replace(job, plan=two, division=small_memory)
    made = []
    journal.store("held-out-trajectories", _visited(), {})
    _weigh_alike(journal)
    gather = calibrate.second_moments

    def die_second(*args, **named):
        made.extend(named["paths"])
        if len(made) == 2:
            raise KeyboardInterrupt
        return gather(*args, **named)

    monkeypatch.setattr(calibrate, "second_moments", die_second)
    with pytest.raises(KeyboardInterrupt):
        layer_figures.held_out(job, journal, done)
    assert made == list(PATHS[:2])
    found = layer_figures.held_out(job, journal, done)
    assert made == [*PATHS[:2], PATHS[1]]
    monkeypatch.setattr(calibrate, "second_moments", None)
    assert layer_figures.held_out(job, journal, done) == found


def test_the_bound_is_that_of_the_moment_in_units_of_the_whole_output(monkeypatch):
    spec = LayerSpec("feed_forward", "linear", 8, 2, 16)
    tensor = small.random_tensor(np.random.default_rng(0), (32, 64), "linear", 16)
    spec = dataclasses.replace(spec, codebooks=3)
    stored = spec.stored((32, 64))
    assert stored.total == 8 * tensor.nbytes
    found = layer_figures.of_search(tensor, stored, 5 * np.eye(32), 0.5, 1.25)
    assert found.seconds == 1.25
    assert found.bound == pytest.approx(0.5 * 2 ** (-2 * stored.per_weight))
    assert 0.9 * stored.per_weight < found.codes_entropy < stored.per_weight
    monkeypatch.setattr(layer_figures, "BOUND_FAN_IN", 31)
    assert layer_figures.of_search(tensor, stored, np.eye(32), 1.0, 1.0).bound is None


def test_figures_of_a_search_survive_an_interruption(job, journal, monkeypatch):
    """The piece of a layer keeps its seconds; its error and bound are of the whole output."""
    path = PATHS[0]
    rows_IRN = np.random.default_rng(1).normal(size=(4, 50, job.sizes[path].fan_in)) + 0.5
    moment = of_images(rows_IRN)
    outlooks = {path: planning.Outlook(DEFAULT, True, 0.3, 0.3, 1.0, {})}

    def compress(kernel, moment_NN, spec, *, key, metric):
        tensor = round_to_grid(grouping.to_matrix(np.asarray(kernel)), kernel.shape, 256)
        return tensor, LayerStats(0.1, 0.2, tensor.bits_per_weight)

    monkeypatch.setattr(quantize, "compress_layer", compress)
    found = quantize._compress(job, journal, {path: moment}, outlooks, "")[path]
    monkeypatch.setattr(quantize, "compress_layer", None)
    again = quantize._compress(job, journal, {path: moment}, outlooks, "")[path]
    assert again[1] == found[1]._replace(history=[])
    assert again[3] == found[3]
    share = found[1].rel_output_mse / 0.2
    assert 0 < share < 0.95
    spectrum_N = np.linalg.eigvalsh(outlooks[path].moment(moment).astype(np.float64))
    bound = share * layer_figures.relative_bound(spectrum_N, found[0].bits_per_weight)
    assert found[3].bound == pytest.approx(bound, rel=1e-4)
    assert found[3].seconds >= 0


def test_the_time_of_held_out_errors_is_estimated(job):
    def seconds(images: int) -> dict[str, float]:
        calibration = dataclasses.replace(CALIBRATION, images=images)
        return estimate.estimate(
            job.model.config, job.shapes, job.plan, job.sizes, calibration, 4, 0, job.division
        ).seconds

    # The speed is measured anew each time: compare stages of one estimate.
    few, many = seconds(16), seconds(320)
    assert 0.5 < few["held-out errors"] / few["calibrate"] < 0.75  # which weighs timesteps, too
    assert 0.5 / 20 < many["held-out errors"] / many["calibrate"] < 0.75 / 20
