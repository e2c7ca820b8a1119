# SPDX-License-Identifier: Apache-2.0
"""Moments, what of them is held out, and the corrected bias, against numpy on the rows."""

import numpy as np
import pytest

from vqjax.core import grouping, moments
from vqjax.errors import VqjaxError


def _rows(images=9, rows=6, fan_in=18, seed=0):
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(images, 1, fan_in))
    return rng.normal(size=(images, rows, fan_in)) + shared + 0.5


def _second(rows_IRN):
    flat = rows_IRN.reshape(-1, rows_IRN.shape[-1])
    return flat.T @ flat / len(flat)


def _split(moment, window):
    found = moments.split(moment, window)
    assert found is not None
    return found


def test_split_gives_back_the_moments_of_disjoint_images():
    rows_IRN = _rows()
    split = _split(moments.of_images(rows_IRN, 3), 3)
    held = np.arange(9) % moments.HELD_EVERY == moments.HELD_EVERY - 1
    np.testing.assert_allclose(split.fit_PP, _second(rows_IRN[~held]), atol=1e-5)
    np.testing.assert_allclose(split.test_PP, _second(rows_IRN[held]), atol=1e-5)
    np.testing.assert_allclose(split.fit_mean_P, rows_IRN[~held].mean((0, 1)), atol=1e-5)
    np.testing.assert_allclose(split.test_mean_P, rows_IRN[held].mean((0, 1)), atol=1e-5)


def test_centring_takes_the_mean_of_the_fit_from_both():
    rows_IRN = _rows()
    split = _split(moments.of_images(rows_IRN), 1).centred()
    held = np.arange(9) % moments.HELD_EVERY == moments.HELD_EVERY - 1
    mean_N = rows_IRN[~held].mean((0, 1))
    np.testing.assert_allclose(split.fit_PP, _second(rows_IRN[~held] - mean_N), atol=1e-5)
    np.testing.assert_allclose(split.test_PP, _second(rows_IRN[held] - mean_N), atol=1e-5)


def test_large_layers_keep_a_share_of_the_channels_and_fit_on_that_share_of_images(monkeypatch):
    monkeypatch.setattr(moments, "HELD_FEATURES", 9)
    rows_IRN = _rows(fan_in=27)
    moment = moments.of_images(rows_IRN, 3)
    assert moment.held_NN is not None
    assert moment.held_NN.shape == (9, 9)
    split = _split(moment, 3)
    fit = np.arange(9) % 3 == 2
    np.testing.assert_allclose(split.fit_PP, _second(rows_IRN[fit][..., :9]), atol=1e-5)
    np.testing.assert_allclose(split.test_PP, _second(rows_IRN[~fit][..., :9]), atol=1e-5)


@pytest.mark.parametrize(
    ("fan_in", "window"), [(1152, 3), (1728, 3), (17280, 3), (3840, 1), (27, 3)]
)
def test_rows_per_feature_are_those_of_the_layer(fan_in, window):
    size = moments.held_size(fan_in, window)
    assert size <= moments.HELD_FEATURES
    columns = moments.held_columns(fan_in, size, window)
    assert len(columns) == size
    assert len(set(columns)) == size
    assert columns.max() < fan_in
    every = moments.held_every(fan_in, window, 1000)
    expected = moments.HELD_EVERY if size == fan_in else fan_in / size
    assert every == pytest.approx(expected, rel=0.01)


def test_one_image_holds_nothing_out():
    moment = moments.of_images(_rows(images=1))
    assert moment.held_NN is None
    assert moments.split(moment, 1) is None


def test_a_held_out_moment_of_part_of_a_channel_is_refused():
    with pytest.raises(VqjaxError, match="10 features for a fan-in of 18 and a 3x3 window"):
        moments.held_columns(18, 10, 3)


