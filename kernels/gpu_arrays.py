# SPDX-License-Identifier: Apache-2.0
"""What stands around a GPU kernel, whatever it is written in: its limits and its arrays."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqjax.kernels.books import CODE_BITS
from vqjax.kernels.problem import FLOATS, INTEGER, Problem, Scaling
from vqjax.kernels.schedule import Schedule, Tiles

_DTYPES = (*FLOATS, INTEGER)
_MOST_BOOKS = 8
_MOST_ELEMENTS = 2**31 - 1  # indices are 32 bits
_MOST_ERROR = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 4e-2, "int8": 1e-5}
"""Of a result relative to the largest, by type of activations: what rounding in another order does,
several times over."""


def unread(problem: Problem) -> list[str]:
    """Returns why kernels cannot read the codes of a problem; nothing if they can."""
    found, bits = [], problem.code_bits
    if problem.entries != 1 << bits or bits not in CODE_BITS:
        found.append(f"K = {problem.entries}, kernels read powers of two up to 1024, and 4096")
    if not 1 <= problem.books <= _MOST_BOOKS:
        found.append(f"M = {problem.books}, kernels add up 1 to {_MOST_BOOKS} codebooks")
    return found


def in_two_bytes(bits: int) -> bool:
    """Returns whether some codes of so many bits begin in one byte and end in the next."""
    return bits & (bits - 1) > 0


def unsupported(problem: Problem) -> list[str]:
    """Returns why kernels cannot run a problem on any device; nothing if they can."""
    found = unread(problem)
    if problem.dtype not in _DTYPES:
        found.append(f"activations are {problem.dtype}, kernels take {', '.join(_DTYPES)}")
    reach = max(problem.strides[0] * problem.strides[1], 1)
    largest = max(
        problem.rows * reach * problem.inputs,
        problem.rows * problem.outputs,
        problem.outputs * problem.fan_in,
    )
    if largest > _MOST_ELEMENTS:
        found.append(f"an array of {largest} elements, kernels count with 32 bits")
    return found


def frame(problem: Problem, tiles: Tiles) -> dict[str, Any]:
    """Returns grid, shape and type of what a fused kernel stores, as `launch` takes them.

    Programs are numbered by tile of rows, tile of outputs, and split; the parts of the splits stand
    below each other, and are scaled after they were added.
    """
    down, across = -(-problem.rows // tiles.rows), -(-problem.outputs // tiles.outputs)
    return {
        "grid": (down, across, tiles.splits),
        "shape": (tiles.splits * problem.rows, problem.outputs),
        "dtype": problem.result if tiles.splits == 1 else problem.sums,
    }


def try_out(
    run: Callable[..., jax.Array],
    definition: Callable[[Any], jax.Array],
    problem: Problem,
    schedule: Schedule,
    x_shape: tuple[int, ...],
) -> None:
    """Runs `run(operands, problem=, schedule=)` on the default device, on random operands.

    Whatever the compiler raises passes on.

    Raises:
      ArithmeticError: if numbers are not those of the definition, rounding apart.
    """
    operands = _sample(problem, x_shape)
    expected = _result(definition, operands)
    found = _result(functools.partial(run, problem=problem, schedule=schedule), operands)
    error = np.max(np.abs(found - expected)) / np.max(np.abs(expected))
    if not error <= _MOST_ERROR[problem.dtype]:
        raise ArithmeticError(
            f"{schedule.kind} products differ from the definition by {error:.2g} of the largest"
        )


def _sample(problem: Problem, x_shape: tuple[int, ...]) -> Any:
    """Random operands by NumPy: they are wanted while other functions are traced."""
    rng, most = np.random.default_rng(0), 127 // problem.books  # so that sums of entries fit int8

    def values(like: jax.ShapeDtypeStruct) -> np.ndarray:
        if like.dtype == np.uint8:  # every pattern of bits is a code
            return rng.integers(0, 256, like.shape).astype(np.uint8)
        if np.issubdtype(like.dtype, np.integer):
            return rng.integers(-most, most + 1, like.shape).astype(like.dtype)
        return rng.normal(size=like.shape).astype(like.dtype)

    return jax.tree.map(values, problem.abstract(x_shape))


def _result(work: Callable[[Any], jax.Array], operands: Any) -> np.ndarray:
    # Whatever the caller forbids to its own arrays.
    with jax.default_matmul_precision("highest"), jax.transfer_guard("allow"):
        program = jax.jit(work).lower(operands).compile()
        return np.asarray(program(operands)).astype(np.float64)


def add_splits(y: jax.Array, splits: int, scaling: Scaling, dtype: Any) -> jax.Array:
    """Adds the parts that splits stored: in a fixed order, so that runs agree to the bit."""
    if splits == 1:
        return y
    return scaling.apply(jnp.sum(y.reshape(splits, -1, y.shape[-1]), axis=0)).astype(dtype)
