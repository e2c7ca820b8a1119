# SPDX-License-Identifier: Apache-2.0
"""Scores against the reference evaluator's fixtures, and against cases with a known answer."""

import re
import tracemalloc

import jax
import numpy as np
import pytest

from tests.eval import fixtures
from vqjax.errors import VqjaxError
from vqjax.eval import metrics, nearest

FIXTURES = fixtures.files("metrics")


def _sets(fixture: dict, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The (reference, samples) pair that a case name such as 300_vs_500 or pr_2048 speaks of."""
    by_size: dict[str, dict[tuple, np.ndarray]] = {"gen": {}, "ref": {}}
    for key, array in fixture.items():
        found = re.fullmatch(r"(?:small_)?(gen|ref)_(\d+)x(\d+)", key)
        if found:
            by_size[found[1]][int(found[2]), int(found[3])] = array
    sizes = [int(number) for number in re.findall(r"\d+", name)]
    if len(sizes) == 1:  # a feature dimension
        pairs = [{s: a for s, a in by_size[k].items() if s[1] == sizes[0]} for k in ("ref", "gen")]
        return max(pairs[0].items())[1], max(pairs[1].items())[1]
    ref = next(a for (n, _), a in by_size["ref"].items() if n == sizes[1])
    longer = [
        a for (n, f), a in sorted(by_size["gen"].items()) if n >= sizes[0] and f == ref.shape[1]
    ]
    return ref, longer[0][: sizes[0]]


def _rows(fixture: dict, which: str, features: int) -> np.ndarray:
    """The full set of reference or generated features of one dimension."""
    name = re.compile(rf"{which}_\d+x{features}")
    return next(array for key, array in fixture.items() if name.fullmatch(key))


def _cases(fixture: dict, pattern: str) -> list[tuple[str, str]]:
    found = [(key, match[1]) for key in fixture if (match := re.fullmatch(pattern, key))]
    assert found, f"the fixture has no key of the form {pattern}"
    return found


@pytest.fixture(scope="module", params=FIXTURES)
def fixture(request):
    return fixtures.load(request.param)


def test_fixture_moments(fixture):
    for key, which in _cases(fixture, r"exp_mu_(ref|gen)"):
        rows = _rows(fixture, which, fixture[key].size)
        found = metrics.moments(rows)
        np.testing.assert_allclose(found.mean, fixture[key], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.covariance, fixture[f"exp_sigma_{which}"], rtol=1e-10)


def test_fixture_frechet_distance(fixture):
    for key, case in _cases(fixture, r"exp_fid_((?:rank_deficient_)?\d+_vs_\d+)(?:_eigh)?"):
        ref, gen = _sets(fixture, case)
        found = metrics.frechet_distance(metrics.moments(gen), metrics.moments(ref))
        assert found == pytest.approx(float(fixture[key]), rel=1e-6), key
    same = metrics.moments(_rows(fixture, "gen", fixture["exp_mu_gen"].size))
    expected = float(fixture["exp_fid_same"])
    assert metrics.frechet_distance(same, same) == pytest.approx(expected, abs=1e-6)


def test_fixture_spatial_distance(fixture):
    spatial = {
        which: metrics.moments(array[..., :7].reshape(len(array), -1))
        for key, array in fixture.items()
        for which in re.findall(r"^spat_(ref|gen)_", key)
    }
    for key, _ in _cases(fixture, r"exp_sfid_(\d+_vs_\d+)"):
        found = metrics.frechet_distance(spatial["gen"], spatial["ref"])
        assert found == pytest.approx(float(fixture[key]), rel=1e-6)


def test_fixture_inception_score(fixture):
    weights = next(a for k, a in fixture.items() if k.startswith("softmax_w"))
    gen = _rows(fixture, "gen", len(weights))
    for key, split in _cases(fixture, r"exp_is_split_(\d+)"):
        found = metrics.inception_score(gen @ weights, split=int(split))
        assert found == pytest.approx(float(fixture[key]), rel=1e-4)


@pytest.fixture(params=["cpu", "gpu"])
def backend(request, monkeypatch):
    """Where distances are made; the programs for a GPU run on any device."""
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)
    return request.param


def test_fixture_precision_and_recall(fixture, backend):
    for key, case in _cases(fixture, r"exp_pr_(\w+)_precision_recall_fp32"):
        ref, gen = _sets(fixture, case)
        ref = ref[: len(fixture[f"exp_pr_{case}_radii_ref_fp64"])]
        scale = np.float32(120 if "scaled" in case else 1)
        found = metrics.precision_recall(ref * scale, gen * scale)
        np.testing.assert_allclose(found, fixture[key], atol=1e-12, err_msg=case)
        # The evaluator's distances are float16 where they are finite: a few rows change sides.
        evaluator = fixture[f"exp_pr_{case}_precision_recall_evaluator"]
        assert np.all(np.abs(found - evaluator) * [len(gen), len(ref)] <= 2 + 1e-9), case
        radii = metrics.radii(ref * scale)
        np.testing.assert_allclose(radii, fixture[f"exp_pr_{case}_radii_ref_fp64"], rtol=1e-3)


def test_batches_give_the_moments_of_the_whole():
    rows = np.random.default_rng(0).normal(1000.0, 1.0, (257, 5)).astype(np.float32)
    accumulator = metrics.Accumulator()
    for start in range(0, 257, 50):
        accumulator.add(rows[start : start + 50])
    found = accumulator.moments()
    assert found.count == 257
    np.testing.assert_allclose(found.mean, rows.mean(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(rows, rowvar=False), rtol=1e-9)


def test_distance_of_two_known_gaussians():
    a = metrics.Moments(np.zeros(2), np.diag([4.0, 9.0]), 10)
    b = metrics.Moments(np.array([3.0, 4.0]), np.diag([1.0, 25.0]), 10)
    # Diagonal covariances: |step|^2 + sum of (sd difference)^2 = 25 + 1 + 4.
    assert metrics.frechet_distance(a, b) == pytest.approx(30.0)
    assert metrics.frechet_distance(a, a) == pytest.approx(0.0, abs=1e-12)


def test_inception_score_of_sure_and_unsure_classifiers():
    sure = 1e4 * np.eye(10)[np.arange(100) % 10]  # exact zeros after the softmax
    assert metrics.inception_score(sure) == pytest.approx(10.0)
    assert metrics.inception_score(np.zeros((100, 10))) == pytest.approx(1.0)


def test_collapse_keeps_precision_and_loses_recall():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(300, 4))
    one_mode = real[0] + 1e-3 * rng.normal(size=(300, 4))
    precision, recall = metrics.precision_recall(real, one_mode)
    assert precision == 1.0
    assert recall < 0.01


def test_nearest_distance_can_skip_the_row_itself(backend):
    rows = np.array([[0.0, 0], [3, 4], [0, 1]])
    assert metrics.nearest_distance(rows, rows).tolist() == [0, 0, 0]
    np.testing.assert_allclose(
        metrics.nearest_distance(rows, rows, skip_itself=True), [1, np.sqrt(18), 1]
    )


def test_block_size_does_not_change_results(backend, monkeypatch):
    rng = np.random.default_rng(0)
    real, samples = rng.normal(size=(100, 3)), rng.normal(size=(90, 3))
    whole = metrics.precision_recall(real, samples)
    monkeypatch.setattr(metrics, "_BLOCK_VALUES", 700)  # seven rows
    assert metrics.precision_recall(real, samples) == whole


def test_programs_for_a_gpu_find_what_numpy_does(monkeypatch):
    rng = np.random.default_rng(0)
    # Norms of 2,000 beside distances of 60, as features of pictures that are alike have them.
    real, samples = (rng.normal(8, 1, (count, 32)).astype(np.float32) for count in (300, 250))
    balls = metrics.radii(real)
    expected = balls, metrics.inside(samples, real, balls)
    assert 0.1 < expected[1].mean() < 0.9
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(metrics, "_BLOCK_VALUES", 70 * 300)  # the last block is not full
    blocks = []
    squared = nearest._squared

    def watched(rows_BF, others_RF):
        blocks.append(rows_BF.shape[0] * others_RF.shape[0])
        return squared(rows_BF, others_RF)

    monkeypatch.setattr(nearest, "_squared", watched)
    np.testing.assert_allclose(metrics.radii(real), expected[0], rtol=1e-4)
    np.testing.assert_array_equal(metrics.inside(samples, real, balls), expected[1])
    assert blocks == [70 * 300] * 2  # traced once each, and never more distances at once


def _error(rows: np.ndarray, reference: metrics.Moments) -> float | None:
    return metrics.frechet_error(rows, metrics.moments(rows), reference)


def test_standard_error_is_the_spread_of_the_distance():
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(6, 6)) / 2 + np.eye(6)
    reference = metrics.moments(rng.normal(size=(5000, 6)))
    sets = [rng.normal(size=(400, 6)) @ mix + 0.3 for _ in range(300)]
    distances = [metrics.frechet_distance(metrics.moments(rows), reference) for rows in sets]
    errors = [_error(rows, reference) for rows in sets[:20]]
    found = np.mean([error for error in errors if error is not None])
    assert found == pytest.approx(np.std(distances), rel=0.15)


def test_no_standard_error_without_an_inverse():
    reference = metrics.moments(np.random.default_rng(0).normal(size=(50, 4)))
    rows = np.random.default_rng(1).normal(size=(60, 4))
    assert _error(rows[:4], reference) is None
    assert _error(np.ones((60, 4)), reference) is None


def test_features_that_never_vary_do_not_disturb_the_standard_error():
    rng = np.random.default_rng(0)
    reference, rows = rng.normal(size=(500, 4)), rng.normal(size=(400, 4))
    expected = _error(rows, metrics.moments(reference))
    rows, reference = (np.pad(each, ((0, 0), (0, 1))) for each in (rows, reference))
    assert _error(rows, metrics.moments(reference)) == pytest.approx(expected, rel=1e-6)


def test_inception_score_does_not_depend_on_batches():
    logits = np.random.default_rng(0).normal(size=(230, 7)) * 3
    whole, parts = metrics.SplitScores(100), metrics.SplitScores(100)
    whole.add(logits)
    for start in range(0, 230, 64):
        parts.add(logits[start : start + 64])
    np.testing.assert_allclose(parts.scores(), whole.scores(), rtol=1e-12)
    alone = [metrics.inception_score(logits[start : start + 100]) for start in (0, 100, 200)]
    np.testing.assert_allclose(whole.scores(), alone, rtol=1e-12)


def test_class_order():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 50, 2000)
    assert not metrics.sorted_by_class(labels, split=200)
    assert not metrics.sorted_by_class(np.arange(2000) % 50, split=200)
    assert not metrics.sorted_by_class(np.zeros(2000, int), split=200)
    assert metrics.sorted_by_class(np.sort(labels), split=200)
    assert metrics.sorted_by_class(np.argsort(rng.random(50))[np.sort(labels)], split=200)
    assert not metrics.sorted_by_class(np.sort(labels), split=2000)  # one split: order is free
    assert not metrics.sorted_by_class(rng.integers(0, 1000, 250), split=20)  # few rows a class


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.moments(np.zeros((1, 3))), "at least 2 feature rows, found 1"),
        (lambda: metrics.moments(np.zeros(3)), r"found shape \(3,\)"),
        (lambda: metrics.radii(np.zeros((3, 2))), "need more than 3 rows"),
        (lambda: metrics.accuracy(np.zeros((3, 2)), np.zeros(2)), "3 rows of logits, 2 labels"),
        (
            lambda: metrics.precision_recall(np.zeros((9, 2)), np.zeros((9, 3))),
            "do not compare",
        ),
        (
            lambda: metrics.frechet_distance(
                metrics.Moments(np.array([np.nan]), np.eye(1), 2),
                metrics.Moments(np.zeros(1), np.eye(1), 2),
            ),
            "NaN or infinity",
        ),
    ],
)
def test_messages(call, message):
    with pytest.raises(VqjaxError, match=message):
        call()


def test_memory_of_precision_and_recall_does_not_grow_with_the_sets(monkeypatch):
    monkeypatch.setattr(metrics, "_BLOCK_VALUES", 1 << 16)
    rng = np.random.default_rng(0)
    peaks = []
    for count in (1000, 4000):
        sets = [rng.normal(size=(count, 4)).astype(np.float32) for _ in range(2)]
        tracemalloc.start()
        metrics.precision_recall(*sets)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    block = 4 * (1 << 16)
    assert peaks[0] > block  # it is seen
    # All distances of the larger sets are 64 MB; what grows is a few numbers of each row.
    assert peaks[1] < 3 * block + 64 * 4000
