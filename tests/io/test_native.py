# SPDX-License-Identifier: Apache-2.0
"""The single-file format: round trips, the numpy-only reader, and what it refuses."""

import dataclasses
import json
import pathlib
import runpy

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy
from safetensors import safe_open

from tests import xla_flags
from tests.io import models
from vqjax.core import tree
from vqjax.core.activations import Activations
from vqjax.core.model import Model
from vqjax.core.tensor import VQTensor
from vqjax.errors import VqjaxError
from vqjax.io import leaves, load_model, native

READER = pathlib.Path(__file__).parents[2] / "docs" / "read_vqjax.py"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model = models.quantized(models.CLASSES)
    path = tmp_path_factory.mktemp("native") / "model.safetensors"
    size = native.save_model(path, model, {"plan": {"rules": [1]}})
    assert size == path.stat().st_size
    return path, model


def test_round_trip_keeps_every_bit(exported):
    path, model = exported
    models.assert_equal(native.load(path), model)
    document = native.metadata(path)
    assert document is not None
    assert document["plan"] == {"rules": [1]}


def test_equal_models_give_equal_bytes(exported, tmp_path):
    path, model = exported
    for _ in range(5):
        native.save_model(tmp_path / "again.safetensors", model, {"plan": {"rules": [1]}})
        assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["again.safetensors"]


def test_numpy_reader_decodes_as_we_do(exported):
    path, model = exported
    reader = runpy.run_path(str(READER))
    found, expected = reader["read"](path), tree.flatten(model.params)
    decoded = jax.jit(VQTensor.decode, compiler_options=xla_flags.EMITTERS_OF_USERS)
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        leaf = decoded(leaf) if isinstance(leaf, VQTensor) else leaf
        # Powers of two with fractions differ in the last place from one library to another.
        np.testing.assert_allclose(found[name], np.asarray(leaf, np.float32), 1e-6, err_msg=name)


def test_numpy_reader_is_short_and_needs_numpy_alone():
    lines = READER.read_text().splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 70
    imports = {line.split()[1] for line in lines if line.startswith(("import", "from"))}
    assert imports == {"json", "struct", "sys", "numpy"}


@pytest.fixture(scope="module")
def with_ranges(tmp_path_factory):
    """Ranges of three timesteps, zero points between levels."""
    model = models.quantized(models.TINY)
    model = Model(
        config=model.config, params=model.params | {"activations": models.any_ranges(model)}
    )
    path = tmp_path_factory.mktemp("ranges") / "model.safetensors"
    native.save_model(path, model)
    return path, model


def test_ranges_of_activations_round_trip(with_ranges):
    path, model = with_ranges
    found = native.load(path)
    ranges = model.params["activations"]
    expected = Model(config=model.config, params=model.params | {"activations": ranges.rounded()})
    models.assert_equal(found, expected)
    assert found.params["activations"].bits == ranges.bits == 4
    native.save_model(path.with_name("again.safetensors"), found)
    assert path.with_name("again.safetensors").read_bytes() == path.read_bytes()


def test_load_model_keeps_ranges(with_ranges):
    path, _ = with_ranges
    models.assert_equal(
        Model(config=models.TINY, params={"activations": _ranges(load_model(path))}),
        Model(config=models.TINY, params={"activations": _ranges(native.load(path))}),
    )


def _ranges(model: Model) -> Activations:
    return model.params["activations"]


def test_numpy_reader_returns_ranges_as_stored(with_ranges):
    path, model = with_ranges
    found = runpy.run_path(str(READER))["read"](path)
    ranges = model.params["activations"].rounded()
    np.testing.assert_array_equal(found["activations.timesteps"], ranges.timesteps_T)
    for layer, zero_T in ranges.zeros.items():
        np.testing.assert_array_equal(found[f"activations/{layer}.zeros"], zero_T)
        log2_T = found[f"activations/{layer}.log2_steps"]
        np.testing.assert_array_equal(log2_T, ranges.log2_steps[layer])
    weights = {name for name in found if not name.startswith("activations")}
    assert weights == tree.flatten(model.params).keys() - {"activations"}


def test_files_without_ranges_do_not_mention_them(exported):
    with safe_open(exported[0], framework="numpy") as file:
        assert "activations" not in file.metadata()["vqjax"]
        assert not any("activations" in name for name in file.keys())  # noqa: SIM118


