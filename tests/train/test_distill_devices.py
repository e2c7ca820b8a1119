# SPDX-License-Identifier: Apache-2.0
"""Distillation over a mesh of simulated devices, in a process of its own that has them."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests import xla_flags

ROOT = pathlib.Path(__file__).parents[2]

_DEVICES = """
import pathlib, sys
import jax
from tests.train import test_distill as t
assert jax.device_count() == 8
seen = []
real = t.loop.train
def watched(name, state, step, *rest, **more):
    def kept(state, inputs):
        state, metrics = step(state, inputs)
        jax.debug.callback(lambda loss: seen.append(float(loss)), metrics["loss"])
        return state, metrics
    return real(name, state, kept, *rest, **more)
t.loop.train = watched
variant = t.dataclasses.replace(t.pv.CODEBOOKS_ONLY, lr=1e-5)
for count, at_once in ((1, 0), (8, 0), (8, 8)):
    # As many trajectories as pairs in a call: the teacher's work is split, too.
    t.RECIPE = t.dataclasses.replace(t.RECIPE, batch=16, at_once=at_once, trajectories=16)
    folder = pathlib.Path(sys.argv[1]) / f"{count}-{at_once}"
    # Small steps, and codes stay: what a rounding error moves would be another run from there on.
    t.taught(folder, 3, variant, devices=jax.devices()[:count])
jax.effects_barrier()
print(*seen)
"""


@pytest.mark.slow
def test_eight_devices_have_the_losses_of_one_also_in_parts(tmp_path):
    flags = xla_flags.simulated(8)
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    found = subprocess.run(
        [sys.executable, "-c", _DEVICES, str(tmp_path)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    losses = [float(word) for word in found.stdout.split()]
    assert len(losses) == 9
    one, *others = losses[:3], losses[3:6], losses[6:]
    for more in others:
        # Sums of parts round differently, and so do some 8-bit activations from the next step on.
        np.testing.assert_allclose(one[0], more[0], rtol=1e-5)
        np.testing.assert_allclose(one, more, rtol=1e-2)
