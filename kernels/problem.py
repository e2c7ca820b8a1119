# SPDX-License-Identifier: Apache-2.0
"""What an operation on packed codes is asked to do: its arrays, and the sizes known before it runs.

Dimension key:  O outputs   M codebooks   K entries   G weights of a vector   Y bytes of a row
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vqjax.errors import VqjaxError
from vqjax.kernels.decode import packed_bytes

FLOATS = ("float32", "float16", "bfloat16")


class Operands(NamedTuple):
    """The arrays of one operation; a pytree, which `jit`, `vmap` and gradients see.

    Attributes:
      x: activations, [B, I] or [B, H, W, I].
      packed_OY, codebooks_MKG, scales_O, codebook_scale: as in `decode`.
      bias_O: floating point, added to the outputs, or None.
    """

    x: jax.Array
    packed_OY: jax.Array
    codebooks_MKG: jax.Array
    scales_O: jax.Array
    codebook_scale: jax.Array | None = None
    bias_O: jax.Array | None = None

    def factors(self) -> jax.Array:
        """Returns what sums of stored entries are multiplied by, float32 [O]."""
        scales_O = self.scales_O.astype(jnp.float32)
        if self.codebook_scale is None:
            return scales_O
        return scales_O * self.codebook_scale.astype(jnp.float32)

    def biases(self) -> jax.Array:
        """Returns the bias in float32, zeros where there is none, [O]."""
        if self.bias_O is None:
            return jnp.zeros(self.scales_O.shape, jnp.float32)
        return self.bias_O.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Static sizes of one operation; what a path can run and how is decided from these alone.

    Attributes:
      op: "vq_matmul" or "vq_conv".
      rows: output rows or pixels, the batch counted.
      inputs: I, channels.
      outputs: O.
      books, entries, group: M, K, G.
      dtype: of the activations.
      codebook_dtype: as stored.
      window, strides: of a convolution; 1 and (1, 1) for a product.
    """

    op: str
    rows: int
    inputs: int
    outputs: int
    books: int
    entries: int
    group: int
    dtype: str
    codebook_dtype: str
    window: int = 1
    strides: tuple[int, int] = (1, 1)

    @property
    def fan_in(self) -> int:
        """Weights of a row."""
        return self.inputs * self.window**2

    @property
    def groups(self) -> int:
        """J, vectors of a row."""
        return -(-self.fan_in // self.group)

    @property
    def code_bits(self) -> int:
        """Bits of a code, where K is a power of two."""
        return self.entries.bit_length() - 1

    def kind_of_kernel(self) -> "Problem":
        """Returns a small problem of the same code and types: its kernel is alike, and compiled
        soon."""
        return dataclasses.replace(self, rows=16, inputs=16, outputs=16, strides=(1, 1))

    def abstract(self, x_shape: tuple[int, ...]) -> Operands:
        """Returns the shapes and types of the operands, without a bias."""
        of: Any = jax.ShapeDtypeStruct
        stored = packed_bytes(self.groups * self.books, self.entries)
        return Operands(
            x=of(x_shape, self.dtype),
            packed_OY=of((self.outputs, stored), jnp.uint8),
            codebooks_MKG=of((self.books, self.entries, self.group), self.codebook_dtype),
            scales_O=of((self.outputs,), jnp.float32),
            codebook_scale=of((), jnp.float32) if self.codebook_dtype == "int8" else None,
        )


def check(problem: Problem, operands: Operands) -> None:
    """Compares arrays with each other before anything runs.

    Codes need no check: kernels read only K of which every pattern of bits is a code.

    Raises:
      VqjaxError: names everything that does not fit.
    """
    wrong = []
    if problem.dtype not in FLOATS:
        wrong.append(f"activations are {problem.dtype}, expected one of {', '.join(FLOATS)}")
    if problem.codebook_dtype not in (*FLOATS, "int8"):
        wrong.append(f"codebooks are {problem.codebook_dtype}, expected a float type or int8")
    if (problem.codebook_dtype == "int8") != (operands.codebook_scale is not None):
        wrong.append(f"{problem.codebook_dtype} codebooks; int8 and codebook_scale go together")
    if operands.packed_OY.dtype != jnp.uint8:
        wrong.append(f"packed codes are {operands.packed_OY.dtype}, expected uint8")
    stored = packed_bytes(problem.groups * problem.books, problem.entries)
    if operands.packed_OY.shape != (problem.outputs, stored):
        wrong.append(
            f"packed codes {operands.packed_OY.shape}, expected {(problem.outputs, stored)}"
        )
    if operands.scales_O.shape != (problem.outputs,):
        wrong.append(f"scales {operands.scales_O.shape}, expected {(problem.outputs,)}")
    if operands.bias_O is not None and operands.bias_O.shape != (problem.outputs,):
        wrong.append(f"bias {operands.bias_O.shape}, expected {(problem.outputs,)}")
    if wrong:
        code = f"{problem.books} codebooks of {problem.entries} vectors of {problem.group}"
        raise VqjaxError(
            f"{problem.op} of {problem.fan_in} inputs with {code} does not fit: {'; '.join(wrong)}"
        )
