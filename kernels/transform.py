# SPDX-License-Identifier: Apache-2.0
"""What JAX does with functions, for kernels that it cannot look into: gradients and `vmap`."""

from collections.abc import Callable

import jax
from jax.custom_batching import custom_vmap

from vqjax.kernels.problem import Operands

Operation = Callable[[Operands], jax.Array]


def transformable(kernel: Operation, reference: Operation) -> Operation:
    """Returns the kernel with gradients and batching.

    Gradients are those of the reference: of x, codebooks, scales and bias; codes and int8 codebooks
    have none. Where `vmap` maps x alone, its axis becomes part of the leading one, so that weights
    are decoded once for all; where it maps weights too, the kernel runs for each in turn.

    Args:
      kernel: treats the entries of the leading axis of x separately, and takes any number of them.
      reference: the same function in operations that JAX can differentiate.
    """

    @custom_vmap
    def batched(operands: Operands) -> jax.Array:
        return kernel(operands)

    @batched.def_vmap
    def _(size: int, mapped_args: list[Operands], operands: Operands) -> tuple[jax.Array, bool]:
        (mapped,) = mapped_args
        if mapped.x and not any(jax.tree.leaves(mapped._replace(x=False))):
            x = operands.x
            y = batched(operands._replace(x=x.reshape(-1, *x.shape[2:])))
            return y.reshape(size, x.shape[1], *y.shape[1:]), True
        flags = jax.tree.leaves(mapped)
        leaves, structure = jax.tree.flatten(operands)

        def one(some: list[jax.Array]) -> jax.Array:
            own = iter(some)
            each = [next(own) if flag else leaf for leaf, flag in zip(leaves, flags)]
            return batched(structure.unflatten(each))

        return jax.lax.map(one, [leaf for leaf, flag in zip(leaves, flags) if flag]), True

    @jax.custom_vjp
    def differentiable(operands: Operands) -> jax.Array:
        return batched(operands)

    def forward(operands: Operands) -> tuple[jax.Array, Operands]:
        return batched(operands), operands

    def backward(operands: Operands, dy: jax.Array) -> tuple[Operands]:
        _, pull = jax.vjp(reference, operands)
        return pull(dy)

    differentiable.defvjp(forward, backward)
    return differentiable
