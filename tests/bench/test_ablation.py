# SPDX-License-Identifier: Apache-2.0
"""`bench ablation`: its cells, what is summed up, and the picture; tuning itself is replaced."""

import json
import types

import numpy as np
import pytest

from vqjax.bench import ablation, embedded, results
from vqjax.bench.__main__ import main
from vqjax.pipeline import quantize
from vqjax.settings import BenchAblationSettings, QuantizeSettings

NAMES = ("fd", "sfd", "is", "precision", "recall", "accuracy")


def record(bits, method, seed, rise=0.0, sd=0.1, loss=1.0):
    scores = dict.fromkeys(NAMES, 1.0) | {"n": 8, "psnr": 20.0, "ssim": 0.9}
    difference = {}
    if bits is not None:
        difference = {"fd_difference": rise, "fd_difference_sd": sd, "loss": (seed + 1) * loss}
    return {"bits": bits, "method": method, "seed": seed, **scores, **difference}


def test_seeds_come_one_after_the_other_and_full_precision_first():
    wanted = BenchAblationSettings(bits=(2.0,), methods=("none", "pv"), seeds=2, seed=3)
    assert ablation.cells(wanted) == [
        (None, "full_precision", 3),
        (2.0, "none", 3),
        (2.0, "pv", 3),
        (None, "full_precision", 4),
        (2.0, "none", 4),
        (2.0, "pv", 4),
    ]


def test_errors_are_those_of_the_bootstrap_or_of_the_seeds_whichever_is_larger():
    rows = [record(None, "full_precision", 0)]
    rows += [record(2.0, "pv", seed, rise=1.0, sd=0.3) for seed in range(4)]
    rows += [record(2.0, "none", seed, rise=float(seed), sd=0.0) for seed in range(4)]
    full, pv, none = ablation.summary(rows)
    assert "rise" not in full
    assert (pv["rise"], pv["spread"]) == (1.0, pytest.approx(0.15))
    assert none["rise"] == 1.5
    assert none["spread"] == pytest.approx(np.std(range(4), ddof=1) / 2)


def test_errors_and_intervals_are_summed_up_where_all_records_have_them():
    errors = {"psnr_se": 0.2, "ssim_se": 0.02, "accuracy_se": 0.01}
    rows = [
        record(2.0, "pv", seed) | errors | {"psnr": 20.0 + seed, "fd_difference_interval": ends}
        for seed, ends in enumerate(([-1.0, 2.0], [0.0, 4.0]))
    ]
    (found,) = ablation.summary(rows)
    assert found["rise_interval"] == [-0.5, 3.0]
    assert found["psnr_se"] == pytest.approx(0.5)  # between seeds
    assert found["accuracy_se"] == pytest.approx(0.01 / 2**0.5)  # of pictures
    assert found["ssim_se"] == pytest.approx(0.02 / 2**0.5)
    (older,) = ablation.summary([rows[0], record(2.0, "pv", 1)])
    assert not older.keys() & {"rise_interval", *errors}
    ablation.show([found, older])


def test_losses_are_compared_seed_by_seed():
    rows = [record(2.0, "pv", seed) for seed in range(2)]
    rows += [record(2.0, "semi_pv", seed, loss=0.9 - 0.2 * seed) for seed in range(2)]
    rows += [record(2.0, "none", seed) for seed in range(3)]
    pv, semi_pv, none = ablation.summary(rows)
    assert (pv["loss"], pv["loss_over_pv"], pv["loss_over_pv_spread"]) == (1.5, 1.0, 0.0)
    assert semi_pv["loss_over_pv"] == pytest.approx(0.8)
    assert semi_pv["loss_over_pv_spread"] == pytest.approx(0.1)
    assert none["loss"] == 2.0
    assert "loss_over_pv" not in none  # no plain PV of seed 2
    assert "loss_over_pv_spread" not in ablation.summary([rows[0]])[0]


def test_a_whole_ablation_is_kept_shown_and_drawn(tmp_path, monkeypatch, capsys):
    model = quantize.prepare(QuantizeSettings()).model
    measured = []

    def cell_model(wanted, cell, start):
        measured.append(cell)
        return model

    def sample(model, count, seed, name):
        images = np.random.default_rng(seed).integers(0, 255, (count, 32, 32, 3), np.uint8)
        return images if name == ablation.FULL else np.minimum(images + 1, 254)

    start = types.SimpleNamespace(model=model)
    monkeypatch.setattr(embedded, "compressed", lambda work, bits: start)
    monkeypatch.setattr(ablation, "_model", cell_model)
    monkeypatch.setattr(embedded, "sample", sample)
    monkeypatch.setattr(embedded, "held_out_loss", lambda start, model: 0.01)
    monkeypatch.setattr(results, "source_digest", lambda *packages: "as it is")
    file, figure = tmp_path / "ablation.json", tmp_path / "ablation.png"
    words = ["ablation", "--bits", "2", "--methods", "none", "semi_pv", "--seeds", "1"]
    words += ["--count", "12", "--work", str(tmp_path / "w"), "--json", str(file)]
    assert main([*words, "--figure", str(figure)]) == 0
    content = json.loads(file.read_text())
    assert [r["method"] for r in content["records"]] == ["full_precision", "none", "semi_pv"]
    assert content["records"][1]["psnr"] > 40
    for name in ("rise_interval", "accuracy_se", "psnr_se", "ssim_se"):
        assert name in content["summary"][1], name
    assert "accuracy_se" in content["summary"][0]
    assert content["records"][2]["codes_changed"] == content["summary"][2]["codes_changed"] == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "semi pv" in capsys.readouterr().out
    assert main(words) == 0
    assert len(measured) == 2  # the second run measured nothing
