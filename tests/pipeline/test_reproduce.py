# SPDX-License-Identifier: Apache-2.0
"""Runs from files: parsed, found, recorded, repeated, compared."""

import dataclasses
import gc
import json
import math
import pathlib
import re
import weakref

import numpy as np
import pytest

from tests.io import models
from vqjax import reproduce as command
from vqjax import settings as lib
from vqjax.errors import QualityGateError, VqjaxError
from vqjax.io import inception, native, orbax_model, published
from vqjax.pipeline import (
    environment,
    evaluate,
    quantize,
    reproduce,
    run_cost,
    run_file,
    run_results,
)

pytestmark = pytest.mark.xdist_group("quantize tiny")

NAMES = list(run_file.packaged())


@pytest.mark.parametrize("name", NAMES)
def test_runs_of_the_package_are_those_of_the_papers(name):
    run = run_file.load(name)
    assert run.quantize is not None
    assert run.evaluate is not None
    model, _, bits = name.removesuffix("a8").partition("_w")
    assert (run.quantize.bits, run.quantize.act_bits) == (float(bits), 8)
    assert (run.evaluate.steps, run.evaluate.eta) == (20, 0.0)
    assert run.quantize.tune_steps == (3_200 if model == "cin256" else 400)
    if model == "cin256":
        assert (run.evaluate.count, run.evaluate.guidance) == (50_000, 3.0)
        named = (run.quantize.source, run.evaluate.reference, run.evaluate.inception)
        assert {str(file) for file in named} <= published.FILES.keys()
    else:
        assert (run.evaluate.count, run.evaluate.guidance) == (10_000, 1.5)
    assert run_file.parse(json.loads(json.dumps(run.to_dict())), pathlib.Path("again")) == run


def test_both_models_have_three_widths():
    assert len([name for name in NAMES if name.startswith("cin256_")]) == 3
    assert len([name for name in NAMES if name.startswith("digits_")]) == 3


def test_settings_survive_json():
    wanted = lib.QuantizeSettings(
        bits=3.0, plan=pathlib.Path("p.json"), calibration=lib.Calibration(images=4)
    )
    text = json.dumps(lib.plain(wanted))
    assert lib.from_plain(lib.QuantizeSettings, json.loads(text), "here") == wanted
    sampled = lib.SampleSettings(classes=(1, 2))
    assert lib.from_plain(lib.SampleSettings, lib.plain(sampled), "here") == sampled
    given = lib.EvaluateSettings(eta=1, lpips=(pathlib.Path("a"), pathlib.Path("b")))
    assert lib.from_plain(lib.EvaluateSettings, lib.plain(given), "here") == given


def test_all_values_that_do_not_fit_are_named_at_once():
    wrong = {
        "name": "a",
        "quantize": {"config": 256, "bits": "2", "calibration": 3, "seed": 1.5, "bit": 2},
        "evaluate": {"lpips": ["a", 1], "count": True, "tuning": {}, "against": [], "seed": -1},
        "more": 1,
    }
    with pytest.raises(VqjaxError) as caught:
        run_file.parse(wrong, pathlib.Path("here.json"))
    heading, *lines = str(caught.value).splitlines()
    assert heading == "here.json: settings that do not fit; correct the file:"
    found = dict(line.removeprefix("  - ").split(": ", 1) for line in lines)
    for name in ("more", "quantize.bit", "evaluate.tuning"):
        assert found.pop(name).startswith("unknown, expected some of ")
    assert found == {
        "quantize.config": "found 256, expected text or null",
        "quantize.bits": 'found "2", expected a number',
        "quantize.calibration": "found 3, expected an object of settings",
        "quantize.seed": "found 1.5, expected a whole number",
        "evaluate.lpips[1]": "found 1, expected a path",
        "evaluate.count": "found true, expected a whole number or null",
        "evaluate.against": "found [], expected text or null",
        "evaluate.seed": "found -1, expected 0 to 4294967295",
    }


