# SPDX-License-Identifier: Apache-2.0
"""Networks that look at pictures, on simulated devices, in a process of its own that has them."""

import os
import pathlib
import subprocess
import sys

from tests import xla_flags

ROOT = pathlib.Path(__file__).parents[2]

_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from vqjax.core import cores
from vqjax.eval import adm, perceptual

seen = []

def watched(work):
    compiled = jax.jit(work)
    def call(params, *pictures):
        found = compiled(params, *pictures)
        # The device, and the first picture's first value: which batch it was.
        first = int(np.asarray(pictures[0]).flat[0])
        seen.append((first, *(d.id for d in jax.tree.leaves(found)[0].devices())))
        return found
    return call

adm._resize = jax.jit(lambda x: x.astype(jnp.float32))
adm._network = watched(lambda p, x: (x.mean((1, 2)) @ p, x.sum((1, 2)) @ p, x.max((1, 2)) @ p))
perceptual._distance = watched(lambda p, a, b: jnp.abs(a[:, 0, 0] @ p - b[:, 0, 0] @ p).sum(1))
adm.CPU_BATCH = perceptual._BATCH = 2
params = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), jnp.float32)
a = np.random.default_rng(1).integers(0, 256, (13, 16, 16, 3), np.uint8)
a[:, 0, 0, 0] = np.arange(13)
b = a[::-1].copy()

everywhere = cores.placed(params)
assert list(everywhere) == jax.local_devices() and len(everywhere) == 3
with jax.default_device(jax.devices()[1]):
    one = cores.placed(params)
    assert list(one) == [jax.devices()[1]]
for work in (lambda p: adm.rows_of(a, p), lambda p: (perceptual.lpips(p, a, b),)):
    expected = work(one)
    assert {device for _, device in seen} == {1}
    seen.clear()
    for found, alone in zip(work(everywhere), expected):
        np.testing.assert_array_equal(found, alone)
    assert sorted(seen) == [(2 * turn, turn % 3) for turn in range(7)], seen
    seen.clear()
"""


def test_batches_go_to_all_devices_in_turn_with_the_numbers_of_one():
    flags = xla_flags.simulated(3)
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    found = subprocess.run(
        [sys.executable, "-c", _DEVICES],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
