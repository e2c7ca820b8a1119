# SPDX-License-Identifier: Apache-2.0
"""What the device at hand can run."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import platform
import re
from typing import Any

import jax

CAPABILITIES = {"pallas": (8, 0), "triton": (7, 5)}
"""Least compute capability of a kernel, by path. XLA, which compiles Pallas kernels as Triton code,
takes "Ampere GPUs and up"; Triton itself goes one generation further back, but not with int8."""


@dataclasses.dataclass(frozen=True)
class Device:
    """A kind of device.

    Attributes:
      platform: as JAX names it: "cpu", "gpu", "tpu".
      kind: as its maker names it; of a CPU with the number of cores, since what is measured on it
        depends on both.
      capability: compute capability of a CUDA device, None for others.
    """

    platform: str
    kind: str
    capability: tuple[int, int] | None = None

    def __str__(self) -> str:
        if self.capability is None:
            return self.kind
        return f"{self.kind}, compute capability {self.capability[0]}.{self.capability[1]}"

    @property
    def multiplies_tiles(self) -> bool:
        """Whether kernels use tensor cores here: Triton does from compute capability 8.0 on."""
        return self.capability is not None and self.capability >= CAPABILITIES["pallas"]

    def refuses(self, path: str, *, integer: bool = False) -> str | None:
        """Returns why kernels of a path cannot run here, or None.

        Args:
          integer: kernels that multiply int8. Without tensor cores Triton does not compile them.
        """
        if path == "native":
            return None if self.platform == "cpu" else f"{self} is no CPU"
        if self.capability is None:
            return f"{self} is no CUDA device"
        if self.capability < CAPABILITIES[path]:
            least = ".".join(map(str, CAPABILITIES[path]))
            compiler = {"pallas": "XLA compiles Triton code", "triton": "Triton compiles"}[path]
            return f"{self}, and {compiler} from {least} on"
        if integer and not self.multiplies_tiles:
            return f"{self}, and Triton compiles products of int8 for tensor cores, from 8.0 on"
        return None


def current() -> Device:
    """Returns the device that computations go to by default."""
    chosen = jax.config.values["jax_default_device"]
    if chosen is None or isinstance(chosen, str):
        chosen = jax.local_devices(backend=chosen)[0]
    return _describe(chosen)


@functools.cache
def _describe(device: Any) -> Device:
    # CUDA writes "9.0" here, ROCm "gfx942", others have no such attribute.
    written = str(getattr(device, "compute_capability", ""))
    parts = re.fullmatch(r"(\d+)\.(\d+)", written) if device.platform == "gpu" else None
    capability = (int(parts[1]), int(parts[2])) if parts else None
    kind = processor() if device.platform == "cpu" else device.device_kind
    return Device(device.platform, kind, capability)


def processor() -> str:
    """Returns the name of the CPU, where Linux tells it, and the number of its cores."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        name = found[1].strip() if found else name
    return f"{name}, {os.cpu_count()} cores"