@pytest.mark.parametrize("shape", [(18, 5), (3, 3, 2, 5)])
def test_the_corrected_bias_leaves_the_centred_error(shape):
    rng = np.random.default_rng(1)
    rows_IRN = _rows(images=1)
    kernel, bias_O = rng.normal(size=shape), rng.normal(size=5)
    quantized = kernel + 0.1 * rng.normal(size=shape)
    moment = moments.of_images(rows_IRN)
    bias = moments.corrected_bias(bias_O, kernel, quantized, moment.mean_N)

    outputs = [rows_IRN[0] @ grouping.to_matrix(k).T + b for k, b in
               ((kernel, bias_O), (quantized, bias))]  # fmt: skip
    error_RO = outputs[0] - outputs[1]
    np.testing.assert_allclose(error_RO.mean(0), 0, atol=1e-5)
    error_ON = grouping.to_matrix(kernel - quantized)
    centred_NN = moments.centred(moment.second_NN, moment.mean_N)
    expected = np.sum((error_ON @ centred_NN) * error_ON)
    assert np.mean(np.sum(error_RO**2, 1)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("columns", [7, 2048])
def test_the_energy_of_a_shifted_output_is_that_of_its_rows(columns, monkeypatch):
    """Signs matter: bias before minus bias after. Held-out rows have a mean of their own."""
    monkeypatch.setattr(moments, "_COLUMNS", columns)
    rng = np.random.default_rng(2)
    seen, fresh = moments.of_images(_rows(seed=1)), _rows(seed=2) + 0.7
    w_ON, bias_O = rng.normal(size=(5, 18)), rng.normal(size=5)
    q_ON = w_ON + 0.1 * rng.normal(size=w_ON.shape)
    after_O = moments.corrected_bias(bias_O, w_ON.T, q_ON.T, seen.mean_N)

    rows_RN, moment = fresh.reshape(-1, 18), moments.of_images(fresh)
    error_RO = (rows_RN @ w_ON.T + bias_O) - (rows_RN @ q_ON.T + after_O)
    of_fresh = moment.second_NN, moment.mean_N
    found = moments.output_energy(w_ON - q_ON, bias_O - after_O, *of_fresh)
    assert found == pytest.approx(np.mean(np.sum(error_RO**2, 1)), rel=1e-4)
    assert found != pytest.approx(
        moments.output_energy(w_ON - q_ON, after_O - bias_O, *of_fresh), rel=1e-2
    )
    whole = np.mean(np.sum((rows_RN @ w_ON.T) ** 2, 1))
    assert moments.output_energy(w_ON, 0.0, *of_fresh) == pytest.approx(whole, rel=1e-4)


def test_a_shift_that_takes_a_large_mean_away_leaves_what_varies():
    """Inputs that hardly vary: their second moment alone, in float32, would leave noise."""
    rng = np.random.default_rng(3)
    rows_IRN = 1.0 + 1e-2 * rng.normal(size=(40, 50, 6))
    error_ON = rng.normal(size=(4, 6))
    moment = moments.of_images(rows_IRN)
    shift_O = -error_ON @ moment.mean_N.astype(np.float64)
    left_RO = rows_IRN.reshape(-1, 6) @ error_ON.T + shift_O
    found = moments.output_energy(error_ON, shift_O, moment.second_NN, moment.mean_N)
    assert found == pytest.approx(np.mean(np.sum(left_RO**2, 1)), rel=1e-2)


def test_inputs_that_hardly_vary_have_no_covariance():
    rng = np.random.default_rng(0)
    rows_RN = rng.normal(size=(4000, 6)) + np.array([0, 1, 10, 100, 3000, 1e5])
    second_NN = (rows_RN.T @ rows_RN / len(rows_RN)).astype(np.float32)
    found_NN = moments.centred(second_NN, rows_RN.mean(axis=0))
    np.testing.assert_allclose(np.diagonal(found_NN)[:4], 1, rtol=0.1)
    assert not found_NN[4:].any()
    assert not found_NN[:, 4:].any()
