# SPDX-License-Identifier: Apache-2.0
"""The choice of shrinkage: against true quantization error, and at the edges."""

import numpy as np
import pytest

from vqjax.core import moments, shrinkage
from vqjax.core.moments import Moment
from vqjax.core.shrinkage import DEFAULT, Shrinkage
from vqjax.errors import VqjaxError

RIDGES = (0.005, 0.06, 0.6)


def _images(images, rows, fan_in=48, seed=0):
    """Inputs of one covariance, eigenvalues over one decade."""
    rng = np.random.default_rng(7)
    mixing = np.linalg.qr(rng.normal(size=(fan_in, fan_in)))[0] * np.logspace(0, -0.5, fan_in)
    return np.random.default_rng(seed).normal(size=(images, rows, fan_in)) @ mixing.T


def _feedback(w_ON, metric_NN, step):
    """Rounds weights to a grid one by one, each error moved to the weights that follow."""
    upper = np.linalg.cholesky(np.linalg.inv(metric_NN)).T
    left, quantized = w_ON.copy(), np.zeros_like(w_ON)
    for n in range(w_ON.shape[1]):
        quantized[:, n] = step * np.round(left[:, n] / step)
        error_O = (left[:, n] - quantized[:, n]) / upper[n, n]
        left[:, n:] -= error_O[:, None] * upper[n, n:]
    return quantized


def test_predictions_rank_ridges_as_true_quantization_does():
    w_ON = np.random.default_rng(3).normal(size=(256, 48))
    test_NN = moments.of_images(_images(1, 20_000, seed=9)).second_NN
    moment = moments.of_images(_images(8, 12))
    split = moments.split(moment, 1)
    assert split is not None
    second_NN = split.fit_PP
    predicted, true = [], []
    for ridge in RIDGES:
        choice = Shrinkage("identity", 0.0, ridge)
        predicted.append(shrinkage.predicted_error(split, 1, choice))
        error_ON = w_ON - _feedback(w_ON, shrinkage.shrink(second_NN, 1, choice), step=1.0)
        true.append(np.sum((error_ON @ test_NN) * error_ON))
    assert np.argsort(predicted).tolist() == np.argsort(true).tolist()
    assert max(true) > 1.2 * min(true)


def test_few_rows_are_shrunk_much_and_many_little():
    few = shrinkage.choose(moments.of_images(_images(8, 12)), 1)
    many = shrinkage.choose(moments.of_images(_images(8, 4000)), 1)
    assert few.ridge >= 0.06
    assert many.ridge == 0.005


def test_smooth_maps_of_mixed_channels_take_the_kronecker_product():
    rng = np.random.default_rng(0)
    channels = np.linalg.cholesky(np.diag(np.logspace(0, -1, 8)) + 0.1)
    distance = np.abs(np.subtract.outer(np.arange(3), np.arange(3)))
    taps = np.linalg.cholesky(np.kron(0.8**distance, 0.8**distance))
    rows = np.einsum("cd,ab,irdb->irca", channels, taps, rng.normal(size=(8, 20, 8, 9)))
    chosen = shrinkage.choose(moments.of_images(rows.reshape(8, 20, 72), 3), 3)
    assert chosen.target == "kronecker"
    assert chosen.share >= 0.7


def test_an_exact_product_is_found_exactly():
    rng = np.random.default_rng(0)
    channel_CC, tap_AA = (np.cov(rng.normal(size=(n, 3 * n))) for n in (5, 9))
    product = np.kron(channel_CC, tap_AA)
    np.testing.assert_allclose(np.kron(*shrinkage.nearest_kronecker(product, 3)), product)
    whole = shrinkage.shrink(product, 3, Shrinkage("kronecker", 1.0, 0.0))
    np.testing.assert_allclose(whole, product)


@pytest.mark.parametrize(
    "choice", [DEFAULT, Shrinkage("identity", 0.5, 0.1), Shrinkage("kronecker", 0.7, 0.02)]
)
def test_shrunk_moments_of_singular_ones_are_symmetric_and_definite(choice):
    rows = np.random.default_rng(0).normal(size=(1, 7, 36))
    second_NN = moments.of_images(rows, 3).second_NN
    before = second_NN.copy()
    shrunk = shrinkage.shrink(second_NN, 3, choice)
    np.testing.assert_array_equal(second_NN, before)
    np.testing.assert_array_equal(shrunk, shrunk.T)
    assert shrunk.dtype == np.float32
    size = np.trace(second_NN) / 36
    assert np.linalg.eigvalsh(shrunk.astype(np.float64))[0] > 0.9 * choice.ridge * size
    assert np.trace(shrunk) == pytest.approx((1 + choice.ridge) * 36 * size, rel=0.3)


def test_no_shrinkage_leaves_the_moment_over_several_blocks(monkeypatch):
    monkeypatch.setattr(shrinkage, "_BLOCK", 7)
    second_NN = moments.of_images(_images(2, 100)).second_NN
    second_NN = (second_NN + second_NN.T) / 2
    same = shrinkage.shrink(second_NN, 1, Shrinkage("identity", 0.0, 0.0))
    np.testing.assert_array_equal(same, second_NN)


def test_inputs_that_are_always_zero_leave_all_weights_equal():
    moment = moments.of_images(np.zeros((4, 3, 9)))
    assert shrinkage.choose(moment, 3) == DEFAULT
    np.testing.assert_array_equal(shrinkage.shrink(moment.second_NN, 3, DEFAULT), np.eye(9))


def test_nothing_held_out_takes_the_default():
    moment = moments.of_images(_images(1, 100))
    assert shrinkage.choose(moment, 1) == DEFAULT
    assert not shrinkage.layer_metric(moment, 1, has_bias=True).centred


def test_centring_is_chosen_where_the_mean_is_large_and_a_bias_can_carry_it():
    rows = _images(8, 50) + 0.5
    moment = moments.of_images(rows)
    metric = shrinkage.layer_metric(moment, 1, has_bias=True)
    assert metric.centred
    assert metric.predicted[1] < 0.95 * metric.predicted[0]
    rows_SN = rows.reshape(-1, 48)
    expected = np.cov(rows_SN.T, bias=True)
    expected += metric.shrinkage.ridge * np.trace(expected) / 48 * np.eye(48)
    np.testing.assert_allclose(metric.metric_NN, expected, atol=1e-5)
    assert not shrinkage.layer_metric(moment, 1, has_bias=False).centred


def test_centring_is_left_out_where_means_differ_between_images():
    rng = np.random.default_rng(0)
    rows = _images(2, 50) + rng.normal(size=(2, 1, 48))
    assert not shrinkage.layer_metric(moments.of_images(rows), 1, has_bias=True).centred


def test_water_level_spends_the_bits():
    values_E = np.logspace(0, -6, 40)
    for bits in (0.1, 1.0, 3.0):
        level = shrinkage._water_level(values_E, bits)
        rate = np.mean(np.maximum(0, np.log2(values_E / level) / 2))
        assert rate == pytest.approx(bits, rel=1e-9)


def test_unusable_moments_are_refused():
    bad = np.full((9, 9), np.nan, np.float32)
    zero = np.zeros(9, np.float32)
    with pytest.raises(VqjaxError, match="NaN or infinite"):
        shrinkage.choose(Moment(bad, zero, bad, 0.25, zero), 3)
    with pytest.raises(VqjaxError, match="moment of 10 features: expected a multiple of 9"):
        shrinkage.shrink(np.eye(10), 3, Shrinkage("kronecker", 1.0, 0.0))
