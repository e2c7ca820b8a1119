# SPDX-License-Identifier: Apache-2.0
"""The whole command on a small random model: complete, repeated, refused."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
import threadpoolctl

import vqjax
from tests import quick
from tests.io import models as small
from tests.pipeline import commands
from tests.pipeline.commands import contents
from vqjax.core import tree
from vqjax.core.tensor import VQTensor
from vqjax.errors import QualityGateError, VqjaxError
from vqjax.io import native
from vqjax.pipeline import layers, quantize
from vqjax.pipeline.journal import Journal
from vqjax.settings import Calibration, QuantizeSettings

pytestmark = pytest.mark.xdist_group("quantize tiny")

ROOT = pathlib.Path(__file__).parents[2]
CALIBRATION = Calibration(images=2, steps=3, batch=2)
BITS = 1.2


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("source") / "small.safetensors"
    native.save_model(path, small.dense(small.TINY))
    return path


@pytest.fixture(scope="module")
def run(source, tmp_path_factory) -> quantize.Report:
    out = tmp_path_factory.mktemp("run") / "out"
    export = out.parent / "model.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        quick.search(patch.setattr)
        with pytest.raises(QualityGateError, match=r"PSNR .* --least-psnr 99"):  # all else is done
            vqjax.quantize(
                source,
                bits=BITS,
                out=out,
                export=export,
                samples=4,
                calibration=CALIBRATION,
                tune_steps=0,  # which has a test of its own
                least_psnr=99.0,
            )
    return quantize.Report(out, json.loads((out / "report.json").read_text()))


@pytest.mark.slow
def test_the_run_folder_is_complete(run):
    names = {path.name for path in run.out.iterdir()}
    expected = {"model", "plan.json", "report.html", "report.json", "report.md", "run.json"}
    assert names == expected | {"samples.png", "sensitivity.json"}
    record = json.loads((run.out / "run.json").read_text())
    assert record["status"] == "done"
    assert record["settings"]["seed"] == 0
    assert record["environment"]["jax"]
    weights = run.report["weights"]
    assert weights["bits_per_weight"] <= BITS
    assert run.report["folded"]["weights"] > 0
    timesteps = run.report["calibration"]["timestep_weights"]
    assert list(timesteps) == ["667", "334", "1"]
    assert sum(timesteps.values()) == pytest.approx(3)
    layers = run.report["layers"]
    assert all(layer["rel_output_mse"] < 0.5 for layer in layers)
    for layer in layers:
        assert 0 < layer["rel_output_mse_test"] < 2
        ratio = layer["rel_output_mse"] / layer["bound"]
        assert layer["ratio_to_bound"] == pytest.approx(ratio)
        assert layer["codes_entropy"] <= layer["bits_per_weight"]
        assert layer["seconds"] > 0
        assert layer["flops_ratio"] == layer["flops_lookup"] / layer["flops_dense"] <= 1
    for way in ("dense", "lookup"):
        whole = sum(layer[f"flops_{way}"] for layer in layers)
        assert whole == run.report["flops"][way]
    assert run.report["seconds"]["held-out errors"] > 0
    assert "--least-psnr 99" in " ".join(run.report["failures"])
    assert run.report["activations"] == {"bits": 8}
    assert run.report["tuning"] == {"steps": 0}
    model = vqjax.load(run.out)
    assert set(model.params["activations"].log2_steps) == {layer["path"] for layer in layers}


@pytest.mark.slow
def test_bits_claimed_are_bytes_on_disk(run, source):
    on_disk = (run.out.parent / "model.safetensors").stat().st_size
    model = vqjax.load(run.out)
    unet = {p: leaf for p, leaf in tree.flatten(model.params).items() if p.startswith("unet/")}
    packed = [leaf for leaf in unet.values() if isinstance(leaf, VQTensor)]
    bits = 8 * sum(t.nbytes for t in packed) / sum(t.size for t in packed)
    assert bits == pytest.approx(run.report["weights"]["bits_per_weight"])
    ranges = model.params["activations"].nbytes
    weights = {name: part for name, part in model.params.items() if name != "activations"}
    rest = sum(2 * leaf.size for leaf in tree.flatten(weights).values()) - sum(
        2 * t.size for t in packed
    )
    data = sum(t.nbytes for t in packed) + rest + ranges
    job = quantize.prepare(QuantizeSettings(source=str(source), plan=run.out / "plan.json"))
    known = job.model.config, job.shapes, job.plan, job.sizes
    wanted = dataclasses.replace(job.settings, calibration=CALIBRATION)
    predicted = quantize.expected_of(*known, wanted, job.division)
    assert predicted.bytes_after == run.report["weights"]["bytes_after"]
    assert data <= on_disk < data + 100_000  # names, shapes, config and plan


@pytest.mark.slow
def test_export_and_run_folder_hold_the_same_model(run):
    small.assert_equal(vqjax.load(run.out.parent / "model.safetensors"), vqjax.load(run.out))


@pytest.mark.slow
def test_a_complete_run_is_not_repeated(run, source, capsys):
    before = contents(run.out)
    again = vqjax.quantize(
        source,
        bits=BITS,
        out=run.out,
        samples=4,
        calibration=CALIBRATION,
        tune_steps=0,
    )
    assert "this run is complete" in capsys.readouterr().err
    assert again.report == run.report
    assert contents(run.out) == before


@pytest.mark.slow
def test_two_processes_measure_the_same_and_plan_the_same(run, source, tmp_path):
    out = tmp_path / "out"
    pair = commands.start_pair(
        source, "--bits", BITS, "--samples", 4, "--out", out, "--calibration.images=2",
        "--calibration.steps=3", "--calibration.batch=2",
    )  # fmt: skip
    written = out / "sensitivity.json"  # after the plan
    while all(process.poll() is None for process in pair) and not written.exists():
        time.sleep(0.05)
    for process in pair:
        process.kill()
    outputs = [process.communicate()[0] for process in pair]
    assert written.exists(), outputs
    for name in ("plan.json", "sensitivity.json"):
        assert (out / name).read_bytes() == (run.out / name).read_bytes()


@pytest.mark.slow
def test_another_run_in_the_same_folder_is_refused(run, source):
    with pytest.raises(VqjaxError, match="holds a run of another model or with other settings"):
        vqjax.quantize(source, bits=3, out=run.out, samples=4, calibration=CALIBRATION)


def test_dry_run_writes_nothing(source, tmp_path, capsys):
    report = vqjax.quantize(source, bits=3, out=tmp_path / "out", dry_run=True)
    assert report.report == {}
    assert not (tmp_path / "out").exists()
    printed = capsys.readouterr().out
    assert "bits per weight" in printed
    assert "memory: about" in printed
    assert "time: about" in printed


def test_a_plan_can_be_fed_back(source, tmp_path):
    job = quantize.prepare(QuantizeSettings(source=str(source), bits=3))
    path = tmp_path / "plan.json"
    path.write_text(job.plan.to_json())
    again = quantize.prepare(QuantizeSettings(source=str(source), plan=path))
    assert again.plan == job.plan


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 0.1}, "--bits 0.1: expected 0.5 to 8"),
        ({"samples": 1}, "--samples 1: expected 4 or more"),
        ({"least_psnr": float("nan")}, "--least-psnr nan: expected a finite number"),
        ({"source": "no-such-file.ckpt"}, "no-such-file.ckpt"),
    ],
)
def test_unusable_settings_are_refused_before_any_work(source, settings, message):
    wanted = dataclasses.replace(QuantizeSettings(source=str(source)), **settings)
    with pytest.raises(VqjaxError, match=message):
        quantize.prepare(wanted)


def test_a_quantized_model_is_not_quantized_again(tmp_path):
    path = tmp_path / "quantized.safetensors"
    native.save_model(path, small.quantized(small.CLASSES))
    with pytest.raises(VqjaxError, match="quantized already"):
        quantize.prepare(QuantizeSettings(source=str(path)))


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(VqjaxError, match="is not empty and holds no run"):
        Journal.open(tmp_path, {"fingerprint": "f"})
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_mistakes_on_the_command_line_are_one_line_and_exit_code_2(tmp_path):
    words = [sys.executable, "-m", "vqjax.quantize", "no-such-file.ckpt"]
    found = subprocess.run(
        words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1
    assert found.stderr.startswith("vqjax: no-such-file.ckpt")


def test_small_models_are_searched_with_one_thread_of_blas(source, monkeypatch):
    """Threads that wait keep cores busy; how many there are follows from the model alone."""
    job, seen = quantize.prepare(QuantizeSettings(source=str(source))), []

    def each_layer(*arguments, **options):
        found = threadpoolctl.threadpool_info()
        seen.append({one["num_threads"] for one in found if one["user_api"] == "blas"})

    monkeypatch.setattr(layers, "each_layer", each_layer)
    with threadpoolctl.threadpool_limits(2, "blas"):
        for small_model in (True, False):
            monkeypatch.setattr(type(job.model.config), "small", small_model)
            quantize._each_layer(job, None, "", None, {}, None, None)
    assert seen == [{1}, {2}]