def test_missing_files_are_named_with_where_they_are_and_what_the_run_costs(tmp_path, capsys):
    words = ["cin256_w2a8", "--files", str(tmp_path), "--out", str(tmp_path / "run")]
    assert command.main(words) == 2
    shown = capsys.readouterr().err
    for file in (published.CIN256_V2, published.IMAGENET_REFERENCE, published.INCEPTION):
        assert file.describe() in shown
    assert "cin256-v2 W2A8: about" in shown
    assert "quantize" in shown
    assert "tune 3,200 steps" in shown
    assert not (tmp_path / "run").exists()


def test_a_file_of_another_size_is_named_and_recorded(tmp_path, monkeypatch, capsys):
    run = json.loads(run_file.packaged()["cin256_w2a8"].read_text())
    (tmp_path / "model.ckpt").write_bytes(b"short")
    images_NHWC = np.zeros((1, 2, 2, 3), np.uint8)
    np.savez(tmp_path / "VIRTUAL_imagenet256_labeled.npz", images_NHWC)
    run["evaluate"]["inception"] = None
    size = (tmp_path / "VIRTUAL_imagenet256_labeled.npz").stat().st_size
    (tmp_path / "run.json").write_text(json.dumps(run))
    monkeypatch.setattr(reproduce, "_made", lambda run, out: out.mkdir(parents=True) or {})
    monkeypatch.setattr(reproduce, "_inputs", lambda run, out: {})
    monkeypatch.setattr(run_cost, "predict", lambda run: None)
    wanted = {"run": str(tmp_path / "run.json"), "files": tmp_path, "out": tmp_path / "out"}
    notes = reproduce.run(lib.ReproduceSettings(**wanted))["notes"]
    assert [note.split(",")[0] for note in notes] == [
        "model.ckpt: found 5 bytes",
        f"VIRTUAL_imagenet256_labeled.npz: found {size} bytes",
    ]
    assert "the published file has 1,827,378,153" in capsys.readouterr().err


def test_a_reference_of_unknown_size_is_not_in_the_cost():
    known = run_file.load("cin256_w2a8")
    assert known.evaluate is not None
    evaluate = dataclasses.replace(known.evaluate, reference="tfds:imagenet2012?size=256")
    costs = [
        run_cost.predict(run) for run in (known, dataclasses.replace(known, evaluate=evaluate))
    ]
    assert costs[0] is not None
    assert costs[1] is not None
    assert costs[0].disk > costs[1].disk
    assert "the features of" not in costs[0].describe()
    assert costs[1].describe().endswith("beside that, the features of tfds:imagenet2012?size=256")


def test_the_cost_grows_with_the_samples():
    run = run_file.load("digits_w2a8")
    assert run.evaluate is not None
    one = run_cost.predict(run)
    two = run_cost.predict(
        run_file.parse(
            run.to_dict() | {"evaluate": lib.plain(run.evaluate) | {"count": 20_000}},
            pathlib.Path(),
        )
    )
    assert one is not None
    assert two is not None
    assert two.disk == 2 * one.disk > 2 * 10_000 * 32 * 32 * 3
    assert one.seconds.keys() == {"quantize", "tune 400 steps", "sample"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("\xff\xfe\xfd", "not JSON"),
        ("[]", "expected a run file"),
        ("{}", "expected a run"),
        ('{"name": "a", "quantize": {"bit": 2}}', r"quantize\.bit: unknown"),
        ('{"name": "a", "quantize": []}', r"quantize: found \[\], expected an object"),
        ('{"name": "a", "quantize": null}', "expected a run"),
        ('{"run": {"name": "a", "evaluate": {}}, "results": 1}', "results: found 1, expected"),
        ('{"run": {"name": "a", "evaluate": {}}, "results": {"fid": "b"}}', "fid: found 'b', exp"),
        ('{"run": {"name": "a", "evaluate": {}}, "results": {"n": NaN}}', "n: found nan, expected"),
        ('{"settings": {}, "fingerprint": "", "sha256": "b"}', "sha256: found 'b', expected"),
        ("[" * 100_000, "not JSON"),
        ('{"run": {"name": "a", "evaluate": {}}, "inputs": 1}', "inputs: found 1, expected"),
        (
            '{"run": {"name": "a", "evaluate": {}}, "notes": "b"}',
            "notes: found 'b', expected a list",
        ),
        ('{"settings": [], "fingerprint": ""}', r"settings: found \[\], expected"),
        ('{"name": "a", "quantize": {}, "more": 1}', "unknown"),
        ('{"settings": {}, "fingerprint": "", "command": "ls"}', "cannot be repeated"),
        ('{"settings": {}, "fingerprint": "", "command": "a -m \'b"}', "cannot be repeated"),
    ],
)
def test_files_that_are_no_runs_are_refused(tmp_path, text, message):
    path = tmp_path / "run.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(VqjaxError, match=message):
        run_file.load(str(path))


