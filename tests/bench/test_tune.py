# SPDX-License-Identifier: Apache-2.0
"""`bench tune`: every part of a step is measured; random weights stand for real ones."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from tests.io import models as small
from vqjax import config as config_lib
from vqjax.bench import random_weights, tune
from vqjax.bench.__main__ import main
from vqjax.core import plan
from vqjax.io import native
from vqjax.pipeline import tuning
from vqjax.settings import BenchTuneSettings
from vqjax.train import pv


@pytest.mark.slow
def test_parts_of_a_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(config_lib.PRESETS, "digits", lambda: small.TINY)
    # One code for each kind of layer: less to compile.
    monkeypatch.setattr(plan, "_SIZES", {"linear": ((8, 2),), "conv3x3": ((9, 2),)})
    file, written = tmp_path / "tune.json", []
    write = native.write_atomically

    def noted(path, content):
        written.append(list(json.loads(content)["seconds"]))
        write(path, content)

    monkeypatch.setattr(native, "write_atomically", noted)
    words = ["tune", "--bits", "3", "--tuning.batch", "2", "--repeat", "1", "--json", str(file)]
    assert main(words) == 0
    found = json.loads(file.read_text())
    assert list(found["seconds"]) == list(tune.PARTS)
    assert written == [list(tune.PARTS[: count + 1]) for count in range(len(tune.PARTS))]
    assert found["v_step_share"] == tune.share_of_v_step(found["seconds"])
    assert found["seconds"]["teacher"] > 0
    assert found["seconds"]["forward"] > 0
    assert found["environment"]["jax"] == jax.__version__
    assert "V step:" in capsys.readouterr().out


def test_each_kind_of_weight_is_compiled_once_before_any_is_updated(monkeypatch):
    student = tuning.student_of(random_weights.quantized_model(small.TINY, 3.0, 0))
    leaves = jax.tree.leaves(student.weights, is_leaf=tune._is_coded)
    least = min(
        (leaf for leaf in leaves if tune._is_coded(leaf)), key=lambda leaf: leaf.codes_OJM.size
    )
    weights = dict.fromkeys("ab", least)
    gradients = {name: jnp.zeros(least.shape) for name in weights}
    variant, ahead, made = dataclasses.replace(pv.SEMI_PV, train_codes=False), [], []
    real = pv.compile_ahead

    def compile_ahead(*arguments, **more):
        ahead.append(arguments)
        real(*arguments, **more)

    def hear(event, duration_secs, **kwargs):
        name = str(kwargs.get("fun_name"))
        if event.endswith("jaxpr_to_mlir_module_duration") and "of_weight" in name:
            made.append(name)

    monkeypatch.setattr(pv, "compile_ahead", compile_ahead)
    jax.monitoring.register_event_duration_secs_listener(hear)
    settings = BenchTuneSettings(bits=3.0, repeat=1)
    update = tune._update(settings, variant, gradients, weights)
    assert len(jax.block_until_ready(update())) == 2
    assert len(ahead) == len(made) == 1
