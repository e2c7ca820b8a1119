# SPDX-License-Identifier: Apache-2.0
"""Predicted changes of the noise prediction against kernels that are really replaced."""

import zlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.io import models as small
from vqjax import io, sampling
from vqjax.core import folding, grouping, moments, shrinkage, tree
from vqjax.core.compress import Effort, compress_layer
from vqjax.core.model import Model
from vqjax.core.plan import RULES, LayerSpec, kernel_shapes, kind_of
from vqjax.pipeline import calibrate, sensitivity
from vqjax.settings import Calibration

GUIDANCE = 3.0
# Of attention, convolutions and feed-forward in the embedded model: each is one search to compile.
OFTEN = ((96, 96), (3, 3, 96, 96), (384, 96))


def _expected(model: Model, gathered: calibrate.Moments) -> dict[str, sensitivity.Expected]:
    sizes = calibrate.trace_layers(model.config, model.params)
    flat = tree.flatten(model.params)
    found = {}
    for path, moment in gathered.items():
        metric = shrinkage.Metric(
            shrinkage.shrink(moment.second_NN, sizes[path].window, shrinkage.DEFAULT),
            shrinkage.DEFAULT,
            False,
        )
        rng = np.random.default_rng(zlib.crc32(path.encode()))
        found[path] = sensitivity.expected(path, flat[path], moment, metric, rng)
    return found


def replaced(
    model: Model,
    visited: Sequence[tuple],
    kernels: Mapping[str, jax.Array],
    weights_T: np.ndarray | None = None,
) -> dict[str, float]:
    """What `sensitivity.responses` predicts, measured: each kernel in turn is replaced."""

    @jax.jit
    def predict(params, x_BHWC, t, ids_B):
        guided = sampling.predictor(model.config, params, ids_B, GUIDANCE)
        return guided(x_BHWC, jnp.broadcast_to(t, x_BHWC.shape[:1]))

    steps, points = zip(*((step, point) for step, *point in sensitivity._points(visited)))
    weights = None if weights_T is None else weights_T[list(steps)]
    exact = [predict(model.params, *point) for point in points]
    flat = tree.flatten(model.params)
    changes = {}
    for path, kernel in kernels.items():
        params = tree.unflatten({**flat, path: kernel})
        moved = [predict(params, *point) for point in points]
        squares = [float(jnp.mean((a - b) ** 2)) for a, b in zip(moved, exact)]
        changes[path] = float(np.average(squares, weights=weights))
    return changes


def test_constant_inputs_leave_nothing_to_a_centred_moment():
    x_RN = np.random.default_rng(0).standard_normal((64, 6)).astype(np.float32)
    x_RN[:, 2] = 3e2
    moment = moments.of_images(x_RN.reshape(4, 16, 6))
    second_NN = sensitivity.measured_with(moment, centred=True)
    assert not np.any(second_NN[2])
    assert not np.any(second_NN[:, 2])
    np.testing.assert_allclose(second_NN[0, :2], np.cov(x_RN.T, bias=True)[0, :2], atol=1e-4)


@pytest.mark.parametrize("config", [small.TINY, small.PLAIN], ids=lambda config: config.name)
def test_small_errors_do_what_is_predicted(config):
    model = small.dense(config)
    model = Model(config, folding.fold(config, model.params).params)
    calibration = Calibration(images=4, steps=4, batch=4)
    visited = list(calibrate.trajectories(model, calibration, seed=1))
    flat = tree.flatten(model.params)
    kernels = list(kernel_shapes({path: leaf.shape for path, leaf in flat.items()}))[::7]
    gathered = calibrate.second_moments(model, visited, kernels)
    found = _expected(model, gathered)
    # Both sides measure one draw of the errors, rows taken as independent by the one alone.
    errors = {path: 1e-4 * one.errors[path] for path, one in found.items()}
    predicted = sensitivity.responses(model, visited, errors, GUIDANCE, jax.random.key(0))
    wrong = {path: flat[path] + jnp.asarray(error) for path, error in errors.items()}
    measured = replaced(model, visited, wrong)
    # Random weights make some layers matter less than what rounding does to the prediction.
    seen = [path for path in kernels if predicted[path] > 1e-7 * max(predicted.values())]
    assert len(seen) > len(kernels) // 2
    pairs = np.log2([(predicted[path], measured[path]) for path in seen])
    # One draw of errors stands for all, and guided noise of random weights soon leaves the linear.
    assert np.corrcoef(pairs.T)[0, 1] > 0.95
    assert abs(np.median(pairs[:, 0] - pairs[:, 1])) < 1


