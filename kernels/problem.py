# SPDX-License-Identifier: Apache-2.0
"""What an operation on packed codes is asked to do: its arrays, and the sizes known before it runs.

Dimension key:  O outputs   M codebooks   K entries   G weights of a vector   Y bytes of a row
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vqjax.errors import VqjaxError
from vqjax.kernels.decode import packed_bytes

FLOATS = ("float32", "float16", "bfloat16")
INTEGER = "int8"
"""Type of activations in integer products."""


def power_of_two(number: int) -> int:
    """Returns the least power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()


class Scaling(NamedTuple):
    """What turns sums of products into outputs.

    Where products are of integers, a row p of the output is computed from inputs which stand for
    steps[p] * (q - zeros[p]):

        y_po = steps_p factors_o (sum_i q_pi w_oi - zeros_p totals_o) + biases_o

    Attributes:
      factors_O: float32, what sums of stored entries are multiplied by.
      biases_O: float32, zeros where there is no bias.
      steps_P, zeros_P, totals_O: float32, int32, and int32 sums of the weights of each output; None
        where products are of floating point.
    """

    factors_O: jax.Array
    biases_O: jax.Array
    steps_P: jax.Array | None = None
    zeros_P: jax.Array | None = None
    totals_O: jax.Array | None = None

    def apply(self, sums_PO: jax.Array) -> jax.Array:
        """Returns the outputs in float32."""
        factors_PO = self.factors_O[None]
        if self.steps_P is not None and self.zeros_P is not None and self.totals_O is not None:
            sums_PO = sums_PO - self.zeros_P[:, None] * self.totals_O[None]
            factors_PO = self.steps_P[:, None] * factors_PO
        return sums_PO.astype(jnp.float32) * factors_PO + self.biases_O[None]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["factors_O", "table"], meta_fields=["kind"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """What GPU kernels read that follows from a stored weight alone.

    Made where it is read, it takes two small kernels for each layer and step of a sampler.

    Attributes:
      factors_O: as in `Scaling`.
      table: of `kernels.books.Books`.
      kind: `Books.kind`: kernels that look vectors up in another way make their own table.
    """

    factors_O: jax.Array
    table: jax.Array
    kind: tuple


class Operands(NamedTuple):
    """The arrays of one operation; a pytree, which `jit`, `vmap` and gradients see.

    Attributes:
      x: activations, [B, I] or [B, H, W, I].
      packed_OY, codebooks_MKG, scales_O, codebook_scale: as in `decode`.
      bias_O: floating point, added to the outputs, or None.
      prepared: of the same codebooks and scales, or None: kernels prepare it themselves.
    """

    x: jax.Array
    packed_OY: jax.Array
    codebooks_MKG: jax.Array
    scales_O: jax.Array
    codebook_scale: jax.Array | None = None
    bias_O: jax.Array | None = None
    prepared: Prepared | None = None

    @property
    def defining(self) -> tuple:
        """The arrays that decide the result: arguments of the definitions."""
        return self[:-1]

    def factors(self) -> jax.Array:
        """Returns what sums of stored entries are multiplied by, float32 [O]."""
        return _factors(self)

    def scaling(self) -> Scaling:
        """Returns what sums of products are scaled by."""
        return Scaling(self.factors(), _biases(self.bias_O, self.scales_O))


class IntegerOperands(NamedTuple):
    """The arrays of one operation in integers; a pytree.

    Attributes:
      x: levels of the activations less what makes them signed, int8, [B, I] or [B, H, W, I].
      packed_OY, codebooks_MKG, scales_O, codebook_scale, bias_O: as in `Operands`; codebooks are
        int8, and so are the sums of their entries.
      steps_P, zeros_P, totals_O: as in `Scaling`.
      prepared: as in `Operands`.
    """

    x: jax.Array
    packed_OY: jax.Array
    codebooks_MKG: jax.Array
    scales_O: jax.Array
    codebook_scale: jax.Array
    bias_O: jax.Array | None
    steps_P: jax.Array
    zeros_P: jax.Array
    totals_O: jax.Array
    prepared: Prepared | None = None

    def scaling(self) -> Scaling:
        """Returns what sums of products are scaled by."""
        biases_O = _biases(self.bias_O, self.scales_O)
        return Scaling(_factors(self), biases_O, self.steps_P, self.zeros_P, self.totals_O)


AnyOperands = Operands | IntegerOperands


def _factors(operands: AnyOperands) -> jax.Array:
    if operands.prepared is not None:
        return operands.prepared.factors_O
    return factors(operands.scales_O, operands.codebook_scale)


def factors(scales_O: jax.Array, codebook_scale: jax.Array | None) -> jax.Array:
    """Returns what sums of stored entries are multiplied by, float32 [O]."""
    scales_O = scales_O.astype(jnp.float32)
    return scales_O if codebook_scale is None else scales_O * codebook_scale.astype(jnp.float32)


def _biases(bias_O: jax.Array | None, scales_O: jax.Array) -> jax.Array:
    if bias_O is None:
        return jnp.zeros(scales_O.shape, jnp.float32)
    return bias_O.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Static sizes of one operation; what a path can run and how is decided from these alone.

    Attributes:
      op: "vq_matmul" or "vq_conv".
      rows: output rows or pixels, the batch counted.
      inputs: I, channels.
      outputs: O.
      books, entries, group: M, K, G.
      dtype: of the activations; "int8" in integer products.
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
    def integer(self) -> bool:
        """Whether int8 is multiplied by int8."""
        return self.dtype == INTEGER

    @property
    def sums(self) -> str:
        """Type of sums of products, and of sums of entries before they are rounded."""
        return "int32" if self.integer else "float32"

    @property
    def result(self) -> str:
        """Type of the output."""
        return "float32" if self.integer else self.dtype

    @property
    def row_bytes(self) -> int:
        """Y, bytes of the codes of a row."""
        return packed_bytes(self.groups * self.books, self.entries)

    @property
    def code_bits(self) -> int:
        """Bits of a code, where K is a power of two."""
        return self.entries.bit_length() - 1

    def abstract(self, x_shape: tuple[int, ...]) -> Any:
        """Returns the shapes and types of the operands, without a bias: `Operands`, or in integer
        products `IntegerOperands`."""
        of: Any = jax.ShapeDtypeStruct
        operands = Operands(
            x=of(x_shape, self.dtype),
            packed_OY=of((self.outputs, self.row_bytes), jnp.uint8),
            codebooks_MKG=of((self.books, self.entries, self.group), self.codebook_dtype),
            scales_O=of((self.outputs,), jnp.float32),
            codebook_scale=of((), jnp.float32) if self.codebook_dtype == "int8" else None,
        )
        if not self.integer:
            return operands
        return IntegerOperands(
            *operands.defining,
            steps_P=of((self.rows,), jnp.float32),
            zeros_P=of((self.rows,), jnp.int32),
            totals_O=of((self.outputs,), jnp.int32),
        )  # pyright: ignore[reportArgumentType]


def check(problem: Problem, operands: AnyOperands) -> None:
    """Compares arrays with each other before anything runs.

    Codes need no check: kernels read only K of which every pattern of bits is a code. That sums of
    entries fit int8 in integer products is for the caller to know (`core.integer`).

    Raises:
      VqjaxError: names everything that does not fit.
    """
    wrong = []
    if isinstance(operands, IntegerOperands):
        wrong += _integer_misfits(problem, operands)
    elif problem.dtype not in FLOATS:
        wrong.append(f"activations are {problem.dtype}, expected one of {', '.join(FLOATS)}")
    if problem.codebook_dtype not in (*FLOATS, "int8"):
        wrong.append(f"codebooks are {problem.codebook_dtype}, expected a float type or int8")
    if (problem.codebook_dtype == "int8") != (operands.codebook_scale is not None):
        wrong.append(f"{problem.codebook_dtype} codebooks; int8 and codebook_scale go together")
    if operands.packed_OY.dtype != jnp.uint8:
        wrong.append(f"packed codes are {operands.packed_OY.dtype}, expected uint8")
    if operands.packed_OY.shape != (problem.outputs, problem.row_bytes):
        wrong.append(
            f"packed codes {operands.packed_OY.shape}, expected "
            f"{(problem.outputs, problem.row_bytes)}"
        )
    for name, found, shape in (
        ("scales", operands.scales_O, (problem.outputs,)),
        ("bias", operands.bias_O, (problem.outputs,)),
        ("codebook_scale", operands.codebook_scale, ()),
        (
            "factors of prepared",
            operands.prepared and operands.prepared.factors_O,
            (problem.outputs,),
        ),
    ):
        if found is not None:
            wrong += _factor_misfits(name, found, shape)
    if wrong:
        code = f"{problem.books} codebooks of {problem.entries} vectors of {problem.group}"
        raise VqjaxError(
            f"{problem.op} of {problem.fan_in} inputs with {code} does not fit: {'; '.join(wrong)}"
        )


def _factor_misfits(name: str, found: jax.Array, shape: tuple[int, ...]) -> list[str]:
    wrong = []
    if not jnp.issubdtype(found.dtype, jnp.floating):
        wrong.append(f"{name} of type {found.dtype}, expected floating point")
    if found.shape != shape:
        wrong.append(f"{name} {found.shape}, expected {shape or 'a scalar'}")
    return wrong


def _integer_misfits(problem: Problem, operands: IntegerOperands) -> list[str]:
    wrong = []
    if not problem.integer:
        wrong.append(f"activations are {problem.dtype}, expected int8")
    if problem.codebook_dtype != INTEGER:
        wrong.append(f"codebooks are {problem.codebook_dtype}, expected int8")
    for name, size, dtype in (
        ("steps_P", problem.rows, jnp.float32),
        ("zeros_P", problem.rows, jnp.int32),
        ("totals_O", problem.outputs, jnp.int32),
    ):
        found = getattr(operands, name)
        if found.shape != (size,) or found.dtype != dtype:
            kind = jnp.dtype(dtype).name
            wrong.append(f"{name} {found.dtype} {found.shape}, expected {kind} {(size,)}")
    return wrong
