# SPDX-License-Identifier: Apache-2.0
"""LDM checkpoints of every kind and container, and every way in which one can be wrong."""

import dataclasses
import pathlib
import resource
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from tests.conftest import golden_files
from tests.io import models, torch_writer
from tests.io.torch_writer import SAVERS, Instance
from vqjax.config import PRESETS, LatentDiffusionConfig
from vqjax.core import tree
from vqjax.core.model import Model
from vqjax.errors import VqjaxError
from vqjax.io import keys, ldm, load_model, native
from vqjax.io.lazy import LazyTensor

CONFIGS = {c.name: c for c in (models.CLASSES, models.PLAIN, models.UPDOWN)}


def schedule(config: LatentDiffusionConfig) -> dict[str, np.ndarray]:
    """The buffers that LDM registers, float32."""
    start, end = np.sqrt(config.linear_start), np.sqrt(config.linear_end)
    betas = np.linspace(start, end, config.timesteps) ** 2
    product = np.cumprod(1 - betas)
    names = ("alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_recipm1_alphas_cumprod")
    names += ("log_one_minus_alphas_cumprod", "posterior_variance", "posterior_mean_coef1")
    buffers = {"betas": betas, "alphas_cumprod": product} | dict.fromkeys(names, product)
    return {name: np.asarray(values, np.float32) for name, values in buffers.items()}


def leftovers(config: LatentDiffusionConfig) -> dict[str, np.ndarray]:
    """What training leaves in a state dict besides weights."""
    return schedule(config) | {
        "logvar": np.zeros(config.timesteps, np.float32),
        "loss.discriminator.main.0.weight": np.zeros((2, 2), np.float32),
        "first_stage_model.loss.logvar": np.zeros((), np.float32),
        "model_ema.decay": np.full((), 0.9999, np.float32),
        "model_ema.num_updates": np.zeros((), np.int32),
    }


def with_average(config: LatentDiffusionConfig, factor: float = 2) -> dict[str, np.ndarray]:
    tensors = models.tensors(config)
    average = {e.ema_key: tensors[e.key] * np.float32(factor) for e in keys.table(config)}
    return tensors | {key: value for key, value in average.items() if key}


