# SPDX-License-Identifier: Apache-2.0
"""The report's table of all layers: a row each in the order of the plan, then means and medians."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Layer = Mapping[str, Any]

FIGURES = {  # field of a layer: head of its column, in order
    "bits_per_weight": "bits",
    "codes_entropy": "entropy",
    "rel_weight_mse": "weight error",
    "rel_output_mse": "output error",
    "rel_output_mse_test": "held-out",
    "bound": "bound",
    "ratio_to_bound": "× bound",
    "scalar_bits_per_weight": "scalar bits",
    "scalar_output_mse": "scalar error",
    "scalar_output_mse_test": "scalar held-out",
    "seconds": "s",
}
COLUMNS = ("layer", "shape", "code", *FIGURES.values())

_NOTE = (
    "Code: codebooks × entries / weights per vector. Bits: all stored, per weight; entropy: the "
    "same with codes in their empirical entropy. Errors are relative squared errors of the weights "
    "and of the layer's output on calibration inputs; held-out: of the output on inputs of other "
    "images and timesteps. Bound: the least output error of Gaussian weights at these bits on the "
    "calibration inputs, and the output error over it. Scalar: the baseline on the same inputs. "
    "s: search, with compilation of what was new. Means count every weight alike; their seconds "
    "are the sum."
)
_NOTHING = "–"


def note(layers: Sequence[Layer]) -> str:
    """What the columns mean, and which layers have no bound."""
    unbounded = [math.prod(x["shape"][:-1]) for x in layers if x["bound"] is None]
    if not unbounded:
        return _NOTE
    return f"{_NOTE} From {min(unbounded):,} inputs on, eigenvalues take too long for a bound."


def cells(layer: Layer) -> list[str]:
    """One row, in the order of `COLUMNS`."""
    return [
        layer["path"].removeprefix("unet/").removesuffix("/kernel"),
        "×".join(map(str, layer["shape"])),
        f"{layer['codebooks']}×{layer['entries']} / {layer['group']}",
        *(three_digits(layer[field]) for field in FIGURES),
    ]


def summary(layers: Sequence[Layer]) -> list[list[str]]:
    """The rows below: means by weights with the sum of seconds, and medians of layers."""
    weights = [math.prod(layer["shape"]) for layer in layers]
    means, medians = [], []
    for field in FIGURES:
        known = [(x[field], w) for x, w in zip(layers, weights) if _is_finite(x[field])]
        if not known:
            means.append(_NOTHING)
            medians.append(_NOTHING)
            continue
        values, counts = zip(*known)
        mean = sum(v * w for v, w in known) / sum(counts)
        means.append(three_digits(sum(values) if field == "seconds" else mean))
        medians.append(three_digits(statistics.median(values)))
    return [
        ["mean by weights", f"{sum(weights):,}", "", *means],
        ["median of layers", "", "", *medians],
    ]


def three_digits(value: float | None) -> str:
    """`value` to three significant digits, whole from a thousand on."""
    if value is None or math.isnan(value):
        return _NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:#.3g}".rstrip(".")


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
