# SPDX-License-Identifier: Apache-2.0
"""Layers of real models, for tests and benchmarks: `layers.json`, made from the models.

`tests/kernels/layers_of_models.py` writes that file, and a test compares it with the models.

Dimension key:  M codebooks   K entries   G weights of a vector
"""

import dataclasses
import functools
import importlib.resources
import json

import jax
import jax.numpy as jnp
import numpy as np

from vqjax.kernels import decode
from vqjax.kernels.problem import INTEGER, IntegerOperands, Operands, Problem

Pad = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of a U-Net, and how it is stored.

    Attributes:
      model: that it comes from: a preset, or the file or folder of a quantized model.
      op: "vq_matmul" or "vq_conv".
      x_shape: of one image; [1, I], [1, tokens, I] or [1, H, W, I].
      outputs, window, stride, padding: as the layer has them.
      scalar: whether single weights are stored: the first and the last convolution.
      count: layers of the model that are like this one.
      code: M, K, G and the type of the codebooks, or None: as a plan of about two bits has it.
    """

    model: str
    op: str
    x_shape: tuple[int, ...]
    outputs: int
    window: int
    stride: int
    padding: Pad
    scalar: bool
    count: int
    code: tuple[int, int, int, str] | None = None

    @property
    def sees_latent(self) -> bool:
        """Whether x has positions. What has none follows from timestep and class, and samplers
        compute it before their loop."""
        return any(size > 1 for size in self.x_shape[1:-1])

    def operands_shape(self, batch: int) -> tuple[int, ...]:
        """Returns the shape of x for a batch: [B, H, W, I] of a convolution, else [rows, I]."""
        if self.op == "vq_conv":
            return (batch, *self.x_shape[1:])
        return (batch * int(np.prod(self.x_shape[1:-1])), self.x_shape[-1])

    def problem(self, batch: int, dtype: str) -> Problem:
        """Returns the problem for a batch of images."""
        rows = self.operands_shape(batch)[0]
        if self.op == "vq_conv":
            sides = [(n + sum(self.padding) - self.window) // self.stride + 1 for n in self.image]
            rows = batch * sides[0] * sides[1]
        usual = (
            (1, 256, 1, "int8") if self.scalar else (4, 16, 9 if self.window == 3 else 8, "float16")
        )
        books, entries, group, codebook_dtype = self.code or usual
        if dtype == INTEGER and not self.code:
            codebook_dtype = "int8"
        return Problem(
            op=self.op,
            rows=rows,
            inputs=self.x_shape[-1],
            outputs=self.outputs,
            books=books,
            entries=entries,
            group=group,
            dtype=dtype,
            codebook_dtype=codebook_dtype,
            window=self.window,
            strides=(self.stride, self.stride),
        )

    @property
    def image(self) -> Pad:
        """Height and width that a convolution sees."""
        return self.x_shape[1], self.x_shape[2]


@functools.cache
def layers(op: str) -> tuple[Layer, ...]:
    """Returns the layers that an operation serves, in the order of the models."""
    file = importlib.resources.files("vqjax.kernels") / "layers.json"
    records = json.loads(file.read_text(encoding="utf-8"))
    return tuple(_layer(record) for record in records if record["op"] == op)


def _layer(record: dict) -> Layer:
    fields = {name: value for name, value in record.items() if name != "x"}
    fields["padding"] = tuple(fields["padding"])
    return Layer(x_shape=tuple(record["x"]), **fields)


def random_operands(
    problem: Problem, x_shape: tuple[int, ...], *, bias: bool = True, seed: int = 0
) -> Operands:
    """Returns random arrays for a problem: Gaussian, codes uniform."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, problem.entries, (problem.outputs, problem.groups * problem.books))
    size = (problem.books, problem.entries, problem.group)
    whole = problem.codebook_dtype == "int8"
    books = rng.integers(-127, 128, size) if whole else rng.normal(size=size)
    put = jax.device_put  # which compiles nothing
    return Operands(
        x=put(rng.normal(size=x_shape).astype(jnp.dtype(problem.dtype))),
        packed_OY=put(decode.pack(codes, problem.entries)),
        codebooks_MKG=put(books.astype(jnp.dtype(problem.codebook_dtype))),
        scales_O=put(rng.uniform(0.5, 1.5, problem.outputs).astype(np.float32)),
        codebook_scale=put(np.float32(0.01)) if whole else None,
        bias_O=put(rng.normal(size=problem.outputs).astype(np.float32)) if bias else None,
    )


_sums = jax.jit(decode.decode_integers, static_argnames="groups")


def random_integer_operands(
    problem: Problem, x_shape: tuple[int, ...], *, seed: int = 0
) -> IntegerOperands:
    """Returns random arrays for products of integers: codes and levels uniform.

    No sum of entries exceeds int8; steps are positive, and levels that stand for 0 any.
    """
    rng, most = np.random.default_rng(seed), 127 // problem.books
    codes = rng.integers(0, problem.entries, (problem.outputs, problem.groups * problem.books))
    size = (problem.books, problem.entries, problem.group)
    books_MKG = rng.integers(-most, most + 1, size).astype(np.int8)
    packed_OY = decode.pack(codes, problem.entries)
    w_OP = _sums(packed_OY, books_MKG, groups=problem.groups)
    totals_O = np.asarray(w_OP)[:, : problem.fan_in].sum(axis=1, dtype=np.int32)
    rows, outputs = problem.rows, problem.outputs
    put = jax.device_put  # which compiles nothing
    return IntegerOperands(
        x=put(rng.integers(-128, 128, x_shape).astype(np.int8)),
        packed_OY=put(packed_OY),
        codebooks_MKG=put(books_MKG),
        scales_O=put(rng.uniform(0.5, 1.5, outputs).astype(np.float32)),
        codebook_scale=put(np.float32(0.01)),
        bias_O=put(rng.normal(size=outputs).astype(np.float32)),
        steps_P=put(rng.uniform(0.01, 0.02, rows).astype(np.float32)),
        zeros_P=put(rng.integers(-128, 128, rows).astype(np.int32)),
        totals_O=put(totals_O),
    )
