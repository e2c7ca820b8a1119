# SPDX-License-Identifier: Apache-2.0
"""Searches of few rounds, for runs whose search is not what is tested."""

from collections.abc import Callable
from typing import Any

from vqjax.core import compress_tree
from vqjax.core.compress import Effort, compress_layer
from vqjax.pipeline import quantize

EFFORT = Effort(start_steps=4, feedback_rounds=2, descent_rounds=1, store_rounds=1)


def search(put: Callable[[Any, str, Any], object] = setattr) -> None:
    """Has whole models and trees compressed with little effort.

    Args:
      put: as `setattr`; `monkeypatch.setattr` in tests, a process of its own keeps it.
    """

    def compress(*arguments, **settings):
        return compress_layer(*arguments, **settings | {"effort": EFFORT})

    for module in (quantize, compress_tree):
        put(module, "compress_layer", compress)
