# SPDX-License-Identifier: Apache-2.0
"""Whole samplers as XLA compiles them for GPUs, on a machine without one.

JAX's CUDA plugin, without its GPU, compiles for a described device. What it makes shows what no
lowering does: which kernels a step of the sampler takes.
"""

import concurrent.futures
import importlib.util
import multiprocessing
import re
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from tests.sampling.test_packed_weights import CONFIG
from vqjax import sampling
from vqjax.bench import random_weights
from vqjax.core import tree
from vqjax.core.tensor import VQTensor
from vqjax.kernels import device, dispatch
from vqjax.kernels.device import Device
from vqjax.sampling import weights

PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
DEVICES = {
    # Capability, multiprocessors, bytes of shared memory (of one, and at most of a block).
    "NVIDIA H200": ((9, 0), 132, (233_472, 232_448)),
    "NVIDIA A100-SXM4-80GB": ((8, 0), 108, (167_936, 166_912)),
    "Tesla T4": ((7, 5), 40, (65_536, 65_536)),
}


def has_plugin() -> bool:
    try:
        return any(importlib.util.find_spec(name) for name in PLUGINS)
    except ModuleNotFoundError:
        return False


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not has_plugin(), reason="no CUDA plugin of JAX: install an extra, cuda12"),
]


def described(kind: str) -> Any:
    """A device to compile for, as XLA's `GpuTargetConfigProto` describes it."""
    (major, minor), cores, (of_core, of_block) = DEVICES[kind]
    text = f"""
      gpu_device_info {{
        threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
        shared_memory_per_block: 49152 shared_memory_per_core: {of_core}
        shared_memory_per_block_optin: {of_block} core_count: {cores} fpus_per_core: 64
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
        memory_bandwidth: 1000000000000 l2_cache_size: 41943040 clock_rate_ghz: 1.5
        device_memory_size: 16000000000 registers_per_core_limit: 65536
        registers_per_block_limit: 65536 device_address_bits: 64
        cuda_compute_capability {{ major: {major} minor: {minor} }}
        device_vendor: "NVIDIA Corporation" name: "{kind}"
        driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"
        dnn_version: "9.10.0"
      }}
      platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
      device_description_str: "{kind}"
    """
    return topologies.get_topology_desc(
        kind, platform="cuda", topology="1x1x1", target_config=text
    ).devices[0]


class Step(NamedTuple):
    """Kernels of one step of a sampler: of packed layers ours and others, and of all else."""

    layers: int
    ours: int
    beside: int
    other: int


def step(kind: str, dtype: str) -> Step:
    """What XLA makes of one image with guidance."""
    here = Device("gpu", kind, DEVICES[kind][0])
    with (
        mock.patch.object(dispatch, "current", return_value=here),
        mock.patch.object(device, "current", return_value=here),
        mock.patch.object(dispatch, "_failed_trial", return_value=()),
    ):
        model = random_weights.quantized_model(CONFIG, 2, seed=0)
        params = weights.place(CONFIG, model.params, rows=2, dtype=dtype).params
        program = compiled(kind, params, dtype)
    flat = tree.flatten({"unet": params["unet"]})
    lines = [line for line in of_the_loop(program) if re.search(r" (fusion|custom-call)\(", line)]
    ours = [line for line in lines if "__gpu$xla.gpu.triton" in line]
    beside = [line for line in lines if "packed_product" in line and line not in ours]
    # What does not see the latent is computed before the loop.
    seen = [path for path in flat if not re.search("/(time_embed|emb|attn2)/", path)]
    layers = sum(isinstance(flat[path], VQTensor) for path in seen)
    return Step(layers, len(ours), len(beside), len(lines) - len(ours) - len(beside))


def compiled(kind: str, params, dtype: str) -> str:
    """XLA's program of two steps."""
    place = SingleDeviceSharding(described(kind))

    def there(leaf) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    arguments = (params, jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.uint32), jnp.uint32(0))
    run = sampling.Run(2, 1.5, 0.0, dtype, dispatch.wanted())
    traced = sampling.sample_batch.trace(CONFIG, *jax.tree.map(there, arguments), run=run)
    return str(traced.lower(lowering_platforms=("cuda",)).compile().as_text())


def of_the_loop(program: str) -> list[str]:
    """The instructions of the sampler's loop."""
    (body,) = set(re.findall(r" while\(.*body=%?([\w.-]+)", program))
    (text,) = re.findall(rf"^%?{re.escape(body)} \(.*?\{{\n(.*?)^\}}", program, re.M | re.S)
    return text.splitlines()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", DEVICES)
def test_no_step_makes_what_weights_alone_decide(kind, dtype, monkeypatch):
    for name in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS", dispatch.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    # The plugin withdraws where there is no GPU, unless it is not what computes.
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        found = process.submit(step, kind, dtype).result()
    print(f"{kind}, {dtype}: {found}")
    if DEVICES[kind][0] < device.CAPABILITIES["pallas"]:
        assert found.layers == found.ours == 0
        return
    assert found.ours == found.layers > 0
    # A layer may take one that adds up the parts of its splits; or, once it is decoded, one or two
    # that multiply. Factors, tables and biases were two or three more.
    assert found.beside < 2 * found.layers
