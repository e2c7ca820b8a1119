# SPDX-License-Identifier: Apache-2.0
"""Places that take a file, and what is said of those that do not."""

import os

import pytest

from vqjax.errors import VqjaxError
from vqjax.io import places


def test_places_that_take_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").write_text("")
    for path in ("new", tmp_path / "new", "old"):
        places.check_file("--out", path)
    places.check_file("--out", "a/b/c", makes_folders=True)
    assert [file.name for file in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("makes_folders", [False, True])
def test_places_that_take_none(makes_folders, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    locked = tmp_path / "locked"
    locked.mkdir()
    # Tests may run as root, who may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: path != locked)
    for path, message in (
        (tmp_path, "is a folder, expected the name of a file"),
        (tmp_path / "file" / "a", f"{tmp_path / 'file'} is a file, expected a folder"),
        (locked / "a", f"{locked} takes no new files .*; choose another --out"),
        (locked / "new" / "a", f"{locked} takes no new files"),
    ):
        with pytest.raises(VqjaxError, match=f"--out {path}: {message}"):
            places.check_file("--out", path, makes_folders=makes_folders)


def test_missing_folders_that_nobody_makes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VqjaxError, match="--json a/b: no folder a; make it first"):
        places.check_file("--json", "a/b")
