# SPDX-License-Identifier: Apache-2.0
"""The whole evaluator against the reference program's, and what it refuses before any work."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from tests.eval import fixtures
from vqjax.errors import VqjaxError
from vqjax.eval import adm, metrics
from vqjax.io import image_set, inception_keys
from vqjax.io import inception as weights_io
from vqjax.io.image_set import Statistics


def _weights(seed: int) -> weights_io.Weights:
    entries = inception_keys.torch_entries()
    tensors = fixtures.state_dict(entries, seed)
    arrays = {entry.path: entry.to_param(tensors[entry.key]) for entry in entries}
    params = weights_io.fold(arrays, where="recipe")
    return weights_io.Weights({k: jnp.asarray(v) for k, v in params.items()}, "recipe", False)


def _shares(ref_RF: np.ndarray, gen_NF: np.ndarray, *, margin: float) -> tuple[float, float]:
    """Precision and recall from differences in float64, all radii longer by `margin`."""
    ref, gen = ref_RF.astype(np.float64), gen_NF.astype(np.float64)

    def squared(a, b):
        return np.stack([((row - b) ** 2).sum(1) for row in a])

    between = squared(gen, ref)
    radii = [np.sort(squared(rows, rows))[:, metrics.NEIGHBOURS] + margin for rows in (ref, gen)]
    return (between <= radii[0]).any(1).mean(), (between <= radii[1][:, None]).any(0).mean()


@pytest.mark.usefixtures("optimized")
@pytest.mark.slow
@pytest.mark.parametrize("path", fixtures.files("evaluator"))
def test_fixture(path, monkeypatch):
    monkeypatch.setattr(adm, "BATCH", 16)  # both sets without filling up
    fixture = fixtures.load(path)
    sets = {name[:3]: images for name, images in fixture.items() if "_images_" in name}
    seen, done = {}, []

    def remember(images, weights, **options):
        seen[images.where] = look(images, weights, **options)
        return seen[images.where]

    look = adm.look
    monkeypatch.setattr(adm, "look", remember)
    found = adm.evaluate(
        image_set.from_array(sets["gen"], where="gen"),
        image_set.from_array(sets["ref"], where="ref"),
        _weights(int(fixture["seed"])),
        advance=done.append,
    )
    assert sum(done) == len(sets["gen"]) + len(sets["ref"])
    for which in ("ref", "gen"):
        pooled, spatial = seen[which].pooled, seen[which].spatial
        expected = fixture[f"exp_pool_{which}"]
        np.testing.assert_allclose(seen[which].rows_NF[: len(expected)], expected, atol=1e-4)
        np.testing.assert_allclose(pooled.mean, fixture[f"exp_mu_{which}"], atol=1e-4)
        np.testing.assert_allclose(spatial.mean, fixture[f"exp_mu_s_{which}"], atol=1e-4)
    for name, moments in (("sigma", seen["ref"].pooled), ("sigma_s", seen["ref"].spatial)):
        expected = fixture[f"exp_{name}_diag_ref"]
        np.testing.assert_allclose(np.diag(moments.covariance), expected, rtol=1e-3, atol=1e-7)
    for name in ("fid", "sfid"):
        assert found[name] == pytest.approx(float(fixture[f"exp_{name}_exact"]), rel=1e-3)
        assert found[name] == pytest.approx(float(fixture[f"exp_{name}_evaluator"]), rel=1e-3)
    assert found["is"] == pytest.approx(float(fixture["exp_inception_score"]), rel=1e-4)
    rows = seen["ref"].rows_NF, seen["gen"].rows_NF
    assert (found["precision"], found["recall"]) == _shares(*rows, margin=0)
    # The evaluator's squared distances are float16 differences of norms of 200 and more, and these
    # weights put all pictures close together: what it may have found lies between two bounds.
    step = float(np.spacing(np.float16((rows[0] ** 2).sum(1).max()))) / 2
    least, most = _shares(*rows, margin=-step), _shares(*rows, margin=step)
    expected = fixture["exp_precision_recall_evaluator"]
    assert np.all(least <= expected)
    assert np.all(expected <= most)
    assert np.all(np.abs(np.array([found["precision"], found["recall"]]) - expected) < 0.1)
    assert found["fid_se"] is None
    assert any("singular" in note for note in found["notes"])


def _fake(params, images_BHWC: np.ndarray) -> adm.Rows:
    """Features that are cheap, tell pictures apart and do not depend on the batch."""
    rows = images_BHWC.reshape(len(images_BHWC), -1).astype(np.float32) / 255
    logits = np.zeros((len(rows), 10), np.float32)
    logits[np.arange(len(rows)), (rows[:, 0] * 9.99).astype(int)] = 50
    return adm.Rows(rows[:, :POOLED], rows[:, :SPATIAL], logits)


POOLED, SPATIAL = 5, 3
WEIGHTS = weights_io.Weights({}, "a1b2", True)


@pytest.fixture
def small(monkeypatch):
    """The evaluator around features of a few dimensions, in batches of 8."""
    monkeypatch.setattr(adm, "_features", _fake)
    for module, name, value in (
        (adm.inception, "POOLED", POOLED),
        (adm.inception, "SPATIAL", SPATIAL),
        (adm, "BATCH", 8),
        (adm, "FLUSH", 20),
    ):
        monkeypatch.setattr(module, name, value)


def _pictures(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 2, 2, 3), np.uint8)


def _moments(images_NHWC: np.ndarray) -> tuple[metrics.Moments, metrics.Moments]:
    seen = _fake({}, images_NHWC)
    return metrics.moments(seen.pooled), metrics.moments(seen.spatial)


def test_scores_are_those_of_all_rows_at_once(small):
    real, made = _pictures(90, 0), _pictures(75, 1)
    found = adm.evaluate(image_set.from_array(made), image_set.from_array(real), WEIGHTS)
    a, b = _moments(real), _moments(made)
    assert found["fid"] == pytest.approx(metrics.frechet_distance(a[0], b[0]), rel=1e-9)
    assert found["sfid"] == pytest.approx(metrics.frechet_distance(a[1], b[1]), rel=1e-9)
    rows = [_fake({}, images).pooled for images in (real, made)]
    assert (found["precision"], found["recall"]) == metrics.precision_recall(*rows)
    assert found["is"] == pytest.approx(metrics.inception_score(_fake({}, made).logits))
    assert found["fid_se"] > 0
    assert found["is_sd"] is None  # one split
    assert (found["n"], found["reference_n"]) == (75, 90)
    assert found["reference_statistics"] == "pictures"
    assert found["inception_sha256"] == "a1b2"
    notes = " ".join(found["notes"])
    assert "N = 75: FID and sFID are biased upwards" in notes
    assert "published ones have 50,000" in notes
    assert "no stored statistics" in notes
    assert "not the published one" not in notes


@pytest.mark.parametrize("rows", [70, 90])
def test_as_many_pictures_come_as_a_set_says(small, rows):
    images = image_set.from_array(_pictures(rows, 0))
    images = dataclasses.replace(images, count=80)
    with pytest.raises(VqjaxError, match=r"features of \d+ .*pictures came, 80 were announced"):
        adm.look(images, WEIGHTS)


def test_stored_statistics_go_before_pictures(small):
    real, made, whole = _pictures(40, 0), _pictures(60, 1), _pictures(500, 2)
    pooled, spatial = _moments(whole)
    stored = Statistics(*pooled[:2], *spatial[:2])
    reference = dataclasses.replace(image_set.from_array(real), statistics=stored)
    found = adm.evaluate(image_set.from_array(made), reference, WEIGHTS)
    expected = metrics.frechet_distance(pooled, _moments(made)[0])
    assert found["fid"] == pytest.approx(expected, rel=1e-9)
    rows = [_fake({}, images).pooled for images in (real, made)]
    assert (found["precision"], found["recall"]) == metrics.precision_recall(*rows)
    assert found["reference_statistics"] == "stored"
    assert found["fid_se"] is not None
    samples = dataclasses.replace(image_set.from_array(made), statistics=stored)
    of_file = adm.evaluate(samples, reference, WEIGHTS)
    assert of_file["fid"] == pytest.approx(0, abs=1e-6)
    assert of_file["fid_se"] is None
    assert any("that the samples' file stores" in note for note in of_file["notes"])


def _never(size):
    raise AssertionError("pictures were read before the check")


def _unread(count: int = 100, **fields) -> image_set.ImageSet:
    return image_set.ImageSet("a.npz", count, (2, 2), _never, **fields)


def test_too_few_samples():
    with pytest.raises(VqjaxError, match=r"a\.npz: 3 pictures are too few: a covariance needs 2"):
        adm.evaluate(_unread(3), _unread(), WEIGHTS)
    with pytest.raises(VqjaxError, match="3 pictures are too few"):
        adm.evaluate(_unread(), _unread(3), WEIGHTS)


def test_statistics_of_another_network():
    stored = Statistics(np.zeros(64), np.eye(64), np.zeros(2023), np.eye(2023))
    with pytest.raises(VqjaxError, match=r"statistics of 64 and 2023 dimensions.*have 2048 and"):
        adm.evaluate(_unread(), _unread(statistics=stored), WEIGHTS)


def test_samples_sorted_by_class():
    labels = np.repeat(np.arange(100), 100)
    with pytest.raises(VqjaxError, match=r"sorted by class.*shuffle pictures and labels"):
        adm.evaluate(_unread(10_000, labels=labels), _unread(), WEIGHTS)


def test_samples_without_labels_that_look_sorted(small, monkeypatch):
    looks_sorted = functools.partial(metrics.sorted_by_class, split=20)
    monkeypatch.setattr(metrics, "sorted_by_class", looks_sorted)
    made = _pictures(200, 1)
    made = made[np.argsort(made[:, 0, 0, 0])]
    found = adm.evaluate(
        image_set.from_array(made), image_set.from_array(_pictures(90, 0)), WEIGHTS
    )
    assert any("look sorted by class" in note for note in found["notes"])
