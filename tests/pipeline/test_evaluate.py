# SPDX-License-Identifier: Apache-2.0
"""`python -m vqjax.evaluate` on small models and pictures: same numbers after interruptions."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from tests import xla_flags
from tests.io import models
from vqjax import evaluate as command
from vqjax import settings as lib
from vqjax.errors import VqjaxError
from vqjax.eval import adm, fidelity
from vqjax.io import adm_npz, image_set, inception, native
from vqjax.models import inception as network
from vqjax.pipeline import evaluate, features, run_file, sampled, sources
from vqjax.pipeline import twins as pairs

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """Files of a small model and its quantized twin."""
    folder = tmp_path_factory.mktemp("models")
    native.save_model(folder / "full.safetensors", models.dense(models.TINY))
    native.save_model(folder / "small.safetensors", models.quantized(models.TINY))
    return folder / "small.safetensors", folder / "full.safetensors"


def wanted(twins, out, **changes):
    options = {"source": str(twins[0]), "against": str(twins[1]), "count": 10, "batch": 2}
    return lib.EvaluateSettings(**(options | {"steps": 2, "out": out} | changes))


def numbers(folder: pathlib.Path) -> dict:
    """What must not depend on interruptions."""
    content = json.loads((folder / "evaluation.json").read_text())
    return {name: content[name] for name in ("models", "difference", "worst", "protocol")}


def shards(folder: pathlib.Path) -> dict[str, bytes]:
    files = sorted((folder / "samples").rglob("*.npy"))
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def whole(twins, tmp_path_factory):
    """The folder of an evaluation that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    evaluate.run(wanted(twins, out))
    return out


def test_a_killed_run_gives_the_same_numbers_on_any_number_of_devices(twins, whole, tmp_path):
    settings = wanted(twins, tmp_path / "run")
    words = lib.command_line("vqjax.evaluate", settings).split()[1:]
    flags = xla_flags.simulated(2)
    process = subprocess.Popen(
        [sys.executable, *words],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        stderr=subprocess.PIPE,
        text=True,
    )
    first = settings.out / "samples" / "source"
    while process.poll() is None and not list(first.glob("images-*.npy")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    assert not (settings.out / "evaluation.json").exists()
    kept = {file: file.stat().st_mtime_ns for file in first.glob("images-*.npy")}
    assert kept
    evaluate.run(settings)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert shards(settings.out) == shards(whole)
    assert numbers(settings.out) == numbers(whole)


def test_the_report_shows_worst_pairs_first_and_stands_alone(whole):
    found = numbers(whole)
    psnr = [pair["psnr"] for pair in found["worst"]]
    assert len(psnr) == 10
    assert psnr == sorted(psnr)
    assert found["difference"]["psnr"] == pytest.approx(np.mean(psnr))
    assert found["difference"]["latent_mse"] > 0
    page = (whole / "evaluation.html").read_text()
    assert page.count("<img") == page.count('src="data:image/png') == 12
    assert "pt_inception-2015-12-05-6726825d.pth" in page  # what is missing, and where it is
    assert "6726825d" in (whole / "evaluation.md").read_text()
    assert len(list(whole.glob("worst-*.png"))) == 10


def test_pictures_of_an_earlier_comparison_do_not_stay(twins, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "mine.png").write_bytes(b"")
    evaluate.run(wanted(twins, out, against=None))
    assert {file.name for file in out.glob("*.png")} == {"samples-source.png", "mine.png"}


def test_classes_of_samples_do_not_depend_on_their_number():
    few, many = (sources.class_ids(models.TINY, count, seed=5) for count in (10, 1000))
    np.testing.assert_array_equal(few, many[:10])
    assert set(many) == {0, 1, 2}  # never "no class"
    assert np.bincount(many).min() > 250


def fake_features(params, images_BHWC):
    """As the network, from random projections."""
    rng = np.random.default_rng(0)
    flat = images_BHWC.reshape(len(images_BHWC), -1)[:, ::16].astype(np.float32) / 255
    return adm.Rows(
        *(
            flat @ rng.standard_normal((flat.shape[1], size)).astype(np.float32)
            for size in (network.POOLED, network.SPATIAL, network.CLASSES)
        )
    )


@pytest.fixture
def fake_network(monkeypatch):
    # Few features, since the root of a matrix of 2048 x 2048 takes half a minute.
    monkeypatch.setattr(network, "POOLED", 32)
    monkeypatch.setattr(network, "SPATIAL", 24)
    weights = inception.Weights({}, "0" * 64, published=False)
    monkeypatch.setattr(inception, "load", lambda path: weights)
    monkeypatch.setattr(adm, "_features", fake_features)
    return weights


def pictures(seed: int, count: int = 12, side: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3)).astype(np.uint8)


