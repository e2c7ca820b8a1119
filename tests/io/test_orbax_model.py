# SPDX-License-Identifier: Apache-2.0
"""Model folders: round trips, equal bytes for equal models, and what is refused."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

from tests.io import models
from vqjax.core.model import Model
from vqjax.errors import VqjaxError
from vqjax.io import load_model, orbax_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = models.quantized(models.CLASSES)
    path = tmp_path_factory.mktemp("run") / "model"
    orbax_model.save_model_folder(path, model)
    return path, model


def contents(path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def test_round_trip_keeps_every_bit(saved):
    path, model = saved
    models.assert_equal(orbax_model.load_model_folder(path), model)


def test_equal_models_give_equal_bytes_and_leave_nothing_else(saved, tmp_path):
    path, model = saved
    for _ in range(2):  # the second replaces the first
        orbax_model.save_model_folder(tmp_path / "elsewhere", model)
    assert contents(tmp_path / "elsewhere") == contents(path)
    assert [p.name for p in tmp_path.iterdir()] == ["elsewhere"]
    assert not any(str(tmp_path).encode() in data for data in contents(path).values())


def test_ranges_of_activations_round_trip(tmp_path):
    model = models.quantized(models.TINY)
    ranges = models.any_ranges(model)
    model = Model(config=model.config, params=model.params | {"activations": ranges})
    orbax_model.save_model_folder(tmp_path / "model", model)
    found = orbax_model.load_model_folder(tmp_path / "model")
    params = model.params | {"activations": ranges.rounded()}
    models.assert_equal(found, Model(config=model.config, params=params))


def test_damaged_ranges_are_named(tmp_path):
    model = models.quantized(models.TINY)
    ranges = models.any_ranges(model)
    layer = "unet/out/conv/kernel"
    ranges = dataclasses.replace(
        ranges, log2_steps=ranges.log2_steps | {layer: jnp.array([0.0, jnp.inf, 0.0])}
    )
    model = Model(config=model.config, params=model.params | {"activations": ranges})
    orbax_model.save_model_folder(tmp_path / "model", model)
    with pytest.raises(VqjaxError, match=f"activations/{layer}.log2_steps: 1 of 3 values are NaN"):
        orbax_model.load_model_folder(tmp_path / "model")


def test_a_run_folder_and_its_model_folder_load(saved):
    path, model = saved
    for source in (path, path.parent):
        loaded = load_model(source)
        assert loaded.config == model.config
    assert orbax_model.find(path.parent.parent) is None


def test_damage_is_named(saved, tmp_path):
    _, model = saved
    path = tmp_path / "model"
    orbax_model.save_model_folder(path, model)
    document = path / "model" / "metadata"
    text = document.read_text()
    document.write_text(text.replace('"linear_end": 0.0195', '"linear_end": 0.0196'))
    with pytest.raises(VqjaxError, match="does not match its SHA-256"):
        orbax_model.load_model_folder(path)
    document.write_text(json.dumps(json.loads(text) | {"version": 9}))
    with pytest.raises(VqjaxError, match="format version 9, this vqjax reads 1"):
        orbax_model.load_model_folder(path)
    document.write_text("{")
    with pytest.raises(VqjaxError, match="not a readable model folder"):
        orbax_model.load_model_folder(path)
    document.write_text(text)
    array = next(path.glob("params/unet.out.conv.bias/0*"))
    array.write_bytes(b"x")
    with pytest.raises(VqjaxError, match="not a readable model folder"):
        orbax_model.load_model_folder(path)


def test_missing_arrays_are_an_error(saved, tmp_path):
    path = tmp_path / "model"
    orbax_model.save_model_folder(path, saved[1])
    for file in path.glob("params/unet.out.conv.bias/*"):
        file.unlink()
    for file in path.glob("params/unet.out.conv.bias/.z*"):
        file.unlink()
    with pytest.raises(VqjaxError, match="not a readable model folder"):
        orbax_model.load_model_folder(path)


def test_a_full_disk_is_one_line_and_leaves_nothing(saved, tmp_path, monkeypatch):
    def full(self, path, **_):
        path.with_name(path.name + ".orbax-checkpoint-tmp").mkdir()
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nand a thousand lines")

    monkeypatch.setattr(orbax_model.ocp.Checkpointer, "save", full)
    with pytest.raises(VqjaxError, match=r"cannot write \(RESOURCE_EXHAUSTED: [^\n]*\); choose"):
        orbax_model.save_model_folder(tmp_path / "model", saved[1])
    assert not list(tmp_path.iterdir())
