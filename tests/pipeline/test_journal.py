# SPDX-License-Identifier: Apache-2.0
"""Finished pieces of a run come back from the journal as they went in."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from vqjax.errors import VqjaxError
from vqjax.pipeline import journal as journals
from vqjax.pipeline.journal import Journal


def test_pieces_keep_shape_type_and_bits(tmp_path):
    journal = Journal(tmp_path, {"status": "running", "seconds": {}})
    arrays = {
        "scalar": np.float32(0.03),
        "strided": np.arange(12, dtype=np.float16).reshape(3, 4).T,
        "codes": np.arange(256, dtype=np.uint8),
    }
    notes = {"error": 0.1, "path": "unet/out/conv/kernel"}
    assert journal.load("layers/a") is None
    journal.store("layers/a", arrays, notes)
    found, found_notes = journal.load("layers/a") or ({}, {})
    assert found_notes == notes
    assert found.keys() == arrays.keys()
    for name, expected in arrays.items():
        assert found[name].dtype == expected.dtype
        assert found[name].shape == expected.shape
        np.testing.assert_array_equal(found[name], expected)


def test_what_a_killed_process_had_begun_is_cleared_away(tmp_path):
    Journal.open(tmp_path / "run", {"fingerprint": "f"})
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], stdout=-1)
    dead = int(gone.stdout)
    (tmp_path / "run" / f".model.{dead}.part" / "params").mkdir(parents=True)
    (tmp_path / "run" / f".model.{dead}.part.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "run" / "work").mkdir()
    (tmp_path / "run" / "work" / f".piece.{dead}.part").write_text("half")
    living = tmp_path / "run" / "work" / f".piece.{os.getppid()}.part"
    living.write_text("half")
    Journal.open(tmp_path / "run", {"fingerprint": "f"})
    assert list(tmp_path.rglob("*.part*")) == [living]


def test_a_run_killed_before_its_first_record_starts_anew(tmp_path):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], stdout=-1)
    (tmp_path / f".run.json.{int(gone.stdout)}.part").write_text("{")
    assert Journal.open(tmp_path, {"fingerprint": "f"}).record["status"] == "running"
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_run_killed_at_its_end_leaves_no_pieces(tmp_path):
    journal = Journal.open(tmp_path, {"fingerprint": "f"})
    journal.store("gathered-0", {"a": np.ones(3)}, {})
    journal.record["status"] = "done"  # and here the process dies
    journal.save()
    assert Journal.open(tmp_path, {"fingerprint": "f"}).done
    assert not (tmp_path / "work").exists()


def test_last_stages_may_be_others_until_the_run_is_complete(tmp_path):
    Journal.open(tmp_path, {"fingerprint": "f", "last_stages": "diverged", "command": "old"})
    other = {"fingerprint": "f", "last_stages": "slower", "command": "new"}
    Journal.open(tmp_path, other)
    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["last_stages"], record["command"]) == ("slower", "new")
    Journal.open(tmp_path, other).finish()
    with pytest.raises(VqjaxError, match=r"with other settings \(new\)"):
        Journal.open(tmp_path, {"fingerprint": "f", "last_stages": "diverged"})


def test_a_folder_has_one_process_at_a_time(tmp_path):
    folder = tmp_path / "run"
    code = (
        "import pathlib, sys; from vqjax.pipeline.journal import alone\n"
        "with alone(pathlib.Path(sys.argv[1])): print('in', flush=True); input()"
    )
    words = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(words, stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        with pytest.raises(VqjaxError, match="another process works there"), journals.alone(folder):
            pass
        other.communicate("\n")
    with journals.alone(folder):
        pass
    with journals.alone(folder):  # left again
        pass


def test_a_refusal_names_what_was_upgraded(tmp_path):
    before = {"fingerprint": "f", "environment": {"numpy": "1.0", "device": "cpu", "cores": "2"}}
    Journal.open(tmp_path / "run", before)
    after = {"fingerprint": "g", "environment": {"numpy": "2.0", "device": "cpu", "cores": "4"}}
    with pytest.raises(VqjaxError, match=r"other settings \(.*\), made with numpy 1.0, here 2.0; "):
        Journal.open(tmp_path / "run", after)


def test_a_continued_run_keeps_seconds_and_the_peak_of_memory(tmp_path, monkeypatch):
    def attempt(peak: int) -> Journal:
        monkeypatch.setattr(journals, "peak_memory_bytes", lambda: peak)
        journal = Journal.open(tmp_path / "run", {"fingerprint": "f"})
        journal.record["seconds"].setdefault("compress", 100.0)
        with journal.stage("compress"):
            pass
        return journal

    attempt(17)
    second = attempt(9)
    with pytest.raises(KeyboardInterrupt), second.stage("sample"):
        raise KeyboardInterrupt  # what was spent counts, too
    assert second.record["seconds"].keys() == {"compress", "sample"}
    assert second.record["peak_memory_after"] == {"compress": 17, "sample": 9}
    assert second.record["seconds"]["compress"] >= 100
    second.finish()
    assert Journal.open(tmp_path / "run", {"fingerprint": "f"}).record["status"] == "done"
    assert second.record["peak_memory_bytes"] == 17
