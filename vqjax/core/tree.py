# SPDX-License-Identifier: Apache-2.0
"""Nested dicts of parameters as flat ones, keyed by paths such as "unet/out/conv/kernel"."""

from collections.abc import Mapping
from typing import Any

from vqjax.errors import VqjaxError

SEPARATOR = "/"


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `{path: leaf}` in sorted order. Everything that is no mapping is a leaf.

    Empty sub-trees vanish, so `unflatten(flatten(tree))` equals `tree` up to those.

    Raises:
      VqjaxError: if a key is not a string, is empty or contains "/".
    """
    flat: dict[str, Any] = {}
    _collect(tree, "", flat)
    return dict(sorted(flat.items()))


def _collect(tree: Mapping[str, Any], prefix: str, flat: dict[str, Any]) -> None:
    for key, value in tree.items():
        if not isinstance(key, str) or not key or SEPARATOR in key:
            raise VqjaxError(
                f"parameter name {key!r} below {prefix or 'the root'!r}: "
                f"names are non-empty strings without {SEPARATOR!r}"
            )
        if isinstance(value, Mapping):
            _collect(value, f"{prefix}{key}{SEPARATOR}", flat)
        else:
            flat[prefix + key] = value


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`: nested dicts with sorted keys.

    Raises:
      VqjaxError: if one path is both a leaf and a prefix of another.
    """
    tree: dict[str, Any] = {}
    for path in sorted(flat):
        *parents, name = path.split(SEPARATOR)
        node = tree
        for depth, parent in enumerate(parents):
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                leaf = SEPARATOR.join(parents[: depth + 1])
                raise VqjaxError(f"{leaf!r} is a leaf, yet {path!r} lies below it: rename one")
        node[name] = flat[path]
    return tree
