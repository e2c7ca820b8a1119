# SPDX-License-Identifier: Apache-2.0
"""Finished pieces of a run come back from the journal as they went in."""

import numpy as np

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
    (tmp_path / "run" / ".model.123.part" / "params").mkdir(parents=True)
    (tmp_path / "run" / "work").mkdir()
    (tmp_path / "run" / "work" / ".piece.123.part").write_text("half")
    Journal.open(tmp_path / "run", {"fingerprint": "f"})
    assert not list(tmp_path.rglob("*.part"))


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
    with second.stage("sample"):
        pass
    assert second.record["peak_memory_after"] == {"compress": 17, "sample": 9}
    assert second.record["seconds"]["compress"] >= 100
    second.finish()
    assert Journal.open(tmp_path / "run", {"fingerprint": "f"}).record["status"] == "done"
    assert second.record["peak_memory_bytes"] == 17
