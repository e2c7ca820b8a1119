# SPDX-License-Identifier: Apache-2.0
"""What a result depends on besides its settings: versions, device, machine."""

import importlib.metadata
import platform

import jax

import vqjax
from vqjax.kernels import device as device_lib
from vqjax.kernels import dispatch

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "safetensors")


def versions() -> dict[str, str]:
    """Version of vqjax, Python and every package that results depend on."""
    found = {"vqjax": vqjax.__version__, "python": platform.python_version()}
    return found | {name: importlib.metadata.version(name) for name in PACKAGES}


def describe() -> dict[str, str]:
    """Versions, device kind, platform and what chooses kernels, for run.json and report.json."""
    device = jax.devices()[0]
    return {
        **versions(),
        "device": device.device_kind,
        "backend": device.platform,
        "devices": str(jax.device_count()),
        "processor": device_lib.processor(),
        "platform": platform.platform(),
        "kernels": dispatch.rules(),
    }
