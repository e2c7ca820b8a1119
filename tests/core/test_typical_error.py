# SPDX-License-Identifier: Apache-2.0
"""Drawn errors: their size, their directions, and the gain against a code that is really made."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import threadpoolctl

from vqjax.core import typical_error as lib
from vqjax.core.compress import compress_layer
from vqjax.core.plan import LayerSpec, expected_distortion
from vqjax.core.typical_error import typical_error


def _moment(fan_in, seed):
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((fan_in, fan_in)) * np.exp2(rng.uniform(-2, 2, fan_in))
    return (factor @ factor.T / fan_in).astype(np.float32)


def _ridge(moment_NN, ridge=0.02):
    size = np.trace(moment_NN) / len(moment_NN)
    return moment_NN + ridge * size * np.eye(len(moment_NN), dtype=np.float32)


def test_errors_are_white_under_the_metric_and_of_the_output_s_size():
    w_NO = np.random.default_rng(0).standard_normal((24, 4000)).astype(np.float32)
    moment_NN = _moment(24, 0)
    error = typical_error(w_NO, moment_NN, moment_NN, np.random.default_rng(0)).error
    error_NO = np.asarray(error)
    energies = [np.vdot(m.T @ moment_NN, m.T) for m in (error_NO, w_NO)]
    assert energies[0] == pytest.approx(energies[1], rel=1e-3)
    lower_NN = np.linalg.cholesky(_ridge(moment_NN, lib._RIDGE))
    white_NN = np.cov(lower_NN.T @ error_NO, bias=True)
    white_NN /= np.trace(white_NN) / 24
    assert np.max(np.abs(white_NN - np.eye(24))) < 0.2


@pytest.mark.parametrize("shape", [(48, 64), (3, 3, 8, 48)])
def test_the_gain_predicts_what_compression_leaves(shape):
    kernel = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    fan_in = int(np.prod(shape[:-1]))
    moment_NN = _moment(fan_in, 2)
    name, group = ("conv3x3", 9) if len(shape) == 4 else ("linear", 8)
    spec = LayerSpec("attention", name, group, 3, 16)
    metric_NN = _ridge(moment_NN)
    gain = typical_error(kernel, moment_NN, metric_NN, np.random.default_rng(0)).gain
    key = jax.random.key(0)
    _, stats = compress_layer(jnp.asarray(kernel), moment_NN, spec, key=key, metric=metric_NN)
    assert gain < 0.8  # correlated inputs are easier than independent ones
    assert 0.6 < stats.rel_output_mse / (gain * expected_distortion(spec)) < 1.4


@pytest.mark.parametrize("rank", [11, 48])
@pytest.mark.parametrize(
    ("name", "group", "books", "entries", "within"),
    [("linear", 8, 1, 16, 4), ("linear", 8, 3, 16, 4), ("scalar", 1, 1, 64, 4)],
)
def test_few_inputs_promise_no_more_than_codes_keep(rank, name, group, books, entries, within):
    """Eleven classes: directions without inputs take the error of a code only in part."""
    rng = np.random.default_rng(3)
    kernel = rng.standard_normal((64, 96)).astype(np.float32)
    rows_RN = rng.standard_normal((rank, 64)) * np.exp2(rng.uniform(-1, 1, 64))
    moment_NN = (rows_RN.T @ rows_RN / rank).astype(np.float32)
    metric_NN = _ridge(moment_NN, 0.005)
    found = typical_error(kernel, moment_NN, metric_NN, np.random.default_rng(0))
    spec = LayerSpec("attention", name, group, books, entries)
    key = jax.random.key(0)
    _, stats = compress_layer(jnp.asarray(kernel), moment_NN, spec, key=key, metric=metric_NN)
    gain = found.scalar_gain if name == "scalar" else found.gain
    assert 1 / within < stats.rel_output_mse / (gain * expected_distortion(spec)) < within


def test_layers_without_output_have_no_error():
    kernel = np.ones((8, 4), np.float32)
    still = typical_error(kernel, np.zeros((8, 8)), np.eye(8), np.random.default_rng(0))
    empty = typical_error(0 * kernel, np.eye(8), np.eye(8), np.random.default_rng(0))
    for found in (still, empty):
        assert found.gain == found.scalar_gain == 0
        assert not np.any(found.error)


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("VQJAX_FULL_SIZE") != "1",
    reason="takes half a minute of two cores; set VQJAX_FULL_SIZE=1 to run it",
)
def test_the_widest_layer_of_ldm_4_gets_through():
    fan_in = 17_280  # LAPACK of NumPy's wheels has crashed at this size, on several threads
    moment_NN = np.full((fan_in, fan_in), 1e-3, np.float32)
    moment_NN[np.diag_indices(fan_in)] += 2
    kernel = np.random.default_rng(0).standard_normal((fan_in, 4), np.float32)
    with threadpoolctl.threadpool_limits(2, "blas"):
        found = typical_error(kernel, moment_NN, moment_NN, np.random.default_rng(0))
    assert np.isfinite(found.error).all()
    assert 0.8 < found.gain < 1.01  # inputs are all but independent
