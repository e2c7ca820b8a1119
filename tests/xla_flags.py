# SPDX-License-Identifier: Apache-2.0
"""Flags of XLA that tests run with, in their own process and in those that they start."""

import importlib.metadata

_JAXLIB = tuple(int(part) for part in importlib.metadata.version("jaxlib").split(".")[:2])

# Where both emitters are. A flag that XLA does not know ends the process.
_OLD_EMITTERS = ("--xla_cpu_use_fusion_emitters=false",) if _JAXLIB < (0, 11) else ()
CHEAP = " ".join(("--xla_cpu_parallel_codegen_split_count=1", *_OLD_EMITTERS))
"""Compile in the least time."""


def simulated(devices: int) -> str:
    """The same with several devices on this CPU."""
    return f"{CHEAP} --xla_force_host_platform_device_count={devices}"
