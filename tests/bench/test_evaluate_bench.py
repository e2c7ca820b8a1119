# SPDX-License-Identifier: Apache-2.0
"""`bench evaluate`: every part is measured, and what it is compared with does the same."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqjax.bench import evaluate, rivals
from vqjax.bench.__main__ import main
from vqjax.bench.clock import costs_in_turn
from vqjax.eval import adm, metrics
from vqjax.io import inception as weights_io
from vqjax.models import inception

RNG = np.random.default_rng(0)
NEEDS_TENSORFLOW = pytest.mark.skipif(
    not rivals.has_tensorflow(), reason="TensorFlow is not installed: nothing to compare with"
)


@pytest.fixture
def small(monkeypatch):
    """Few features, a network of one product, and no TensorFlow."""
    monkeypatch.setattr(inception, "POOLED", 16)
    weights = weights_io.Weights({"w": jnp.ones((3, 16))}, "small", False)
    monkeypatch.setattr(evaluate, "random_weights", lambda seed: weights)
    monkeypatch.setattr(rivals, "has_tensorflow", lambda: False)

    def network(params, images_BHWC):
        rows = images_BHWC.mean((1, 2), dtype=np.float32) @ np.asarray(params["w"])
        return adm.Rows(rows, rows, rows)

    monkeypatch.setattr(adm, "_features", network)
    monkeypatch.setattr(adm, "BATCH", 4)


def test_every_part_is_measured(small, tmp_path, capsys):
    file = tmp_path / "evaluate.json"
    words = ["evaluate", "--pictures", "4", "--samples", "50", "--reference", "30"]
    assert main([*words, "--repeat", "2", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    records = {record["part"]: record for record in found["records"]}
    assert list(records) == [
        "FID network",
        "moments",
        "Frechet distance",
        "its standard error",
        "precision, recall",
    ]
    for record in records.values():
        assert record["per_second"] == pytest.approx(record["count"] / record["seconds"])
    assert records["FID network"]["count"] == 4
    assert "rival" not in records["FID network"]
    for name in ("moments", "Frechet distance"):
        assert records[name]["rival"]["ratio"] > 0
        assert records[name]["rival"]["difference"] < 1e-6
    assert (found["network"], found["tensorflow"]) == ("random weights", None)
    assert found["environment"]["jax"] == jax.__version__
    out = capsys.readouterr().out
    assert "TensorFlow is not installed" in out
    assert "random weights" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pictures", "0"], "--pictures 0: expected 1 or more"),
        (["--pictures", "65"], "--pictures 65: expected a multiple of 64"),
        (["--reference", "3"], "--reference 3: expected 4 or more"),
        (["--inception", "absent.pth"], "absent.pth"),
    ],
)
def test_mistakes_in_one_line(words, message, capsys):
    assert main(["evaluate", *words]) == 2
    assert message in capsys.readouterr().err


def test_random_weights_keep_activations_level(monkeypatch):
    params = evaluate.random_weights(0).params
    assert params["Mixed_7c/branch3x3_2a/kernel"].shape == (1, 3, 384, 384)
    kernel = np.asarray(params["Conv2d_4a_3x3/kernel"])
    assert kernel.std() == pytest.approx((2 / np.prod(kernel.shape[:3])) ** 0.5, rel=0.02)


def test_the_root_of_scipy_gives_the_same_distance():
    a, b = (metrics.moments(RNG.normal(shift, 1, (200, 12))) for shift in (0, 0.5))
    assert rivals.scipy_distance(a, b) == pytest.approx(metrics.frechet_distance(a, b), rel=1e-8)


def test_works_take_turns_after_a_round_that_compiles():
    done = []
    works = {name: (lambda name=name: done.append(name)) for name in "ab"}
    costs = costs_in_turn(works, 2)
    assert done == list("ababab")
    assert all(cost.seconds >= 0 for cost in costs.values())
    done.clear()
    costs_in_turn(works, 1, warm_up=False)
    assert done == list("ab")


@NEEDS_TENSORFLOW
def test_distances_of_tensorflow():
    real, samples = RNG.normal(0, 1, (90, 6)), RNG.normal(0.8, 1, (70, 6))
    sets = real.astype(np.float32), samples.astype(np.float32)
    expected = metrics.precision_recall(*sets)
    assert rivals.tensorflow_precision_recall(*sets, 32) == pytest.approx(expected, abs=0.02)


@pytest.mark.slow
@NEEDS_TENSORFLOW
def test_the_network_of_tensorflow():
    weights = evaluate.random_weights(0)
    pictures = RNG.integers(0, 256, (2, 64, 64, 3), np.uint8)
    ours = inception.features(weights.params, inception.resize(jnp.asarray(pictures))).pooled
    found = rivals.tensorflow_network(weights.params)(pictures)
    assert evaluate.relative(found, np.asarray(ours)) < 1e-5
