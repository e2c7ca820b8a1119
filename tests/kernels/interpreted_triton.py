# SPDX-License-Identifier: Apache-2.0
"""Runs kernels in Triton on its CPU interpreter: `python -m tests.kernels.interpreted_triton OUT`.

Whether kernels are compiled or interpreted is decided where they are defined, for a whole process;
hence a program of its own. It reads two lists of cases from its input (JSON, by `Case.plain`) and
writes to OUT (.npz) the results of the first, in their order, and as "tried" what trials of the
second met. Triton's interpreter takes tensors of PyTorch; `Tensor` has what it asks of them.
"""

import dataclasses
import importlib
import json
import os
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.kernels import integers
from vqjax.kernels import specs, triton_gpu
from vqjax.kernels.problem import AnyOperands, Problem
from vqjax.kernels.schedule import Schedule, Tiles, one_tile
from vqjax.kernels.vq_conv.window import Window


@dataclasses.dataclass(frozen=True)
class Case:
    """Attributes:
    problem, schedule: what runs, on `operands`.
    x_shape: of the activations.
    padding: of a convolution, alike on both axes.
    """

    problem: Problem
    schedule: Schedule
    x_shape: tuple[int, ...]
    padding: tuple[int, int] = (0, 0)

    @property
    def window(self) -> Window:
        """Of a convolution."""
        return Window(self.problem.window, self.problem.strides, (self.padding, self.padding))

    def plain(self) -> dict[str, Any]:
        """The same as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, plain: dict[str, Any]) -> "Case":
        """The inverse of `plain`."""
        problem = {**plain["problem"], "strides": tuple(plain["problem"]["strides"])}
        schedule = Schedule(plain["schedule"]["kind"], Tiles(**plain["schedule"]["tiles"]))
        return cls(Problem(**problem), schedule, tuple(plain["x_shape"]), tuple(plain["padding"]))

    def operands(self) -> AnyOperands:
        """Random ones of the problem's kind."""
        make = integers.random_operands if self.problem.integer else specs.random_operands
        return make(self.problem, self.x_shape)

    def run(self) -> jax.Array:
        """The kernel's result."""
        operands = self.operands()
        if self.problem.op == "vq_matmul":
            from vqjax.kernels.vq_matmul import triton as matmul

            return matmul.vq_matmul(operands, self.problem, self.schedule)
        from vqjax.kernels.vq_conv import triton as conv

        return conv.vq_conv(operands, self.problem, self.schedule, self.window)

    def tried(self) -> str:
        """What the dispatcher's trial of such a kernel meets; nothing if it passes."""
        module = importlib.import_module(f"vqjax.kernels.{self.problem.op}.triton")
        try:
            module.try_out(*one_tile(self.problem, self.schedule))
        except ArithmeticError as error:
            return str(error)
        return ""


TYPES = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "uint8": "u8",
    "int8": "i8",
    "int32": "i32",
}


class Tensor:
    """An array as Triton's interpreter sees a tensor in memory of the host."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = np.ascontiguousarray(array)
        self.dtype, self.shape = TYPES[self.array.dtype.name], self.array.shape

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def cpu(self) -> "Tensor":
        return self

    def untyped_storage(self) -> "Tensor":
        return self

    def new_empty(self, *args: Any, **kwargs: Any) -> "Tensor":
        return Tensor(self.array)

    def set_(self, storage: "Tensor", *args: Any) -> "Tensor":
        return storage

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def element_size(self) -> int:
        return self.array.itemsize

    def numel(self) -> int:
        return self.array.size

    def is_contiguous(self) -> bool:
        return True

    def copy_(self, other: "Tensor") -> None:
        """Host and device are one."""


def launch(kernel, operands, *, grid, shape, dtype, constants, **unused) -> jax.Array:
    """As `triton_gpu.launch`, by the interpreter; trials call it from a compiled program."""
    unseen = np.nan if jnp.issubdtype(dtype, jnp.floating) else -1  # what is not stored is seen

    def run(*operands: jax.Array) -> np.ndarray:
        y = Tensor(np.full(shape, unseen, jnp.dtype(dtype)))
        kernel[grid](*(Tensor(np.asarray(operand)) for operand in operands), y, **constants)
        return y.array

    return jax.pure_callback(run, jax.ShapeDtypeStruct(shape, dtype), *operands)


def compute_bfloat16() -> None:
    """The interpreter keeps bfloat16 as integers of the same bits, and computes with those as such.

    Corrected are the operations of our kernels.
    """
    import triton.language as tl  # pyright: ignore[reportMissingImports]
    from triton.runtime import interpreter  # pyright: ignore[reportMissingImports]

    dot, add = interpreter.InterpreterBuilder.create_dot, interpreter.InterpreterBuilder.create_fadd

    def wide(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return dot(self, wide(a), wide(b), *rest)

    def create_fadd(self, a, b):
        if a.dtype.scalar != tl.bfloat16:
            return add(self, a, b)
        sums = (wide(a).data + wide(b).data).astype(jnp.bfloat16)
        return interpreter.TensorHandle(sums.view(np.uint16), tl.bfloat16)

    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter.InterpreterBuilder.create_fadd = create_fadd


def main() -> None:
    assert os.environ["TRITON_INTERPRET"] == "1"
    compute_bfloat16()
    triton_gpu.launch = launch
    cases, trials = ([Case.of(plain) for plain in each] for each in json.load(sys.stdin))
    # NumPy's files do not know bfloat16; float32 holds all that it can be.
    results = [np.asarray(case.run(), np.float32) for case in cases]
    np.savez(sys.argv[1], *results, tried=[case.tried() for case in trials])


if __name__ == "__main__":
    main()
