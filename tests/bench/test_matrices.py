# SPDX-License-Identifier: Apache-2.0
"""`bench aq --inputs` on a small Gaussian matrix: fields, limits, bound, resume."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from vqjax.bench import inputs, matrices, reference, results
from vqjax.bench.__main__ import main
from vqjax.bench.clock import CompileClock
from vqjax.core.compress import Effort, LayerStats
from vqjax.core.plan import LayerSpec
from vqjax.core.rate import reverse_water_filling
from vqjax.core.tensor import VQTensor

FIELDS = {"file", "setting", "bits_per_weight", "rel_weight_mse", "rel_act_mse"} | {
    "rel_act_mse_test", "seconds", "bound", "ratio_to_bound", "codes_entropy", "spec",
    "reference", "ratio_to_reference", "method", "objective", "nominal_bits", "storage",
    "limit_bits", "shape", "shrinkage", "fingerprint",
}  # fmt: skip
CASE = {
    "input": "gauss.npz",
    "shape": [96, 128],
    "M": 2,
    "nbits": 8,
    "group": 8,
    "objective": "xtx",
    "beam": 1,
    "rel_weight_mse": 0.2,
    "rel_act_mse": 0.05,
    "rel_act_mse_test": 0.06,
    "wall_s": 10.0,
}


def correlated(fan_in, seed):
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(40 * fan_in, fan_in)) @ np.diag(np.geomspace(0.2, 2, fan_in))
    mixed = mixed + 0.6 * np.roll(mixed, 1, axis=1)
    return mixed.T @ mixed / len(mixed)


@pytest.fixture(scope="module")
def small():
    """Settings of one nominal rate and few rounds, so that one code serves both tables."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrices, "NOMINAL", (2,))
        patch.setattr(
            results, "REDUCED", Effort(start_steps=4, feedback_rounds=1, descent_rounds=1)
        )
        patch.setattr(results, "source_digest", lambda *packages: "as it is")
        patch.setattr(reference, "limit", lambda shape, nominal: nominal + 0.05)
        yield patch


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("aq")
    weight = np.random.default_rng(0).normal(size=(96, 128)).astype(np.float32)
    np.savez(folder / "gauss.npz", W=weight, XTX=correlated(128, 1), XTX_test=correlated(128, 2))
    np.savez(folder / "ref_gauss.npz", codes=[1], codebooks=[1.0], scales=[1.0])
    (folder / "reference_results.json").write_text(json.dumps({"gauss_2b": CASE, "_bounds": {}}))
    return folder


def command(folder, file):
    return ["aq", "--inputs", str(folder), "--json", str(file), "--effort", "reduced"]


@pytest.fixture(scope="module")
def content(folder) -> dict:
    file = folder / "results.json"
    assert main(command(folder, file)) == 0
    return json.loads(file.read_text())


def test_the_file_says_how_it_was_made(content, folder):
    assert content["seed"] == 0
    assert content["command"].startswith("python -m vqjax.bench aq --inputs")
    assert content["environment"]["jax"]
    assert content["effort"]["name"] == "reduced"


def test_every_setting_has_every_field(content):
    for record in content["records"]:
        assert set(record) == FIELDS
    assert [record["setting"] for record in content["records"]] == [
        "reference 2b S beam 1",
        "round_to_nearest 2b I",
        "product 2b I",
        "gptq 2b S",
        "vqjax 2b S reference",
        "vqjax 2b I reference",
        "vqjax 2b S exact",
        "vqjax 2b I exact",
    ]


def test_no_table_stores_more_than_it_says(content):
    ours = [record for record in content["records"] if record["method"] == "vqjax"]
    assert {record["limit_bits"] for record in ours} == {2.0, 2.05}
    for record in ours:
        assert record["bits_per_weight"] <= record["limit_bits"]
        assert record["codes_entropy"] <= record["bits_per_weight"]


def test_no_error_is_below_the_bound_of_gaussian_weights(content, folder):
    for record in content["records"]:
        assert record["ratio_to_bound"] > 1
    with np.load(folder / "gauss.npz") as arrays:
        spectrum_N = np.linalg.eigvalsh(arrays["XTX"])
    ours = next(r for r in content["records"] if r["setting"] == "vqjax 2b S exact")
    bound = reverse_water_filling(spectrum_N, ours["bits_per_weight"]) / np.mean(spectrum_N)
    assert ours["bound"] == pytest.approx(bound)
    assert ours["ratio_to_bound"] == pytest.approx(ours["rel_act_mse"] / bound)


