# SPDX-License-Identifier: Apache-2.0
"""`bench pareto`: its points, their intervals, and one small model from weights to the figure."""

import dataclasses
import json
import pathlib

import pytest

from tests.io import models
from vqjax.bench import embedded, pareto
from vqjax.bench.__main__ import main
from vqjax.errors import VqjaxError
from vqjax.io import native
from vqjax.pipeline import calibrate, quantize
from vqjax.settings import BenchParetoSettings, Calibration


def test_scalar_quantization_has_whole_bits_only():
    wanted = BenchParetoSettings(bits=(2.0, 1.5), methods=("untuned", "scalar"))
    assert pareto.points(wanted) == [
        (None, "full_precision"),
        (2.0, "untuned"),
        (2.0, "scalar"),
        (1.5, "untuned"),
    ]
    with pytest.raises(VqjaxError, match=r"--bits 1\.5 --methods scalar: nothing to measure"):
        pareto.points(dataclasses.replace(wanted, bits=(1.5,), methods=("scalar",)))


def test_what_a_point_does_not_depend_on_keeps_it(monkeypatch):
    monkeypatch.setattr(embedded, "identity", lambda: "as it is")
    wanted = BenchParetoSettings(bits=(2.0,), methods=("untuned", "tuned"))

    def keys(**changes):
        changed = dataclasses.replace(wanted, **changes)
        return dict(zip(pareto.points(changed), pareto._keys(changed, pareto.points(changed))))

    first, longer, moved = keys(), keys(tune_steps=7), keys(work=pathlib.Path("elsewhere"))
    assert first == moved
    assert first[(2.0, "untuned")] == longer[(2.0, "untuned")]
    assert first[(2.0, "tuned")] != longer[(2.0, "tuned")]
    assert not set(first.values()) & set(keys(count=7).values())


def test_intervals_are_two_standard_errors_to_each_side():
    scores = dict.fromkeys(("sfd", "is", "precision", "recall", "accuracy"), 1.0)
    record = {
        "bits": 2.0,
        "method": "tuned",
        "bits_per_weight": 1.99,
        "bytes": 5,
        "n": 8,
        "fd": 6.0,
    }
    lost = {
        "fd_difference": 1.0,
        "fd_difference_sd": 0.5,
        "psnr": 20.0,
        "psnr_se": 0.1,
        "ssim": 0.9,
    }
    full = record | scores | {"bits": None, "method": "full_precision"}
    rows = pareto.with_intervals([full, record | scores | lost])
    assert "fd_interval" not in rows[0]
    assert rows[1]["fd_interval"] == pytest.approx([6 - 0.98, 6 + 0.98])
    assert rows[1]["psnr_interval"] == pytest.approx([20 - 0.196, 20 + 0.196])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bits", "9"], "--bits 9: expected 0.5 to 8"),
        (["--count", "3"], "--count 3: expected 4 or more"),
        (["--figure", "absent/a.png"], "--figure absent/a.png: no folder absent"),
    ],
)
def test_mistakes_cost_no_work(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["pareto", *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_model(tmp_path, monkeypatch):
    """In place of the embedded model: random weights of ten classes."""
    path = tmp_path / "small.safetensors"
    native.save_model(path, models.dense(dataclasses.replace(models.TINY, n_classes=11)))
    prepare, calibration = quantize.prepare, Calibration(images=2, steps=3, batch=2)
    monkeypatch.setattr(
        quantize,
        "prepare",
        lambda wanted: prepare(
            dataclasses.replace(wanted, source=str(path), calibration=calibration)
        ),
    )


@pytest.mark.slow
def test_every_point_is_made_once(small_model, tmp_path, monkeypatch, capsys):
    file, figure, work = tmp_path / "a.json", tmp_path / "a.png", tmp_path / "work"
    words = ["pareto", "--bits", "4", "1.5", "--methods", "untuned", "scalar", "tuned"]
    words += ["--count", "8", "--work", str(work), "--json", str(file)]
    monkeypatch.setattr(embedded, "tuned", lambda start, method, seed, teaching: start.model)
    assert main([*words, "--figure", str(figure)]) == 0
    assert "scalar" in capsys.readouterr().out
    assert figure.read_bytes().startswith(b"\x89PNG")
    content = json.loads(file.read_text())
    by_name = {(row["bits"], row["method"]): row for row in content["points"]}
    assert len(by_name) == 6
    full, four, low = (
        by_name[key] for key in ((None, "full_precision"), (4, "untuned"), (1.5, "untuned"))
    )
    assert low["bits_per_weight"] <= 1.5 < four["bits_per_weight"] <= 4
    assert low["bytes"] < four["bytes"] < full["bytes"]
    assert low["psnr"] < four["psnr"]
    rival = by_name[(4, "scalar")]
    assert 4 < rival["bits_per_weight"] < 4.5  # codes, and a step and an offset for each row
    assert rival["psnr"] > low["psnr"]
    assert by_name[(4, "tuned")]["psnr"] == four["psnr"]

    def never(*arguments, **options):
        raise AssertionError("was made before")

    # Scores are lost with their file; samples are not, nor what all bit widths share.
    monkeypatch.setattr(embedded, "sample", never)
    monkeypatch.setattr(calibrate, "second_moments", never)
    file.unlink()
    assert main(words) == 0
    assert json.loads(file.read_text())["points"] == content["points"]
