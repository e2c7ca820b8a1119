# SPDX-License-Identifier: Apache-2.0
"""`vq_conv` on the path that is best here (`kernels.dispatch`).

Dimension key:  B batch   H W image   I inputs   O outputs   M codebooks   K entries   G weights of
                a vector   Y bytes of a row of codes
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vqjax.errors import VqjaxError
from vqjax.kernels import dispatch
from vqjax.kernels.lut_matmul import ref as lut
from vqjax.kernels.problem import Operands, Problem, check
from vqjax.kernels.transform import Operation, transformable
from vqjax.kernels.vq_conv import pallas, ref
from vqjax.kernels.vq_conv.window import Window
from vqjax.kernels.vq_matmul import api as matmul

POINT = Window(1, (1, 1), ((0, 0), (0, 0)))
"""Of a 1x1 convolution that is a product."""


def vq_conv(
    x_BHWI: jax.Array,
    packed_OY: jax.Array,
    codebooks_MKG: jax.Array,
    scales_O: jax.Array,
    codebook_scale: jax.Array | None = None,
    bias_O: jax.Array | None = None,
    *,
    window: int,
    strides: tuple[int, int] = (1, 1),
    padding: str | Sequence[tuple[int, int]] = "SAME",
) -> jax.Array:
    """Returns the convolution with a window x window kernel stored as packed codes, plus a bias.

    Differentiable in x, codebooks, scales and bias; works under `jit`, `vmap` and `shard_map`. One
    code stands for a 3x3 kernel where G = 9 (AQUATIC-Diff, arXiv:2506.05960).

    Args:
      x_BHWI: float32, float16 or bfloat16.
      packed_OY, codebooks_MKG, scales_O, codebook_scale, bias_O: as in `vq_matmul`; columns of the
        matrix are ordered (input channel, ky, kx).
      window: side of the kernel.
      strides, padding: as in `jax.lax.conv_general_dilated`.

    Returns:
      [B, H', W', O] in the type of x.

    Raises:
      VqjaxError: if the arrays do not fit together, or if `VQJAX_KERNELS` names a path that cannot
        run them.
    """
    if x_BHWI.ndim != 4 or codebooks_MKG.ndim != 3 or packed_OY.ndim != 2:
        raise VqjaxError(
            f"vq_conv: x {x_BHWI.shape}, packed codes {packed_OY.shape}, codebooks "
            f"{codebooks_MKG.shape}; expected [B, H, W, I], [O, Y] and [M, K, G]"
        )
    shape = Window.of(window, strides, padding, x_BHWI.shape[1:3])
    operands = Operands(x_BHWI, packed_OY, codebooks_MKG, scales_O, codebook_scale, bias_O)
    if shape == POINT:
        return matmul.vq_matmul(*operands)
    check(problem_of(operands, shape), operands)
    return _transformed(shape)(operands)


def problem_of(operands: Operands, window: Window) -> Problem:
    """Returns the sizes of operands whose x is [B, H, W, I]."""
    books, entries, group = operands.codebooks_MKG.shape
    batch, *image, inputs = operands.x.shape
    height, width = window.outputs(image)
    return Problem(
        op="vq_conv",
        rows=batch * height * width,
        inputs=inputs,
        outputs=operands.packed_OY.shape[0],
        books=books,
        entries=entries,
        group=group,
        dtype=jnp.dtype(operands.x.dtype).name,
        codebook_dtype=jnp.dtype(operands.codebooks_MKG.dtype).name,
        window=window.size,
        strides=window.strides,
    )


def choice(operands: Operands, window: Window) -> dispatch.Choice:
    """Returns how operands whose x is [B, H, W, I] would run, by `vq_matmul` where that serves.

    Their shapes and types are enough.
    """
    if window == POINT:
        return matmul.choice(operands)
    problem = problem_of(operands, window)
    return dispatch.decide(problem, _ways(problem, window))


def _ways(problem: Problem, window: Window) -> dispatch.Implementations:
    geometry: dict[str, Any] = {
        "window": window.size,
        "strides": window.strides,
        "padding": window.padding,
    }
    return dispatch.Implementations(
        unsupported=pallas.unsupported,
        compile_small=pallas.compile_small,
        pallas=lambda operands, schedule: pallas.vq_conv(operands, problem, schedule, window),
        lookup=lambda operands: lut.lut_conv(*operands, **geometry),
        reference=lambda operands: ref.vq_conv(*operands, **geometry),
    )


@functools.cache
def _transformed(window: Window) -> Operation:
    def ways_of(operands: Operands) -> tuple[Problem, dispatch.Implementations]:
        problem = problem_of(operands, window)
        return problem, _ways(problem, window)

    def run(operands: Operands) -> jax.Array:
        problem, ways = ways_of(operands)
        return dispatch.run(problem, operands, ways)

    def reference(operands: Operands) -> jax.Array:
        return ways_of(operands)[1].reference(operands)

    return transformable(run, reference)
