# SPDX-License-Identifier: Apache-2.0
"""Times of `bench kernels` added up: of a step, and of parts that the design has targets for."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

TARGETS = {8: 1.0, 16: 1.0, 32: 0.95, 64: 0.95}
"""Ratios to dense that kernels are designed for on a GPU, by the side of the image that layers
see."""

FEW_ROWS, FEW_ROWS_TARGET = 16, 3.0
"""The same for layers that wait for their weights. AQLM's README claims up to 3.0 for its CUDA
kernel of two codebooks with 256 entries, and up to 0.7 for the one in Triton, which takes all."""


def of(records: Sequence[Mapping[str, Any]], *, targets: bool) -> list[dict[str, Any]]:
    """Adds up layers of the model, as often as it has them, for each batch: those of each step of a
    sampler apart from what it computes before its loop, those of each level of the U-Net, and those
    of few rows.

    Args:
      records: of `kernels.measure`.
      targets: whether to name those of the design, which are for GPUs.
    """
    found = []
    for batch in dict.fromkeys(record["batch"] for record in records):
        chosen = [record for record in records if record["batch"] == batch]
        for name, (some, target) in _parts_of_model(chosen).items():
            one: dict[str, Any] = {"layers": name, "batch": batch} | {
                field: sum(record["count"] * record[field] for record in some)
                for field in ("seconds", "dense_seconds", "packed_bytes", "dense_bytes")
            }
            one["ratio_to_dense"] = one["dense_seconds"] / one["seconds"]
            found.append(one | {"target": target if targets else None})
    return found


def _parts_of_model(
    records: Sequence[Mapping[str, Any]],
) -> dict[str, tuple[list[Mapping[str, Any]], float | None]]:
    """Layers and target by a name for people; a level is what sees images of one size."""
    inside = [record for record in records if record["in_each_step"]]
    levels: dict[int, list[Mapping[str, Any]]] = {}
    for record in inside:
        levels.setdefault(math.isqrt(math.prod(record["x"][1:-1])), []).append(record)
    before = [record for record in records if not record["in_each_step"]]
    few = [record for record in records if record["rows"] <= FEW_ROWS]
    found = {
        "Layers of a step": (inside, None),
        "Layers before the first step": (before, None),
        **{
            f"Layers that see {side}x{side}": (levels[side], TARGETS.get(side))
            for side in sorted(levels)[::-1]
        },
        f"Layers of 1 to {FEW_ROWS} rows": (few, FEW_ROWS_TARGET),
    }
    return {name: part for name, part in found.items() if part[0]}
