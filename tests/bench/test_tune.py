# SPDX-License-Identifier: Apache-2.0
"""`bench tune`: every part of a step is measured; random weights stand for real ones."""

import json

import jax

from tests.io import models as small
from vqjax import config as config_lib
from vqjax.bench import tune
from vqjax.bench.__main__ import main
from vqjax.core import plan


def test_parts_of_a_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(config_lib.PRESETS, "digits", lambda: small.TINY)
    # One code for each kind of layer: less to compile.
    monkeypatch.setattr(plan, "_SIZES", {"linear": ((8, 2),), "conv3x3": ((9, 2),)})
    file = tmp_path / "tune.json"
    words = ["tune", "--bits", "3", "--tuning.batch", "2", "--repeat", "1", "--json", str(file)]
    assert main(words) == 0
    found = json.loads(file.read_text())
    assert list(found["seconds"]) == list(tune.PARTS)
    assert found["seconds"]["teacher"] > 0
    assert found["seconds"]["forward"] > 0
    assert found["environment"]["jax"] == jax.__version__
    assert "V step:" in capsys.readouterr().out
