# SPDX-License-Identifier: Apache-2.0
"""Layers and whole U-Nets with ranges of their inputs: simulated and in integers."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vqjax
from tests.conftest import relative_rms
from tests.io import models as small
from vqjax import models, sampling
from vqjax.core import tree
from vqjax.core.activations import InputRange
from vqjax.core.integer import integer_kernel, integerize
from vqjax.core.model import Model
from vqjax.errors import VqjaxError
from vqjax.models.layers import Conv, Dense

ROUNDING = 1e-6
"""Relative RMS between both paths of one layer: float32 rounding of the simulated one."""

TIES = 0.03
"""The same for a whole U-Net at 8 bits: 0.005 seen, 0.02 on a larger one."""

SAMPLED = 0.05
"""The same for the latents after 20 steps: 0.007 seen."""

CONFIG = small.TINY
predict = jax.jit(models.predict_noise, static_argnums=0)


def _read(bits=8) -> InputRange:
    zero_B = jnp.array([100.0, 31.0]) if bits == 8 else jnp.array([6.0, 2.0])
    return InputRange(step_B=jnp.array([0.02, 0.03]) * 2 ** (8 - bits), zero_B=zero_B, bits=bits)


def _both(layer, shape, x, read):
    """A layer's output with decoded weights, and with integers."""
    rng = np.random.default_rng(0)
    tensor = small.integer_tensor(rng, shape)
    bias_O = jnp.asarray(rng.standard_normal(shape[-1]), jnp.float32)

    @jax.jit
    def run(kernel, x):
        params = {"kernel": kernel, "bias": bias_O, "input_range": read}
        return layer.apply({"params": params}, x)

    return run(tensor, x), run(integer_kernel(tensor), x)


def _input(shape):
    return jnp.asarray(np.random.default_rng(1).standard_normal((2, *shape)), jnp.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(24,), (5, 24)], ids=["vector", "tokens"])
def test_dense_layers_agree(shape, bits):
    simulated, integer = _both(Dense(7), (24, 7), _input(shape), _read(bits))
    assert relative_rms(integer, simulated) < ROUNDING


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("window", "stride", "padding"),
    [(3, 1, (1, 1)), (3, 2, (1, 1)), (3, 2, (0, 1)), (1, 1, (0, 0))],
)
@pytest.mark.parametrize("side", [5, 6])
def test_convolutions_agree(window, stride, padding, side, bits):
    layer = Conv(7, window=window, stride=stride, padding=padding)
    shape, x = (window, window, 4, 7), _input((side, side + 2, 4))
    simulated, integer = _both(layer, shape, x, _read(bits))
    assert relative_rms(integer, simulated) < ROUNDING


def test_a_layer_with_a_range_multiplies_what_levels_stand_for():
    x, read, kernel_IO = _input((24,)), _read(), jnp.eye(24)
    params = {"kernel": kernel_IO, "bias": jnp.zeros(24), "input_range": read}
    np.testing.assert_array_equal(
        Dense(24).apply({"params": params}, x), np.asarray(read.fake_quantize(x))
    )


def test_an_integer_kernel_needs_a_range_of_eight_bits():
    kernel = integer_kernel(small.integer_tensor(np.random.default_rng(0), (24, 7)))
    params = {"kernel": kernel, "bias": jnp.zeros(7)}
    with pytest.raises(VqjaxError, match="kernel: integer kernel, but no range of its input"):
        Dense(7).apply({"params": params}, _input((24,)))
    params["input_range"] = dataclasses.replace(_read(), bits=10)
    with pytest.raises(VqjaxError, match="inputs of 10 bits, integer kernels take 8 or less"):
        Dense(7).apply({"params": params}, _input((24,)))


@functools.cache
def _call():
    rng = np.random.default_rng(3)
    x_BHWC = jnp.asarray(rng.standard_normal((2, *CONFIG.latent_shape)), jnp.float32)
    params = small.integer(CONFIG).params
    return x_BHWC, jnp.array([17, 640]), models.embed_classes(CONFIG, params, jnp.array([1, 2]))


@functools.cache
def _predicted(*, integer: bool = False) -> jax.Array:
    """Of the whole U-Net at 8 bits."""
    params = small.with_ranges(CONFIG).params
    return predict(CONFIG, integerize(params) if integer else params, *_call())


@pytest.fixture(scope="module")
def inputs() -> dict[str, jax.Array]:
    """What every layer of the U-Net is given, where inputs are rounded to 8 bits."""

    @jax.jit
    def run(params, x_BHWC, t_B, context):
        def keep(path, x, window):
            return x

        return models.capture_inputs(CONFIG, params, x_BHWC, t_B, context, keep)[1]

    return run(small.with_ranges(CONFIG).params, *_call())