LAYER = "activations/unet/out/conv/kernel"
OTHER = "activations/unet/middle_block/res1/conv1/kernel"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("activations.timesteps"), "activations.timesteps: missing"),
        (lambda a: a["activations.timesteps"].fill(3), "in rising order"),
        (
            lambda a: a.update({"activations.timesteps": np.array([1.0, 2.0], np.float32)}),
            "not int32 numbers",
        ),
        (lambda a: a.pop(f"{LAYER}.zeros"), f"{LAYER}.zeros: missing"),
        (lambda a: a.pop(f"{LAYER}.log2_steps"), f"{LAYER}.log2_steps: missing"),
        (lambda a: a[f"{LAYER}.log2_steps"].fill(np.nan), "3 of 3 values are NaN"),
        (
            lambda a: a.update({f"{LAYER}.zeros": np.zeros(4, np.uint8)}),
            r"zeros: uint8 \(4,\), expected uint8 \(3,\)",
        ),
        (
            lambda a: a.update({f"{LAYER}.zeros": np.zeros(3, np.float32)}),
            r"zeros: float32 \(3,\), expected uint8",
        ),
        (lambda a: a[f"{OTHER}.zeros"].fill(16), f"{OTHER}.zeros: 16 is no level of 4 bits"),
        (
            lambda a: a.update({"activations/unet/x/kernel.zeros": np.zeros(2, np.uint8)}),
            "activations/unet/x/kernel.zeros: no such layer",
        ),
        (
            lambda a: a.update({f"{LAYER}.other": np.zeros(2, np.uint8)}),
            f"{LAYER}.other: no such layer",
        ),
    ],
)
def test_wrong_ranges_are_named(with_ranges, tmp_path, change, message):
    path = rewrite(with_ranges[0], tmp_path / "bad.safetensors", change)
    with pytest.raises(VqjaxError, match=message):
        native.load(path)


@pytest.mark.parametrize("about", [{"bits": 1}, {"bits": 9}, {"bits": "8"}, {"bits": True}, 8, {}])
def test_wrong_descriptions_of_ranges_are_named(with_ranges, tmp_path, about):
    def change(document):
        document["activations"] = about

    path = rewrite(with_ranges[0], tmp_path / "bad.safetensors", change_document=change)
    with pytest.raises(VqjaxError, match=r"activations described as .*, expected 2 to 8 bits"):
        native.load(path)


def test_ranges_that_nothing_describes_are_no_weights(with_ranges, tmp_path):
    def change(document):
        del document["activations"]

    path = rewrite(with_ranges[0], tmp_path / "bad.safetensors", change_document=change)
    with pytest.raises(VqjaxError, match=r"\.log2_steps: no such weight"):
        native.load(path)


def test_more_than_eight_bits_are_not_stored(with_ranges, tmp_path):
    _, model = with_ranges
    ranges = dataclasses.replace(model.params["activations"], bits=10)
    model = Model(config=model.config, params=model.params | {"activations": ranges})
    with pytest.raises(VqjaxError, match="activations of 10 bits: 2 to 8 can be stored"):
        native.save_model(tmp_path / "x.safetensors", model)


def test_folded_weights_may_be_absent(tmp_path):
    model = models.dense(models.CLASSES)
    dead = ("attn2/to_q/", "attn2/to_k/", "/norm2/")
    flat = {
        path: leaf
        for path, leaf in tree.flatten(model.params).items()
        if not ("/block_" in path and "attn" in path and any(name in path for name in dead))
    }
    assert len(flat) < len(tree.flatten(model.params))
    model = Model(config=model.config, params=tree.unflatten(flat))
    native.save_model(tmp_path / "folded.safetensors", model)
    models.assert_equal(native.load(tmp_path / "folded.safetensors"), model)


def rewrite(source, target, change_arrays=None, change_document=None):
    """Writes a file whose parts were changed and whose hash is right again."""
    arrays = safetensors_numpy.load_file(source)
    with safe_open(source, framework="numpy") as file:
        document = json.loads(file.metadata()["vqjax"])
    if change_arrays:
        change_arrays(arrays)
    if change_document:
        change_document(document)
    if document.get("sha256") is not None:
        document["sha256"] = leaves.content_hash(document, arrays)
    safetensors_numpy.save_file(arrays, target, metadata={"vqjax": json.dumps(document)})
    return target


