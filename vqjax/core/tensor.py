# SPDX-License-Identifier: Apache-2.0
"""The one data type: a weight stored as packed codes into shared codebooks.

Dimension key:  O outputs   N fan-in   C input channels   J vectors of a row   M codebooks
                K entries   G weights of a vector   Y bytes of a row of codes
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from vqjax.core import grouping as grouping_lib
from vqjax.core.host import to_device
from vqjax.core.scales import LogScales
from vqjax.errors import VqjaxError
from vqjax.kernels import decode as decode_lib
from vqjax.kernels.books import Books
from vqjax.kernels.problem import Prepared


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "codebooks", "scales", "input_scales", "codebook_scale", "prepared"],
    meta_fields=["shape", "grouping"],
)
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class VQTensor:
    """Stands where a kernel stood in the tree of parameters; memory in use equals the bits claimed.

    Invariants, which `pack` checks:
      * row o, vector j decodes to scales[o] * sum over m of codebooks[m, code[o, j, m]], and each
        weight is multiplied by the input scale of the channel that it reads, where there are any;
      * the vectors of a row are consecutive columns of the kernel's matrix view (`core.grouping`),
        the last one zero-padded where G does not divide N;
      * codes are below K, stored in about log2 K bits each, in the order (j, m), each row in whole
        bytes (`kernels.decode`);
      * `codebook_scale` is given exactly where the codebooks are int8.

    It is a pytree: `jit`, `vmap`, `scan` and checkpointing see the arrays, while `shape` and
    `grouping` are static.

    Attributes:
      codes: uint8 [O, Y].
      codebooks: float16 [M, K, G], or int8.
      scales: of the rows, O of them.
      input_scales: of the input channels, C of them, or None.
      codebook_scale: float32 scalar, or None.
      shape: kernel shape in Linen layout.
      grouping: "conv3x3", "linear" or "scalar".
      prepared: what GPU kernels read that follows from the others (`prepared_for`), or None. It is
        never stored.
    """

    codes: jax.Array
    codebooks: jax.Array
    scales: LogScales
    input_scales: LogScales | None = None
    codebook_scale: jax.Array | None = None
    prepared: Prepared | None = None
    shape: tuple[int, ...]
    grouping: str

    @classmethod
    def pack(
        cls,
        codes_OJM: jax.Array | np.ndarray,
        codebooks_MKG: jax.Array,
        scales: LogScales | jax.typing.ArrayLike,
        *,
        shape: tuple[int, ...],
        grouping: str,
        input_scales: LogScales | None = None,
        codebook_scale: jax.Array | None = None,
    ) -> "VQTensor":
        """Packs integer codes. Codebooks are stored in the type they come in.

        Args:
          scales: numbers [O] are rounded; see `LogScales`.

        Raises:
          VqjaxError: if the parts do not fit together; every misfit is named. Values of codes are
            unknown inside of `jit`, and not checked there.
        """
        outputs, fan_in = grouping_lib.matrix_shape(shape)
        books, entries, group = codebooks_MKG.shape
        groups = grouping_lib.groups_per_row(fan_in, group)
        problems = []
        if grouping not in grouping_lib.GROUPS:
            problems.append(f"grouping {grouping!r}, expected one of {sorted(grouping_lib.GROUPS)}")
        if codes_OJM.shape != (outputs, groups, books):
            problems.append(f"codes {codes_OJM.shape}, expected {(outputs, groups, books)}")
        scales = scales if isinstance(scales, LogScales) else LogScales.of(scales)
        if scales.count != outputs:
            problems.append(f"scales {(scales.count,)}, expected {(outputs,)}")
        channels = grouping_lib.channels(shape)
        if input_scales is not None and input_scales.count != channels:
            problems.append(f"input_scales {(input_scales.count,)}, expected {(channels,)}")
        if (codebooks_MKG.dtype == jnp.int8) != (codebook_scale is not None):
            problems.append(f"{codebooks_MKG.dtype} codebooks; int8 and codebook_scale go together")
        if not isinstance(codes_OJM, Tracer) and codes_OJM.size:
            least, most = int(codes_OJM.min()), int(codes_OJM.max())
            if least < 0 or most >= entries:
                problems.append(f"codes from {least} to {most}, expected 0 to {entries - 1}")
        if problems:
            found = "; ".join(problems)
            raise VqjaxError(f"kernel {tuple(shape)} in vectors of {group} does not fit: {found}")
        packed = decode_lib.pack(codes_OJM.reshape(outputs, groups * books), entries)
        return cls(
            codes=to_device(packed) if isinstance(packed, np.ndarray) else packed,
            codebooks=codebooks_MKG,
            scales=scales,
            input_scales=input_scales,
            codebook_scale=codebook_scale,
            shape=tuple(shape),
            grouping=grouping,
        )

    @property
    def ndim(self) -> int:
        """Axes of the kernel."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Weights of the kernel, padding not counted."""
        return math.prod(self.shape)

    @property
    def groups(self) -> int:
        """J, vectors of a row."""
        _, fan_in = grouping_lib.matrix_shape(self.shape)
        return grouping_lib.groups_per_row(fan_in, self.codebooks.shape[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of everything stored: codes, codebooks and scales."""
        stored = jax.tree.leaves(dataclasses.replace(self, prepared=None))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in stored)

    @property
    def bits_per_weight(self) -> float:
        """All stored bits over the weights of the kernel."""
        return 8 * self.nbytes / self.size

    def unpack(self) -> jax.Array:
        """Returns the codes as int32 [O, J, M]: of `jax.device_get(tensor)` by NumPy."""
        books, entries, _ = self.codebooks.shape
        codes = decode_lib.unpack(self.codes, self.groups * books, entries)
        return codes.reshape(self.codes.shape[0], self.groups, books)

    def prepared_for(self, books: Books) -> "VQTensor":
        """Returns the tensor with what kernels read that look its vectors up in this way."""
        prepared = books.prepare(self.codebooks, self.scales.values(), self.codebook_scale)
        return dataclasses.replace(self, prepared=prepared)

    def decode_matrix(self) -> jax.Array:
        """Returns the matrix view in float32, [O, N]."""
        return _matrix(self)

    def host_matrix(self) -> np.ndarray:
        """Returns `decode_matrix`, rounding errors apart, made by NumPy.

        For what looks at each tensor once: a model has too many shapes to compile for each.
        """
        _, fan_in = grouping_lib.matrix_shape(self.shape)
        host, scales_O = jax.device_get((self, self.scales.values()))
        matrix_ON = decode_lib.decode(
            host.codes, host.codebooks, scales_O, host.codebook_scale, groups=self.groups
        )[:, :fan_in]
        if self.input_scales is None:
            return matrix_ON
        scales_C = np.asarray(self.input_scales.values())
        return matrix_ON * np.repeat(scales_C, fan_in // self.input_scales.count)

    def decode(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        """Returns the kernel in its own shape. Summed in float32, rounded to `dtype` at the end."""
        return _kernel(self, jnp.dtype(dtype))


# Compiled as wholes: operation by operation, every shape of weight would compile each of them.
@jax.jit
def _matrix(tensor: VQTensor) -> jax.Array:
    _, fan_in = grouping_lib.matrix_shape(tensor.shape)
    books_MKG = decode_lib.real_codebooks(tensor.codebooks, tensor.codebook_scale)
    # No products in multiply-adds: the sums are then those of `CodedWeight`.
    books_MKG, scales_O = jax.lax.optimization_barrier((books_MKG, tensor.scales.values()))
    matrix_ON = decode_lib.decode(tensor.codes, books_MKG, scales_O, groups=tensor.groups)
    matrix_ON = matrix_ON[:, :fan_in]
    if tensor.input_scales is None:
        return matrix_ON
    scales_N = jnp.repeat(tensor.input_scales.values(), fan_in // tensor.input_scales.count)
    return matrix_ON * scales_N[None]


@functools.partial(jax.jit, static_argnums=1)
def _kernel(tensor: VQTensor, dtype: jnp.dtype) -> jax.Array:
    return grouping_lib.from_matrix(_matrix(tensor), tensor.shape).astype(dtype)


def densify(params: Mapping[str, Any], dtype: jax.typing.DTypeLike = jnp.float32) -> dict[str, Any]:
    """Returns the tree with every `VQTensor` decoded; all other leaves as they are."""
    return jax.tree.map(
        lambda leaf: leaf.decode(dtype) if isinstance(leaf, VQTensor) else leaf,
        dict(params),
        is_leaf=lambda leaf: isinstance(leaf, VQTensor),
    )
