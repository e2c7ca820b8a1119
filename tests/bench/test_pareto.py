# SPDX-License-Identifier: Apache-2.0
"""`bench pareto`: its points, their intervals, and one small model from weights to the figure."""

import dataclasses
import json
import pathlib

import pytest

from tests.io import models
from vqjax import sampling
from vqjax.bench import embedded, pareto
from vqjax.bench.__main__ import main
from vqjax.core import plan
from vqjax.errors import VqjaxError
from vqjax.eval.judge import Judge
from vqjax.io import native
from vqjax.pipeline import quantize
from vqjax.pipeline.journal import Journal
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
    untuned, tuned = pareto.Point(2.0, "untuned"), pareto.Point(2.0, "tuned")
    assert first[untuned] == longer[untuned]
    assert first[tuned] != longer[tuned]
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
def small_model(tmp_path, monkeypatch, quick_search):
    """In place of the embedded model: random weights of ten classes."""
    path = tmp_path / "small.safetensors"
    native.save_model(path, models.dense(models.LIKE_DIGITS))
    prepare, calibration = quantize.prepare, Calibration(images=2, steps=3, batch=2)
    # One code for each kind of layer: less to compile.
    monkeypatch.setattr(plan, "_SIZES", {"linear": ((8, 2),), "conv3x3": ((9, 2),)})
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
    words = ["pareto", "--bits", "2", "--methods", "untuned", "scalar", "tuned"]
    words += ["--count", "8", "--work", str(work), "--json", str(file)]
    # Which takes longer than all else, and has tests of its own.
    halves = {"fd": 4.5, "fd_sd": 0.6, "n": 898}
    monkeypatch.setattr(Judge, "real_halves", lambda judge: halves)
    monkeypatch.setattr(embedded, "tuned", lambda start, method, seed, teaching: start.model)
    assert main([*words, "--figure", str(figure)]) == 0
    assert "full precision" in capsys.readouterr().out
    assert figure.read_bytes().startswith(b"\x89PNG")
    content = json.loads(file.read_text())
    assert content["reference"] == {"real_halves": halves}
    full, ours, rival, same = content["points"]
    assert [row["method"] for row in content["points"]][1:] == ["untuned", "scalar", "tuned"]
    assert ours["bits_per_weight"] <= 2 < rival["bits_per_weight"] < 4
    assert ours["bytes"] < rival["bytes"] < full["bytes"]
    assert ours["psnr"] == same["psnr"] != rival["psnr"]
    assert ours["psnr_interval"][0] < ours["psnr"] < ours["psnr_interval"][1]

    def never(*arguments, **options):
        raise AssertionError("was made before")

    # Scores are lost with their file, samples are not.
    monkeypatch.setattr(sampling, "generate", never)
    file.unlink()
    assert main(words) == 0
    assert json.loads(file.read_text())["points"] == content["points"]
    # What no bit width changes serves the next one.
    monkeypatch.setattr(quantize, "compressed", stop)
    with pytest.raises(Stopped):
        embedded.compressed(work, 2.5)
    journal = Journal(embedded.folder(work) / "2.5", {})
    assert journal.load("gathered-0") is not None


class Stopped(Exception):
    """In place of a search."""


def stop(job, journal):
    raise Stopped
