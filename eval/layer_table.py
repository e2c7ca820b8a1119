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
    "ratio_to_bound": "×\u00a0bound",
    "flops_ratio": "tables",
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
    "calibration inputs (trained weights may do better), and the output error over it: large where "
    "inputs have few directions, as those made of classes. Tables: operations by lookup tables "
    "over those of the dense product; 1 where tables save none. Scalar: the baseline on the same "
    "inputs. s: search beside other layers, with compilation of what was new. Means count every "
    "weight alike; × bound there is mean error over mean bound, tables the ratio of sums, s the "
    "sum."
)
_NOTHING = "–"


def note(layers: Sequence[Layer]) -> str:
    """What the columns mean, and which layers have no bound."""
    unbounded = [math.prod(x["shape"][:-1]) for x in layers if x["bound"] is None]
    if not unbounded:
        return _NOTE
    return f"{_NOTE} No bound from {min(unbounded):,} inputs on: eigenvalues take too long."


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
        whole = {
            "seconds": sum(values),
            "ratio_to_bound": _ratio_of_means(layers),
            "flops_ratio": _ratio_of_operations(layers),
        }
        means.append(three_digits(whole.get(field, mean)))
        medians.append(three_digits(statistics.median(values)))
    return [
        ["mean by weights", f"{sum(weights):,}", "", *means],
        ["median of layers", "", "", *medians],
    ]


def _ratio_of_means(layers: Sequence[Layer]) -> float:
    """Mean error over mean bound; the mean of ratios would be that of the least bound alone."""
    bounded = [(x, math.prod(x["shape"])) for x in layers if x["bound"]]
    error, bound = (
        sum(x[field] * weights for x, weights in bounded) for field in ("rel_output_mse", "bound")
    )
    return error / bound if bound else math.nan


def _ratio_of_operations(layers: Sequence[Layer]) -> float:
    """As of the whole network: layers at many positions count most, whatever their weights."""
    dense, lookup = (sum(x[field] for x in layers) for field in ("flops_dense", "flops_lookup"))
    return lookup / dense if dense else math.nan


def three_digits(value: float | None) -> str:
    """`value` to three significant digits or whole; in powers of ten where it is far from 1."""
    if value is None or math.isnan(value):
        return _NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    if 999.5 <= abs(value) < 1e5:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".").replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
