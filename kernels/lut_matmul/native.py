# SPDX-License-Identifier: Apache-2.0
"""Lookup tables in native code for CPUs (`native.cc`), called by XLA.

A table of 16 entries fits a vector register, and one permutation looks up as many outputs as that
has lanes: unlike XLA's gathers this takes less time than the products that it replaces, where a
weight has about two bits or less.

Dimension key:  B batch   H W image   I inputs   O outputs   P rows of x   M codebooks   K entries
                G weights of a vector
"""

import ctypes
import functools

import jax
import jax.numpy as jnp
import numpy as np

from vqjax.errors import VqjaxError
from vqjax.kernels import native_library
from vqjax.kernels.decode import real_codebooks
from vqjax.kernels.problem import Operands, Problem
from vqjax.kernels.vq_conv.window import POINT, Window

PACKAGE, SOURCE = "vqjax.kernels.lut_matmul", "native.cc"
ENTRIES, MOST_WEIGHTS = 16, 64
"""Of a table, and of a vector."""

_TARGET = "vqjax_lut_conv"


def unsupported(problem: Problem) -> list[str]:
    """Returns why the code cannot read a problem's weight; nothing if it can."""
    found = []
    if problem.entries != ENTRIES:
        found.append(f"K = {problem.entries}, a table in a register has {ENTRIES} entries")
    if problem.group > MOST_WEIGHTS:
        found.append(f"vectors of {problem.group}, at most {MOST_WEIGHTS} are read")
    if problem.integer:
        found.append("tables hold products in floating point, this is one of integers")
    return found


def build(problem: Problem, schedule: None) -> None:
    """Builds the code, unless it was built before: all problems share it, and there is no schedule.

    Raises:
      VqjaxError: if it cannot be built here.
    """
    del problem, schedule
    _library()


def missing() -> str | None:
    """Returns why there is no native code on this machine, or None. Builds it on first use."""
    try:
        instructions()
    except VqjaxError as error:
        return str(error)
    return None


def instructions() -> str:
    """Returns the vector instructions that the code uses, "AVX-512" or "AVX2".

    Raises:
      VqjaxError: if it cannot be built here.
    """
    name = _library().vqjax_instructions
    name.restype = ctypes.c_char_p
    return name().decode()


def lut_conv(operands: Operands, window: Window) -> jax.Array:
    """Returns what `lut_matmul.ref.lut_conv` defines; sums do not depend on the number of threads.

    Args:
      operands: K = 16; x is [B, H, W, I].

    Returns:
      [B, H', W', O] in the type of x, computed in float32.

    Raises:
      VqjaxError: if the code cannot be built here.
    """
    _library()
    x_BHWI = operands.x
    height, width = window.outputs(x_BHWI.shape[1:3])
    (above, _), (left, _) = window.padding
    books_MKG = real_codebooks(operands.codebooks_MKG, operands.codebook_scale)
    shape = (x_BHWI.shape[0], height, width, operands.packed_OY.shape[0])
    x_BHWI = x_BHWI.astype(jnp.float32)
    # Of the kind that x is under `shard_map`, with as many axes.
    result = jax.typeof(x_BHWI).update(shape=shape, manual_axis_type=_manual_axes(operands))
    y_BHWO = jax.ffi.ffi_call(_TARGET, result)(
        x_BHWI,
        operands.packed_OY,
        jnp.swapaxes(books_MKG, 1, 2),
        operands.scales_O.astype(jnp.float32),
        operands.scaling().biases_O,
        window=np.int64(window.size),
        down=np.int64(window.strides[0]),
        right=np.int64(window.strides[1]),
        above=np.int64(above),
        left=np.int64(left),
    )
    return y_BHWO.astype(operands.x.dtype)


def lut_matmul(operands: Operands) -> jax.Array:
    """Returns what `lut_matmul.ref.lut_matmul` defines; each row is an image of one pixel.

    Args:
      operands: K = 16; x is [P, I].

    Raises:
      VqjaxError: as `lut_conv`.
    """
    x_P11I = operands.x[:, None, None, :]
    return lut_conv(operands._replace(x=x_P11I), POINT)[:, 0, 0, :]


def _manual_axes(operands: Operands) -> jax.sharding.ManualAxisType:
    """Under `shard_map` a result varies along the axes of the mesh along which any operand does."""
    types = [jax.typeof(leaf).manual_axis_type for leaf in jax.tree.leaves(operands)]
    return jax.sharding.ManualAxisType(varying=frozenset().union(*(t.varying for t in types)))


@functools.cache
def _library() -> ctypes.CDLL:
    """The library, known to XLA."""
    library = native_library.load(PACKAGE, SOURCE)
    handler = jax.ffi.pycapsule(library.vqjax_lut_conv)
    jax.ffi.register_ffi_target(_TARGET, handler, platform="cpu")
    return library
