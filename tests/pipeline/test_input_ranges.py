# SPDX-License-Identifier: Apache-2.0
"""Calibrated ranges against numpy on the layer inputs themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import relative_rms
from tests.io import models as small
from vqjax import models
from vqjax.core import tree
from vqjax.core.activations import candidate_ranges
from vqjax.core.model import Model
from vqjax.errors import VqjaxError
from vqjax.pipeline import activations, calibrate

MODEL = small.dense(small.TINY)
TIMESTEPS = np.array([501, 1])
OF_CLASS = calibrate.class_layers(MODEL.config, calibrate.trace_layers(MODEL.config, MODEL.params))


@pytest.fixture(scope="module")
def visited() -> list[tuple]:
    """Two batches of two latents at two timesteps, as `calibrate.trajectories` gives them."""
    rng = np.random.default_rng(0)
    shape = (2, 2, *MODEL.config.latent_shape)
    return [
        (rng.normal(0, size, shape).astype(np.float32), TIMESTEPS, jnp.array(ids))
        for size, ids in ((1, [0, 1]), (1.5, [2, 0]))
    ]


@pytest.fixture(scope="module")
def seen(visited) -> list[dict[str, np.ndarray]]:
    """All inputs of every layer, by step of the trajectories."""
    steps = []
    for step in range(len(TIMESTEPS)):
        parts = [_inputs(x[step], t_T[step], ids) for x, t_T, ids in visited]
        steps.append({path: np.concatenate([part[path] for part in parts]) for path in parts[0]})
    return steps


@jax.jit
def _inputs(x_BHWC, t, ids_B) -> dict[str, jax.Array]:
    def keep(path, x, window):
        return x

    return calibrate.capture_branches(MODEL.config, MODEL.params, x_BHWC, t, ids_B, keep)


@pytest.mark.parametrize("bits", [4, 8])
def test_ranges_have_the_least_error_over_all_batches(visited, seen, bits):
    ticks = []
    found = activations.observe(MODEL, visited, bits, lambda: ticks.append(1))
    assert len(ticks) == activations.calls(visited) == 2 * 2 * 2
    kernels = {p for p in tree.flatten(MODEL.params) if p[:5] == "unet/" and p[-7:] == "/kernel"}
    assert found.zeros.keys() == found.log2_steps.keys() == kernels
    assert found.timesteps_T.tolist() == [1, 501]
    ranges = found.at(jnp.array([501, 1]))  # in the order of the trajectories
    for step, inputs in enumerate(seen):
        for path, x in inputs.items():
            layer_bits, read = found.bits_of(path), ranges[path]
            if path not in OF_CLASS:
                _assert_least(x, read.step_B[step], read.zero_B[step], layer_bits, path)


@pytest.mark.parametrize("bits", [4, 8])
def test_ranges_of_layers_that_see_the_class_alone_are_of_all_classes(visited, bits):
    """Of three classes two are visited; none is half of what guidance asks for."""
    config = MODEL.config
    assert config.n_classes == 4
    assert OF_CLASS
    inputs = _inputs(np.zeros((3, *config.latent_shape), np.float32), 1, jnp.arange(3))
    one_class = [(x_TBHWC, t_T, jnp.zeros(2, jnp.int32)) for x_TBHWC, t_T, _ in visited]
    ranges = activations.observe(MODEL, one_class, bits).at(jnp.asarray(TIMESTEPS))
    for path in OF_CLASS:
        for step, zero in zip(ranges[path].step_B, ranges[path].zero_B):
            _assert_least(np.asarray(inputs[path]), step, zero, bits, path)


def _assert_least(x: np.ndarray, step, zero, bits: int, path: str) -> None:
    candidates = zip(*candidate_ranges(x.min(), x.max(), bits))
    least = min(_error(x, *pair, bits) for pair in candidates)
    assert zero == round(float(zero))
    assert _error(x, step, zero, bits) <= 1.01 * least + 1e-9, path


def _error(x, step, zero, bits: int) -> float:
    x, step, zero = (np.asarray(part, np.float64) for part in (x, step, zero))
    level = np.clip(np.round(x / step) + zero, 0, 2**bits - 1)
    return (((level - zero) * step - x) ** 2).sum()


def test_time_layers_see_the_timestep_and_context_layers_the_class(visited, seen):
    """What the docstring of `observe` says: their inputs do not depend on the latents."""
    path = "unet/time_embed/dense1/kernel"
    assert all((inputs[path] == inputs[path][:1]).all() for inputs in seen)
    path = "unet/middle_block/attn/block_0/attn2/to_v/kernel"
    np.testing.assert_array_equal(seen[0][path], seen[1][path])


def test_the_model_with_its_ranges_is_near_the_model(visited):
    ranges = activations.observe(MODEL, visited, 8)
    x_TBHWC, t_T, ids_B = visited[0]
    context = models.embed_classes(MODEL.config, MODEL.params, ids_B)
    call = jnp.asarray(x_TBHWC[1]), jnp.full(2, int(t_T[1])), context
    predict = jax.jit(models.predict_noise, static_argnums=0)
    exact = predict(MODEL.config, MODEL.params, *call)
    found = predict(MODEL.config, MODEL.params | {"activations": ranges}, *call)
    assert 1e-4 < relative_rms(found, exact) < 0.3


def test_inputs_that_are_no_numbers_are_named(visited):
    flat = tree.flatten(MODEL.params)
    flat["unet/time_embed/dense1/bias"] = jnp.full(128, jnp.inf)
    model = Model(config=MODEL.config, params=tree.unflatten(flat))
    with pytest.raises(VqjaxError, match="unet/middle_block/res1/conv2/kernel: inputs are NaN"):
        activations.observe(model, visited[1:], 8)
