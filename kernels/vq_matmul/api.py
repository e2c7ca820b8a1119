# SPDX-License-Identifier: Apache-2.0
"""`vq_matmul` on the path that is best here (`kernels.dispatch`).

Dimension key:  I inputs   O outputs   M codebooks   K entries   G weights of a vector   Y bytes of
                a row of codes
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from vqjax.errors import VqjaxError
from vqjax.kernels import dispatch, triton_gpu
from vqjax.kernels.lut_matmul import native
from vqjax.kernels.lut_matmul import ref as lut
from vqjax.kernels.problem import (
    AnyOperands,
    IntegerOperands,
    Operands,
    Prepared,
    Problem,
    check,
)
from vqjax.kernels.schedule import Schedule
from vqjax.kernels.transform import transformable
from vqjax.kernels.vq_matmul import pallas, ref


def vq_matmul(
    x: jax.Array,
    packed_OY: jax.Array,
    codebooks_MKG: jax.Array,
    scales_O: jax.Array,
    codebook_scale: jax.Array | None = None,
    bias_O: jax.Array | None = None,
    prepared: Prepared | None = None,
) -> jax.Array:
    """Returns x @ W.T + bias, [..., O] in the type of x, for a weight stored as packed codes.

    Differentiable in x, codebooks, scales and bias; works under `jit`, `vmap` and `shard_map`.
    A linear layer or a 1x1 convolution (AQLM, arXiv:2401.06118, section 3.1).

    Args:
      x: [..., I], float32, float16 or bfloat16.
      packed_OY: uint8, as `kernels.decode.pack` makes them.
      codebooks_MKG: floating point, or int8 with `codebook_scale`.
      scales_O: one factor per output, floating point.
      codebook_scale: float scalar for int8 codebooks; None for floating point.
      bias_O: floating point, or None.
      prepared: what `Books.prepare` made of the same codebooks and scales, or None.

    Raises:
      VqjaxError: if the arrays do not fit together, or if `VQJAX_KERNELS` names a path that cannot
        run them.
    """
    if x.ndim == 0 or codebooks_MKG.ndim != 3 or packed_OY.ndim != 2:
        raise VqjaxError(
            f"vq_matmul: x {x.shape}, packed codes {packed_OY.shape}, codebooks "
            f"{codebooks_MKG.shape}; expected [..., I], [O, Y] and [M, K, G]"
        )
    x_BI = x.reshape(-1, x.shape[-1])
    operands = Operands(x_BI, packed_OY, codebooks_MKG, scales_O, codebook_scale, bias_O, prepared)
    check(problem_of(operands), operands)
    return _transformed(operands).reshape(*x.shape[:-1], packed_OY.shape[0])


def vq_matmul_int8(
    q: jax.Array,
    steps_B: jax.Array,
    zeros_B: jax.Array,
    packed_OY: jax.Array,
    codebooks_MKG: jax.Array,
    scales_O: jax.Array,
    codebook_scale: jax.Array,
    totals_O: jax.Array,
    bias_O: jax.Array | None = None,
    prepared: Prepared | None = None,
) -> jax.Array:
    """Returns x @ W.T + bias, float32 [B, ..., O], where example b has x = steps[b] (q - zeros[b]).

    int8 is multiplied by int8 and summed in int32 (arXiv:1712.05877, section 2.2). Not
    differentiable.

    Args:
      q: int8 [B, ..., I].
      steps_B, zeros_B: float32, and whole numbers.
      packed_OY, scales_O, bias_O, prepared: as in `vq_matmul`.
      codebooks_MKG, codebook_scale: int8; sums of entries must fit int8.
      totals_O: int32, sums of each output's weights as they are stored (`decode_integers`).

    Raises:
      VqjaxError: as `vq_matmul`.
    """
    operands = integer_operands(
        q.reshape(-1, q.shape[-1]),
        jnp.repeat(steps_B, math.prod(q.shape[1:-1])),
        jnp.repeat(zeros_B, math.prod(q.shape[1:-1])),
        packed_OY, codebooks_MKG, scales_O, codebook_scale, totals_O, bias_O, prepared,
    )  # fmt: skip
    problem = problem_of(operands)
    check(problem, operands)
    y = dispatch.run(problem, operands, ways(problem))
    return y.reshape(*q.shape[:-1], packed_OY.shape[0])


def integer_operands(
    q, steps_P, zeros_P, packed_OY, codebooks_MKG, scales_O, codebook_scale, totals_O, bias_O,
    prepared=None,
) -> IntegerOperands:  # fmt: skip
    """Puts the arguments of an integer operation into their places."""
    return IntegerOperands(
        q, packed_OY, codebooks_MKG, scales_O, codebook_scale, bias_O,
        steps_P.astype(jnp.float32), zeros_P.astype(jnp.int32), totals_O, prepared,
    )  # fmt: skip


def problem_of(operands: AnyOperands) -> Problem:
    """Returns the sizes of operands whose x is [B, I]."""
    books, entries, group = operands.codebooks_MKG.shape
    return Problem(
        op="vq_matmul",
        rows=operands.x.shape[0],
        inputs=operands.x.shape[1],
        outputs=operands.packed_OY.shape[0],
        books=books,
        entries=entries,
        group=group,
        dtype=jnp.dtype(operands.x.dtype).name,
        codebook_dtype=jnp.dtype(operands.codebooks_MKG.dtype).name,
    )


def choice(operands: Operands) -> dispatch.Choice:
    """Returns how operands whose x is [..., I] would run; their shapes and types are enough."""
    x = operands.x
    x_BI = jax.ShapeDtypeStruct((math.prod(x.shape[:-1]), x.shape[-1]), x.dtype)
    problem = problem_of(operands._replace(x=x_BI))
    return dispatch.decide(problem, ways(problem))


def ways(problem: Problem) -> dispatch.Implementations:
    """Returns what there is to run a problem, paths that cannot run here included."""
    return dispatch.Implementations(
        kernels={
            "pallas": dispatch.Kernel(
                unsupported=pallas.unsupported,
                trial=pallas.try_out,
                run=lambda operands, schedule: pallas.vq_matmul(operands, problem, schedule),
            ),
            "triton": dispatch.Kernel(
                unsupported=triton_gpu.unsupported,
                trial=_try_triton,
                run=lambda operands, schedule: _triton().vq_matmul(operands, problem, schedule),
            ),
            "native": dispatch.Kernel(
                unsupported=native.unsupported,
                trial=native.build,
                run=lambda operands, schedule: native.lut_matmul(operands),
            ),
        },
        lookup=lambda operands: lut.lut_matmul(*operands.defining),
        reference=ref.definition(problem),
    )


def integer_choice(x: jax.Array, packed_OY: jax.Array, codebooks_MKG: jax.Array) -> dispatch.Choice:
    """Returns how `vq_matmul_int8` would run x [..., I] once it is quantized."""
    q_BI = jax.ShapeDtypeStruct((math.prod(x.shape[:-1]), x.shape[-1]), jnp.int8)
    problem = problem_of(Operands(q_BI, packed_OY, codebooks_MKG, None))  # pyright: ignore
    return dispatch.decide(problem, ways(problem))


def _triton() -> Any:
    """Its packages are optional: it is imported where `triton_gpu.missing` says nothing."""
    from vqjax.kernels.vq_matmul import triton

    return triton


def _try_triton(problem: Problem, schedule: Schedule) -> None:
    _triton().try_out(problem, schedule)


def _reference(operands: Operands) -> jax.Array:
    return ref.vq_matmul(*operands.defining)


def _run(operands: Operands) -> jax.Array:
    problem = problem_of(operands)
    return dispatch.run(problem, operands, ways(problem))


_transformed = transformable(_run, _reference)
