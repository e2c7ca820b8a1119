# SPDX-License-Identifier: Apache-2.0
"""The pictures of a report: samples side by side, error per layer, bytes and bits per weight.

Each figure is drawn twice, for a light and a dark page, on a transparent ground. Only the object
interface of matplotlib is used: no global state, no window, any thread.

Dimension key:  N samples   H W C picture
"""

import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

METHOD_COLOURS = {
    "none": "#8b929b",
    "codebooks": "#2a9d9d",
    "straight_through": "#5b9a4a",
    "pv": "#dd8a2f",
    "pv_decay": "#b5651d",
    "pv_restart": "#f2c14e",
    "semi_pv": "#3f78c4",
    "semi_pv_first": "#7aa6dc",
    "semi_pv_keep": "#1f4e8c",
    "semi_pv_restart": "#9268c0",
    "semi_pv_trust": "#5fb3c9",
    "scalar": "#cf5650",
}
KIND_COLOURS = {
    "conv3x3": "#3f78c4",
    "conv1x1": "#2a9d9d",
    "attention": "#dd8a2f",
    "feed_forward": "#9268c0",
    "time": "#5b9a4a",
    "first_last": "#cf5650",
}
_OTHER_KIND = "#8b929b"
_FULL, _QUANTIZED = "#8b929b", "#3f78c4"
_DARK_INK = "#20242a"
_DPI = 160
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


class Picture(NamedTuple):
    """One figure as PNG bytes, for a light and for a dark page."""

    light: bytes
    dark: bytes


def before_after(
    panels: dict[str, np.ndarray],
    labels_N: Sequence[int] | np.ndarray,
    *,
    class_names: dict[int, str] | None = None,
    columns: int = 6,
    rows: int = 10,
) -> Picture:
    """Twin samples side by side: one panel per model, one row per class.

    Args:
      panels: heading to uint8 [N, H, W, 3]; entry i of every panel has the same noise and class.
      labels_N: the class of each entry.
      class_names: what to write at a row; the class number if absent.
      columns: samples per row and panel at most.
      rows: classes shown at most, those with the smallest numbers.

    Raises:
      ValueError: if a panel has another number of pictures than there are labels.
    """
    labels = np.asarray(labels_N)
    for heading, images in panels.items():
        if len(images) != len(labels):
            raise ValueError(f"panel {heading!r}: {len(images)} pictures, {len(labels)} labels")
    classes = np.unique(labels)[:rows]
    chosen = [np.flatnonzero(labels == label)[:columns] for label in classes]
    width = max(len(row) for row in chosen)
    names = [(class_names or {}).get(int(label), str(label)) for label in classes]
    mosaics = {heading: _mosaic(images, chosen, width) for heading, images in panels.items()}

    def draw(figure: Figure, ink: str) -> None:
        for axes, (heading, mosaic) in zip(_row(figure, len(mosaics)), mosaics.items()):
            axes.imshow(mosaic, interpolation="nearest")
            axes.set_title(heading, loc="center", color=ink)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        step = mosaic.shape[0] / len(classes)
        first = figure.axes[0]
        first.set_yticks([(row + 0.5) * step for row in range(len(classes))], names)
        first.tick_params(axis="y", length=0, pad=4)

    height, across = next(iter(mosaics.values())).shape[:2]
    inches = 3.1 * len(mosaics)
    return picture(draw, (inches, 0.4 + inches / len(mosaics) * 0.95 * height / across))


def layer_errors(layers: Sequence[dict[str, Any]]) -> Picture:
    """Relative output error of every layer in the order of the model, coloured by kind."""
    if not layers:
        raise ValueError("no layers to draw")
    errors = np.array([_finite(layer["rel_output_mse"]) for layer in layers])
    floor = max(float(errors[errors > 0].min(initial=1.0)) / 2, 1e-8)
    kinds = list(dict.fromkeys(layer["kind"] for layer in layers))

    def draw(figure: Figure, ink: str) -> None:
        (axes,) = _row(figure, 1)
        for kind in kinds:
            at = [index for index, layer in enumerate(layers) if layer["kind"] == kind]
            heights = np.maximum(errors[at], floor)
            colour = KIND_COLOURS.get(kind, _OTHER_KIND)
            label = kind.replace("_", " ")
            axes.bar(at, heights - floor, bottom=floor, width=0.82, color=colour, label=label)
        axes.set_yscale("log")
        axes.set_xlim(-1, len(layers))
        axes.set_ylim(floor, max(float(errors.max()), floor) * 2.2)
        axes.yaxis.set_major_formatter(FuncFormatter(_percent))
        axes.grid(axis="y", color=ink, alpha=0.13, linewidth=0.6)
        axes.set_xlabel("layer, in the order of the checkpoint")
        axes.set_title("Output error of each layer, share of the output's energy", color=ink)
        columns = min(len(kinds), 6)
        axes.legend(
            loc="lower right", bbox_to_anchor=(1, 1.0), ncols=columns, labelcolor=ink,
            handlelength=0.8, handleheight=0.8, columnspacing=1.1, fontsize=7.5,
        )  # fmt: skip

    return picture(draw, (9.3, 2.7))


