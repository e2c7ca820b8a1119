# SPDX-License-Identifier: Apache-2.0
"""`bench pipeline`: every stage is timed; what a longer tuning takes follows from its steps."""

import json
import pathlib
import time

import pytest
from jax.sharding import NamedSharding, PartitionSpec

import vqjax
from tests.io import models as small
from vqjax import config as config_lib
from vqjax import progress
from vqjax.bench import pipeline
from vqjax.bench.__main__ import main
from vqjax.core.model import Model
from vqjax.pipeline import journal, quantize
from vqjax.settings import BenchPipelineSettings, Calibration
from vqjax.train import distill


@pytest.fixture
def quantized(monkeypatch):
    """Quantizations that take no time; those that were asked for. Real ones name their stages so:
    tests/pipeline/test_tuning.py."""
    asked = []

    def run(wanted):
        asked.append(wanted)
        assert vqjax.load(wanted.source).config == small.TINY
        file = wanted.out / "run.json"
        if journal.is_done(file):
            return
        assert not list(wanted.out.glob("work/tune-*"))
        with progress.stage("calibrate", 3, quiet=True) as advance:
            advance()
        with progress.stage("tune", wanted.tune_steps, quiet=True) as advance:
            for _ in range(wanted.tune_steps):
                time.sleep(0.001)
                advance()
        record = {"command": "quantize", "seconds": {"calibrate": 0.001, "tune": 0.004}}
        record |= {"status": "done", "peak_memory_bytes": 10**9}
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(record))

    monkeypatch.setitem(config_lib.PRESETS, "digits", lambda: small.TINY)
    monkeypatch.setattr(quantize, "run", run)
    return asked


def test_stages_are_kept_and_predicted(tmp_path, quantized, capsys):
    file, out = tmp_path / "pipeline.json", tmp_path / "out"
    words = ["pipeline", "--tune-steps", "50", "--out", str(out), "--json", str(file)]
    words += ["--calibration.steps", "3", "--tuning.batch", "2", "--memory", "3", "--seed", "4"]
    assert main(words) == 0
    (asked,) = quantized
    assert (asked.memory, asked.act_bits, asked.tuning.trajectories) == (3, 8, 2)
    found = json.loads(file.read_text())
    assert list(found["seconds"]) == ["calibrate", "tune", pipeline._REST]
    assert found["seconds"][pipeline._REST] > 0
    assert found["compile_seconds"] >= 0
    tuning, whole = found["tuning"], found["complete"]
    assert tuning["steps"] == 1 + 3 + 1
    assert tuning["seconds_per_step"] >= 0.001
    more = 45 * tuning["seconds_per_step"]
    assert whole["seconds"]["tune"] == pytest.approx(found["seconds"]["tune"] + more)
    assert whole["total_seconds"] == pytest.approx(sum(whole["seconds"].values()))
    assert "s, 50 steps" in capsys.readouterr().out

    # The same command shows what was measured; what only its first attempt saw is not known.
    assert main(words) == 0
    again = json.loads(file.read_text())
    assert again["tuning"] == tuning
    assert again["compile_seconds"] is None
    assert again["seconds"] == {"calibrate": 0.001, "tune": 0.004}


def test_interrupted_tuning_begins_anew(tmp_path, quantized):
    begun = tmp_path / "run" / "work" / "tune-0"
    begun.mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text('{"status": "running"}')
    assert main(["pipeline", "--out", str(tmp_path)]) == 0
    assert not begun.exists()
    assert len(json.loads((tmp_path / "steps.json").read_text())) == quantized[0].tune_steps - 1


def test_a_longer_course_has_more_steps_and_checkpoints():
    seconds = [2.0, 2.0, 5.0, 2.0, 6.0]  # the third round of the teacher, and the last one saves
    tuning = pipeline.of_steps(seconds)
    assert tuning == {"steps": 6, "seconds_per_step": 2.75, "checkpoint_seconds": 4.0}
    measured = {"calibrate": 7.0, "tune": 30.0}
    found = pipeline.complete(measured, tuning, 106)
    assert found["seconds"] == {"calibrate": 7.0, "tune": 30.0 + 100 * 2.75 + 4 * 4.0}
    assert found["total_seconds"] == 7.0 + 321.0
    # Steps that took minutes have had their checkpoints.
    slow = {"steps": 27, "seconds_per_step": 60.0, "checkpoint_seconds": 9.0}
    assert pipeline.complete(measured, slow, 28)["seconds"]["tune"] == 90.0


@pytest.mark.parametrize("calibration_steps", [3, 25])
def test_the_steps_hold_one_round_of_the_teacher(calibration_steps):
    calibration = Calibration(steps=calibration_steps)
    asked = pipeline.quantize_settings(small.TINY, BenchPipelineSettings(calibration=calibration))
    assert asked.tune_steps is not None
    recipe = distill.Recipe(
        steps=asked.tune_steps,
        batch=asked.tuning.batch,
        trajectories=asked.tuning.trajectories,
        timesteps=asked.calibration.steps,
    )
    teacher = Model(small.TINY, {})
    sharding = NamedSharding(distill._mesh(recipe, None), PartitionSpec())
    per_round = distill.Lessons(teacher, recipe, sharding).steps_per_round
    timed = range(1, recipe.steps - 1)
    assert [step for step in timed if step % per_round == 0] == [per_round]
    assert len(timed) == per_round


def test_as_many_steps_as_the_runs_of_a_model_have():
    large = config_lib.PRESETS["cin256-v2"]()
    run_file = pathlib.Path(__file__).parents[2] / "eval" / "runs" / "cin256_w2a8.json"
    steps = json.loads(run_file.read_text())["quantize"]["tune_steps"]
    assert pipeline.complete_steps(large, BenchPipelineSettings()) == steps
    assert pipeline.complete_steps(small.TINY, BenchPipelineSettings()) == 100


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--tune-steps", "0"], "expected 1 or more"), (["--bits", "9"], "0.5 to 8")],
)
def test_bad_settings_are_refused_before_any_work(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.setitem(config_lib.PRESETS, "digits", lambda: small.TINY)
    assert main(["pipeline", "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_watchers_hear_of_every_unit():
    heard = []
    with progress.watched(heard.append):
        for quiet in (True, False):
            with progress.stage("a", 2, quiet=quiet) as advance:
                advance()
                advance(1, "note")
    with progress.stage("b", 1, quiet=True) as advance:
        advance()
    assert heard == ["a"] * 4
