# SPDX-License-Identifier: Apache-2.0
"""The FID network from every kind of file it is published as, and everything wrong with one."""

import json

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from tests.eval import fixtures
from tests.io import graph_writer
from tests.io.torch_writer import SAVERS
from vqjax.errors import VqjaxError
from vqjax.io import graph_def, inception, inception_keys, lpips

ENTRIES = inception_keys.torch_entries()


@pytest.mark.parametrize("path", fixtures.manifests())
def test_tables_are_those_of_the_manifests(path):
    manifest = json.loads(path.read_text())
    tables = [{e.key: list(e.shape) for e in table} for table in (ENTRIES, lpips.entries())]
    table = next(t for t in tables if t.keys() & manifest["shapes"].keys())
    assert table == manifest["shapes"]
    for key, first in manifest["check_first3"].items():
        value = fixtures.weight(key, tuple(table[key]), manifest["seed"])
        np.testing.assert_array_equal(value.ravel()[:3], np.float32(first))


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    """A whole state dict; what the values are does not matter here, so they are cheap to make."""
    rng = np.random.default_rng(0)
    pool = rng.random(1 << 23, np.float32)
    values = {e.key: pool[: int(np.prod(e.shape))].reshape(e.shape) for e in ENTRIES}
    for index, value in enumerate(values.values()):
        value = value.copy()
        value.flat[0] = index
        values[list(values)[index]] = value
    return values


def _expected(tensors: dict[str, np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and bias of a convolution and its batch norm, by the formula."""
    scale, offset, mean, variance = (
        tensors[f"{name}.bn.{part}"].astype(np.float64)
        for part in ("weight", "bias", "running_mean", "running_var")
    )
    gain = scale / np.sqrt(variance + 0.001)
    kernel = tensors[f"{name}.conv.weight"].astype(np.float64).transpose(2, 3, 1, 0)
    return kernel * gain, offset - mean * gain


def _check(loaded: inception.Weights, tensors: dict[str, np.ndarray]) -> None:
    assert not loaded.published
    for conv in inception_keys.convolutions():
        kernel, bias = _expected(tensors, conv.name.replace("/", "."))
        np.testing.assert_allclose(loaded.params[f"{conv.name}/kernel"], kernel, rtol=1e-6)
        np.testing.assert_allclose(loaded.params[f"{conv.name}/bias"], bias, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(loaded.params["fc/kernel"], tensors["fc.weight"].T)
    np.testing.assert_array_equal(loaded.params["fc/bias"], tensors["fc.bias"])


@pytest.mark.parametrize("container", [*SAVERS, "safetensors", "pb"])
def test_every_container(container, tensors, tmp_path):
    path = tmp_path / f"weights.{'pth' if container in SAVERS else container}"
    if container in SAVERS:
        counter = {"Conv2d_1a_3x3.bn.num_batches_tracked": np.zeros((), np.int64)}
        SAVERS[container](path, {**tensors, **counter})
    elif container == "safetensors":
        safetensors_numpy.save_file(tensors, path)
    else:
        pairs = zip(inception_keys.tensorflow_entries(), ENTRIES)
        graph_writer.save(path, {tf.key: pt.to_param(tensors[pt.key]) for tf, pt in pairs})
    with pytest.warns(UserWarning, match=r"is not that of the published weights \(6726825d"):
        loaded = inception.load(path)
    _check(loaded, tensors)


def test_the_published_file_is_recognized(tensors, tmp_path, monkeypatch, recwarn):
    safetensors_numpy.save_file(tensors, tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="published"):
        sha256 = inception.load(tmp_path / "a.safetensors").sha256
    monkeypatch.setattr(inception, "PUBLISHED", sha256[:8])
    recwarn.clear()
    assert inception.load(tmp_path / "a.safetensors").published
    assert not recwarn.list


def test_every_misfit_is_named_at_once(tensors, tmp_path):
    wrong = dict(tensors)
    del wrong["Mixed_6d.branch1x1.conv.weight"]
    wrong["fc.weight"] = np.zeros((1000, 2048), np.float32)  # torchvision's
    wrong["AuxLogits.fc.bias"] = np.zeros(1000, np.float32)
    wrong["fc.bias"] = np.full(1008, np.nan, np.float32)
    safetensors_numpy.save_file(wrong, tmp_path / "a.safetensors")
    with pytest.raises(VqjaxError, match="not the FID network") as caught:
        inception.load(tmp_path / "a.safetensors")
    text = str(caught.value)
    assert "Mixed_6d.branch1x1.conv.weight: missing" in text
    assert "fc.weight: shape (1000, 2048), expected (1008, 2048)" in text
    assert "AuxLogits.fc.bias: unknown" in text
    assert "fc.bias: 1008 of 1008 values are NaN or infinite" in text


def test_a_negative_variance_is_damage(tensors):
    arrays = {e.path: e.to_param(tensors[e.key]) for e in ENTRIES}
    arrays["Mixed_5b/branch_pool/variance"] = np.full(32, -1, np.float32)
    with pytest.raises(VqjaxError, match="Mixed_5b/branch_pool: negative variance -1"):
        inception.fold(arrays, where="file")


def test_files_that_are_no_network(tmp_path):
    with pytest.raises(VqjaxError, match="no such file"):
        inception.load(tmp_path / "absent.pth")
    (tmp_path / "a.pb").write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(VqjaxError, match="not a TensorFlow graph"):
        inception.load(tmp_path / "a.pb")
    (tmp_path / "empty.pb").write_bytes(b"")
    with pytest.raises(VqjaxError, match=r"empty\.pb: cannot be read"):
        inception.load(tmp_path / "empty.pb")


def test_graph_constants(tmp_path):
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    graph_writer.save(tmp_path / "g.pb", {"a/weights": value})
    found = graph_def.constants(tmp_path / "g.pb")
    assert list(found) == ["a/weights"]  # the writer adds an operation and an integer constant
    np.testing.assert_array_equal(found["a/weights"].read(), value)
    data = (tmp_path / "g.pb").read_bytes()
    for end in range(1, len(data)):
        (tmp_path / "cut.pb").write_bytes(data[:end])
        try:
            cut = graph_def.constants(tmp_path / "cut.pb")
        except VqjaxError:
            continue
        for tensor in cut.values():  # a cut between two nodes is a shorter graph
            np.testing.assert_array_equal(tensor.read(), value)
