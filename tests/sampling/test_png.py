# SPDX-License-Identifier: Apache-2.0
"""PNG grids: layout, parameters there and back, no half-written file."""

import os

import numpy as np
import pytest
from PIL import Image

from vqjax import sampling
from vqjax.errors import VqjaxError
from vqjax.sample import __main__ as command
from vqjax.sampling import png


def _images(count=5, size=4):
    return np.arange(count, dtype=np.uint8)[:, None, None, None] + np.zeros(
        (1, size, size, 3), np.uint8
    )


def test_tile_is_row_major_on_white():
    canvas = png.tile(_images(), 3, gap=2)
    assert canvas.shape == (10, 16, 3)
    assert canvas[0, 6, 0] == 1
    assert canvas[6, 0, 0] == 3
    assert (canvas[4:6] == 255).all()
    assert (canvas[6:, 12:] == 255).all()


def test_metadata_survives(tmp_path):
    path = tmp_path / "new" / "grid.png"
    metadata = {"classes": [3, 7], "guidance": 3.0, "note": "größer"}
    png.save_grid(path, _images(), 2, metadata)
    assert png.read_metadata(path) == metadata
    np.testing.assert_array_equal(np.asarray(Image.open(path)), png.tile(_images(), 2))
    assert [file.name for file in path.parent.iterdir()] == ["grid.png"]


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "grid.png"
    png.save_grid(path, _images(), 2, {"run": 1})

    def broken(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        png.save_grid(path, _images(), 2, {"run": 2})
    assert png.read_metadata(path) == {"run": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_place_for_no_grid_is_refused_before_sampling(tmp_path, monkeypatch, capsys):
    def sampled(*args, **kwargs):
        raise AssertionError("sampled before --out was looked at")

    monkeypatch.setattr(sampling, "generate", sampled)
    # Which places are refused, tests of `places` say; missing folders are made.
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    for out, message in (
        (tmp_path, "is a folder"),
        (tmp_path / "new" / "a.png", f"{tmp_path} takes no new files"),
    ):
        assert command.main(["digits", "--out", str(out)]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(sampling, "generate", sampled)
    assert command.main(["digits", "--count", "20000", "--out", str(tmp_path / "a.png")]) == 2
    assert "the grid would be 270 x 84998 pixels, the limit is 65535" in capsys.readouterr().err


def test_messages(tmp_path):
    with pytest.raises(VqjaxError, match="found float64"):
        png.tile(np.zeros((1, 2, 2, 3)), 1)
    with pytest.raises(VqjaxError, match="at least one column"):
        png.tile(_images(), 0)
    with pytest.raises(VqjaxError, match="fewer pictures"):
        png.save_grid(tmp_path / "long.png", _images(20_000), 1, {})
    Image.new("RGB", (1, 1)).save(tmp_path / "foreign.png")
    with pytest.raises(VqjaxError, match="not written by vqjax"):
        png.read_metadata(tmp_path / "foreign.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(VqjaxError, match="not a readable PNG"):
        png.read_metadata(tmp_path / "text.png")
