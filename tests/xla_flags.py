# SPDX-License-Identifier: Apache-2.0
"""What XLA is told in tests, in their own process and in those that they start."""

import importlib.metadata

_JAXLIB = tuple(int(part) for part in importlib.metadata.version("jaxlib").split(".")[:2])

# jaxlib 0.10 has two emitters; 0.12 has no flag for them. A flag that XLA does not know ends the
# process.
_TWO_EMITTERS = _JAXLIB < (0, 11)
_OLD_EMITTERS = ("--xla_cpu_use_fusion_emitters=false",) if _TWO_EMITTERS else ()

CHEAP = " ".join(("--xla_cpu_parallel_codegen_split_count=1", *_OLD_EMITTERS))
"""XLA_FLAGS that compile in the least time."""

EMITTERS_OF_USERS = {"xla_cpu_use_fusion_emitters": True} if _TWO_EMITTERS else None
"""`compiler_options` for sums that must be exact: the old emitters move products into
multiply-adds, over a barrier."""


def simulated(devices: int) -> str:
    """`CHEAP` with so many devices on this CPU."""
    return f"{CHEAP} --xla_force_host_platform_device_count={devices}"
