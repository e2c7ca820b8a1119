# SPDX-License-Identifier: Apache-2.0
"""The figure of `bench pareto`: what is drawn where."""

import io

import numpy as np
import pytest
from PIL import Image

from vqjax.eval import pareto_figure

HALVES = {"fd": 4.5, "fd_sd": 0.6, "n": 898}
FULL = {"method": "full_precision", "bits": None, "bits_per_weight": 32.0, "bytes": 9e6, "fd": 4.9}


def point(method, bits, fd=6.0, psnr=25.0):
    interval = {"fd_interval": [fd - 1, fd + 1], "psnr_interval": [psnr - 0.1, psnr + 0.1]}
    size = {"bits_per_weight": bits - 0.01, "bytes": 250_000 * bits, "n": 1000}
    return {"method": method, "bits": bits, "fd": fd, "psnr": psnr} | size | interval


def test_lines_go_from_few_bits_to_many():
    rows = [FULL, point("scalar", 4.0), point("untuned", 4.0), point("untuned", 1.5)]
    lines = pareto_figure.by_method(rows)
    assert list(lines) == ["untuned", "scalar"]
    assert [row["bits"] for row in lines["untuned"]] == [1.5, 4.0]
    assert lines["scalar"][0]["megabytes"] == 1.0


def test_every_line_is_seen_on_white():
    rows = [FULL, *(point(m, b) for m in ("tuned", "scalar") for b in (2.0, 8.0))]
    png = pareto_figure.draw(rows, HALVES)
    assert png == pareto_figure.draw(rows, HALVES)
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    assert (pixels[0, 0] == 255).all()
    blue = (pixels == (0x1F, 0x4F, 0x8F)).all(-1).sum()
    red = (pixels == (0xE8, 0x93, 0x8E)).all(-1).sum()
    assert min(blue, red) > 100
    assert not (pixels == (0x5F, 0x9B, 0xE0)).all(-1).any()  # nobody measured that method


def test_nothing_to_draw_is_said():
    with pytest.raises(ValueError, match="no points"):
        pareto_figure.draw([FULL], HALVES)
