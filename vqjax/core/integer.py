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
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqjax.core import grouping as grouping_lib
from vqjax.core import tree
from vqjax.core.activations import InputRange
from vqjax.core.tensor import VQTensor
from vqjax.errors import VqjaxError, gathered
from vqjax.kernels import decode as decode_lib

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
        sums = _dot(read.quantize(x), self.values)
        return self._rescaled(sums, read)

    def convolution(
        self, x_BHWI: jax.Array, read: InputRange, stride: int, padding: tuple[int, int]
    ) -> jax.Array:
        """2-D convolution of x with this kernel [H, W, I, O], float32 [B, H', W', O].

        It is a sum over the window of products: XLA has fast products of int8 on more devices than
        convolutions of int8.

        Args:
          padding: zeros before and after each spatial axis.
        """
        q_BHWI = _pad(read.quantize(x_BHWI), read, padding)
        batch, *sides, inputs = q_BHWI.shape
        window = self.shape[:2]
        # Where the last window of each axis begins.
        last = [(side - size) // stride * stride for side, size in zip(sides, window)]
        sums = None
        for y, x in np.ndindex(*window):
            part_BHWI = jax.lax.slice(
                q_BHWI,
                (0, y, x, 0),
                (batch, y + last[0] + 1, x + last[1] + 1, inputs),
                (1, stride, stride, 1),
            )
            product_BHWO = _dot(part_BHWI, self.values[y, x])
            sums = product_BHWO if sums is None else sums + product_BHWO
        assert sums is not None  # a window has a first place
        return self._rescaled(sums, read)

    def _rescaled(self, sums: jax.Array, read: InputRange) -> jax.Array:
        """Sums of shifted levels times values, int32 [B, ..., O], to what they stand for."""
        middle = [1] * (sums.ndim - 2)
        total_O = jnp.sum(self.values, axis=range(self.values.ndim - 1), dtype=jnp.int32)
        zero_B = _shifted_zero(read).astype(jnp.int32)
        offset = (zero_B[:, None] * total_O[None]).reshape(len(zero_B), *middle, -1)
        unit = (read.step_B[:, None] * self.scales_O[None]).reshape(len(zero_B), *middle, -1)
        return (sums - offset).astype(jnp.float32) * unit


def integer_kernel(tensor: VQTensor) -> IntegerKernel:
    """Decodes a quantized kernel to int8 values and one scale per output; nothing is rounded.

    Raises:
      VqjaxError: if its codebooks are not int8, sums of their entries do not fit int8, or it has
        input scales.
    """
    return _convert({f"kernel {tensor.shape}": tensor})[f"kernel {tensor.shape}"]


def integerize(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tree with an `IntegerKernel` for every `VQTensor`; other leaves as they are.

    Raises:
      VqjaxError: names every layer that `integer_kernel` refuses, or if none is quantized.
    """
    flat = tree.flatten(params)
    tensors = {path: leaf for path, leaf in flat.items() if isinstance(leaf, VQTensor)}
    if not tensors:
        raise VqjaxError(
            "no weight is quantized, so there are no integers: sample in floating point"
        )
    return tree.unflatten(flat | _convert(tensors))


def _convert(tensors: dict[str, VQTensor]) -> dict[str, IntegerKernel]:
    problems = {path: _misfits(tensor) for path, tensor in tensors.items()}
    fitting = {path: tensor for path, tensor in tensors.items() if not problems[path]}
    kernels, extremes = _decoded(fitting)
    for path, (low, high) in jax.device_get(extremes).items():
        if low < -128 or high > 127:
            problems[path].append(f"sums of codebook entries from {low} to {high} exceed int8")
    found = [f"{path}: {problem}" for path, some in problems.items() for problem in some]
    if found:
        raise gathered(
            found,
            "not all weights are 8-bit integers: sample in floating point, or quantize again with "
            "int8 codebooks whose sums fit:",
        )
    return kernels


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
        sums_OJG = decode_lib.sum_entries(tensor.unpack(), tensor.codebooks.astype(jnp.int32))
        outputs, fan_in = grouping_lib.matrix_shape(tensor.shape)
        sums_ON = sums_OJG.reshape(outputs, -1)[:, :fan_in]
        extremes[path] = (jnp.min(sums_ON), jnp.max(sums_ON))
        assert tensor.codebook_scale is not None  # int8 codebooks have one
        kernels[path] = IntegerKernel(
            values=grouping_lib.from_matrix(sums_ON.astype(jnp.int8), tensor.shape),
            scales_O=tensor.scales.values() * tensor.codebook_scale,
        )
    return kernels, extremes


def _dot(q: jax.Array, values_IO: jax.Array) -> jax.Array:
    """Product over the last axis of q with the first of the values, int8 x int8 -> int32."""
    axes = (((q.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(q, values_IO, axes, preferred_element_type=jnp.int32)


def _pad(q_BHWI: jax.Array, read: InputRange, padding: tuple[int, int]) -> jax.Array:
    """Pads with what stands for 0.0, which differs from example to example."""
    if not any(padding):
        return q_BHWI
    batch, height, width, inputs = q_BHWI.shape
    zero_B111 = _shifted_zero(read).astype(jnp.int8).reshape(-1, 1, 1, 1)
    shape = (batch, height + sum(padding), width + sum(padding), inputs)
    padded = jnp.broadcast_to(zero_B111, shape)
    return jax.lax.dynamic_update_slice(padded, q_BHWI, (0, padding[0], padding[0], 0))


def _shifted_zero(read: InputRange) -> jax.Array:
    return read.zero_B - read.shift