def test_every_layer_of_a_network_agrees_on_equal_inputs(inputs):
    params = small.with_ranges(CONFIG).params
    kernels = tree.flatten({"unet": params["unet"]})

    @jax.jit
    def both(inputs, t_B):
        found = {}
        for path, read in params["activations"].at(t_B).items():
            tensor, x = kernels[path], inputs[path]
            layer = Dense(tensor.shape[-1], use_bias=False)
            if len(tensor.shape) == 4:
                size = tensor.shape[0]
                layer = Conv(tensor.shape[-1], window=size, padding=(size // 2, size // 2))
            leaves = {"input_range": read, "bias": jnp.zeros(tensor.shape[-1])}
            found[path] = [
                layer.apply({"params": leaves | {"kernel": kernel}}, x)
                for kernel in (tensor, integers[path])
            ]
        return found

    integers = tree.flatten(integerize({"unet": params["unet"]}))
    for path, (simulated, integer) in both(inputs, _call()[1]).items():
        assert relative_rms(integer, simulated) < ROUNDING, path


def test_whole_networks_agree_but_for_ties():
    """Rounding of floating point moves a few inputs over the edge of a level, and later layers see
    it; weights are random here, which makes more of it than trained ones do."""
    difference = relative_rms(_predicted(integer=True), _predicted())
    print(f"whole network: {difference:.2g}")
    assert difference < TIES


def test_images_of_a_batch_have_ranges_of_their_own():
    """In another order of the batch the images are the same, in other ranges they are not."""
    params = small.with_ranges(CONFIG).params
    x_BHWC, t_B, context = _call()
    assert context is not None
    x_BHWC, t_B, context = x_BHWC[::-1], t_B[::-1], context[::-1]
    swapped = predict(CONFIG, params, x_BHWC, t_B, context)[::-1]
    assert relative_rms(swapped, _predicted()) < TIES
    ranges = params["activations"]
    shifted = {path: log2_T - 2 for path, log2_T in ranges.log2_steps.items()}
    ranges = dataclasses.replace(ranges, log2_steps=shifted)
    other = predict(CONFIG, params | {"activations": ranges}, *_call())
    assert relative_rms(other, _predicted()) > TIES


def test_captured_inputs_are_not_rounded(inputs):
    np.testing.assert_array_equal(inputs["unet/input_blocks_0/conv/kernel"], _call()[0])


def test_errors_in_kernels_act_on_rounded_inputs(inputs):
    path = "unet/out/conv/kernel"
    params = small.with_ranges(CONFIG).params
    error = jnp.full(tree.flatten(params)[path].shape, 0.01)
    amounts = {path: jnp.ones((2, error.shape[-1]))}
    disturbed = jax.jit(models.predict_noise_disturbed, static_argnums=0)
    found = disturbed(CONFIG, params, *_call(), {path: error}, amounts)
    read = params["activations"].at(_call()[1])[path]
    leaves = {"kernel": error, "bias": jnp.zeros(error.shape[-1]), "input_range": read}
    change: Any = Conv(error.shape[-1]).apply({"params": leaves}, inputs[path])
    assert relative_rms(found, _predicted() + change) < TIES


def test_ranges_of_layers_that_folding_removed_do_nothing():
    flat = tree.flatten(small.with_ranges(CONFIG).params)
    kept = {p: leaf for p, leaf in flat.items() if "attn2/to_q" not in p and "attn2/to_k" not in p}
    assert len(kept) < len(flat)
    run = functools.partial(models.predict_noise, CONFIG)
    assert jax.eval_shape(run, tree.unflatten(kept), *_call()).shape == _call()[0].shape


def test_sampling_runs_in_integers_at_any_number_of_steps():
    """The table has 3 timesteps, the sampler 20."""
    model = small.with_ranges(CONFIG)
    settings = {"steps": 20, "guidance": 1.5, "batch_size": 2}
    simulated = sampling.generate_with_latents(model, [0, 1], **settings)[1]
    integer = sampling.generate_with_latents(model, [0, 1], integer=True, **settings)[1]
    difference = relative_rms(integer, simulated)
    print(f"sampled: {difference:.2g}")
    assert difference < SAMPLED


def test_models_that_integers_cannot_compute_are_refused():
    with pytest.raises(VqjaxError, match="tiny has no ranges of activations"):
        vqjax.sample(small.integer(CONFIG), [0], integer=True)
    params = small.with_ranges(CONFIG).params
    flat = tree.flatten(params)
    path = "unet/out/conv/kernel"
    flat[path] = small.random_tensor(np.random.default_rng(0), flat[path].shape, "conv3x3", 16)
    with pytest.raises(VqjaxError, match=f"{path}: codebooks float16, expected int8"):
        vqjax.sample(Model(config=CONFIG, params=tree.unflatten(flat)), [0], integer=True)
