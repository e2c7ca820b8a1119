# SPDX-License-Identifier: Apache-2.0
"""Counted floating-point operations of weight layers: dense, and by lookup tables.

A lookup table holds the products of an input vector with every codebook entry, once for all
outputs; an output then adds M table values per vector. One multiply-add counts 2, one addition 1.

Dimension key:  O outputs   N fan-in   J vectors of a row   M codebooks   K entries   G weights of a
                vector   P output positions
"""

import math
from typing import NamedTuple

from vqjax.core.grouping import groups_per_row, matrix_shape
from vqjax.core.plan import LayerSpec
from vqjax.kernels.lut_matmul import counts


class Flops(NamedTuple):
    """Operations of one layer or of many; `lookup` uses tables only where they save."""

    dense: int
    lookup: int

    @property
    def ratio(self) -> float:
        """Lookup over dense."""
        return self.lookup / self.dense if self.dense else math.nan


def layer_flops(shape: tuple[int, ...], spec: LayerSpec, positions: int) -> Flops:
    """Counts one layer.

    Args:
      shape: kernel shape, Linen layout.
      spec: how it is stored.
      positions: P, output pixels or tokens that the layer computes.

    Returns:
      dense = 2 N O P. lookup = 2 (J G) M K P for the tables and M J O P for the sums, or dense
      where that is less.
    """
    outputs, fan_in = matrix_shape(shape)
    dense = counts.dense(positions, fan_in, outputs)
    if spec.grouping == "scalar":
        return Flops(dense, dense)
    groups = groups_per_row(fan_in, spec.group)
    sizes = groups, spec.group, spec.codebooks, spec.entries, outputs
    return Flops(dense, min(dense, counts.lookup(positions, *sizes)))


def total(layers: list[Flops]) -> Flops:
    """The sum over layers."""
    return Flops(sum(one.dense for one in layers), sum(one.lookup for one in layers))
