# SPDX-License-Identifier: Apache-2.0
"""Counted operations of one layer's quantization by stage, and the machine's speed and memory.

Dimension key:  O outputs   N fan-in   J vectors of a row   M codebooks   K entries   R rows
"""

import math
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from vqjax.core import grouping
from vqjax.core.codebooks import fit_rows
from vqjax.core.compress import part_rows
from vqjax.core.encode import EXACT_LIMIT
from vqjax.core.plan import LayerSpec

# One least-squares update: products with S of all rows to set up and to judge, and of those rows
# that codebooks are fitted to for each step of conjugate gradients, taken at their most.
_JUDGING, _STEPS = 3, 8
_STORED_SWEEPS = 2  # of descent, after rounding to the stored types


def stage_flops(
    shape: tuple[int, ...], spec: LayerSpec, rounds: Mapping[str, int], rows: int
) -> dict[str, float]:
    """Operations that the method needs, a multiply-add counted as two; stages without a count miss.

    A sweep is one product of [O, N] with S, half of it where errors only move on to later columns,
    plus one addition and one comparison for each sum of codewords that is tried. Stages on a
    part of the rows take that part of it.

    Args:
      rounds: how often each stage ran.
      rows: R, inputs that the moment is the mean over.
    """
    outputs, fan_in = grouping.matrix_shape(shape)
    if spec.grouping == "scalar":
        return {"moments": 2.0 * rows * fan_in**2}
    product = 2.0 * outputs * fan_in**2
    groups = grouping.groups_per_row(fan_in, spec.group)
    part = part_rows(outputs, groups, spec) / outputs
    fitted = fit_rows(outputs, groups) / outputs
    tried = 2.0 * outputs * groups * _sums(spec)
    counts = {
        "moments": 2.0 * rows * fan_in**2,
        # A Cholesky factor and its inverse, each N^3 / 3, and its rows times G x G blocks.
        "factor": 2 / 3 * fan_in**3 + 2.0 * spec.group * fan_in**2,
        "feedback": product / 2 + tried,
        "descent": product + tried,
        "least_squares": (_JUDGING + _STEPS * fitted) * product,
        "store": _STORED_SWEEPS * (product + tried),
    }
    counts |= {
        "part feedback": part * counts["feedback"],
        "part descent": part * counts["descent"],
        "part least_squares": (_JUDGING * part + _STEPS * min(part, fitted)) * product,
    }
    return {stage: count * rounds.get(stage, 0) for stage, count in counts.items()}


def _sums(spec: LayerSpec) -> float:
    """Sums of codewords tried per vector: all, or those of blocks that can be enumerated."""
    every = spec.codebooks * math.log2(spec.entries)
    blocks = math.ceil(every / math.log2(EXACT_LIMIT))
    return blocks * 2.0 ** (every / blocks)


def accelerator_peak_bytes() -> int | None:
    """The most memory of the first device that was in use so far; None on a CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def matmul_peak(dtype: str = "float32") -> float:
    """Operations per second of one large matrix product in a type here, best of five."""
    size = 1536 if jax.default_backend() == "cpu" else 8192
    square = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    sums = jnp.int32 if square.dtype == jnp.int8 else None
    precision = jax.lax.Precision.HIGHEST
    product = jax.jit(lambda a: jnp.matmul(a, a, precision=precision, preferred_element_type=sums))
    product(square).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        product(square).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(times)