def save_folder(folder: pathlib.Path, images: np.ndarray) -> pathlib.Path:
    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:03d}.png")
    return folder


def test_pictures_are_scored_as_the_evaluator_does(tmp_path, fake_network):
    samples, real = pictures(1), pictures(2, 14)
    adm_npz.save_npz(tmp_path / "samples.npz", [samples], count=12, labels_N=np.arange(12) % 3)
    folder = save_folder(tmp_path / "real", real)
    twin = save_folder(tmp_path / "twin", np.minimum(samples + 1, 255).astype(np.uint8))
    found = evaluate.run(
        lib.EvaluateSettings(
            source=str(tmp_path / "samples.npz"),
            against=str(twin),
            reference=str(folder),
            inception=pathlib.Path("weights.pth"),
            out=tmp_path / "run",
        )
    )
    expected = adm.evaluate(image_set.from_array(samples), image_set.from_array(real), fake_network)
    scores = found["models"]["source"]["adm"]
    assert {name: scores[name] for name in adm.SCORES} == {
        name: pytest.approx(expected[name]) for name in adm.SCORES
    }
    after = np.minimum(samples + 1, 255).astype(np.uint8)
    assert found["difference"]["psnr"] == pytest.approx(fidelity.psnr(after, samples).mean())
    assert found["protocol"] is None
    assert any("compared in their order" in note for note in found["notes"])
    assert any("LPIPS" in sentence for sentence in found["missing"])


def test_precision_and_recall_look_at_the_first_pictures_alone(fake_network):
    samples, real = (image_set.from_array(pictures(seed, 30)) for seed in (1, 2))
    first = dataclasses.replace(real, manifold=9)
    expected = adm.evaluate(samples, real, fake_network)
    few = adm.evaluate(samples, image_set.from_array(pictures(2, 30)[:9]), fake_network)
    found = adm.evaluate(samples, first, fake_network)
    assert {name: found[name] for name in ("fid", "sfid")} == pytest.approx(
        {name: expected[name] for name in ("fid", "sfid")}
    )
    assert [found[name] for name in ("precision", "recall")] == [few["precision"], few["recall"]]
    assert (found["reference_n"], found["reference_manifold_n"]) == (30, 9)
    assert any("first 9 of the reference's 30 pictures" in note for note in found["notes"])


def test_an_inception_score_needs_no_reference(tmp_path, fake_network):
    adm_npz.save_npz(tmp_path / "samples.npz", [pictures(1)], count=12)
    found = evaluate.run(
        lib.EvaluateSettings(
            source=str(tmp_path / "samples.npz"), inception=tmp_path, out=tmp_path / "run"
        )
    )
    scores = found["models"]["source"]["adm"]
    assert scores["is"] > 1
    assert "fid" not in scores
    assert "VIRTUAL_imagenet256_labeled.npz" in found["missing"][0]


def test_features_that_are_there_are_not_computed_again(tmp_path, fake_network, monkeypatch):
    images = image_set.from_array(pictures(3, 10))
    whole = features.look(images, fake_network, tmp_path / "whole", "all", block=4)
    calls, limit = [], 2

    def broken(params, batch):
        if len(calls) == limit:
            raise KeyboardInterrupt
        calls.append(len(batch))
        return fake_features(params, batch)

    monkeypatch.setattr(adm, "_features", broken)
    with pytest.raises(KeyboardInterrupt):
        features.look(images, fake_network, tmp_path / "part", "all", block=4)
    limit = 3
    again = features.look(images, fake_network, tmp_path / "part", "all", block=4)
    assert calls == [4, 4, 2]
    np.testing.assert_array_equal(again.rows_NF, whole.rows_NF)
    np.testing.assert_array_equal(again.spatial.covariance, whole.spatial.covariance)
    block = tmp_path / "part" / "00001.safetensors"
    block.write_bytes(block.read_bytes()[:50])
    with pytest.raises(VqjaxError, match=r"00001.safetensors: no features .* delete it"):
        features.look(images, fake_network, tmp_path / "part", "all", block=4)


def test_a_mistake_costs_no_samples(twins, whole, tmp_path, fake_network):
    before = shards(whole)
    adm_npz.save_npz(tmp_path / "two.npz", [pictures(1, 2)], count=2)
    options = {"reference": str(tmp_path / "two.npz"), "inception": tmp_path}
    with pytest.raises(VqjaxError, match="2 pictures are too few"):
        evaluate.run(wanted(twins, whole, **options))
    adm_npz.save_npz(tmp_path / "some.npz", [pictures(1, 8)], count=8)
    options["reference"] = str(tmp_path / "some.npz")
    found = evaluate.run(wanted(twins, whole, **options))
    assert found["models"]["source"]["adm"]["fid"] > 0
    assert shards(whole) == before