def test_steps_count_as_their_weights_say():
    model = small.dense(small.TINY)
    model = Model(small.TINY, folding.fold(small.TINY, model.params).params)
    visited = list(calibrate.trajectories(model, Calibration(images=8, steps=4, batch=8), seed=1))
    path = "unet/input_blocks_1/res/conv1/kernel"
    kernel = tree.flatten(model.params)[path]
    error = 1e-3 * np.asarray(jax.random.normal(jax.random.key(0), kernel.shape))

    def both(*weights) -> np.ndarray:  # two steps are looked at, the first and the last
        weights_T = np.array(weights)
        args = GUIDANCE, jax.random.key(0)
        followed = sensitivity.responses(model, visited, {path: error}, *args, weights_T=weights_T)
        moved = replaced(model, visited, {path: kernel + error}, weights_T)
        return np.array([followed[path], moved[path]])

    first, last = both(1.0, 7.0, 7.0, 0.0), both(0.0, 7.0, 7.0, 1.0)
    assert np.all(np.abs(np.log(first / last)) > 1e-3)
    np.testing.assert_allclose(both(3.0, 0.0, 0.0, 1.0), (3 * first + last) / 4, rtol=1e-5)


@pytest.mark.slow
def test_layers_are_ranked_as_replacing_them_does():
    """The embedded model: some of its layers, replaced by what compression makes of them."""
    model = io.load_model("digits")
    model = Model(model.config, folding.fold(model.config, model.params).params)
    calibration = Calibration(images=32, steps=10, batch=16)
    visited, held = ([batch] for batch in calibrate.trajectories(model, calibration, seed=1))
    flat = tree.flatten(model.params)
    kinds = {
        path: kind_of(path, shape, RULES)
        for path, shape in kernel_shapes({p: leaf.shape for p, leaf in flat.items()}).items()
        if shape in OFTEN
    }
    paths = list(kinds)[::3]
    gathered = calibrate.second_moments(model, visited, paths)
    expected = _expected(model, gathered)
    errors = {path: one.errors[path] for path, one in expected.items()}
    costs = sensitivity.responses(model, visited, errors, GUIDANCE, jax.random.key(0))
    effort = Effort(start_steps=5, feedback_rounds=1, descent_rounds=1)
    compressed, predicted = {}, {}
    for path in paths:
        # Two codebooks and three: errors of several sizes.
        name, books = ("conv3x3", 3) if flat[path].shape[:-2] == (3, 3) else ("linear", 2)
        spec = LayerSpec(kinds[path], name, grouping.GROUPS[name], books, 16, 8)
        tensor, stats = compress_layer(
            flat[path], gathered[path].second_NN, spec, key=jax.random.key(0), effort=effort
        )
        compressed[path] = tensor.decode(jnp.float32)
        predicted[path] = costs[path] * stats.rel_output_mse
    measured = replaced(model, held, compressed)
    pairs = np.log2(np.array([(predicted[path], measured[path]) for path in paths]))
    ranks = np.argsort(np.argsort(pairs, axis=0), axis=0)
    assert np.asarray(np.corrcoef(ranks.T))[0, 1] > 0.85
    # Held-out inputs and second-order effects make errors larger than predicted, evenly.
    assert 0 < np.median(pairs[:, 1] - pairs[:, 0]) < 1.2
