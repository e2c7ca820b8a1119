# SPDX-License-Identifier: Apache-2.0
"""The figure of `bench pareto`: digit-FD, PSNR and size over stored bits, a line per method."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from vqjax.eval import figures

FULL = "full_precision"
_NAMES = {
    "tuned": "vqjax, tuned",
    "untuned": "vqjax",
    "scalar_tuned": "scalar, tuned",
    "scalar": "scalar",
}
_COLOURS = {
    "tuned": "#1f4f8f",
    "untuned": "#5f9be0",
    "scalar_tuned": "#b03a34",
    "scalar": "#e8938e",
}
_INCHES = (10.6, 3.3)
_MOST_TICKS = 7
_BELOW = 0.78  # digit-FD goes on by this factor below all points: text stands there


def draw(rows: Sequence[Mapping[str, Any]], halves: Mapping[str, float]) -> bytes:
    """The figure as PNG bytes, on white.

    Args:
      rows: points as `vqjax.bench.pareto.with_intervals` returns them.
      halves: of `judges.DIGITS.real_halves`: "fd", "fd_sd" and "n".

    Raises:
      ValueError: if there is no point but full precision.
    """
    lines = by_method(rows)
    if not lines:
        raise ValueError("no points to draw")
    full = next((row for row in rows if row["method"] == FULL), None)
    bits = sorted({row["bits"] for line in lines.values() for row in line})
    named = [b for b in bits if float(b).is_integer() or b in (bits[0], bits[-1])]

    def paint(figure: Figure, ink: str) -> None:
        fd, psnr, size = figure.subplots(1, 3)
        count = next(iter(lines.values()))[0]["n"]
        _references(fd, full, halves, ink)
        _lines(fd, lines, "fd", "fd_interval")
        fd.set_yscale("log", nonpositive="clip")
        least = min(row["fd_interval"][0] for line in lines.values() for row in line)
        fd.set_ylim(bottom=_BELOW * min(halves["fd"] - halves["fd_sd"], max(least, 1e-3)))
        fd.set_title(f"digit-FD, N = {count:,}: lower is better", color=ink)
        _lines(psnr, lines, "psnr", "psnr_interval")
        psnr.set_title("PSNR to full precision, dB", color=ink)
        _lines(size, lines, "megabytes", None)
        size.set_yscale("log")
        whole = "" if full is None else f" (full precision: {full['bytes'] / 1e6:.2f})"
        size.set_title(f"Stored U-Net, MB{whole}", color=ink)
        for axes in (fd, psnr, size):
            axes.set_xscale("log")
            axes.set_xticks(named, [f"{value:g}" for value in named])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel("stored bits per quantized weight")
            axes.grid(color=ink, alpha=0.11, linewidth=0.6)
        for axes in (fd, size):
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        _plain_ticks(fd, [value for row in rows for value in row.get("fd_interval", [row["fd"]])])
        _plain_ticks(size, [row["bytes"] / 1e6 for line in lines.values() for row in line])
        names = [_NAMES[method] for method in lines]
        style: dict[str, Any] = {"loc": "outside lower center", "ncols": len(names)}
        figure.legend(psnr.containers, names, labelcolor=ink, fontsize=8, **style)

    return figures.opaque(paint, _INCHES)


def by_method(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The points of each method from few bits to many, methods in the order of `_NAMES`."""
    found = {}
    for method in _NAMES:
        own = [{**row, "megabytes": row["bytes"] / 1e6} for row in rows if row["method"] == method]
        if own:
            found[method] = sorted(own, key=lambda row: row["bits_per_weight"])
    return found


def _lines(axes: Axes, lines: Mapping[str, list[dict[str, Any]]], name: str, interval) -> None:
    for method, line in lines.items():
        at, values = [row["bits_per_weight"] for row in line], [row[name] for row in line]
        bars = None
        if interval is not None:
            ends = np.array([row[interval] for row in line]).T
            bars = np.abs(ends - np.array(values))
        axes.errorbar(
            at,
            values,
            yerr=bars,
            color=_COLOURS[method],
            marker="o",
            markersize=3.5,
            linewidth=1.3,
            elinewidth=0.9,
            capsize=2,
        )


def _references(axes: Axes, full, halves: Mapping[str, float], ink: str) -> None:
    """What full precision reaches, and what real digits do among themselves."""
    low, high = halves["fd"] - halves["fd_sd"], halves["fd"] + halves["fd_sd"]
    axes.axhspan(low, high, color=ink, alpha=0.07, linewidth=0)
    axes.axhline(halves["fd"], color=ink, linewidth=0.7, linestyle=(0, (1, 2)))
    style: dict[str, Any] = {"fontsize": 7, "color": ink, "transform": axes.get_yaxis_transform()}
    spread = f"{halves['fd']:.2g} ± {halves['fd_sd']:.1g}"
    text = f"grey: real half against half {spread} (N = {halves['n']})"
    if full is not None:
        axes.axhline(full["fd"], color=ink, linewidth=0.8, linestyle=(0, (5, 3)))
        text = f"dashed: full precision {full['fd']:.2f}\n{text}"
    axes.text(0.015, low, text, va="top", linespacing=1.3, **style)


def _plain_ticks(axes: Axes, values: Sequence[float]) -> None:
    """A few round ticks, also where a log axis spans less than a decade."""
    low, high = max(min(values), 1e-3), max(values)
    for digits in ((1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 5), (1,)):
        ticks = [d * 10.0**e for e in range(-4, 6) for d in digits]
        ticks = [tick for tick in ticks if 0.9 * low <= tick <= 1.1 * high]
        if len(ticks) <= _MOST_TICKS:
            break
    axes.set_yticks(ticks)
    axes.yaxis.set_minor_locator(NullLocator())