def sizes(
    bytes_before: int, bytes_after: int, layers: Sequence[dict[str, Any]], bits_target: float
) -> Picture:
    """Stored bytes before and after, and bits per weight of every kind of layer."""
    totals: dict[str, tuple[float, float]] = {}
    for layer in layers:
        weights = float(np.prod(layer["shape"]))
        bits, count = totals.get(layer["kind"], (0.0, 0.0))
        totals[layer["kind"]] = (bits + layer["bits_per_weight"] * weights, count + weights)
    kinds = [kind for kind, (_, count) in totals.items() if count]

    def draw(figure: Figure, ink: str) -> None:
        left, right = _row(figure, 2)
        values = [bytes_before / 1e6, bytes_after / 1e6]
        bars = left.barh(["full precision", "quantized"], values, color=[_FULL, _QUANTIZED])
        left.bar_label(bars, [f"{value:.3g} MB" for value in values], padding=4, color=ink)
        left.set_xlim(0, max(values) * 1.22)
        left.set_title("Stored weights", color=ink)
        bits = [totals[kind][0] / totals[kind][1] for kind in kinds]
        colours = [KIND_COLOURS.get(kind, _OTHER_KIND) for kind in kinds]
        bars = right.barh([kind.replace("_", " ") for kind in kinds], bits, color=colours)
        right.bar_label(bars, [f"{value:.2f}" for value in bits], padding=4, color=ink)
        right.axvline(bits_target, color=ink, linewidth=0.9, linestyle=(0, (4, 3)))
        right.set_xlim(0, max([*bits, bits_target]) * 1.15)
        right.set_title(f"Bits per weight (target {bits_target:g})", color=ink)
        for axes in (left, right):
            axes.invert_yaxis()
            axes.tick_params(axis="y", length=0)
            axes.set_xticks([])
            axes.spines["bottom"].set_visible(False)

    return picture(draw, (9.3, max(1.7, 0.75 + 0.26 * len(kinds))))


def ablation(rows: Sequence[dict[str, Any]]) -> Picture:
    """Rise of digit-FD and PSNR by bits per weight, a bar for each way of tuning.

    Args:
      rows: "bits", "method", "rise", "spread" and "psnr" of each pair of bits and method.

    Raises:
      ValueError: if there are none.
    """
    if not rows:
        raise ValueError("no cells to draw")
    bits = sorted({row["bits"] for row in rows}, reverse=True)
    methods = [name for name in METHOD_COLOURS if any(row["method"] == name for row in rows)]
    width = 0.8 / len(methods)

    def bars(axes: Axes, value: str, spread: str | None) -> None:
        for number, method in enumerate(methods):
            chosen = [row for row in rows if row["method"] == method]
            at = [bits.index(row["bits"]) + (number - len(methods) / 2) * width for row in chosen]
            axes.bar(
                at,
                [row[value] for row in chosen],
                width=0.9 * width,
                align="edge",
                color=METHOD_COLOURS[method],
                yerr=[2 * row[spread] for row in chosen] if spread else None,
                ecolor=_OTHER_KIND,
                label=method.replace("_", " "),
            )
        axes.set_xticks(range(len(bits)), [f"{value:g} bits" for value in bits])

    def draw(figure: Figure, ink: str) -> None:
        left, right = _row(figure, 2)
        bars(left, "rise", "spread")
        left.set_yscale("symlog", linthresh=1)
        left.axhline(0, color=ink, linewidth=0.6)
        left.set_title("Rise of digit-FD over full precision (2 standard errors)", color=ink)
        bars(right, "psnr", None)
        right.set_title("PSNR to full precision, dB", color=ink)
        right.set_ylim(bottom=0.8 * min(row["psnr"] for row in rows))
        for axes in (left, right):
            axes.grid(axis="y", color=ink, alpha=0.13, linewidth=0.6)
        handles, names = right.get_legend_handles_labels()
        figure.legend(
            handles,
            names,
            loc="outside lower center",
            ncols=len(names),
            labelcolor=ink,
            fontsize=7.5,
        )

    return picture(draw, (9.3, 3.1))


def picture(draw: Callable[[Figure, str], None], inches: tuple[float, float]) -> Picture:
    """Draws for both kinds of page; `draw` takes an empty figure and the colour of its text."""
    return Picture(_render(draw, inches, _DARK_INK), _render(draw, inches, "#dfe3e8"))


def opaque(draw: Callable[[Figure, str], None], inches: tuple[float, float]) -> bytes:
    """Draws on white, for pages whose ground is not known."""
    return _render(draw, inches, _DARK_INK, ground="white")


def _render(
    draw: Callable[[Figure, str], None],
    inches: tuple[float, float],
    ink: str,
    ground: str = "none",
) -> bytes:
    colours = {f"{name}.color": ink for name in ("xtick", "ytick", "text")}
    colours |= {"axes.labelcolor": ink, "axes.edgecolor": ink}
    style: Any = {**_STYLE, **colours}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=inches, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure, ink)
        target = io.BytesIO()
        # Without the version in the file, equal pictures are equal bytes.
        figure.savefig(
            target,
            format="png",
            dpi=_DPI,
            facecolor=ground,
            bbox_inches="tight",
            pad_inches=0.04,
            metadata={"Software": None},
        )
    return target.getvalue()


def _row(figure: Figure, count: int) -> list[Axes]:
    return list(figure.subplots(1, count, squeeze=False)[0])


def _mosaic(images_NHWC: np.ndarray, chosen: list[np.ndarray], width: int) -> np.ndarray:
    """RGBA mosaic with a transparent gap between pictures and between classes."""
    height, side = images_NHWC.shape[1:3]
    gap = max(1, side // 16)
    canvas = np.zeros((len(chosen) * (height + gap), width * (side + gap), 4), np.uint8)
    for row, indices in enumerate(chosen):
        for column, index in enumerate(indices):
            top, left = row * (height + gap), column * (side + gap)
            canvas[top : top + height, left : left + side, :3] = images_NHWC[index]
            canvas[top : top + height, left : left + side, 3] = 255
    return canvas


def _percent(value: float, _position: int) -> str:
    return f"{100 * value:g}%"


def _finite(value: float | None) -> float:
    return float(value) if value is not None and np.isfinite(value) else 0.0
