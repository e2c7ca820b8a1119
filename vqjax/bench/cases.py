# SPDX-License-Identifier: Apache-2.0
"""One layer shape at one batch size: with a packed weight, and with one decoded at load.

Dimension key:  O outputs   N fan-in   P the same, padded   H W window   I inputs
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vqjax.core import grouping
from vqjax.kernels import decode, dispatch, specs
from vqjax.kernels.books import books_for
from vqjax.kernels.dispatch import Choice, Implementations
from vqjax.kernels.problem import AnyOperands, IntegerOperands, Operands, Problem, Scaling
from vqjax.kernels.schedule import Schedule, bias_dtype
from vqjax.kernels.vq_conv import api as conv
from vqjax.kernels.vq_conv import ref as conv_ref
from vqjax.kernels.vq_conv.window import Window
from vqjax.kernels.vq_matmul import api as matmul
from vqjax.kernels.vq_matmul import ref as matmul_ref
from vqjax.models import layers as model_layers


class Case(NamedTuple):
    """A layer in floating point, or in integers.

    Attributes:
      operands: of the packed weight. In integers x is padded already, as by the sampler.
      kernel: the decoded weight, as the model holds a dense one (`decoded`), or in int8.
    """

    layer: specs.Layer
    batch: int
    problem: Problem
    operands: AnyOperands
    kernel: jax.Array

    @property
    def window(self) -> Window:
        """Of a convolution."""
        pad = (0, 0) if self.problem.integer else self.layer.padding
        return Window(self.layer.window, self.problem.strides, (pad, pad))

    def packed(self, operands: AnyOperands) -> jax.Array:
        """The operation on the path that is asked for."""
        if isinstance(operands, IntegerOperands):
            return dispatch.run(self.problem, operands, self.ways)
        if self.layer.op == "vq_matmul":
            return matmul.vq_matmul(*operands)
        geometry = self.window._asdict()
        return conv.vq_conv(*operands, window=geometry.pop("size"), **geometry)

    def scheduled(self, operands: AnyOperands, *, path: str, schedule: Schedule | None) -> Any:
        """The operation by a kernel, on a GPU with this schedule."""
        return self.ways.kernels[path].run(operands, schedule)

    @property
    def ways(self) -> Implementations:
        """What there is to run it."""
        if self.layer.op == "vq_matmul":
            return matmul.ways(self.problem)
        return conv.ways(self.problem, self.window)

    def dense(self, operands: tuple[jax.Array, jax.Array, Any]) -> jax.Array:
        """The model's own layer with a weight that was decoded at load.

        Args:
          operands: x, kernel and bias; in integers the levels, the kernel and a `Scaling`.
        """
        x, kernel, last = operands
        of = self.layer
        if isinstance(last, Scaling):
            if of.op == "vq_matmul":
                return last.apply(matmul_ref.integer_product(x, kernel))
            sums = conv_ref.integer_sums(x, kernel, self.problem.strides)
            return last.apply(sums.reshape(-1, of.outputs)).reshape(sums.shape)
        module = (
            model_layers.Conv(of.outputs, of.window, of.stride, of.padding)
            if is_image(of)
            else model_layers.Dense(of.outputs)
        )
        params = {"kernel": kernel, "bias": last}
        y = module.apply({"params": params}, x.reshape(self.batch, *of.x_shape[1:]))
        assert isinstance(y, jax.Array)  # nothing else is asked of the module
        return y if of.op == "vq_conv" else y.reshape(len(x), -1)

    @property
    def dense_operands(self) -> tuple[jax.Array, jax.Array, Any]:
        """What `dense` takes; in floating point of one type, as sampling places it."""
        if isinstance(self.operands, IntegerOperands):
            return self.operands.x, self.kernel, self.operands.scaling()
        return self.operands.x, self.kernel, self._bias(self.problem.dtype)

    def packed_operands(self, schedule: Schedule | None) -> AnyOperands:
        """What the operation reads, as sampling places it (`sampling.weights`).

        Args:
          schedule: of a GPU kernel, which reads more than what is stored; None for others.
        """
        if schedule is None:
            return self.operands
        of = self.operands
        books = books_for(self.problem, staged=schedule.kind == "staged")
        prepared = books.prepare(of.codebooks_MKG, of.scales_O, of.codebook_scale)
        return of._replace(bias_O=self._bias(bias_dtype(self.problem, schedule)), prepared=prepared)

    def _bias(self, dtype: str) -> jax.Array:
        assert self.operands.bias_O is not None  # all of them have one
        return self.operands.bias_O.astype(dtype)

    @property
    def stored(self) -> tuple[Any, ...]:
        """Codes, codebooks and scales."""
        of = self.operands
        return of.packed_OY, of.codebooks_MKG, of.scales_O, of.codebook_scale

    def choice(self) -> Choice:
        """The path that would be taken."""
        return dispatch.decide(self.problem, self.ways)


def case_of(layer: specs.Layer, batch: int, dtype: str, seed: int = 0) -> Case:
    """Returns a layer with random arrays, which exist while it is looked at."""
    problem, shape = layer.problem(batch, dtype), layer.operands_shape(batch)
    if not problem.integer:
        operands = specs.random_operands(problem, shape, seed=seed)
        return Case(layer, batch, problem, operands, decoded(operands, problem, is_image(layer)))
    if layer.op == "vq_conv":
        images, *sides, inputs = shape
        shape = (images, *(side + sum(layer.padding) for side in sides), inputs)
    operands = specs.random_integer_operands(problem, shape, seed=seed)
    return Case(layer, batch, problem, operands, decoded_integers(operands, problem))


def is_image(layer: specs.Layer) -> bool:
    """Whether the layer is a convolution, of one pixel perhaps."""
    return len(layer.x_shape) == 4


@functools.partial(jax.jit, static_argnames=("problem", "image"))
def decoded(operands: Operands, problem: Problem, image: bool) -> jax.Array:
    """The weight as the model holds a dense one: [H, W, I, O] of a convolution, else [I, O]."""
    w_OP = decode.decode(
        operands.packed_OY,
        operands.codebooks_MKG,
        operands.scales_O,
        operands.codebook_scale,
        groups=problem.groups,
    )
    return _kernel(w_OP.astype(problem.dtype), problem, image)


@functools.partial(jax.jit, static_argnames="problem")
def decoded_integers(operands: IntegerOperands, problem: Problem) -> jax.Array:
    """The integers of the weight, int8 [H, W, I, O] of a 3x3 convolution, else [I, O]."""
    w_OP = decode.decode_integers(operands.packed_OY, operands.codebooks_MKG, groups=problem.groups)
    return _kernel(w_OP.astype(jnp.int8), problem, problem.window > 1)


def _kernel(w_OP: jax.Array, problem: Problem, image: bool) -> jax.Array:
    sides = (problem.window, problem.window) if image else ()
    w_ON = w_OP[:, : problem.fan_in]
    return grouping.from_matrix(w_ON, (*sides, problem.inputs, problem.outputs))
