# SPDX-License-Identifier: Apache-2.0
"""Products of 8-bit inputs and 8-bit weights, summed in 32 bits (arXiv 1712.05877, section 2).

Dimension key:  B examples   H W image   I inputs   O outputs   J vectors of a row   M codebooks
                G weights of a vector

With levels q, zero point z and step s of the input, and integers w_io and scale r_o of the kernel,

    y_o = s r_o sum_i (q_i - z) w_io = s r_o (sum_i (q_i - h) w_io - (z - h) sum_i w_io).

The shift h makes levels fit int8; both sums are exact, so that an output differs from that of the
same numbers in floating point by the rounding of the latter.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vqjax.core import grouping as grouping_lib
from vqjax.core import tree
from vqjax.core.activations import InputRange
from vqjax.core.tensor import VQTensor
from vqjax.errors import VqjaxError, gathered
from vqjax.kernels.decode import decode_integers
from vqjax.kernels.vq_conv.ref import integer_sums, pad_levels
from vqjax.kernels.vq_matmul.ref import integer_product

_MOST_INPUTS = (2**31 - 1) // (255 * 128)  # more could exceed 32 bits


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "scales_O"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class IntegerKernel:
    """Stands where a kernel stood: `values` times the scale of their output.

    Attributes:
      values: int8, kernel in Linen layout, [I, O] or [H, W, I, O].
      scales_O: float32.
    """

    values: jax.Array
    scales_O: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel."""
        return self.values.shape

    def product(self, x: jax.Array, read: InputRange) -> jax.Array:
        """Affine map without bias of the last axis of x [B, ..., I], float32 [B, ..., O]."""
        sums = integer_product(read.quantize(x), self.values)
        return self._rescaled(sums, read)

    def convolution(
        self, x_BHWI: jax.Array, read: InputRange, stride: int, padding: tuple[int, int]
    ) -> jax.Array:
        """2-D convolution of x with this kernel [H, W, I, O], float32 [B, H', W', O].

        Args:
          padding: zeros before and after each spatial axis.
        """
        q_BHWI = pad_levels(read.quantize(x_BHWI), shifted_zero(read), (padding, padding))
        return self._rescaled(integer_sums(q_BHWI, self.values, (stride, stride)), read)

    def _rescaled(self, sums: jax.Array, read: InputRange) -> jax.Array:
        """Sums of shifted levels times values, int32 [B, ..., O], to what they stand for."""
        middle = [1] * (sums.ndim - 2)
        total_O = jnp.sum(self.values, axis=range(self.values.ndim - 1), dtype=jnp.int32)
        zero_B = shifted_zero(read).astype(jnp.int32)
        offset = (zero_B[:, None] * total_O[None]).reshape(len(zero_B), *middle, -1)
        unit = (read.step_B[:, None] * self.scales_O[None]).reshape(len(zero_B), *middle, -1)
        return (sums - offset).astype(jnp.float32) * unit


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["tensor", "totals_O"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class PackedIntegerKernel:
    """Stands where a kernel stood: one of 8-bit integers that stays packed (`models.packed`).

    Attributes:
      tensor: what `integer_kernel` would decode.
      totals_O: int32, sums of each output's integers.
    """

    tensor: VQTensor
    totals_O: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel."""
        return self.tensor.shape

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.tensor.nbytes + self.totals_O.nbytes


AnyIntegerKernel = IntegerKernel | PackedIntegerKernel


def integer_kernel(tensor: VQTensor) -> IntegerKernel:
    """Decodes a quantized kernel to int8 values and one scale per output; nothing is rounded.

    Raises:
      VqjaxError: if its codebooks are not int8, sums of their entries do not fit int8, or it has
        input scales.
    """
    name = f"kernel {tensor.shape}"
    found = _convert({name: tensor}, ())[name]
    assert isinstance(found, IntegerKernel)
    return found


def integerize(params: Mapping[str, Any], stay_packed: Collection[str] = ()) -> dict[str, Any]:
    """Returns the tree with an `IntegerKernel` for every `VQTensor`; other leaves as they are.

    Args:
      stay_packed: paths of those that become a `PackedIntegerKernel`.

    Raises:
      VqjaxError: names every layer that `integer_kernel` refuses, or if none is quantized.
    """
    flat = tree.flatten(params)
    tensors = {path: leaf for path, leaf in flat.items() if isinstance(leaf, VQTensor)}
    if not tensors:
        raise VqjaxError(
            "no weight is quantized, so there are no integers: sample in floating point"
        )
    return tree.unflatten(flat | _convert(tensors, stay_packed))


def _convert(
    tensors: dict[str, VQTensor], stay_packed: Collection[str]
) -> dict[str, AnyIntegerKernel]:
    problems = {path: _misfits(tensor) for path, tensor in tensors.items()}
    fitting = {path: tensor for path, tensor in tensors.items() if not problems[path]}
    packed = {path: tensor for path, tensor in fitting.items() if path in stay_packed}
    decoded, extremes = _decoded({p: t for p, t in fitting.items() if p not in packed})
    totals, more = _totals(packed)
    for path, (low, high) in jax.device_get(extremes | more).items():
        if low < -128 or high > 127:
            problems[path].append(f"sums of codebook entries from {low} to {high} exceed int8")
    found = [f"{path}: {problem}" for path, some in problems.items() for problem in some]
    if found:
        raise gathered(
            found,
            "not all weights are 8-bit integers: sample in floating point, or quantize again with "
            "int8 codebooks whose sums fit:",
        )
    kept = {
        path: PackedIntegerKernel(tensor=packed[path], totals_O=totals[path]) for path in packed
    }
    return {**decoded, **kept}


def _misfits(tensor: VQTensor) -> list[str]:
    found = []
    if tensor.codebooks.dtype != jnp.int8:
        found.append(f"codebooks {tensor.codebooks.dtype}, expected int8")
    if tensor.input_scales is not None:
        found.append("has input scales, which no factor of the output replaces")
    _, fan_in = grouping_lib.matrix_shape(tensor.shape)
    if fan_in > _MOST_INPUTS:
        found.append(f"{fan_in} inputs, expected at most {_MOST_INPUTS}, whose sums fit int32")
    return found


@jax.jit  # of all layers at once: they have many shapes
def _decoded(
    tensors: dict[str, VQTensor],
) -> tuple[dict[str, IntegerKernel], dict[str, tuple[jax.Array, jax.Array]]]:
    """The kernels, and the least and largest sum of each before it became int8."""
    kernels, extremes = {}, {}
    for path, tensor in tensors.items():
        sums_ON = _integers(tensor)
        extremes[path] = (jnp.min(sums_ON), jnp.max(sums_ON))
        assert tensor.codebook_scale is not None  # int8 codebooks have one
        kernels[path] = IntegerKernel(
            values=grouping_lib.from_matrix(sums_ON.astype(jnp.int8), tensor.shape),
            scales_O=tensor.scales.values() * tensor.codebook_scale,
        )
    return kernels, extremes


@jax.jit
def _totals(
    tensors: dict[str, VQTensor],
) -> tuple[dict[str, jax.Array], dict[str, tuple[jax.Array, jax.Array]]]:
    """The sums over each output, and the least and largest integer; no kernel outlives this."""
    totals, extremes = {}, {}
    for path, tensor in tensors.items():
        sums_ON = _integers(tensor)
        totals[path] = jnp.sum(sums_ON, axis=1)
        extremes[path] = (jnp.min(sums_ON), jnp.max(sums_ON))
    return totals, extremes


def _integers(tensor: VQTensor) -> jax.Array:
    """The matrix of a kernel before its scales, int32 [O, N]."""
    _, fan_in = grouping_lib.matrix_shape(tensor.shape)
    sums_OP = decode_integers(tensor.codes, tensor.codebooks, groups=tensor.groups)
    return sums_OP[:, :fan_in]


def shifted_zero(read: InputRange) -> jax.Array:
    """Returns the levels that stand for 0.0 as `InputRange.quantize` gives them, float32 [B]."""
    return read.zero_B - read.shift