def test_the_inputs_given_are_what_is_minimized(content):
    errors = {r["setting"]: (r["rel_weight_mse"], r["rel_act_mse"]) for r in content["records"]}
    seen, plain = errors["vqjax 2b S reference"], errors["vqjax 2b I reference"]
    assert seen[1] < plain[1]
    assert plain[0] < seen[0]


def test_the_reference_stands_beside_what_it_is_compared_with(content):
    record = content["records"][0]
    assert record["rel_act_mse_test"] == 0.06
    assert record["bits_per_weight"] == pytest.approx(2 + 2 * 256 * 8 * 16 / 96 / 128 + 16 / 128)
    ours = next(r for r in content["records"] if r["setting"] == "vqjax 2b S exact")
    assert ours["reference"]["case"] == "gauss_2b"
    assert ours["ratio_to_reference"] == pytest.approx(ours["rel_act_mse_test"] / 0.06)
    unmatched = next(r for r in content["records"] if r["setting"] == "vqjax 2b I exact")
    assert unmatched["reference"] is None


def test_a_second_run_measures_only_what_is_missing(content, folder, tmp_path, monkeypatch, capsys):
    """Killed after two records: those stay as they are, to the last digit of their seconds."""
    file = tmp_path / "results.json"
    half = content | {"records": content["records"][:5]}
    file.write_text(json.dumps(half))
    measured = []

    def measure(matrix, setting, *rest):
        measured.append(setting.name)
        return next(r for r in content["records"] if r["setting"] == setting.name)

    monkeypatch.setattr(matrices, "measure", measure)
    assert main(command(folder, file)) == 0
    assert measured == ["vqjax 2b I reference", "vqjax 2b S exact", "vqjax 2b I exact"]
    assert json.loads(file.read_text())["records"] == content["records"]
    measured.clear()
    assert main([*command(folder, file), "--seed", "1"]) == 0
    assert len(measured) == 7  # another seed is another measurement
    assert "Stored bits no higher than 2.00 and 4.00" in capsys.readouterr().out


def test_another_file_is_not_overwritten(folder, tmp_path, capsys):
    file = tmp_path / "mine.json"
    file.write_text('{"mine": 1}')
    assert main(command(folder, file)) == 2
    assert "something other than results of this command" in capsys.readouterr().err
    assert file.read_text() == '{"mine": 1}'
    assert main(command(folder, tmp_path / "absent" / "results.json")) == 2
    assert "make it first" in capsys.readouterr().err


def test_a_convolution_chooses_its_shrinkage(monkeypatch, tmp_path):
    """Images can be held out where maps are given."""
    rng = np.random.default_rng(3)
    maps = rng.normal(size=(8, 6, 8, 8)).astype(np.float16)
    np.savez(
        tmp_path / "conv.npz", W=rng.normal(size=(32, 6, 3, 3)), maps=maps[:4], maps_test=maps[4:]
    )
    given = []

    def compress(kernel, moment, spec, *, key, effort, metric):
        given.append((moment, metric))
        return fake_layer(kernel, spec)

    monkeypatch.setattr(matrices, "compress_layer", compress)
    (matrix,) = inputs.read(tmp_path)
    bench = matrices._Bench(results.REDUCED, 0, CompileClock())
    spec = LayerSpec("conv3x3", "conv3x3", 9, 1, 16, 8)
    for objective in "SI":
        setting = matrices.Setting("vqjax", 2, objective, "exact", 2.0, spec)
        record = matrices.measure(matrix, setting, None, bench)
        assert (record["shrinkage"] is not None) == (objective == "S")
    (moment, metric), (no_moment, no_metric) = given[0], given[-1]
    assert metric.shape == moment.shape == (54, 54)
    assert np.linalg.eigvalsh(metric)[0] > 0
    assert no_moment is no_metric is None


def fake_layer(kernel, spec):
    """A layer of zeros: what follows the search does not need a good one."""
    outputs, groups = kernel.shape[-1], kernel.size // kernel.shape[-1] // spec.group
    tensor = VQTensor.pack(
        np.zeros((outputs, groups, spec.codebooks), np.int32),
        jnp.zeros((spec.codebooks, spec.entries, spec.group), jnp.float16),
        jnp.ones(outputs, jnp.float16),
        shape=kernel.shape,
        grouping=spec.grouping,
    )
    return tensor, LayerStats(1.0, 1.0, tensor.bits_per_weight)
