# SPDX-License-Identifier: Apache-2.0
"""Weights of timesteps against derivatives of the sampler that are worked out in other ways."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.io import models as small
from vqjax import sampling
from vqjax.core import tree
from vqjax.core.model import Model
from vqjax.pipeline import calibrate, quantize, timesteps
from vqjax.pipeline.journal import Journal
from vqjax.sampling import ddim
from vqjax.sampling.schedule import ddim_schedule
from vqjax.settings import Calibration, QuantizeSettings

STEPS = 4
NONE = np.zeros((STEPS, 2, 3, 3, 1), np.float32)


def _linear(monkeypatch, slope) -> None:
    """Makes the prediction slope(t) times the latent, whose derivatives are known."""

    def predictor(config, params, ids_B, guidance):
        return lambda x, t_B: slope(t_B[0].astype(jnp.float32)) * x

    monkeypatch.setattr(sampling, "predictor", predictor)
    squares: Any = timesteps._squares
    squares.clear_cache()  # of another slope


def _weights_of_slope() -> np.ndarray:
    visited = [(NONE, ddim_schedule(small.PLAIN, STEPS).timesteps[::-1], None)]
    model = Model(small.PLAIN, {})
    return timesteps.weights(model, visited, Calibration(steps=STEPS), jax.random.key(0))


def test_a_linear_prediction_gives_the_product_of_the_steps(monkeypatch):
    _linear(monkeypatch, lambda t: 0.3 + t / 2000)
    schedule = ddim_schedule(small.PLAIN, STEPS)
    parts = schedule.timesteps, schedule.alphas, schedule.alphas_prev
    slopes, after = [], 1.0
    for t, a, a_prev in zip(*(np.asarray(part, np.float64) for part in parts)):  # last step first
        keeps = np.sqrt(a_prev / a)
        takes = np.sqrt(1 - a_prev) - keeps * np.sqrt(1 - a)
        slopes.insert(0, after * takes)
        after *= keeps + takes * (0.3 + t / 2000)
    expected_T = np.abs(slopes) / np.mean(np.abs(slopes))
    np.testing.assert_allclose(_weights_of_slope(), expected_T, rtol=1e-4)


def test_weights_of_a_network_are_what_disturbing_its_predictions_does():
    config = small.TINY
    flat = tree.flatten(small.dense(config).params)
    flat["unet/out/conv/kernel"] *= 0.05  # predictions of size 1
    model = Model(config, tree.unflatten(flat))
    calibration = Calibration(images=8, steps=STEPS, batch=8, guidance=2.0)
    visited = list(calibrate.trajectories(model, calibration, seed=0))
    found_T = timesteps.weights(model, visited, calibration, jax.random.key(0))
    x_TBHWC, t_T, ids_B = visited[0]

    @jax.jit
    def final(disturbance_BHWC, t):
        predict = sampling.predictor(config, model.params, ids_B, 2.0)

        def disturbed(x, t_B):
            return predict(x, t_B) + jnp.where(t_B[0] == t, disturbance_BHWC, 0)

        return ddim.ddim(disturbed, ddim_schedule(config, STEPS), jnp.asarray(x_TBHWC[0]))[0]

    signs_BHWC = 1e-2 * jax.random.rademacher(jax.random.key(1), x_TBHWC[0].shape, jnp.float32)
    moved = [final(signs_BHWC, t) - final(-signs_BHWC, t) for t in t_T]
    expected_T = np.array([float(jnp.sqrt(jnp.sum(moved_BHWC**2))) for moved_BHWC in moved])
    # Each side is one draw of signs for each of eight images of 768 values.
    np.testing.assert_allclose(found_T, expected_T / expected_T.mean(), rtol=0.1)
    assert found_T.max() > 1.5 * found_T.min()


@pytest.mark.parametrize("slope", [np.inf, np.nan])
def test_a_sampler_without_derivatives_weighs_all_alike(slope, monkeypatch, capsys):
    _linear(monkeypatch, lambda t: slope)
    np.testing.assert_array_equal(_weights_of_slope(), np.ones(STEPS))
    assert "all weigh alike" in capsys.readouterr().err


def test_a_resumed_run_keeps_its_weights(tmp_path, monkeypatch, capsys):
    _linear(monkeypatch, lambda t: 0.5)
    settings = QuantizeSettings(calibration=Calibration(steps=STEPS))
    job = quantize.Job(settings, Model(small.PLAIN, {}), None, None, {}, None)  # type: ignore[arg-type]
    journal = Journal(tmp_path, {"seconds": {}})
    t_T = ddim_schedule(small.PLAIN, STEPS).timesteps[::-1]
    made = timesteps.weights_of_run(job, journal, [(NONE, t_T, None)])
    assert f"{t_T[0]} {made[0]:.2g}" in capsys.readouterr().out
    again = timesteps.weights_of_run(job, Journal(tmp_path, {"seconds": {}}), [])
    np.testing.assert_array_equal(made, again)
    recorded = timesteps.recorded(journal)
    assert [int(t) for t in recorded] == t_T.tolist()
    np.testing.assert_array_equal(list(recorded.values()), made)


def test_weights_at_other_timesteps_lie_between_those_of_the_run(tmp_path):
    journal = Journal(tmp_path, {"seconds": {}})
    arrays = {"weights": np.array([2.0, 1.0, 0.5]), "timesteps": np.array([9, 5, 1])}
    journal.store("timesteps", arrays, {})
    found = timesteps.at(journal, np.array([7, 3, 1]))
    np.testing.assert_allclose(found, [1.5, 0.75, 0.5])
