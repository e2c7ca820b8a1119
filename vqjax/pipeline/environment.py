# SPDX-License-Identifier: Apache-2.0
"""What a result depends on besides its settings: versions, device, machine, our own code."""

import hashlib
import importlib
import importlib.metadata
import pathlib
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


def code() -> str:
    """SHA-256 of our source but for benches, the same in a checkout and installed."""
    files: dict[str, pathlib.Path] = {}
    for name in ("", "kernels", "train", "eval"):
        module = importlib.import_module(f"vqjax.{name}".rstrip("."))
        folder = pathlib.Path(str(module.__file__)).parent
        for path in (path for kind in ("*.py", "*.cc") for path in folder.rglob(kind)):
            files[(name / path.relative_to(folder)).as_posix()] = path
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        if not name.startswith("bench/"):
            digest.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()
