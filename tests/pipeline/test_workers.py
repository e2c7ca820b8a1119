# SPDX-License-Identifier: Apache-2.0
"""Devices, processes, SIGKILL: whoever did the work and however often, the bytes are the same."""

import pathlib
import signal
import time

import numpy as np
import pytest

import vqjax
from tests import quick
from tests.io import models as small
from tests.pipeline import commands
from vqjax.core.plan import LayerSpec, Plan, kernel_shapes
from vqjax.io import native
from vqjax.pipeline import quantize
from vqjax.settings import Calibration, QuantizeSettings

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("quantize tiny")]
SAMPLES = 4


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("source") / "tiny.safetensors"
    native.save_model(path, small.dense(small.TINY))
    return path


@pytest.fixture(scope="module")
def plan(source) -> pathlib.Path:
    """Searches ten layers of two shapes and rounds the others: little to compile."""
    job = quantize.prepare(QuantizeSettings(source=str(source)))
    layers = {}
    for path, shape in kernel_shapes(job.shapes).items():
        layers[path] = LayerSpec("first_last", "scalar", 1, 1, 256, 8)
        if shape == (3, 3, 32, 32):
            layers[path] = LayerSpec("conv3x3", "conv3x3", 9, 2, 16, 8)
        elif path.startswith("unet/middle_block/res") and shape == (128, 32):
            layers[path] = LayerSpec("time", "linear", 8, 2, 16, 8)
    assert sum(spec.grouping != "scalar" for spec in layers.values()) == 10
    path = source.with_name("plan.json")
    path.write_text(Plan(layers).to_json())
    return path


@pytest.fixture(scope="module")
def options(source, plan) -> list[object]:
    # As in test_quantize, which compiles for these tests then.
    calibration = ["--calibration.images=2", "--calibration.steps=3", "--calibration.batch=2"]
    return [source, "--plan", plan, "--samples", SAMPLES, "--tune-steps", 0, *calibration]


@pytest.fixture(scope="module")
def expected(source, plan, tmp_path_factory) -> dict[str, str]:
    """Contents of a run in this process, on one device, never interrupted."""
    out = tmp_path_factory.mktemp("run") / "out"
    calibration = Calibration(images=2, steps=3, batch=2)
    with pytest.MonkeyPatch.context() as patch:
        quick.search(patch.setattr)
        vqjax.quantize(
            source, plan=plan, out=out, samples=SAMPLES, tune_steps=0, calibration=calibration
        )
    return commands.contents(out)


def test_killed_in_turn_and_resumed_by_others(expected, options, tmp_path):
    out, rng = tmp_path / "out", np.random.default_rng(0)
    process = commands.start(*options, "--out", out, devices=8)
    commands.wait_for_pieces(process, out, int(rng.integers(2, 20)))
    time.sleep(rng.uniform(0, 0.3))  # not only right after a piece was written
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    kept = commands.pieces(out)
    for lost in (1, 0):
        pair = commands.start_pair(*options, "--out", out)
        commands.wait_for_life(pair[lost], out, lost)
        commands.wait_for_pieces(pair[lost], out, kept + 4)
        pair[lost].kill()
        pair[lost].communicate()
        output, _ = pair[1 - lost].communicate()
        assert pair[1 - lost].returncode == 2, output
        assert f"process {lost} of 2 has given no sign of life for" in output
        assert "start all processes again: finished layers in" in output
        assert commands.pieces(out) >= kept + 4
        kept = commands.pieces(out)
    pair = commands.start_pair(*options, "--out", out, devices=4)
    outputs = [commands.end(process) for process in pair]
    assert "report:" in outputs[0]  # the first one reports, alone
    assert "report:" not in outputs[1]
    assert commands.contents(out) == expected
    assert not (out / "work").exists()
    assert not list(out.rglob("*.part"))
