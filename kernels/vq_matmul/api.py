# SPDX-License-Identifier: Apache-2.0
"""`vq_matmul` on the path that is best here (`kernels.dispatch`).

Dimension key:  I inputs   O outputs   M codebooks   K entries   G weights of a vector   Y bytes of
                a row of codes
"""

import math

import jax
import jax.numpy as jnp

from vqjax.errors import VqjaxError
from vqjax.kernels import dispatch
from vqjax.kernels.lut_matmul import ref as lut
from vqjax.kernels.problem import Operands, Problem, check
from vqjax.kernels.transform import transformable
from vqjax.kernels.vq_matmul import pallas, ref


def vq_matmul(
    x: jax.Array,
    packed_OY: jax.Array,
    codebooks_MKG: jax.Array,
    scales_O: jax.Array,
    codebook_scale: jax.Array | None = None,
    bias_O: jax.Array | None = None,
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
    operands = Operands(x_BI, packed_OY, codebooks_MKG, scales_O, codebook_scale, bias_O)
    check(problem_of(operands), operands)
    return _transformed(operands).reshape(*x.shape[:-1], packed_OY.shape[0])


def problem_of(operands: Operands) -> Problem:
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
    return dispatch.decide(problem, _ways(problem))


def _ways(problem: Problem) -> dispatch.Implementations:
    return dispatch.Implementations(
        unsupported=pallas.unsupported,
        compile_small=pallas.compile_small,
        pallas=lambda operands, schedule: pallas.vq_matmul(operands, problem, schedule),
        lookup=lambda operands: lut.lut_matmul(*operands),
        reference=_reference,
    )


def _reference(operands: Operands) -> jax.Array:
    return ref.vq_matmul(*operands)


def _run(operands: Operands) -> jax.Array:
    problem = problem_of(operands)
    return dispatch.run(problem, operands, _ways(problem))


_transformed = transformable(_run, _reference)