@pytest.mark.parametrize("container", SAVERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_checkpoints_load_exactly(container, name, tmp_path):
    config = CONFIGS[name]
    state = models.tensors(config) | leftovers(config)
    contents = {
        "epoch": 3,
        "global_step": 100,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": state,
        "callbacks": {"ema": Instance("somewhere", "Callback", {"best": 1.0})},
    }
    SAVERS[container](tmp_path / "model.ckpt", contents)
    loaded = load_model(tmp_path / "model.ckpt", config=config)
    models.assert_equal(loaded, models.dense(config))


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_safetensors_with_ldm_keys(kind, tmp_path):
    tensors = {k: v.astype(kind) for k, v in models.tensors(models.PLAIN).items()}
    safetensors_numpy.save_file(tensors, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors", config=models.PLAIN)
    for entry in keys.table(models.PLAIN):
        expected = entry.to_param(tensors[entry.key].astype(np.float32))
        found = tree.flatten(loaded.params)[entry.path]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)


def lazy(tensors: dict[str, np.ndarray]) -> dict[str, LazyTensor]:
    return {
        key: LazyTensor(value.shape, value.dtype, lambda value=value: value)
        for key, value in tensors.items()
    }


def build(tensors: dict[str, np.ndarray], config=models.CLASSES):
    return ldm.build_model(lazy(tensors), config, where="model.ckpt")


def test_averaged_weights_go_before_raw_ones():
    plain = tree.flatten(build(models.tensors(models.CLASSES)).params)
    found = tree.flatten(build(with_average(models.CLASSES)).params)
    for path, value in plain.items():
        factor = 2 if path.startswith("unet/") else 1
        np.testing.assert_array_equal(np.asarray(found[path]), factor * np.asarray(value))


def test_averaged_weights_alone_are_enough():
    tensors = with_average(models.CLASSES)
    alone = {k: v for k, v in tensors.items() if not k.startswith(keys.UNET_PREFIX)}
    models.assert_equal(build(alone), build(tensors))


def test_an_incomplete_average_is_no_average():
    tensors = with_average(models.CLASSES)
    del tensors["model_ema.diffusion_modelout2weight"]
    with pytest.raises(VqjaxError, match=r"model_ema\.diffusion_modelout2weight: missing"):
        build(tensors)


def test_every_misfit_is_named_at_once():
    tensors = models.tensors(models.CLASSES)
    out = "model.diffusion_model.out.2.weight"
    del tensors["cond_stage_model.embedding.weight"]
    tensors["model.diffusion_model.label_emb.weight"] = np.zeros((3, 3), np.float32)
    tensors[out] = np.zeros((3, 32, 1, 1), np.float32)
    tensors["model.diffusion_model.out.2.bias"] = np.zeros(3, np.int64)
    tensors["first_stage_model.encoder.conv_in.bias"][3] = np.inf
    tensors["model.diffusion_model.out.0.bias"][:2] = np.nan
    with pytest.raises(VqjaxError) as caught:
        build(tensors)
    text = str(caught.value)
    for line in (
        "model.ckpt does not fit the config 'small-classes'",
        "cond_stage_model.embedding.weight: missing",
        "model.diffusion_model.label_emb.weight: unknown",
        f"{out}: shape (3, 32, 1, 1), expected (3, 32, 3, 3)",
        "model.diffusion_model.out.2.bias: type int64, expected floating point",
        "first_stage_model.encoder.conv_in.bias: 1 of 32 values are NaN or infinite",
        "model.diffusion_model.out.0.bias: 2 of 32 values are NaN",
        "lsun_churches",
    ):
        assert line in text
    assert text.count("\n") == 6


def test_doubles_beyond_single_precision_are_reported():
    tensors = models.tensors(models.CLASSES)
    key = "model.diffusion_model.out.2.bias"
    tensors[key] = np.array([1, 1e300, 2.0])
    with pytest.raises(VqjaxError, match=f"{key}: 1 of 3 values are NaN or infinite"):
        build(tensors)


def test_a_noise_schedule_that_differs_is_an_error():
    other = dataclasses.replace(models.CLASSES, linear_end=0.0155)
    with pytest.raises(VqjaxError, match=r"betas: runs from 0.0015 to 0.0155, the config's from"):
        build(models.tensors(models.CLASSES) | schedule(other))
    shorter = dataclasses.replace(models.CLASSES, timesteps=500)
    with pytest.raises(VqjaxError, match=r"betas: \(500,\) steps, the config has 1000"):
        build(models.tensors(models.CLASSES) | schedule(shorter))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_a_checkpoint_in_half_precision_has_its_schedule_in_it_too(dtype):
    state = models.tensors(models.CLASSES)
    half = {name: values.astype(dtype) for name, values in schedule(models.CLASSES).items()}
    as_read = {name: values.astype(np.float32) for name, values in half.items()}
    build(state | as_read)
    other = schedule(dataclasses.replace(models.CLASSES, linear_end=0.0155))
    with pytest.raises(VqjaxError, match=r"betas: runs from 0\.0015"):
        build(state | {"betas": other["betas"].astype(dtype).astype(np.float32)})


def test_the_reference_schedule_fits():
    files = golden_files("golden", "schedule*.npz")
    if not files:
        pytest.skip("no reference schedule (set VQJAX_GOLDEN)")
    with np.load(files[0]) as data:
        buffers = {name: data[name] for name in schedule(models.CLASSES) if name in data}
    assert "betas" in buffers
    build(models.tensors(models.CLASSES) | buffers)


def test_scale_factor_goes_into_the_config():
    tensors = models.tensors(models.UPDOWN) | {"scale_factor": np.full((), 0.2275, np.float32)}
    assert build(tensors, models.UPDOWN).config.scale_factor == pytest.approx(0.2275)
    for bad in (np.full((), -1, np.float32), np.ones(3, np.float32), np.ones((), np.int64)):
        with pytest.raises(VqjaxError, match=r"scale_factor: .*expected"):
            build(tensors | {"scale_factor": bad}, models.UPDOWN)


def placeholders(config: LatentDiffusionConfig) -> dict[str, LazyTensor]:
    """Tensors of the right shapes that cannot be read."""
    return {
        entry.key: LazyTensor(entry.shape, np.dtype(np.float32), lambda: np.empty(0))
        for entry in keys.table(config)
    }


@pytest.mark.parametrize("name", PRESETS)
def test_published_models_are_recognized(name):
    found = ldm.recognize(placeholders(PRESETS[name]()), where="model.ckpt")
    assert dataclasses.replace(found, name=name) == PRESETS[name]()
    assert name in found.name.split(" or ")


def test_a_damaged_published_model_is_still_recognized():
    tensors = placeholders(PRESETS["cin256-v2"]())
    del tensors["model.diffusion_model.out.2.weight"]
    assert ldm.recognize(tensors, where="m").name == "cin256-v2"


def test_unknown_models_ask_for_a_config(tmp_path):
    torch_writer.save_zip(tmp_path / "model.ckpt", models.tensors(models.PLAIN))
    with pytest.raises(VqjaxError, match=r"fit no published model; pass the config.*celebahq"):
        load_model(tmp_path / "model.ckpt")


def test_digits_checkpoints_need_no_config(tmp_path):
    config = PRESETS["digits"]()
    torch_writer.save_legacy(tmp_path / "model.pth", models.tensors(config))
    models.assert_equal(load_model(tmp_path / "model.pth"), models.dense(config))


def test_exports_are_computed_in_single_precision(tmp_path):
    model = models.quantized(models.CLASSES)
    native.save_model(tmp_path / "model.safetensors", model)
    loaded = load_model(tmp_path / "model.safetensors")
    flat = tree.flatten(loaded.params)
    assert flat["unet/out/conv/bias"].dtype == np.float32
    assert flat["unet/out/conv/kernel"].codes.dtype == np.uint8
    with pytest.raises(VqjaxError, match=r"in n_classes \(4, given 0\), unet/attention_res"):
        load_model(tmp_path / "model.safetensors", config=models.PLAIN)


def test_an_export_is_taken_with_the_config_that_it_was_made_with(tmp_path):
    made = dataclasses.replace(models.TINY, name="published", scale_factor=0.5, guidance=2.0)
    native.save_model(tmp_path / "a.safetensors", Model(made, models.dense(made).params))
    loaded = load_model(tmp_path / "a.safetensors", config=models.TINY)
    assert loaded.config == made


def test_sources_that_are_none(tmp_path):
    with pytest.raises(VqjaxError, match="no such file or folder"):
        load_model(tmp_path / "nothing.ckpt")
    with pytest.raises(VqjaxError, match=r"folder; published as model.ckpt: .*/cin/model\.ckpt$"):
        load_model(tmp_path / "model.ckpt")
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(VqjaxError, match=r"unknown kind of file; expected one of \.ckpt"):
        load_model(tmp_path / "model.onnx")
    with pytest.raises(VqjaxError, match="neither a run folder"):
        load_model(tmp_path)


def run_python(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torch_is_never_imported(tmp_path):
    config = PRESETS["digits"]()
    torch_writer.save_zip(tmp_path / "model.ckpt", models.tensors(config))
    native.save_model(tmp_path / "model.safetensors", models.dense(config))
    code = """
import sys
import vqjax.io
assert "jax" not in sys.modules
for source in sys.argv[1:]:
    vqjax.io.load_model(source)
assert not {"torch", "diffusers", "pickle5"} & set(sys.modules)
print("done")
"""
    output = run_python(code, tmp_path / "model.ckpt", tmp_path / "model.safetensors")
    assert output.strip() == "done"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "RUSAGE_SELF"), reason="needs getrusage")
def test_memory_stays_near_the_size_of_the_model(tmp_path):
    config = PRESETS["celebahq"]()
    path = tmp_path / "model.ckpt"
    ones = {e.key: np.ones(e.shape, np.float32) for e in keys.table(config)}
    torch_writer.save_zip(path, {"state_dict": ones})
    size, largest = path.stat().st_size, max(array.nbytes for array in ones.values())
    del ones
    code = """
import resource, sys
import jax, vqjax.io
jax.numpy.zeros(3).block_until_ready()
import vqjax.io.ldm, vqjax.io.torch_pickle, vqjax.io.orbax_model
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = vqjax.io.load_model(sys.argv[1])
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024)
"""
    peak = int(run_python(code, path))
    assert peak < size + 4 * largest + (100 << 20)