def test_samples_of_other_settings_are_not_mixed(twins, whole):
    with pytest.raises(VqjaxError, match="other settings"):
        evaluate.run(wanted(twins, whole, seed=1))


def test_samples_of_other_kernels_are_not_mixed(twins, whole, monkeypatch):
    monkeypatch.setenv("VQJAX_KERNELS", "lut")
    with pytest.raises(VqjaxError, match="made with kernels auto, here lut"):
        evaluate.run(wanted(twins, whole))


def test_a_complete_evaluation_that_is_made_anew_is_not_complete(
    twins, whole, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    shutil.copytree(whole, out)

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "_scores", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(wanted(twins, out, against=None))
    assert json.loads((out / "run.json").read_text())["status"] == "running"


def test_a_comparison_may_come_and_go(twins, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    alone = evaluate.run(wanted(twins, out, against=None))
    assert alone["difference"] is None
    assert alone["models"].keys() == {"source"}
    with pytest.raises(VqjaxError, match="holds work for another --against"):
        evaluate.run(wanted(twins, out, against=str(twins[0])))
    again = evaluate.run(wanted(twins, out))
    assert again["difference"] == numbers(whole)["difference"]
    assert shards(out) == shards(whole)


def test_samples_that_a_killed_comparison_left_serve_no_other(twins, tmp_path, monkeypatch):
    adm_npz.save_npz(tmp_path / "given.npz", [pictures(1, 4)], count=4)
    options = {"source": str(tmp_path / "given.npz"), "count": None}
    out = tmp_path / "run"
    evaluate.run(wanted(twins, out, against=None, **options))

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sampled, "sample", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(wanted(twins, out, **options))
    with pytest.raises(VqjaxError, match="holds work for another --against"):
        evaluate.run(wanted(twins, out, seed=1, **options))


def test_a_damaged_shard_is_named(twins, tmp_path):
    settings = wanted(twins, tmp_path / "run", count=4)
    evaluate.run(settings)
    path = settings.out / "samples" / "source" / "images-00001.npy"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(VqjaxError, match=r"images-00001.npy: unreadable .* delete it"):
        evaluate.run(settings)
    np.save(path, np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(VqjaxError, match=r"uint8 \[2, 8, 8, 3\], expected uint8 \[2, 16, 16\]"):
        evaluate.run(settings)


def test_a_lost_shard_of_latents_is_sampled_again(twins, tmp_path):
    settings = wanted(twins, tmp_path / "run", count=4)
    before = evaluate.run(settings)["difference"]
    (settings.out / "samples" / "source" / "latents-00001.npy").unlink()
    assert evaluate.run(settings)["difference"] == before


def test_unusable_guidance_does_not_claim_the_folder(twins, tmp_path):
    with pytest.raises(VqjaxError, match="--guidance nan: expected a finite number"):
        evaluate.run(wanted(twins, tmp_path / "run", guidance=float("nan")))
    assert not (tmp_path / "run").exists()


def test_twins_must_be_as_many_of_one_size(twins, tmp_path):
    adm_npz.save_npz(tmp_path / "a.npz", [pictures(1)[:, :8, :8]], count=12)
    adm_npz.save_npz(tmp_path / "b.npz", [pictures(1, 11)], count=11)
    settings = wanted(twins, tmp_path / "run", source=str(tmp_path / "a.npz"), count=None)
    with pytest.raises(VqjaxError, match=r"12 of 8 x 8 and .* 12 of 16 x 16"):
        evaluate.prepare(settings)
    other = wanted(twins, tmp_path / "run", **{"source": str(tmp_path / "a.npz"), "count": 5})
    with pytest.raises(VqjaxError, match="--count 5: 12 pictures are given"):
        evaluate.prepare(other)
    pair = {"source": str(tmp_path / "a.npz"), "against": str(tmp_path / "b.npz"), "count": None}
    with pytest.raises(VqjaxError, match=r"12 of 8 x 8 and .* 11 of 16 x 16"):
        evaluate.prepare(wanted(twins, tmp_path / "run", **pair))
    small = image_set.from_array(pictures(1)[:, :8, :8])
    with pytest.raises(VqjaxError, match=r"--lpips: .* 8 x 8, expected sides of at least 16"):
        pairs.check(small, small, with_lpips=True)


@pytest.mark.slow
def test_names_may_hold_anything(tmp_path, capsys):
    """Brackets, which are markup to the library that prints, and bytes that are no UTF-8."""
    folder = tmp_path / os.fsdecode(b"made \xff")
    folder.mkdir()
    for number, picture in enumerate(pictures(1)):
        Image.fromarray(picture).save(folder / os.fsdecode(b"%d \xfe.png" % number))
    out = tmp_path / "scores [/of] it [ema]"
    evaluate.run(lib.EvaluateSettings(source=str(folder), against=str(folder), out=out))
    assert f"report: {out / 'evaluation.html'}\n" in capsys.readouterr().out
    assert json.loads((out / "evaluation.json").read_text())["difference"]["identical"] == 12


def test_mistakes_end_with_code_2(twins, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for words, message in (
        ([tmp_path / "empty"], "neither a model"),
        ([tmp_path / "absent.npz"], "no such file"),
        ([tmp_path / "absent"], "no such file or folder"),
        ([twins[0], "--count", "3"], "--count 3: expected 4 or more"),
        ([twins[0], "--against", "digits"], "twins share noise and classes"),
        ([twins[0], "--steps", "0"], "steps: found 0, expected 1 to 999"),
        ([twins[0], "--eta", "-1"], "eta: found -1.0, expected 0"),
        ([twins[0], "--inception", tmp_path / "absent.pth"], "absent.pth"),
        ([twins[0], "--reference", tmp_path / "absent.npz"], "no such file"),
        ([twins[0], "--lpips", tmp_path / "absent.pth"], "absent.pth"),
    ):
        assert command.main([*map(str, words), "--out", str(tmp_path / "run")]) == 2, words
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_samples_are_exported_for_other_programs(twins, whole, tmp_path, monkeypatch, capsys):
    out, target = tmp_path / "run", tmp_path / "new" / "samples.npz"
    shutil.copytree(whole, out)
    before = shards(out)

    def sampled_again(*arguments):
        raise AssertionError("the samples are there")

    monkeypatch.setattr(sampled.sampling, "generate_placed", sampled_again)
    evaluate.run(wanted(twins, out, export_npz=target))
    assert f"samples: {target}" in capsys.readouterr().out
    assert shards(out) == before
    assert [file.name for file in target.parent.iterdir()] == ["samples.npz"]
    files = sorted((out / "samples" / "source").glob("images-*.npy"))
    with np.load(target) as found:
        assert found["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(found["arr_0"], np.concatenate([np.load(f) for f in files]))
        np.testing.assert_array_equal(found["arr_1"], sources.class_ids(models.TINY, 10, seed=0))
    assert adm_npz.open_npz(target).count == 10
    again = run_file.load(str(out)).evaluate
    assert again is not None
    assert again.export_npz is None  # a repetition leaves it alone


def test_an_export_that_cannot_be_is_refused_before_work(twins, tmp_path, capsys):
    adm_npz.save_npz(tmp_path / "a.npz", [pictures(1)], count=12)
    (tmp_path / "file").write_text("")
    real = save_folder(tmp_path / "real", pictures(2, 4))
    before = (tmp_path / "a.npz").read_bytes()
    for words, target, message in (
        ([twins[0]], "file/a.npz", "file is a file, expected a folder"),
        ([twins[0]], "samples.npy", "samples.npy: expected a name that ends in .npz"),
        ([tmp_path / "a.npz"], "b.npz", "a.npz is pictures already, expected a model"),
        ([twins[0], "--reference", tmp_path / "a.npz"], "a.npz", "a part of --reference"),
        ([twins[0], "--against", real], "real/a.npz", "a part of --against"),
    ):
        place = ["--export-npz", tmp_path / target, "--out", tmp_path / "run"]
        assert command.main([*map(str, [*words, *place])]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "a.npz").read_bytes() == before


def test_a_run_folder_must_be_one(tmp_path, capsys):
    adm_npz.save_npz(tmp_path / "a.npz", [pictures(1)], count=12)
    (tmp_path / "file").write_text("")
    for out, message in (("file", "file is a file, expected a folder"), ("file/run", "file/run: ")):
        assert command.main([str(tmp_path / "a.npz"), "--out", str(tmp_path / out)]) == 2
        assert message in capsys.readouterr().err


def test_notes_of_a_judge_say_how_many_pictures(tmp_path):
    job = evaluate.prepare(lib.EvaluateSettings(source="digits", count=20, out=tmp_path / "run"))
    about, count = evaluate._notes(job, {})
    assert "says nothing about ImageNet" in about
    assert count.startswith("N = 20: digit-FD grows as N shrinks")


@pytest.mark.slow
def test_digits_keep_their_scores(tmp_path):
    found = evaluate.run(
        lib.EvaluateSettings(against="digits", count=20, batch=10, out=tmp_path / "run")
    )
    scores = found["models"]["source"]["digits"]
    assert scores["accuracy"] > 0.8
    assert scores["memorization"]["n"] == 20
    assert found["difference"]["identical"] == 20
    assert found["difference"]["fd_difference"] == 0
    assert found["missing"] == []
    assert "real half against real half" in (tmp_path / "run" / "evaluation.md").read_text()