BAD = "unet/out/conv/kernel"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop(f"{BAD}.codes"), f"{BAD}: codes missing"),
        (lambda a: a.pop("unet/out/conv/bias"), "unet/out/conv/bias: missing"),
        (lambda a: a.update(stray=np.zeros(3, np.float32)), "stray: no such weight"),
        (lambda a: a.update({"unet/out/conv/bias": np.zeros(9, np.float32)}), r"shape \(9,\)"),
        (lambda a: a.update({"unet/out/conv/bias": np.zeros(3, np.int8)}), "int8, expected float"),
        (
            lambda a: a.update({"unet/out/conv/bias": np.full(3, np.nan, np.float32)}),
            "3 of 3 values are NaN",
        ),
        (lambda a: a.update({f"{BAD}.scales": np.ones(9, np.uint8)}), r"scales \(9,\), expected"),
        (lambda a: a.update({f"{BAD}.scales": np.ones(3, np.float64)}), "scales float64, expected"),
        (lambda a: a.pop(f"{BAD}.scale_range"), "scale_range missing"),
        (lambda a: a[f"{BAD}.scale_range"].fill(np.inf), "scale_range: 2 of 2 values are NaN"),
        (
            lambda a: a.update({f"{BAD}.input_scales": np.ones(24, np.uint8)}),
            "input_scales and input_scale_range go together",
        ),
    ],
)
def test_wrong_arrays_are_named(exported, tmp_path, change, message):
    path = rewrite(exported[0], tmp_path / "bad.safetensors", change)
    with pytest.raises(VqjaxError, match=message):
        native.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=7), "format version 7, this vqjax reads 1"),
        (lambda d: d.update(sha256=None), "content does not match its SHA-256"),
        (lambda d: d.pop("config"), "lacks config or quantized"),
        (lambda d: d["config"].update(flavour=1), r"bad\.safetensors: .*unknown fields"),
        (lambda d: d["config"].update(unet=5), r"bad\.safetensors: unet: found 5, expected"),
        (lambda d: d["config"]["unet"].update(model_channels="x"), "found 'x', expected int"),
        (
            lambda d: d["config"]["first_stage"].update(ch_mult=[]),
            r"(?s)bad\.safetensors: model config: .*first_stage\.ch_mult: found \(\), expected",
        ),
        (lambda d: d["quantized"][BAD].update(grouping="x"), "described as"),
        (lambda d: d["quantized"][BAD].update(shape=[1, 2]), "expected"),
        (lambda d: d["quantized"].update(other={}), "other: no such weight"),
    ],
)
def test_wrong_documents_are_named(exported, tmp_path, change, message):
    path = rewrite(exported[0], tmp_path / "bad.safetensors", change_document=change)
    with pytest.raises(VqjaxError, match=message):
        native.load(path)


def test_codes_beyond_the_codebook_are_refused(exported, tmp_path):
    flat = tree.flatten(exported[1].params)
    path = next(p for p, x in flat.items() if isinstance(x, VQTensor) and x.codebooks.shape[1] == 5)

    def change(arrays):
        arrays[f"{path}.codes"] = np.full_like(arrays[f"{path}.codes"], 255)

    bad = rewrite(exported[0], tmp_path / "bad.safetensors", change)
    with pytest.raises(VqjaxError, match=f"{path}: codes beyond the 5 codebook entries"):
        native.load(bad)


def test_any_damage_is_one_clear_error(exported, tmp_path):
    data, rng = bytearray(exported[0].read_bytes()), np.random.default_rng(0)
    path = tmp_path / "damaged.safetensors"
    for trial in range(60):
        broken = data.copy()
        if trial % 2:
            # The header is where damage has the most ways to go wrong.
            limit = len(data) if trial % 4 == 1 else 20_000
            broken[rng.integers(limit)] ^= 1 << rng.integers(8)
        else:
            broken = broken[: rng.integers(len(data))]
        path.write_bytes(broken)
        with pytest.raises(VqjaxError, match="damaged"):
            native.load(path)


RESERVED = {"activations": 1}


def test_save_refuses_other_types_and_reserved_names(tmp_path):
    model = models.dense(models.PLAIN)
    model.params["unet"]["out"]["conv"]["bias"] = np.zeros(3, np.float64)
    with pytest.raises(VqjaxError, match="unet/out/conv/bias: float64"):
        native.save_model(tmp_path / "x.safetensors", model)
    with pytest.raises(VqjaxError, match=r"names \['config'\]"):
        native.save_model(tmp_path / "x.safetensors", models.dense(models.PLAIN), {"config": 1})
    with pytest.raises(VqjaxError, match=r"names \['activations'\]"):
        native.save_model(tmp_path / "x.safetensors", models.dense(models.PLAIN), RESERVED)
    with pytest.raises(VqjaxError, match="cannot write"):
        native.save_model(tmp_path / "no" / "x.safetensors", models.dense(models.PLAIN))


def test_other_files_are_told_apart(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors_numpy.save_file({"a": np.zeros(3)}, path)
    assert native.metadata(path) is None
    with pytest.raises(VqjaxError, match="no 'vqjax' metadata"):
        native.load(path)
    path.write_bytes(b"<html>")
    with pytest.raises(VqjaxError, match="not a readable"):
        native.load(path)
