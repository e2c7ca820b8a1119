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
from vqjax.kernels import dispatch, triton_gpu
from vqjax.kernels.lut_matmul import native
from vqjax.kernels.lut_matmul import ref as lut
from vqjax.kernels.problem import AnyOperands, Operands, Prepared, Problem, check
from vqjax.kernels.schedule import Schedule
from vqjax.kernels.transform import Operation, transformable
from vqjax.kernels.vq_conv import pallas, ref
from vqjax.kernels.vq_conv.window import POINT, Window, unread
from vqjax.kernels.vq_matmul import api as matmul


def vq_conv(
    x_BHWI: jax.Array,
    packed_OY: jax.Array,
    codebooks_MKG: jax.Array,
    scales_O: jax.Array,
    codebook_scale: jax.Array | None = None,
    bias_O: jax.Array | None = None,
    prepared: Prepared | None = None,
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
      packed_OY, codebooks_MKG, scales_O, codebook_scale, bias_O, prepared: as in `vq_matmul`;
        columns of the matrix are ordered (input channel, ky, kx).
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
    operands = Operands(
        x_BHWI, packed_OY, codebooks_MKG, scales_O, codebook_scale, bias_O, prepared
    )
    if shape == POINT:
        return matmul.vq_matmul(*operands)
    check(problem_of(operands, shape), operands)
    return _transformed(shape)(operands)


def vq_conv_int8(
    q_BHWI: jax.Array,
    steps_B: jax.Array,
    zeros_B: jax.Array,
    packed_OY: jax.Array,
    codebooks_MKG: jax.Array,
    scales_O: jax.Array,
    codebook_scale: jax.Array,
    totals_O: jax.Array,
    bias_O: jax.Array | None = None,
    prepared: Prepared | None = None,
    *,
    window: int,
    strides: tuple[int, int] = (1, 1),
    padding: str | Sequence[tuple[int, int]] = "SAME",
) -> jax.Array:
    """Returns the convolution in integers plus a bias, float32 [B, H', W', O].

    Args:
      q_BHWI: int8; example b has x = steps[b] (q - zeros[b]), and is padded with zeros[b], which
        stands for 0 and fits int8.
      steps_B, zeros_B, packed_OY, codebooks_MKG, scales_O, codebook_scale, totals_O, bias_O,
        prepared: as in `vq_matmul_int8`; columns of the matrix are ordered (input channel, ky, kx).
      window, strides, padding: as in `vq_conv`.

    Raises:
      VqjaxError: as `vq_conv`.
    """
    if q_BHWI.ndim != 4 or q_BHWI.dtype != jnp.int8:
        raise VqjaxError(
            f"vq_conv_int8: q {q_BHWI.dtype} {q_BHWI.shape}; expected int8 [B, H, W, I]"
        )
    arrays = (packed_OY, codebooks_MKG, scales_O, codebook_scale, totals_O, bias_O, prepared)
    shape = Window.of(window, strides, padding, q_BHWI.shape[1:3])
    if shape == POINT:
        return matmul.vq_matmul_int8(q_BHWI, steps_B, zeros_B, *arrays)
    padded_BHWI = ref.pad_levels(q_BHWI, zeros_B, shape.padding)
    inner = shape._replace(padding=POINT.padding)
    height, width = inner.outputs(padded_BHWI.shape[1:3])
    operands = matmul.integer_operands(
        padded_BHWI,
        jnp.repeat(steps_B, height * width),
        jnp.repeat(zeros_B, height * width),
        *arrays,
    )
    problem = problem_of(operands, inner)
    check(problem, operands)
    return dispatch.run(problem, operands, ways(problem, inner))


def problem_of(operands: AnyOperands, window: Window) -> Problem:
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
    return dispatch.decide(problem, ways(problem, window))


def ways(problem: Problem, window: Window) -> dispatch.Implementations:
    """Returns what there is to run a problem, paths that cannot run here included."""
    return dispatch.Implementations(
        kernels={
            "pallas": dispatch.Kernel(
                unsupported=pallas.unsupported,
                trial=pallas.try_out,
                run=lambda operands, schedule: pallas.vq_conv(operands, problem, schedule, window),
            ),
            "triton": dispatch.Kernel(
                unsupported=_unsupported_triton,
                trial=_try_triton,
                run=lambda operands, schedule: _triton().vq_conv(
                    operands, problem, schedule, window
                ),
            ),
            "native": dispatch.Kernel(
                unsupported=native.unsupported,
                trial=native.build,
                run=lambda operands, schedule: native.lut_conv(operands, window),
            ),
        },
        lookup=lambda operands: lut.lut_conv(*operands.defining, **window.keywords()),
        reference=ref.definition(problem, window),
    )


def integer_choice(
    x_BHWI: jax.Array, packed_OY: jax.Array, codebooks_MKG: jax.Array, window: Window
) -> dispatch.Choice:
    """Returns how `vq_conv_int8` would run x once it is quantized."""
    if window == POINT:
        return matmul.integer_choice(x_BHWI, packed_OY, codebooks_MKG)
    batch, *image, inputs = x_BHWI.shape
    sides = [side + sum(pad) for side, pad in zip(image, window.padding)]
    q_BHWI = jax.ShapeDtypeStruct((batch, *sides, inputs), jnp.int8)
    inner = window._replace(padding=POINT.padding)
    operands = Operands(q_BHWI, packed_OY, codebooks_MKG, None)  # pyright: ignore
    problem = problem_of(operands, inner)
    return dispatch.decide(problem, ways(problem, inner))


def _triton() -> Any:
    """Its packages are optional: it is imported where `triton_gpu.missing` says nothing."""
    from vqjax.kernels.vq_conv import triton

    return triton


def _unsupported_triton(problem: Problem) -> list[str]:
    return triton_gpu.unsupported(problem) + unread(problem)


def _try_triton(problem: Problem, schedule: Schedule) -> None:
    _triton().try_out(problem, schedule)


@functools.cache
def _transformed(window: Window) -> Operation:
    def ways_of(operands: Operands) -> tuple[Problem, dispatch.Implementations]:
        problem = problem_of(operands, window)
        return problem, ways(problem, window)

    def run(operands: Operands) -> jax.Array:
        problem, found = ways_of(operands)
        return dispatch.run(problem, operands, found)

    def reference(operands: Operands) -> jax.Array:
        return ways_of(operands)[1].reference(operands)

    return transformable(run, reference)