def test_mistakes_of_the_command(tmp_path, capsys):
    for words, message in (
        ([], "give a run file, or the name"),
        (["nonsense"], "nor a run in the package: cin256"),
        ([str(tmp_path)], "holds neither reproduction.json nor run.json"),
        (["digits_w2a8", "--out", __file__], "test_reproduce.py is a file, expected a folder"),
        (["--table", "--results", str(tmp_path / "absent")], "no such folder"),
        (["digits_w2a8", "--results", str(tmp_path / "absent")], "no such folder"),
        (["digits_w2a8", "--table"], "--table beside digits_w2a8: --table runs nothing"),
    ):
        assert command.main(words) == 2
        assert message in capsys.readouterr().err


def test_numbers_are_equal_near_or_far():
    before = {"psnr": 25.0, "fid": 10.0, "full.digits.fd": 3.0, "model_sha256": "a", "n": 8}
    after = {"psnr": 25.0, "fid": 10.2, "full.digits.fd": 5.0, "model_sha256": "b"}
    verdicts = {row.name: row.verdict for row in run_results.compare(before, after)}
    assert verdicts == {
        "psnr": "equal",
        "fid": "within tolerance",
        "full.digits.fd": "outside",
        "model_sha256": "other bits",
        "n": "absent",
    }


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A record, and a way to say what its repetition finds."""
    found = {"psnr": 25.0, "model_sha256": "a"}
    monkeypatch.setattr(reproduce, "_made", lambda run, out: out.mkdir(parents=True) or found)
    monkeypatch.setattr(reproduce, "_inputs", lambda run, out: {"source": "0" * 64})
    monkeypatch.setattr(run_cost, "predict", lambda run: None)
    run = lib.ReproduceSettings(run="digits_w2a8", out=tmp_path / "first")
    reproduce.run(run)
    return tmp_path / "first" / run_file.RECORD, found


def test_a_record_is_repeated_and_compared(recorded, tmp_path, capsys):
    path, found = recorded
    reproduce.run(lib.ReproduceSettings(run=str(path), out=tmp_path / "second"))
    assert "all numbers and bits are equal" in capsys.readouterr().out
    found["model_sha256"] = "b"
    found["psnr"] = 25.2
    reproduce.run(lib.ReproduceSettings(run=str(path), out=tmp_path / "third"))
    assert "within its tolerance" in capsys.readouterr().out
    found["psnr"] = 24.0
    with pytest.raises(QualityGateError, match="absent: psnr"):
        reproduce.run(lib.ReproduceSettings(run=str(path), out=tmp_path / "fourth"))
    assert (tmp_path / "fourth" / run_file.RECORD).exists()
    # Other seeds are another run: there is nothing to compare.
    reproduce.run(lib.ReproduceSettings(run=str(path), out=tmp_path / "fifth", seed=1))
    again = run_file.load(str(tmp_path / "fifth" / run_file.RECORD))
    assert again.quantize is not None
    assert again.quantize.seed == 1
    record = json.loads((tmp_path / "fifth" / run_file.RECORD).read_text())
    assert record["command"].endswith(f"{path} --seed 1")


def test_what_may_explain_other_bits_is_named(recorded, tmp_path, monkeypatch, capsys):
    path, found = recorded
    record = json.loads(path.read_text())
    inputs = {"source": "0", "reference": "1", "inception": "2", "code": "3"}
    files = {"reference": "refs/val.npz", "inception": "net.pth"}
    record["run"]["quantize"]["source"] = "ldm/model.ckpt"
    record["run"]["evaluate"] |= files
    monkeypatch.setattr(run_file, "resolved", lambda run, files: run)
    monkeypatch.setattr(evaluate, "check_ahead", lambda wanted, config: None)
    monkeypatch.setattr(reproduce, "_inputs", lambda run, out: inputs)
    found["model_sha256"] = "b"
    same = record["environment"]
    less = {name: value for name, value in same.items() if name not in ("processor", "kernels")}
    for number, (before, there, said) in enumerate(
        [
            (inputs, same, "on the same files, kind of device and versions;"),
            (inputs | {"source": "9"}, same, "on other source model.ckpt;"),
            (inputs | {"reference": "9", "code": "9"}, same, "on other reference val.npz, code;"),
            (
                inputs | {"inception": "9"},
                same | {"processor": "a toaster", "kernels": "lut"},
                "on other inception net.pth, processor, kernels;",
            ),
            (
                {},
                less | {"jax": "0.1"},
                "on other jax (not recorded: source model.ckpt, reference val.npz, inception "
                "net.pth, code, processor, kernels);",
            ),
        ]
    ):
        path.write_text(json.dumps(record | {"inputs": before, "environment": there}))
        reproduce.run(lib.ReproduceSettings(run=str(path), out=tmp_path / f"again{number}"))
        assert f"not all bits are equal, {said}" in capsys.readouterr().out


def test_inputs_of_a_part_that_follows_another_are_not_what_was_made():
    scored = {"sha256": {"source": "made", "against": "0", "reference": "1", "inception": "2"}}
    quantized = {"source_sha256": "0"}
    assert run_results.inputs(quantized, scored) == {
        "source": "0",
        "reference": "1",
        "inception": "2",
    }
    assert run_results.inputs(None, scored) == scored["sha256"]
    assert run_results.inputs({}, None) == {}  # of a version that kept none


def test_the_digest_of_the_code_follows_the_code(tmp_path, monkeypatch):
    (tmp_path / "lut").mkdir()
    (tmp_path / "__init__.py").write_text("")
    monkeypatch.setattr("vqjax.kernels.__file__", str(tmp_path / "__init__.py"))
    found = [environment.code()]
    for name, text in (("lut/a.py", "1"), ("lut/a.py", "2"), ("lut/native.cc", "2")):
        (tmp_path / name).write_text(text)
        found.append(environment.code())
    (tmp_path / "lut" / "a.txt").write_text("")
    assert environment.code() == found[-1]
    assert len(set(found)) == 4


def test_a_record_is_repeated_within_other_memory_and_compared(recorded, tmp_path, capsys):
    path, found = recorded
    found["model_sha256"] = "b"
    asked = lib.ReproduceSettings(run=str(path), out=tmp_path / "less", memory=24.0)
    reproduce.run(asked)
    printed = capsys.readouterr().out
    assert "not all bits are equal, on other memory;" in printed
    assert "within its tolerance" in printed
    record = json.loads((tmp_path / "less" / run_file.RECORD).read_text())
    assert record["command"].endswith(f"{path} --memory 24.0")
    assert record["run"]["quantize"]["memory"] == 24.0
    found["psnr"] = 20.0
    with pytest.raises(QualityGateError, match="absent: psnr"):
        reproduce.run(dataclasses.replace(asked, out=tmp_path / "far"))


def test_memory_is_refused_where_nothing_takes_it(tmp_path, capsys):
    (tmp_path / "run.json").write_text(json.dumps({"name": "scores", "evaluate": {}}))
    for words, code, message in (
        ([str(tmp_path / "run.json"), "--memory", "8"], 2, "limits a quantization, and scores has"),
        (["digits_w2a8", "--memory", "-1"], 2, "--memory -1: expected a number of GB above 0"),
        (["digits_w2a8", "--memory", "nan"], 2, "--memory nan: expected a number of GB above 0"),
        (["digits_w2a8", "--memory", "0.1"], 3, "ask for "),
    ):
        assert command.main([*words, "--out", str(tmp_path / "out")]) == code
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_runs_within_other_memory_do_not_share_a_folder(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize, "compressed", killed)
    monkeypatch.chdir(tmp_path)
    native.save_model(tmp_path / "small.safetensors", models.dense(models.TINY))
    run = {"name": "small", "quantize": {"source": "small.safetensors", "samples": 4}}
    (tmp_path / "small.json").write_text(json.dumps(run))

    def asked(memory: float, out: pathlib.Path | None) -> lib.ReproduceSettings:
        return lib.ReproduceSettings(run="small.json", memory=memory, out=out)

    for out in (tmp_path / "out", None):
        with pytest.raises(KeyboardInterrupt):
            reproduce.run(asked(8.0, out))
    with pytest.raises(VqjaxError, match="with other settings"):
        reproduce.run(asked(9.0, tmp_path / "out"))
    with pytest.raises(KeyboardInterrupt):  # where nobody says otherwise each has a folder
        reproduce.run(asked(9.0, None))
    folders = (tmp_path / "vqjax-runs").iterdir()
    assert {folder.name for folder in folders} == {"small_memory8", "small_memory9"}


def test_a_run_is_not_repeated_in_its_own_folder(recorded):
    path, _ = recorded
    with pytest.raises(VqjaxError, match="choose another --out"):
        reproduce.run(lib.ReproduceSettings(run=str(path), out=path.parent))


def test_the_table_shows_ours_and_what_is_not_measured(recorded, tmp_path):
    text = reproduce.table_text([tmp_path])
    assert "not found" in text
    assert "`python -m vqjax.reproduce cin256_w1.5a8`" in text
    assert str(recorded[0]) in text
    assert "reproduce digits_w2a8" not in text  # it was measured


def test_the_table_tells_runs_with_other_files_or_doubts(tmp_path):
    run = json.loads(run_file.packaged()["cin256_w2a8"].read_text())
    # Each is the packaged run but for what follows.
    for name, reference, notes in (
        ("a", "refs/VIRTUAL_imagenet256_labeled.npz", []),
        ("b", "refs/my_val.npz", []),
        ("c", "tfds:imagenet2012/a?split=train", []),
        ("d", "VIRTUAL_imagenet256_labeled.npz", ["model.ckpt: found 5 bytes"]),
    ):
        about = run | {"name": name, "evaluate": run["evaluate"] | {"reference": reference}}
        record = {"run": about, "results": {"fid": 9.0, "n": 50_000}, "notes": notes}
        (tmp_path / name).mkdir()
        (tmp_path / name / run_file.RECORD).write_text(json.dumps(record))
    text = reproduce.table_text([tmp_path])
    first, *others = text.split("\n## ")
    assert f"{tmp_path}/a/" in first
    for name, reason in (
        ("b", "- reference: found my_val.npz,"),
        ("c", "- reference: found tfds:imagenet2012/a?split=train,"),
        ("d", "- model.ckpt: found 5 bytes"),
    ):
        assert f"{tmp_path}/{name}/" not in first
        (own,) = (part for part in others if part.startswith(f"{name}: 50,000 samples"))
        assert reason in own
        assert f"{tmp_path}/{name}/" in own


def sections(printed: str) -> dict[str, str]:
    """What stands below each heading of the tables."""
    parts = printed.split("\n## ")[1:]
    return {part.splitlines()[0]: part for part in parts}


def test_a_run_ends_with_its_table(recorded, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, found = recorded
    path = tmp_path / "second" / run_file.RECORD
    reproduce.run(lib.ReproduceSettings(run="digits_w2a8", out=path.parent))
    printed = capsys.readouterr().out
    assert printed.index(f"record: {path}") < printed.index("## ")
    (digits,) = sections(printed).values()
    assert digits.startswith("Embedded digits")
    assert str(path) in digits
    assert "eval/results/digits_w4a8.json" in digits
    assert "Sources:" not in digits  # nobody else has measured these

    out = tmp_path / "vqjax-runs" / "a"
    run = json.loads(run_file.packaged()["cin256_w2a8"].read_text())
    (tmp_path / "a.json").write_text(json.dumps(run))
    monkeypatch.setattr(run_file, "resolved", lambda run, files: run)
    monkeypatch.setattr(run_file, "doubts", lambda run: [])
    monkeypatch.setattr(evaluate, "check_ahead", lambda wanted, config: None)
    found |= {"fid": 9.876, "n": 50_000}
    reproduce.run(lib.ReproduceSettings(run="a.json", out=out))
    (published_ones,) = sections(capsys.readouterr().out).values()
    (ours,) = (line for line in published_ones.splitlines() if str(out) in line)
    assert "9.88" in ours
    assert "| QuEST |" in published_ones
    assert "[Q] QuEST, arXiv 2402.03666" in published_ones

    monkeypatch.setattr(run_file, "doubts", lambda run: ["model.ckpt: found 5 bytes"])
    out = tmp_path / "vqjax-runs" / "b"
    reproduce.run(lib.ReproduceSettings(run="a.json", out=out))
    first, own = sections(capsys.readouterr().out).values()
    assert str(out) not in first
    assert "- model.ckpt: found 5 bytes" in own
    assert str(out / run_file.RECORD) in own


def test_the_table_looks_where_runs_go_and_names_what_it_cannot_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.main(["--table"]) == 0  # no such folder yet
    run = json.loads(run_file.packaged()["digits_w2a8"].read_text())
    for name, text in (("a", json.dumps({"run": run, "results": {"n": 8}})), ("b", "{")):
        (tmp_path / "vqjax-runs" / name).mkdir(parents=True)
        (tmp_path / "vqjax-runs" / name / run_file.RECORD).write_text(text)
    capsys.readouterr()
    for words in (["--table"], ["--table", "--results", str(tmp_path / "vqjax-runs")]):
        assert command.main(words) == 0
        shown = capsys.readouterr().out
        assert shown.count("vqjax-runs/a/reproduction.json") == 1
        assert "Left out, since they are unreadable:" in shown
        assert "vqjax-runs/b/reproduction.json: not JSON" in shown


@pytest.fixture
def small_run(tmp_path, monkeypatch):
    """A run of a small model by its file, whose quantization is at hand already."""

    def quantized(wanted: lib.QuantizeSettings) -> None:
        assert wanted.bits == 1.2
        orbax_model.save_model_folder(wanted.out / "model", models.quantized(models.TINY))
        names = ("bits_per_weight", "bits_per_weight_model", "bytes_before", "bytes_after")
        report = {"weights": dict.fromkeys(names, 1), "fidelity": {"psnr": 20.0}}
        (wanted.out / "report.json").write_text(json.dumps(report))
        command = f"python -m vqjax.quantize {'long/' * 60}model.ckpt"
        about = {"command": command, "fingerprint": "0123456789", "environment": {}}
        about["source_sha256"] = "0" * 64
        (wanted.out / "run.json").write_text(json.dumps(about | {"settings": lib.plain(wanted)}))

    monkeypatch.setattr(quantize, "run", quantized)
    native.save_model(tmp_path / "small.safetensors", models.dense(models.TINY))
    run = {
        "name": "small",
        "quantize": {"source": "small.safetensors", "bits": 1.2},
        "evaluate": {"count": 4, "steps": 2, "batch": 2},
    }
    (tmp_path / "small.json").write_text(json.dumps(run))
    return tmp_path / "small.json"


def test_a_run_and_its_parts_are_repeated_to_the_same_bits(small_run, capsys):
    folder = small_run.parent

    def again(path: pathlib.Path, name: str) -> dict:
        wanted = lib.ReproduceSettings(run=str(path), files=folder, out=folder / name)
        return reproduce.run(wanted)["results"]

    first = again(small_run, "first")
    assert first["psnr"] > 0
    assert {"model_sha256", "samples_sha256", "report.psnr"} <= first.keys()
    record = json.loads((folder / "first" / run_file.RECORD).read_text())
    assert record["run"]["quantize"]["source"] == "small.safetensors"  # no path of this machine
    assert record["inputs"] == {"source": "0" * 64, "code": environment.code()}
    assert run_file.load(str(folder / "first")).inputs == record["inputs"]
    assert run_file.load(str(folder / "first" / "quantized")).inputs == {"source": "0" * 64}
    about = json.loads((folder / "first" / "evaluation" / "run.json").read_text())
    assert run_file.load(str(folder / "first" / "evaluation")).inputs == about["sha256"]
    assert about["settings"]["against"] == str(folder / "small.safetensors")
    for path, name in (
        (pathlib.Path(), "second"),  # the folder: by its record
        (pathlib.Path("evaluation/run.json"), "third"),
        (pathlib.Path("quantized/run.json"), "fourth"),
    ):
        with pytest.raises(VqjaxError, match="holds the run to be repeated"):
            again(folder / "first" / path, "first")
        again(folder / "first" / path, name)
        assert "all numbers and bits are equal" in capsys.readouterr().out


def test_runs_whose_names_have_other_letters_do_not_share_a_folder():
    runs = [run_file.Run(name, None, None, {}, {}) for name in ("实验", "..", "W2A8 ä", "W2A8")]
    slugs = [reproduce._slug(run, lib.ReproduceSettings()) for run in runs]
    assert len(set(slugs)) == len(slugs)
    assert slugs[-1] == "w2a8"
    assert all(re.fullmatch("[a-z0-9_]+", slug) for slug in slugs)


def test_a_run_of_a_long_command_has_a_short_name(tmp_path):
    command = f"python -m vqjax.evaluate {'long/' * 60}model.ckpt"
    about = {"command": command, "fingerprint": "0123456789", "settings": {}}
    (tmp_path / "run.json").write_text(json.dumps(about))
    found = {"models": {"source": {"n": 4}}, "difference": None}
    (tmp_path / "evaluation.json").write_text(json.dumps(found))
    assert run_file.load(str(tmp_path)).name == f"evaluate {tmp_path.name} 01234567"


def test_a_run_that_is_being_made_anew_is_not_repeated(tmp_path):
    command = "python -m vqjax.evaluate run"
    about = {"command": command, "fingerprint": "f", "settings": {}, "status": "running"}
    (tmp_path / "run.json").write_text(json.dumps(about))
    (tmp_path / "evaluation.json").write_text("{}")  # of the settings before
    with pytest.raises(VqjaxError, match=f"not complete; go on with it first: {command}"):
        run_file.load(str(tmp_path))


def test_what_a_command_ran_is_its_module_not_a_name_in_it(tmp_path):
    wanted = lib.EvaluateSettings(source="runs/vqjax.quantize_a")
    command = lib.command_line("vqjax.evaluate", wanted)
    about = {"command": command, "fingerprint": "0123456789", "settings": lib.plain(wanted)}
    (tmp_path / "run.json").write_text(json.dumps(about))
    found = {"models": {"source": {"n": 4}}, "difference": None}
    (tmp_path / "evaluation.json").write_text(json.dumps(found))
    run = run_file.load(str(tmp_path))
    assert run.quantize is None
    assert run.evaluate is not None
    assert run.evaluate.source == wanted.source


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inception": "bad.pth"}, r"bad\.pth"),
        ({"lpips": ["bad.pth"]}, r"bad\.pth"),
        ({"reference": "bad.npz"}, r"bad\.npz"),
        ({"reference": "two.npz", "inception": "fake.pth"}, "2 pictures are too few"),
        ({"count": 3}, "--count 3: expected 4 or more"),
        ({"export_npz": "a.txt"}, "expected a name that ends in .npz"),
        ({"steps": 0}, "steps: found 0, expected 1 or more"),
        ({"eta": -1.0}, "eta: found -1.0, expected 0"),
        ({"guidance": math.nan}, "--guidance nan: expected a finite number"),
    ],
)
def test_a_mistake_of_the_evaluation_costs_no_quantization(small_run, monkeypatch, change, message):
    folder, run = small_run.parent, json.loads(small_run.read_text())
    for name in ("bad.pth", "bad.npz", "fake.pth"):
        (folder / name).write_bytes(b"something else")
    np.savez(folder / "two.npz", np.zeros((2, 4, 4, 3), np.uint8))
    load = inception.load
    fake = inception.Weights({}, "0" * 64, published=False)
    monkeypatch.setattr(
        inception, "load", lambda path: fake if path.name == "fake.pth" else load(path)
    )
    small_run.write_text(json.dumps(run | {"evaluate": run["evaluate"] | change}))
    asked = lib.ReproduceSettings(run=str(small_run), files=folder, out=folder / "out")
    with pytest.raises(VqjaxError, match=message):
        reproduce.run(asked)
    assert not (folder / "out").exists()


def test_a_model_that_the_run_names_is_known_before_its_quantization(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "_made", lambda run, out: out.mkdir() or {})
    run = {"name": "a", "quantize": {"source": "digits"}, "evaluate": {"steps": 1000}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    asked = lib.ReproduceSettings(run=str(tmp_path / "run.json"), out=tmp_path / "out")
    with pytest.raises(VqjaxError, match="steps: found 1000, expected 1 to 999"):
        reproduce.run(asked)
    assert not (tmp_path / "out").exists()


def test_the_fid_network_is_not_kept_while_a_model_is_quantized(small_run, monkeypatch):
    loaded = []

    def load(path):
        weights = inception.Weights({}, "0" * 64, published=False)
        loaded.append(weakref.ref(weights))
        return weights

    def quantized(wanted):
        gc.collect()
        assert [reference() for reference in loaded] == [None]
        raise KeyboardInterrupt

    monkeypatch.setattr(inception, "load", load)
    monkeypatch.setattr(quantize, "run", quantized)
    folder, run = small_run.parent, json.loads(small_run.read_text())
    (folder / "network.pth").write_bytes(b"")
    run["evaluate"]["inception"] = "network.pth"
    small_run.write_text(json.dumps(run))
    with pytest.raises(KeyboardInterrupt):
        reproduce.run(lib.ReproduceSettings(run=str(small_run), files=folder, out=folder / "out"))


@pytest.mark.slow
def test_a_quantization_and_its_evaluation_make_one_record(tmp_path, quick_search):
    native.save_model(tmp_path / "small.safetensors", models.dense(models.TINY))
    wanted = {
        "source": "small.safetensors",
        "bits": 1.2,
        "samples": 4,
        "tune_steps": 0,
        "calibration": {"images": 2, "steps": 3, "batch": 2},
    }
    run = {"name": "small", "quantize": wanted, "evaluate": {"count": 4, "steps": 2, "batch": 2}}
    (tmp_path / "small.json").write_text(json.dumps(run))
    asked = lib.ReproduceSettings(
        run=str(tmp_path / "small.json"), files=tmp_path, out=tmp_path / "out"
    )
    found = reproduce.run(asked)["results"]
    assert found["bits_per_weight"] <= 1.2
    assert found["report.psnr"] > 0
    assert found["psnr"] > 0
    repeated = run_file.load(str(tmp_path / "out" / "quantized" / "run.json"))
    assert repeated.recorded["model_sha256"] == found["model_sha256"]
