# SPDX-License-Identifier: Apache-2.0
"""Compression of any model's parameters: nested dicts of arrays, whatever the layers are called.

Dimension key:  N fan-in   J vectors of a row

The kernels' layout is that of Flax: linear [inputs, outputs], convolution [height, width, inputs,
outputs]. A layer's moment S = mean of x x^T over its inputs is [N, N], columns in the order of
`core.grouping.to_matrix`; for linear layers that is the order of the inputs.
"""

import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vqjax.core import grouping, tree
from vqjax.core.compress import Effort, LayerStats, check_layer, compress_layer
from vqjax.core.plan import LayerSpec, Plan, best_spec
from vqjax.core.tensor import VQTensor
from vqjax.errors import VqjaxError, gathered


class Compressed(NamedTuple):
    """What `compress_tree` returns.

    Attributes:
      params: the tree, with a `VQTensor` at each path of the plan.
      stats: errors and bits by path.
    """

    params: dict[str, Any]
    stats: dict[str, LayerStats]


def compress_tree(
    params: Mapping[str, Any],
    moments: Mapping[str, jax.typing.ArrayLike] | None,
    plan: Mapping[str, LayerSpec],
    *,
    seed: int = 0,
    effort: Effort | None = None,
    on_layer: Callable[[str, LayerStats], None] = lambda path, stats: None,
) -> Compressed:
    """Compresses the kernels that a plan names; all other leaves are handed on as they are.

    Layers do not influence each other: the result for one depends on its kernel, moment, spec, path
    and the seed.

    Args:
      params: nested dict of arrays; paths join its keys by "/".
      moments: S [N, N] by path; a layer without one weighs all its inputs alike.
      plan: a `Plan` (`uniform_plan` makes one for any model) or a dict of `LayerSpec` by path.
      seed: of the search.
      effort: how hard to search.
      on_layer: called as each layer is done.

    Raises:
      VqjaxError: lists every layer of the plan that is missing, has no kernel of two or four axes,
        has fewer vectors than codebook entries, NaN or infinite weights, or a moment that cannot be
        its own; and every moment of a layer that is not in the plan.
    """
    flat, moments = tree.flatten(params), moments or {}
    problems = [problem for path in plan for problem in _problems(path, flat, moments, plan[path])]
    unused = [path for path in moments if path not in plan]
    problems += [f"{path}: a moment, but no such layer in the plan" for path in unused]
    if problems:
        raise gathered(sorted(problems), "the plan does not fit the tree; correct it:")
    key, stats = jax.random.key(seed), {}
    for path, spec in plan.items():
        layer_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        flat[path], stats[path] = compress_layer(
            flat[path], moments.get(path), spec, key=layer_key, effort=effort
        )
        on_layer(path, stats[path])
    return Compressed(tree.unflatten(flat), stats)


def uniform_plan(params: Mapping[str, Any], *, bits: float, select: str = r"(^|/)kernel$") -> Plan:
    """Gives every chosen layer the same budget, and the code that promises the least error in it.

    Args:
      params: nested dict of arrays, or of anything with a shape.
      bits: most stored bits per weight, in each layer: codes, codebooks and scales.
      select: regular expression; leaves of two or four axes whose path it is found in are chosen.

    Raises:
      VqjaxError: if no leaf is chosen, or if one layer is too small for any code in the budget.
    """
    shapes = {path: tuple(np.shape(leaf)) for path, leaf in tree.flatten(params).items()}
    chosen = {p: s for p, s in shapes.items() if len(s) in (2, 4) and re.search(select, p)}
    if not chosen:
        raise VqjaxError(
            f"no leaf of two or four axes has {select!r} in its path; there are {sorted(shapes)}"
        )
    layers, problems = {}, []
    for path, shape in chosen.items():
        try:
            layers[path] = best_spec(shape, bits, _kind(shape))
        except VqjaxError as error:
            problems.append(f"{path}: {error}")
    if problems:
        raise gathered(problems, "layers too small for their budget; raise it or leave them out:")
    return Plan(layers, bits)


def _kind(shape: tuple[int, ...]) -> str:
    if len(shape) == 2:
        return "feed_forward"
    return "conv3x3" if shape[:2] == (3, 3) else "conv1x1"


def _problems(
    path: str,
    flat: Mapping[str, Any],
    moments: Mapping[str, jax.typing.ArrayLike],
    spec: LayerSpec,
) -> list[str]:
    """What is wrong with one layer of the plan, one line each."""
    if path not in flat:
        return [f"{path}: the tree has no such leaf"]
    leaf = flat[path]
    if isinstance(leaf, VQTensor):
        return [f"{path}: quantized already"]
    shape = tuple(np.shape(leaf))
    if len(shape) not in (2, 4) or 0 in shape or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return [
            f"{path}: {leaf.dtype} {shape}, expected floats, [inputs, outputs] or "
            f"[height, width, inputs, outputs]"
        ]
    found = [f"{path}: {problem}" for problem in spec.problems()]
    if spec.grouping == "conv3x3" and shape[:2] != (3, 3):
        found.append(f"{path}: grouping conv3x3 for a kernel {shape}")
    outputs, fan_in = grouping.matrix_shape(shape)
    vectors = outputs * grouping.groups_per_row(fan_in, spec.group)
    if spec.grouping != "scalar" and spec.entries > vectors:
        found.append(
            f"{path}: codebooks of {spec.entries} entries for {vectors} vectors; take at most "
            f"{vectors} entries, or leave the layer out"
        )
    try:
        check_layer(leaf, moments.get(path))
    except VqjaxError as error:
        found.append(f"{path}: {error}")
    return found
