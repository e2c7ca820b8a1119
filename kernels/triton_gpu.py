# SPDX-License-Identifier: Apache-2.0
"""Kernels written in Triton, started from JAX through jax-triton: the twins of those in Pallas.

Both packages are optional, and nothing here imports them before a kernel is asked for. Modules
that hold kernels (`triton_decode`, `vq_matmul.triton`, `vq_conv.triton`) need them to be imported.
"""

import functools
import importlib
import inspect
from typing import Any

import jax

from vqjax.kernels import gpu_arrays
from vqjax.kernels.problem import Problem
from vqjax.kernels.schedule import Tiles

HINT = "pip install 'vqjax[triton]'"


@functools.cache
def missing() -> str | None:
    """Returns why kernels in Triton cannot be started from this Python, or None."""
    for name in ("triton", "jax_triton"):
        try:
            importlib.import_module(name)
        except Exception as error:  # a package that fits no GPU plugin may raise anything
            text = str(error).strip().splitlines() or [type(error).__name__]
            return f"{name} cannot be imported ({text[0]}; {HINT})"
    return None


def unsupported(problem: Problem) -> list[str]:
    """Returns why the kernels cannot run a problem on any device; nothing if they can."""
    found = missing()
    return [*([found] if found else []), *gpu_arrays.unsupported(problem)]


def launch(
    kernel: Any,
    operands: tuple[jax.Array, ...],
    *,
    grid: tuple[int, ...],
    shape: tuple[int, ...],
    dtype: Any,
    tiles: Tiles,
    name: str,
    constants: dict[str, Any],
    capability: int | None = None,
) -> jax.Array:
    """Runs a kernel on whole arrays: it takes the operands, then the result, then `constants`.

    Under `shard_map` the result varies over every mesh axis that an operand varies over.

    Args:
      kernel: a `triton.jit` function.
      capability: compute capability to compile for (80 for 8.0); None is that of the device here.
    """
    call = importlib.import_module("jax_triton").triton_call
    # jax-triton 0.4 calls "out_type" what 0.3 calls "out_shape".
    known = inspect.signature(call).parameters
    result = "out_type" if "out_type" in known else "out_shape"
    y = call(
        *operands,
        kernel=kernel,
        grid=grid,
        name=name,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        compute_capability=capability,
        **{result: jax.ShapeDtypeStruct(shape, dtype)},
        **constants,
    )
    varying = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in operands))
    unsaid = varying - jax.typeof(y).manual_axis_type.varying
    return jax.lax.pcast(y, tuple(sorted(unsaid)), to="varying") if unsaid else y
