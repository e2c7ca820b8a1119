# SPDX-License-Identifier: Apache-2.0
"""A state of thousands of small arrays as few arrays, and back.

Orbax takes milliseconds for each array that it writes, whatever its size: a checkpoint of tuning,
with thousands of them, would take as long as many steps.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SMALL = 1 << 20
"""Bytes from which on an array stays by itself."""


def pack(state: Any) -> dict[str, Any]:
    """Returns the arrays of a state: large ones where they are, small ones of each type as one in
    host memory.

    Args:
      state: pytree of arrays, of any shapes and types; random keys stay by themselves.
    """
    leaves = jax.tree.leaves(state)
    alone, together = _parts(leaves)
    packed = {_name(index): leaves[index] for index in alone}
    for dtype, members in together.items():
        parts = jax.device_get([leaves[index] for index in members])
        packed[dtype] = np.concatenate([np.ravel(part) for part in parts])
    return packed


def packed_shapes(like: Any) -> dict[str, Any]:
    """Returns shapes, types and places of what `pack` makes of such a state.

    Args:
      like: a state, or what `shapes_of` returns.
    """
    leaves = jax.tree.leaves(shapes_of(like))
    alone, together = _parts(leaves)
    shapes: dict[str, Any] = {_name(index): leaves[index] for index in alone}
    for dtype, members in together.items():
        total = sum(leaves[index].size for index in members)
        shapes[dtype] = np.empty(total, leaves[members[0]].dtype)  # that is, in host memory
    return shapes


def unpack(packed: Mapping[str, Any], like: Any) -> Any:
    """Returns the state that `pack` was given; its arrays lie where those of `like` do.

    Args:
      packed: what `pack` returned.
      like: a state of the same shapes and types, or what `shapes_of` returns.
    """
    leaves, treedef = jax.tree.flatten(shapes_of(like))
    alone, together = _parts(leaves)
    found = {index: packed[_name(index)] for index in alone}
    for dtype, members in together.items():
        ends = np.cumsum([leaves[index].size for index in members])
        for index, part in zip(members, np.split(packed[dtype], ends[:-1]), strict=True):
            shape, place = leaves[index].shape, leaves[index].sharding
            # A step may take the memory of what it is given.
            found[index] = jax.device_put(part.reshape(shape), place, may_alias=False)
    return treedef.unflatten([found[index] for index in range(len(leaves))])


def shapes_of(state: Any) -> Any:
    """Returns the shapes, types and places of a state, which take no memory.

    Orbax has a function like it, which makes a random key the integers that it is made of.
    """
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )


def _parts(leaves: Sequence[Any]) -> tuple[list[int], dict[str, list[int]]]:
    """Returns which leaves stay by themselves, and by type which are one array."""
    alone: list[int] = []
    together: dict[str, list[int]] = {}
    for index, leaf in enumerate(leaves):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
        small = not is_key and leaf.size * leaf.dtype.itemsize < SMALL
        (together.setdefault(str(leaf.dtype), []) if small else alone).append(index)
    return alone, together


def _name(index: int) -> str:
    return f"leaf {index}"
