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
_LEAST_GAP = 0.075  # between labels, in heights of a panel
_ROOM = 1.55  # the axis goes on by this factor to the right: labels stand there


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

    def paint(figure: Figure, ink: str) -> None:
        fd, psnr, size = figure.subplots(1, 3)
        count = next(iter(lines.values()))[0]["n"]
        _references(fd, full, halves, ink)
        _lines(fd, lines, "fd", "fd_interval")
        fd.set_yscale("log", nonpositive="clip")
        fd.set_title(f"digit-FD, N = {count:,}: lower is better", color=ink)
        _lines(psnr, lines, "psnr", "psnr_interval")
        psnr.set_title("PSNR to full precision, dB", color=ink)
        _lines(size, lines, "megabytes", None)
        size.set_yscale("log")
        whole = "" if full is None else f" (full precision: {full['bytes'] / 1e6:.2f})"
        size.set_title(f"Stored U-Net, MB{whole}", color=ink)
        for axes in (fd, psnr, size):
            axes.set_xscale("log")
            axes.set_xticks(bits, [f"{value:g}" for value in bits])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel("stored bits per quantized weight")
            axes.grid(color=ink, alpha=0.11, linewidth=0.6)
        for axes in (fd, size):
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        _plain_ticks(fd, [value for row in rows for value in row.get("fd_interval", [row["fd"]])])
        _plain_ticks(size, [row["bytes"] / 1e6 for line in lines.values() for row in line])
        for axes, name in ((fd, "fd"), (psnr, "psnr"), (size, "megabytes")):
            _label(axes, lines, name)

    return figures.opaque(paint, _INCHES)


def by_method(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The points of each method from few bits to many, methods in the order of `_NAMES`."""
    found = {}
    for method in _NAMES:
        own = [{**row, "megabytes": row["bytes"] / 1e6} for row in rows if row["method"] == method]
        if own:
            found[method] = sorted(own, key=lambda row: row["bits_per_weight"])
    return found


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Moves numbers apart, by no more than it takes, until none is within `gap` of another."""
    order = np.argsort(places, kind="stable")
    groups: list[list[float]] = []  # [sum of centres asked for, members]: each a run of labels
    for place in np.asarray(places, float)[order]:
        groups.append([place, 1])
        while len(groups) > 1 and _centre(groups[-1]) - _centre(groups[-2]) < gap * 0.5 * (
            groups[-1][1] + groups[-2][1]
        ):
            total, members = groups.pop()
            groups[-1] = [groups[-1][0] + total, groups[-1][1] + members]
    moved: list[float] = []
    for total, members in groups:
        offsets = gap * (np.arange(members) - (members - 1) / 2)
        moved += list(total / members + offsets)
    result = np.empty(len(moved))
    result[order] = moved
    return [float(value) for value in result]


def _centre(group: list[float]) -> float:
    return group[0] / group[1]


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
    text = f"real half against half {halves['fd']:.2g} (N = {halves['n']})"
    axes.text(0.015, low, text, va="top", **style)
    if full is not None:
        axes.axhline(full["fd"], color=ink, linewidth=0.8, linestyle=(0, (5, 3)))
        axes.text(0.015, high, f"full precision {full['fd']:.2f}", va="bottom", **style)


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


def _label(axes: Axes, lines: Mapping[str, list[dict[str, Any]]], name: str) -> None:
    """Writes each line's name beside its last point, moved apart where they would touch."""
    left, right = axes.get_xlim()
    axes.set_xlim(left, right * _ROOM)
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = [(line[-1]["bits_per_weight"], line[-1][name]) for line in lines.values()]
    at = [to_axes.transform(end) for end in ends]
    places = spread([y for _, y in at], _LEAST_GAP)
    inside = max(0.0, _LEAST_GAP / 2 - min(places)) or min(0.0, 1 - _LEAST_GAP / 2 - max(places))
    beside = max(x for x, _ in at) + 0.045
    for method, (x, y), place in zip(lines, at, places):
        axes.annotate(
            _NAMES[method],
            (x, y),
            (beside, place + inside),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=_COLOURS[method],
            fontsize=7.5,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": _COLOURS[method], "linewidth": 0.5},
        )
