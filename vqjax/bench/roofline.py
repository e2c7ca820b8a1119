# SPDX-License-Identifier: Apache-2.0
"""What a device could do at best: the share of it that a program reaches.

A program that moves some bytes and takes some operations needs at least the longer of both at the
device's peaks (Williams et al. 2009, doi:10.1145/1498765.1498785). Peaks of GPUs are those that
their maker publishes (`peaks.json`); a CPU's are measured where they are used.
"""

import functools
import importlib.resources
import json
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vqjax.bench.work import matmul_peak
from vqjax.kernels.device import Device

ASSUMED_CACHE = 64 * 2**20
"""Bytes that are taken to be past the cache of a CPU, which does not tell, or an unknown GPU."""

_STREAM = 128 * 2**20  # bytes of an array that is streamed


class Machine(NamedTuple):
    """Peaks of a device.

    Attributes:
      bandwidth: bytes per second, or None where it is not known.
      operations: per second, of products in one type, or None.
      cache: bytes of its last cache.
      source: where the peaks are from, or why there are none.
    """

    bandwidth: float | None
    operations: float | None
    cache: int
    source: str

    def least_seconds(self, moved: float, operations: float) -> float | None:
        """Returns the least time for so many bytes and operations, or None."""
        if self.bandwidth is None or self.operations is None:
            return None
        return max(moved / self.bandwidth, operations / self.operations)


@functools.cache
def of(device: Device, dtype: str) -> Machine:
    """Returns the peaks of a device for products in a type; a CPU is measured, for a second or so.

    Args:
      device: the default one, where it is a CPU.
    """
    if device.platform == "cpu":
        found = stream_bandwidth(), matmul_peak(dtype)
        speeds = f"{found[0] / 1e9:.3g} GB/s and {found[1] / 1e9:.3g} GFLOP/s"
        return Machine(*found, ASSUMED_CACHE, f"measured on this CPU: {speeds}")
    file = importlib.resources.files("vqjax.bench") / "peaks.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    known = data["devices"].get(device.kind)
    if known is None:
        return Machine(None, None, ASSUMED_CACHE, f"no published peaks of {device.kind} at hand")
    operations = known["operations"].get(dtype)
    if operations is None:
        reason = f"{device.kind} has no peak for {dtype}"
        return Machine(known["bandwidth"], None, known["cache"], reason)
    return Machine(known["bandwidth"], operations, known["cache"], data["source"])


def stream_bandwidth() -> float:
    """Bytes per second that one addition to a long array reads and writes here, best of five."""
    array = jnp.ones(_STREAM // 4, jnp.float32)
    add = jax.jit(lambda a: a + 1)
    add(array).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        add(array).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2.0 * _STREAM / min(times)
