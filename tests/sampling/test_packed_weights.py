# SPDX-License-Identifier: Apache-2.0
"""Sampling with packed weights, on every path, against decoded ones; the limit of memory."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vqjax
from tests.conftest import relative_rms
from tests.io import models as small
from vqjax import sampling
from vqjax.core import tree
from vqjax.core.integer import IntegerKernel, PackedIntegerKernel
from vqjax.core.model import Model
from vqjax.core.tensor import VQTensor, densify
from vqjax.errors import VqjaxError
from vqjax.io.image_shards import Shards
from vqjax.kernels import device, dispatch, pallas_gpu, tuned
from vqjax.kernels.device import Device
from vqjax.kernels.lut_matmul import native
from vqjax.kernels.schedule import smallest
from vqjax.pipeline import sampled
from vqjax.sampling import weights
from vqjax.sampling.schedule import ddim_schedule

TOL = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}
"""Relative RMS of latents after 2 steps with guidance."""

SIMULATED = 0.03
"""The same at 8-bit activations: rounding moves a few inputs to the next level."""

CONFIG = dataclasses.replace(
    small.TINY,  # with so many channels that lookup tables save, and few pixels
    unet=dataclasses.replace(small.TINY.unet, model_channels=64),
    first_stage=dataclasses.replace(small.STAGE, resolution=16),
)
KINDS = {2: "fused", 10_000: "staged"}
"""Schedules that a convolution has in a network that sees so many latents."""

H200 = Device("gpu", "NVIDIA H200", (9, 0))


@pytest.fixture(autouse=True)
def _nothing_asked_for(monkeypatch):
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    dispatch._log_once.cache_clear()


@functools.partial(jax.jit, static_argnames=("dtype", "guidance", "kernels"))
def _latents(params, x_BHWC, *, dtype: str, guidance: float, kernels: str):
    del kernels  # another path is another program
    schedule, ids_B = ddim_schedule(CONFIG, 2, 0.0), jnp.array([1])
    settings = {"guidance": guidance, "dtype": dtype}
    return sampling.sample_latents(CONFIG, params, schedule, ids_B, x_BHWC, **settings)[0]


def latents(params, dtype: str = "float32", *, guidance: float = 1.5) -> np.ndarray:
    """Of one image after two steps; without the first stage, which is half of the program."""
    noise = sampling.image_noise(0, jnp.arange(1), CONFIG.latent_shape)
    settings = {"dtype": dtype, "guidance": guidance, "kernels": dispatch.wanted()}
    return np.asarray(_latents(params, noise, **settings))


def placed(params, **options) -> weights.Placed:
    return weights.place(CONFIG, params, **{"rows": 2, "dtype": "float32", **options})


def some_packed(*paths: str) -> dict:
    """A model with ranges of activations, dense but for these kernels."""
    params = small.with_ranges(CONFIG).params
    flat, dense = tree.flatten(params), tree.flatten(densify(params))
    return tree.unflatten({p: flat[p] if p in paths else leaf for p, leaf in dense.items()})


@pytest.mark.parametrize("dtype", TOL)
def test_weights_decoded_in_the_step_agree(dtype, monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "xla")
    params = small.integer(CONFIG).params
    packed, loaded = placed(params, limit=0, dtype=dtype), placed(params, dtype=dtype)
    assert set(packed.paths.values()) == {"xla"}
    assert set(loaded.paths.values()) == {weights.LOADED}
    assert packed.nbytes < loaded.nbytes / 3
    difference = relative_rms(latents(packed.params, dtype), latents(loaded.params, dtype))
    print(f"{dtype}: {difference:.2g}")
    assert difference < TOL[dtype]


def test_half_precision_is_used():
    params = placed(small.integer(CONFIG).params, dtype="bfloat16").params
    assert tree.flatten(params)["unet/out/conv/kernel"].dtype == jnp.bfloat16
    difference = relative_rms(latents(params, "bfloat16"), latents(params))
    assert 1e-4 < difference < TOL["bfloat16"]


def test_simulated_activations_agree_on_lookup_tables(monkeypatch, caplog):
    monkeypatch.setenv(dispatch.VARIABLE, "lut")
    block = "unet/middle_block"
    lookup = [f"{block}/attn/block_0/attn1/to_q/kernel", f"{block}/res1/conv1/kernel"]
    few_outputs = "unet/out/conv/kernel"
    params = some_packed(*lookup, few_outputs)
    with caplog.at_level(logging.INFO, "vqjax.kernels"):
        found = placed(params)
    assert found.counts() == {"lut": 2, weights.LOADED: 1}
    said = f"vq_conv on {device.current()}: lut (tables, then sums): VQJAX_KERNELS=lut"
    assert said in caplog.messages
    flat = tree.flatten(found.params)
    assert [path for path, leaf in flat.items() if isinstance(leaf, VQTensor)] == lookup
    difference = relative_rms(latents(found.params), latents(densify(params)))
    print(f"lookup tables, 8-bit activations: {difference:.2g}")
    assert difference < SIMULATED


@pytest.mark.skipif(native.missing() is not None, reason=f"no native code: {native.missing()}")
@pytest.mark.parametrize("how", ["named", "measured", "over the limit"])
def test_native_tables_agree(how, monkeypatch):
    paths = ("unet/middle_block/res1/conv1/kernel", "unet/output_blocks_0/res/skip/kernel")
    params = some_packed(*paths)
    del params["activations"]
    if how == "named":
        monkeypatch.setenv(dispatch.VARIABLE, "native")
    if how == "measured":
        monkeypatch.setattr(tuned, "knows", lambda kind: True)
        monkeypatch.setattr(tuned, "find", lambda kind, problem: tuned.Entry("native"))
    if how == "over the limit":
        slower = tuned.Entry("xla", packed="native")
        monkeypatch.setattr(tuned, "find", lambda kind, problem: slower)
    found = placed(params, limit=0 if how == "over the limit" else None)
    assert found.paths == dict.fromkeys(paths, "native")
    difference = relative_rms(latents(found.params), latents(densify(params)))
    print(f"native tables: {difference:.2g}")
    assert difference < TOL["float32"]


@pytest.mark.parametrize("dtype", TOL)
def test_pallas_kernels_agree(dtype, monkeypatch):
    """In interpret mode, as if this were a GPU: fused with the product, and of a whole weight."""
    kinds = {
        "unet/middle_block/res1/conv1/kernel": "staged",
        "unet/out/conv/kernel": "fused",
        "unet/output_blocks_0/res/skip/kernel": "fused",
    }
    params = some_packed(*kinds)
    del params["activations"]
    monkeypatch.setenv(dispatch.VARIABLE, "xla")  # a program of other tests
    expected = latents(placed(densify(params), dtype=dtype).params, dtype)
    launch = pallas_gpu.launch
    monkeypatch.setattr(
        pallas_gpu,
        "launch",
        lambda *args, **options: launch(*args, **options | {"interpret": True}),
    )
    monkeypatch.setattr(dispatch, "current", lambda: H200)
    monkeypatch.setattr(dispatch, "_failed_trial", lambda *args: ())
    monkeypatch.setattr(
        dispatch.schedule, "by_rule", lambda of, *_: smallest()[of.inputs == of.outputs]
    )
    monkeypatch.setenv(dispatch.VARIABLE, "pallas")
    chosen = weights.choices(CONFIG, params, rows=2, dtype=dtype)
    assert {path: getattr(chosen[path].schedule, "kind", None) for path in kinds} == kinds
    found = placed(params, dtype=dtype)
    assert found.paths == dict.fromkeys(kinds, "pallas")
    difference = relative_rms(latents(found.params, dtype), expected)
    print(f"pallas, {dtype}: {difference:.2g}")
    assert difference < TOL[dtype]


def test_a_named_kernel_that_cannot_run_is_an_error(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "pallas")
    with pytest.raises(VqjaxError, match=r"VQJAX_KERNELS=pallas, but vq_.* is no CUDA device"):
        vqjax.sample(small.integer(CONFIG), [0], steps=1)


def test_the_largest_weights_that_fit_are_decoded(caplog, monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "xla")
    params = small.integer(CONFIG).params
    sizes = {p: leaf.size for p, leaf in tree.flatten(params).items() if isinstance(leaf, VQTensor)}
    largest, *_, smallest = sorted(sizes, key=lambda path: -sizes[path])
    # Room for the largest and for the smallest, and not quite for another one.
    room = 4 * (sizes[largest] + sizes[smallest])
    found = placed(params, limit=room / 1e9)
    assert found.paths[largest] == weights.LOADED
    decoded = [path for path, how in found.paths.items() if how == weights.LOADED]
    assert sum(4 * sizes[path] for path in decoded) <= room
    assert not caplog.messages  # it is for the caller to say, once
    weights.say_what_stays(found, room / 1e9)
    (message,) = caplog.messages
    assert f"{len(sizes) - len(decoded)} of {len(sizes)} quantized weights" in message
    assert message.endswith(
        f"decoded, they exceed the limit of {room / 1e9:g} GB ({tuned.COMMAND} finds out whether "
        "native code is faster)"
    )


def test_nothing_is_said_where_all_fits(caplog):
    weights.say_what_stays(placed(small.integer(CONFIG).params, limit=1.0), 1.0)
    weights.say_what_stays(placed(small.dense(CONFIG).params, limit=0.0), 0.0)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_memory": -1.0}, "weight memory of -1.0 GB: expected 0 or more"),
        ({"dtype": "float8"}, "dtype 'float8': expected one of float32, float16, bfloat16"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(VqjaxError, match=message):
        vqjax.sample(small.with_ranges(CONFIG), [0], **settings)


def test_packed_integers_are_decoded_ones():
    """In the step, for products of int8: latents differ by rounding of float32 at most."""
    params = small.with_ranges(CONFIG).params
    packed, loaded = (placed(params, integer=True, limit=limit) for limit in (0, None))
    assert set(packed.paths.values()) == {"xla"}
    assert set(loaded.paths.values()) == {weights.LOADED}
    kinds = [
        {type(tree.flatten(one.params)[path]) for path in one.paths} for one in (packed, loaded)
    ]
    assert kinds == [{PackedIntegerKernel}, {IntegerKernel}]
    difference = relative_rms(latents(packed.params), latents(loaded.params))
    print(f"packed integers: {difference:.2g}")
    assert difference < SIMULATED
    # A byte for each weight: a limit of one layer's size holds that layer.
    sizes = {path: np.prod(tree.flatten(params)[path].shape) for path in packed.paths}
    largest = max(sizes, key=lambda path: sizes[path])
    some = placed(params, integer=True, limit=sizes[largest] / 1e9)
    assert [path for path, how in some.paths.items() if how == weights.LOADED] == [largest]


def test_integers_stay_packed_for_kernels(monkeypatch):
    """What a GPU would be given; only traced here."""
    for module in (dispatch, device):
        monkeypatch.setattr(module, "current", lambda: H200)
    monkeypatch.setattr(dispatch, "_failed_trial", lambda *args: ())
    params = small.with_ranges(CONFIG).params
    found = placed(params, integer=True)
    assert set(found.paths.values()) == {"pallas"}
    flat = tree.flatten(found.params)
    assert all(isinstance(flat[path], PackedIntegerKernel) for path in found.paths)
    assert all(flat[path].tensor.prepared is not None for path in found.paths)


@pytest.mark.parametrize("share", [0.0, 0.7, 100.0])
def test_a_gpu_holds_small_weights_decoded_while_memory_lasts(share, monkeypatch):
    for module in (dispatch, device):
        monkeypatch.setattr(module, "current", lambda: H200)
    monkeypatch.setattr(dispatch, "_failed_trial", lambda *args: ())
    monkeypatch.setattr(weights, "MEMORY_SHARE", share)
    params = small.integer(CONFIG).params
    tensors = {p: leaf for p, leaf in tree.flatten(params).items() if isinstance(leaf, VQTensor)}
    settings = {"rows": 8, "dtype": "bfloat16"}
    found = weights.choices(CONFIG, params, **settings)
    staged = {path for path, choice in found.items() if "staged" in str(choice.schedule)}
    assert staged < set(tensors)
    paths = placed(params, **settings).paths
    decoded = {path for path, how in paths.items() if how == weights.LOADED}
    held = {
        path: 2 * leaf.size if path in decoded else leaf.nbytes for path, leaf in tensors.items()
    }
    sizes = {path: leaf.size for path, leaf in tensors.items()}
    assert decoded <= staged
    if 0 < share < 100:
        assert 0 < len(decoded) < len(staged)
        assert max(sizes[p] for p in decoded) <= min(sizes[p] for p in staged - decoded)
        assert sum(held.values()) <= share * 2 * sum(sizes.values())
    else:
        assert decoded == (staged if share else set())
    assert weights.LOADED not in placed(params, **settings, limit=0).paths.values()
    monkeypatch.setenv(dispatch.VARIABLE, "pallas")
    assert weights.LOADED not in placed(params, **settings).paths.values()


def test_an_evaluation_places_weights_once_as_sample_does(tmp_path, monkeypatch):
    """Placed again, those left packed would be counted as the whole, and more be decoded."""
    for module in (dispatch, device):
        monkeypatch.setattr(module, "current", lambda: H200)
    monkeypatch.setattr(dispatch, "_failed_trial", lambda *args: ())
    monkeypatch.setattr(weights, "MEMORY_SHARE", 1.0)
    model, ids, ran = small.integer(CONFIG), np.arange(8) % 3, []

    def compiled(config, params, ids_B, index_B, seed, *, run):
        shapes = jax.tree.map(jnp.shape, jax.tree.leaves(params))
        ran.append(((run, len(ids_B), jax.tree.structure(params), shapes), params))
        images = np.zeros((len(ids_B), 16, 16, 3), np.uint8)
        return images, np.zeros((len(ids_B), *config.latent_shape), np.float32)

    monkeypatch.setattr(sampling, "sample_batch", compiled)
    vqjax.sample(model, ids[:4], steps=2, guidance=1.5)
    protocol = sampled.Protocol(steps=2, guidance=1.5, eta=0.0, seed=0)
    shards = Shards(tmp_path, 7, 4, (16, 16))  # the last is padded: one program serves both
    sampled.sample(model, ids[:7], shards, protocol, "sample")
    (as_sample, _), *of_shards = ran
    assert [how for how, _ in of_shards] == [as_sample, as_sample]
    first, second = (jax.tree.leaves(params) for _, params in of_shards)
    assert all(one is other for one, other in zip(first, second, strict=True))
    stored, held = tree.flatten(model.params), tree.flatten(of_shards[0][1])
    packed = [path for path, leaf in stored.items() if isinstance(leaf, VQTensor)]
    assert {isinstance(held[path], VQTensor) for path in packed} == {True, False}
    dense = 2 * sum(stored[path].size for path in packed)
    assert sum(held[path].nbytes for path in packed) <= weights.MEMORY_SHARE * dense


@pytest.mark.parametrize("rows", [2, 10_000], ids=["fused", "staged"])
def test_what_kernels_read_is_made_at_load(rows, monkeypatch):
    """No step converts a bias, scales factors or merges codebooks; only traced here."""
    for module in (dispatch, device):
        monkeypatch.setattr(module, "current", lambda: H200)
    monkeypatch.setattr(dispatch, "_failed_trial", lambda *args: ())
    monkeypatch.setattr(weights, "MEMORY_SHARE", 0.0)  # all stay packed
    model = small.integer(CONFIG)
    half = {
        path: leaf.astype(jnp.float16) if path.endswith("bias") else leaf
        for path, leaf in tree.flatten(model.params).items()
    }
    found = placed(tree.unflatten(half), rows=rows, dtype="bfloat16")
    assert set(found.paths.values()) == {"pallas"}
    flat, stored = tree.flatten(found.params), tree.flatten(model.params)
    choices = weights.choices(CONFIG, model.params, rows=rows, dtype="bfloat16")
    chosen = {path: choice.schedule for path, choice in choices.items() if choice.schedule}
    assert chosen.keys() == choices.keys()
    assert {schedule.kind for schedule in chosen.values()} >= {KINDS[rows]}
    for path, schedule in chosen.items():
        tensor, books = flat[path], choices[path].books
        assert books is not None
        assert tensor.prepared.kind == books.kind
        assert tensor.nbytes == stored[path].nbytes
        scales_O = tensor.scales.values() * tensor.codebook_scale
        np.testing.assert_array_equal(tensor.prepared.factors_O, scales_O)
        bias = path.removesuffix("kernel") + "bias"
        if bias in flat and path.startswith("unet/"):
            convolved = schedule.kind == "staged" and tensor.shape[0] == 3
            assert flat[bias].dtype == ("bfloat16" if convolved else "float32")
    norms = [leaf for path, leaf in flat.items() if path.endswith("norm1/bias")]
    assert norms
    assert all(leaf.dtype == jnp.float16 for leaf in norms)


def test_images_of_packed_weights_are_those_of_decoded_ones(caplog, monkeypatch):
    """The whole of `sample`: first stage, guidance and noise of every step."""
    monkeypatch.setenv(dispatch.VARIABLE, "xla")
    model, settings = small.integer(CONFIG), {"steps": 2, "guidance": 1.5, "eta": 0.5}
    packed = vqjax.sample(model, [2, 0], weight_memory=0.0, **settings)
    (message,) = caplog.messages
    assert "stay packed and are decoded in every step" in message
    dense = vqjax.sample(Model(CONFIG, densify(model.params)), [2, 0], **settings)
    # At most one grey level, where rounding lies at its edge.
    assert np.abs(packed.astype(int) - dense.astype(int)).max() <= 1
