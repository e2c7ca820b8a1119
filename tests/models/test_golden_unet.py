# SPDX-License-Identifier: Apache-2.0
"""The U-Net against the original: outputs and the activations on the way."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import recipe
from tests.conftest import golden_params, relative_rms
from vqjax import models
from vqjax.config import PRESETS
from vqjax.models.unet import UNet, timestep_embedding


@pytest.mark.parametrize("path", golden_params("golden", "*.npz"))
def test_every_fixture_has_a_test(path):
    assert recipe.Fixture(path).kind != "unknown"


@pytest.mark.parametrize("path", recipe.fixtures("recipe"))
def test_weights_follow_the_recipe(path):
    data = recipe.Fixture(path)
    shapes = data.text("shapes_json")
    shapes = list(shapes.values()) if isinstance(shapes, dict) else shapes
    for i, key in enumerate(data["keys"]):
        value = recipe.weight(str(key), tuple(shapes[i]), int(data["seed"]))
        first = np.zeros(8, np.float32)
        first[: min(8, value.size)] = value.ravel()[:8]
        np.testing.assert_array_equal(first, data["first8"][i], err_msg=str(key))
        np.testing.assert_allclose(value.sum(dtype=np.float64), data["sum_f64"][i], rtol=1e-9)


@functools.partial(jax.jit, static_argnames="config")  # fixtures of one config share a program
def forward(config, params, x_BHWC, t_B, context_BNX):
    apply = UNet(config).apply
    return apply({"params": params["unet"]}, x_BHWC, t_B, context_BNX, mutable=["intermediates"])


def run(data: recipe.Fixture, case: str):
    """Our output and sown activations by name, on the inputs of one case."""
    text = data.text("config_json")
    rules = data.text("gain_rules_json", [])
    params = recipe.params(recipe.entries_of(text), int(data["seed"]), rules)
    context = data.get(case + "context")
    x_BHWC, t_B = recipe.nhwc(data[case + "x"]), data[case + "t"].astype(np.int32)
    out, sown = forward(recipe.unet_config(text), params, x_BHWC, t_B, context)
    prefix = "act."
    activations = {
        name.removeprefix(prefix): recipe.nchw(value[0])
        for name, value in sown["intermediates"].items()
        if name.startswith(prefix)
    }
    return recipe.nchw(out), activations


@pytest.mark.parametrize("path", recipe.fixtures("unet"))
def test_outputs_and_activations(path, request):
    data = recipe.Fixture(path)
    if recipe.unet_config(data.text("config_json")).model_channels >= 128:
        request.getfixturevalue("optimized")  # of small ones compilation is all that takes long
    cases = sorted(name.removesuffix("x") for name in data.names if name.split("/")[-1] == "x")
    assert cases
    for case in cases:
        out, activations = run(data, case)
        assert relative_rms(out, data[case + "out"]) <= recipe.LIMIT, case
        expected = {name for name in data.names if name.startswith(case + "act/")}
        for name in expected:
            found = activations[name.split("/")[-1]]
            assert relative_rms(found, data[name]) <= recipe.LIMIT, name
        if "probe_names" in data:
            check_probes(data, activations)
        assert expected or "probe_names" in data


def check_probes(data: recipe.Fixture, activations: dict[str, np.ndarray]) -> None:
    """Compares the few numbers that a full-size fixture keeps of each activation."""
    shapes = data.text("probe_shape_json")
    for i, name in enumerate(str(name) for name in data["probe_names"]):
        found, std = activations[name].astype(np.float64), data["probe_std"][i]
        assert list(found.shape) == list(shapes[name] if isinstance(shapes, dict) else shapes[i])
        if found.ndim == 4:
            center = found[0, -16:, found.shape[2] // 2, found.shape[3] // 2]
            first = found[0, :16, 0, 0]
        else:
            first, center = found[0, :16], found[0, -16:]
        pairs = {
            "mean": (found.mean(), data["probe_mean"][i]),
            "std": (found.std(), std),
            "first16": (first, data["probe_first16"][i]),
            "center16": (center, data["probe_center16"][i]),
        }
        for what, (ours, theirs) in pairs.items():
            error = np.sqrt(np.mean((ours - theirs) ** 2)) / std
            assert error <= recipe.LIMIT, f"{name} {what}: {error:.1e} of its standard deviation"


@pytest.mark.parametrize("path", recipe.fixtures("unet"))
def test_class_embedding(path):
    data = recipe.Fixture(path)
    config = recipe.unet_config(data.text("config_json"))
    presets = [make() for make in PRESETS.values() if make().unet == config]
    if "class_ids" not in data or not presets:
        pytest.skip("no class ids of a known model")
    assert config.context_dim is not None
    rows = presets[0].n_classes, config.context_dim
    table = recipe.weight("cond_stage_model.embedding.weight", rows, int(data["seed"]))
    params = {"cond_stage": {"embedding": table}}
    found = models.embed_classes(presets[0], params, jnp.asarray(data["class_ids"]))
    np.testing.assert_array_equal(found, data["context"])


@pytest.mark.parametrize("path", recipe.fixtures("schedule"))
def test_timestep_embedding(path):
    data = recipe.Fixture(path)
    names = [name for name in data.names if name.startswith("timestep_embedding_")]
    assert names
    for name in names:
        found = timestep_embedding(jnp.asarray(data["t"], jnp.int32), int(name.split("_")[-1]))
        assert relative_rms(found, data[name]) <= recipe.LIMIT
