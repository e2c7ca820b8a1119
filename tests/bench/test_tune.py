# SPDX-License-Identifier: Apache-2.0
"""`bench tune`: every part of a step is measured; random weights stand for real ones."""

import json

import jax
import numpy as np
import pytest

from tests.io import models as small
from vqjax import config as config_lib
from vqjax.bench import tune
from vqjax.bench.__main__ import main
from vqjax.core import plan
from vqjax.core.plan import LayerSpec


def test_a_random_weight_has_the_size_of_an_untrained_one():
    spec = LayerSpec("conv3x3", "conv3x3", 9, 4, 16, 8)
    weight = tune.random_weight((3, 3, 32, 48), spec, (0, 1))
    kernel = np.asarray(weight.decode())
    assert kernel.shape == (3, 3, 32, 48)
    assert np.std(kernel) == pytest.approx((9 * 32) ** -0.5, rel=0.1)


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
