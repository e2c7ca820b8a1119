# SPDX-License-Identifier: Apache-2.0
"""The report of a quantization: one dict becomes report.json, report.md and report.html.

Everything here is a pure function of that dict and of finished pictures. `check` names the fields
that must be there; these may be added and are shown where present:
`failures` and `warnings` (lists of sentences, shown on top), `fidelity_scalar_baseline` (as
`fidelity`), `paired` ({model: {fd_difference, fd_difference_sd}}), `real_halves` (scores of real
pictures against real ones), `memorization`, `folded` ({weights, share}: removed without loss).
A value that was not measured is None; NaN and infinity become null in the JSON file.
"""

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vqjax.errors import gathered
from vqjax.eval import layer_table
from vqjax.eval.page import PAGE

FIELDS: dict[str, tuple[str, ...]] = {
    "model": ("name", "parameters"),
    "weights": (
        "bits_target",
        "bits_per_weight",
        "bits_per_weight_model",
        "bytes_before",
        "bytes_after",
    ),
    "activations": ("bits",),
    "layers": (),
    "metrics": ("full_precision", "quantized", "scalar_baseline"),
    "fidelity": ("psnr", "ssim", "latent_mse"),
    "flops": ("dense", "lookup", "ratio"),
    "seconds": (),
    "peak_memory_bytes": (),
    "environment": (),
}
LAYER_FIELDS = (
    "path",
    "kind",
    "shape",
    "group",
    "codebooks",
    "entries",
    "flops_dense",
    "flops_lookup",
    *layer_table.FIGURES,
)
SCORE_FIELDS = ("fd", "sfd", "is", "precision", "recall", "accuracy", "n")
_MODELS = FIELDS["metrics"]
_SCORES = {  # field: (name, digits after the point, whether more is better)
    "fd": ("{fd}", 2, False),
    "sfd": ("{fd}, spatial", 2, False),
    "is": ("Inception score", 2, True),
    "precision": ("Precision", 3, True),
    "recall": ("Recall", 3, True),
    "accuracy": ("Class accuracy", 3, True),
}
_FIDELITY = {
    "psnr": ("PSNR, dB", 2, True),
    "ssim": ("SSIM", 4, True),
    "latent_mse": ("Latent error, relative", 5, False),
}
_CAPTIONS = {
    "samples": (
        "Samples, before and after",
        "Every column position holds twins: the same starting noise, class and sampler, so each "
        "difference comes from the weights alone. One row per class.",
    ),
    "sizes": ("Bytes and bits", "Codes, codebooks and scales are all counted."),
    "layers": (
        "Error of each layer",
        "Share of the energy of a layer's output that quantization changes, on calibration "
        "inputs. Logarithmic.",
    ),
}
_NOTHING = "–"


class Table(NamedTuple):
    """A table before it is HTML or Markdown; a cell may be text or (text, "good" or "worse")."""

    heading: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | tuple[str, str]]]


def build(
    report: Mapping[str, Any], pictures: Mapping[str, tuple[bytes, bytes]]
) -> dict[str, bytes]:
    """Writes the three files of a report.

    Args:
      report: the fields of `FIELDS`, and the optional ones named at the top of this file.
      pictures: PNG bytes for a light and a dark page (`vqjax.eval.figures.Picture`) under any
        of "samples", "sizes", "layers".

    Returns:
      File name to content: "report.json", "report.md", "report.html".

    Raises:
      VqjaxError: listing every field that is missing.
    """
    check(report)
    text = json.dumps(plain(report), indent=2, ensure_ascii=False, allow_nan=False)
    return {
        "report.json": (text + "\n").encode(),
        "report.md": _markdown(report).encode(),
        "report.html": _page(report, pictures).encode(),
    }


def check(report: Mapping[str, Any]) -> None:
    """Raises one VqjaxError that lists every missing field."""
    problems = [f"{name} is missing" for name in FIELDS if name not in report]
    for name, fields in FIELDS.items():
        problems += _missing(name, report.get(name, fields), fields)
    for index, layer in enumerate(report.get("layers", ())):
        problems += _missing(f"layers[{index}]", layer, LAYER_FIELDS)
    for model in _MODELS:
        scores = dict(report.get("metrics", {})).get(model)
        if scores is not None:
            problems += _missing(f"metrics.{model}", scores, SCORE_FIELDS)
    if problems:
        raise gathered(problems, "the report is incomplete; put None where nothing was measured:")


def tables(report: Mapping[str, Any]) -> list[Table]:
    """What the report says, as tables: gained, lost, fidelity, memorization, kinds of layers."""
    found = [_gained(report), _lost(report), _near(report)]
    found += [_memorization(report["memorization"])] if report.get("memorization") else []
    return [table for table in [*found, _kinds(report["layers"])] if table.rows]


def _gained(report: Mapping[str, Any]) -> Table:
    weights, flops = report["weights"], report["flops"]
    before, after = weights["bytes_before"], weights["bytes_after"]
    # The weights that both byte counts speak of are in neither field, but their ratio is enough.
    bits_before = weights["bits_per_weight_model"] * before / after
    rows = [
        ["Stored weights", size(before), size(after), _times(_divide(before, after))],
        [
            "Bits per weight, quantized layers",
            number(bits_before, 2),
            number(weights["bits_per_weight"], 3),
            _times(_divide(bits_before, weights["bits_per_weight"])),
        ],
        [
            "Bits per weight, whole network",
            number(bits_before, 2),
            number(weights["bits_per_weight_model"], 3),
            _times(_divide(bits_before, weights["bits_per_weight_model"])),
        ],
        [
            "Bits per activation",
            "32",
            number(report["activations"]["bits"], 0),
            _times(_divide(32, report["activations"]["bits"])),
        ],
        [
            "Operations per step, dense and by lookup",
            count(flops["dense"]),
            count(flops["lookup"]),
            _times(_divide(1, flops["ratio"])),
        ],
    ]
    note = f"Target {number(weights['bits_target'], 2)} bits per weight."
    if report.get("folded"):
        folded = report["folded"]
        note += (
            f" {count(folded['weights'])} weights ({folded['share']:.1%}) cannot reach the output "
            "and were removed first, at no loss."
        )
    return Table("What was gained", note, ["", "before", "after", "less by"], rows)


def _lost(report: Mapping[str, Any]) -> Table:
    metrics = {model: report["metrics"][model] or {} for model in _MODELS}
    full, small, scalar = metrics.values()
    real = report.get("real_halves") or {}
    rows = []
    for field, (name, digits, more_is_better) in _SCORES.items():
        if full.get(field) is None and small.get(field) is None:
            continue
        row: list[str | tuple[str, str]] = [
            name.format(fd=full.get("name", "Frechet distance"))
            + (" ↑" if more_is_better else " ↓"),
            number(full.get(field), digits),
            number(small.get(field), digits),
            _change(full.get(field), small.get(field), digits, more_is_better),
            number(scalar.get(field), digits),
        ]
        rows.append([*row, number(real.get(field), digits)] if real else row)
    columns = ["", "full precision", "quantized", "change", "scalar (GPTQ)"]
    return Table(
        "What was lost", _lost_note(report), columns + ["real pictures"] * bool(real), rows
    )


def _lost_note(report: Mapping[str, Any]) -> str:
    scores = report["metrics"]["quantized"] or report["metrics"]["full_precision"] or {}
    parts = [f"N = {count(scores.get('n'))} samples per model."]
    if scores.get("feature_dimension"):
        parts.append(
            f"{scores['name']} is the Frechet distance of {scores['feature_dimension']} features "
            f"({scores['spatial_dimension']} spatial ones) to {count(scores['reference_n'])} real "
            f"pictures, mean of {len(scores['extractors'])} extractors. It depends on N and on the "
            "extractors, and is not the FID of the literature."
        )
    for model, paired in (report.get("paired") or {}).items():
        parts.append(
            f"Paired difference, {model.replace('_', ' ')} minus full precision: "
            f"{paired['fd_difference']:+.2f} ± {paired['fd_difference_sd']:.2f}."
        )
    if report.get("real_halves"):
        parts.append("Real pictures: one random half against the other.")
    return " ".join(parts)


def _near(report: Mapping[str, Any]) -> Table:
    scalar = report.get("fidelity_scalar_baseline") or {}
    rows = [
        [
            name + (" ↑" if more_is_better else " ↓"),
            number(report["fidelity"].get(field), digits),
            *([number(scalar.get(field), digits)] if scalar else []),
        ]
        for field, (name, digits, more_is_better) in _FIDELITY.items()
    ]
    note = "Each picture against its full-precision twin, mean over pictures."
    columns = ["", "quantized", *(["scalar (GPTQ)"] if scalar else [])]
    return Table("Likeness to the full-precision pictures", note, columns, rows)


def _memorization(found: Mapping[str, Any]) -> Table:
    held = found["held_out"]
    names = {
        "to_train": ("Distance to the nearest training picture", 4),
        "to_held": ("Distance to the nearest unseen picture", 4),
        "closer_to_train": ("Share closer to a training picture", 3),
        "copies": ("Share as close as a copy would be", 3),
    }
    rows = [
        [name, number(found[field], digits), number(held[field], digits)]
        for field, (name, digits) in names.items()
    ]
    note = (
        "Median root-mean-square pixel distance on 0 to 1. A model that invents its pictures looks "
        "like the unseen ones in the right column; one that repeats the training set does not."
    )
    return Table("Invented or remembered", note, ["", "samples", "unseen real ones"], rows)


def _kinds(layers: Sequence[Mapping[str, Any]]) -> Table:
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for layer in layers:
        kinds.setdefault(layer["kind"], []).append(layer)
    rows = []
    for kind, members in kinds.items():
        sizes = [math.prod(layer["shape"]) for layer in members]
        total = max(sum(sizes), 1)
        bits = sum(layer["bits_per_weight"] * size for layer, size in zip(members, sizes)) / total
        errors = [x for layer in members if (x := layer["rel_output_mse"]) is not None]
        rows.append(
            [
                kind.replace("_", " "),
                str(len(members)),
                count(total),
                number(bits, 2),
                number(sum(errors) / len(errors) if errors else None, 4),
                number(max(errors, default=None), 4),
            ]
        )
    columns = ["kind", "layers", "weights", "bits per weight", "mean error", "largest error"]
    note = "Error: share of the layer output's energy, on calibration inputs."
    return Table("Layers by kind", note, columns, rows)


def _markdown(report: Mapping[str, Any]) -> str:
    parts = [f"# {_heading(report)}", _lead(report)]
    for title, lines in _banners(report):
        parts.append("\n".join([f"> **{title}**", *(f"> - {line}" for line in lines)]))
    parts.append("![Samples before and after](samples.png)")
    for table in tables(report):
        parts += [f"## {table.heading}", table.note, markdown_rows(table.columns, table.rows)]
    layers = report["layers"]
    if layers:
        rows = [*map(layer_table.cells, layers), *layer_table.summary(layers)]
        table = markdown_rows(layer_table.COLUMNS, rows)
        parts += ["## Every layer", layer_table.note(layers), table]
    parts += ["## How it was made", markdown_rows(["", ""], _made(report))]
    return "\n\n".join(parts) + "\n"


def markdown_rows(columns: Sequence[str], rows: Sequence[Sequence[str | tuple[str, str]]]) -> str:
    """A Markdown table; every column but the first is aligned to the right."""

    def line(cells):
        texts = (cell if isinstance(cell, str) else cell[0] for cell in cells)
        return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"

    rule = "|" + " --- |" + " ---: |" * (len(columns) - 1)
    return "\n".join([line(columns), rule, *map(line, rows)])


def _page(report: Mapping[str, Any], pictures: Mapping[str, tuple[bytes, bytes]]) -> str:
    gained, *rest = tables(report)
    sections = [
        _figure("samples", pictures),
        html_table(gained),
        _figure("sizes", pictures),
        *(html_table(table) for table in rest),
        _figure("layers", pictures),
        _layers_table(report["layers"]),
        html_table(Table("How it was made", "", ["", ""], _made(report)), style="facts"),
    ]
    banners = [
        f'<div class="banner {"bad" if index == 0 else "warn"}" role="alert">'
        f"<strong>{html.escape(title)}</strong><ul>"
        + "".join(f"<li>{html.escape(line)}</li>" for line in lines)
        + "</ul></div>"
        for index, (title, lines) in enumerate(_banners(report, keep_empty=True))
        if lines
    ]
    tiles = [
        f'<div class="tile"><span>{html.escape(label)}</span><b>{html.escape(value)}</b>'
        f"<span>{html.escape(detail)}</span></div>"
        for label, value, detail in _tiles(report)
    ]
    return PAGE.substitute(
        kind="quantization report",
        title=html.escape(f"{report['model']['name']} · vqjax report"),
        heading=html.escape(_heading(report)),
        lead=html.escape(_lead(report)),
        banners="\n".join(banners),
        tiles="\n".join(tiles),
        sections="\n".join(section for section in sections if section),
        footer="All numbers of this page, unrounded, are in report.json beside it.",
    )


def html_table(table: Table, *, style: str = "scores") -> str:
    """A section of a page: heading, note, table."""
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in table.columns)
    body = "\n".join(
        "<tr>"
        + f'<th scope="row">{_cell(row[0])}</th>'
        + "".join(map(_data_cell, row[1:]))
        + "</tr>"
        for row in table.rows
    )
    head = f"<thead><tr>{head}</tr></thead>" if any(table.columns) else ""
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    return (
        f"<section><h2>{html.escape(table.heading)}</h2>{note}"
        f'<div class="card"><table class="{style}">{head}<tbody>\n{body}\n</tbody></table></div>'
        "</section>"
    )


def _cell(cell: str | tuple[str, str]) -> str:
    return html.escape(cell if isinstance(cell, str) else cell[0])


def _data_cell(cell: str | tuple[str, str]) -> str:
    style = "" if isinstance(cell, str) or not cell[1] else f' class="{cell[1]}"'
    return f"<td{style}>{_cell(cell)}</td>"


def _layers_table(layers: Sequence[Mapping[str, Any]]) -> str:
    if not layers:
        return ""
    errors = [layer["rel_output_mse"] for layer in layers if _on_log_scale(layer)]
    low, high = math.log(min(errors, default=1) / 2), math.log(max(errors, default=1) * 1.01)
    shares = [
        (math.log(layer["rel_output_mse"]) - low) / (high - low) if _on_log_scale(layer) else 0
        for layer in layers
    ]
    meter = layer_table.COLUMNS.index(layer_table.FIGURES["rel_output_mse"])

    def line(cells: Sequence[str], share: float | None = None) -> str:
        style = "" if share is None else f' class="meter" style="--w:{100 * share:.0f}%"'
        first, *rest = map(html.escape, cells)
        data = (
            f"<td{style if index == meter else ''}>{cell}</td>"
            for index, cell in enumerate(rest, 1)
        )
        return f'<tr><th scope="row">{first}</th>{"".join(data)}</tr>'

    head = "".join(f'<th scope="col">{name}</th>' for name in layer_table.COLUMNS)
    body = (line(layer_table.cells(layer), share) for layer, share in zip(layers, shares))
    foot = map(line, layer_table.summary(layers))
    return (
        f"<details><summary>All {len(layers)} layers</summary>"
        f'<p class="note">{layer_table.note(layers)} Bars are logarithmic.</p>'
        '<div class="card wide scroll"><table class="layers">'
        f"<thead><tr>{head}</tr></thead><tbody>\n"
        + "\n".join(body)
        + "\n</tbody><tfoot>"
        + "\n".join(foot)
        + "</tfoot></table></div></details>"
    )


def _on_log_scale(layer: Mapping[str, Any]) -> bool:
    """Whether a layer has a positive, finite output error to draw on a logarithmic scale."""
    error = layer["rel_output_mse"]
    return error is not None and 0 < error < math.inf


def _figure(name: str, pictures: Mapping[str, tuple[bytes, bytes]]) -> str:
    if name not in pictures:
        return ""
    title, caption = _CAPTIONS[name]
    light, dark = map(data_uri, pictures[name])
    return (
        f'<section><h2>{title}</h2><figure class="card"><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{title}"></picture>'
        f"<figcaption>{caption}</figcaption></figure></section>"
    )


def data_uri(png: bytes) -> str:
    """PNG bytes as a `data:` address, for a page that must stand alone."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _heading(report: Mapping[str, Any]) -> str:
    return f"{report['model']['name']} at {number(report['weights']['bits_per_weight'], 2)} bits"


def _lead(report: Mapping[str, Any]) -> str:
    weights = report["weights"]
    before, after = weights["bytes_before"], weights["bytes_after"]
    text = (
        f"The weights went from {size(before)} to {size(after)}, "
        f"{number(_divide(before, after), 1)} times smaller."
    )
    full, small = (report["metrics"][model] or {} for model in _MODELS[:2])
    if full.get("fd") is not None and small.get("fd") is not None:
        name = full.get("name", "Frechet distance")
        text += f" {name} went from {number(full['fd'], 2)} to {number(small['fd'], 2)}"
        text += " (lower is better)."
    return text


def _tiles(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    weights, fidelity = report["weights"], report["fidelity"]
    full, small = (report["metrics"][model] or {} for model in _MODELS[:2])
    before, after = weights["bytes_before"], weights["bytes_after"]
    found = [
        ("Size", _times(_divide(before, after)), f"{size(before)} → {size(after)}"),
        (
            "Bits per weight",
            number(weights["bits_per_weight"], 2),
            f"{number(weights['bits_per_weight_model'], 2)} over the whole network",
        ),
    ]
    if small.get("fd") is not None:
        detail = f"{number(full.get('fd'), 2)} at full precision"
        found.append((small.get("name", "Frechet distance"), number(small["fd"], 2), detail))
    if fidelity.get("psnr") is not None:
        found.append(
            ("PSNR", f"{number(fidelity['psnr'], 1)} dB", f"SSIM {number(fidelity['ssim'], 3)}")
        )
    return found


def _banners(
    report: Mapping[str, Any], *, keep_empty: bool = False
) -> list[tuple[str, Sequence[str]]]:
    found = [
        ("The quality gate failed", report.get("failures") or ()),
        ("Worth knowing before you use it", report.get("warnings") or ()),
    ]
    return [banner for banner in found if banner[1] or keep_empty]


def _made(report: Mapping[str, Any]) -> list[list[str]]:
    total = sum(report["seconds"].values())
    stages = ", ".join(f"{stage} {duration(value)}" for stage, value in report["seconds"].items())
    rows = [
        ["Time", f"{duration(total)} ({stages})" if stages else _NOTHING],
        ["Peak memory", size(report["peak_memory_bytes"])],
    ]
    scores = report["metrics"]["quantized"] or {}
    if scores.get("extractor_sha256"):
        rows.append(["Extractors, SHA-256", scores["extractor_sha256"]])
    rows += [[str(name), _text(value)] for name, value in report["environment"].items()]
    return rows


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return _NOTHING if value is None else str(value)


def number(value: float | None, digits: int) -> str:
    """`value` with at most `digits` after the point, in powers of ten where that shows nothing."""
    if value is None or math.isnan(value):
        return _NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value and abs(value) < 0.5 * 10**-digits:
        return f"{value:.1e}"
    return f"{value:,.{digits}f}"


def count(value: float | None) -> str:
    """A count with a thousands separator, or in millions and billions where it is large."""
    if value is None:
        return _NOTHING
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:,.0f}"


def size(value: float | None) -> str:
    """Bytes in decimal units with three digits: 999 B, 1.23 MB."""
    if value is None:
        return _NOTHING
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    """Seconds as a person says them: 4.2 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _change(
    before: float | None, after: float | None, digits: int, more_is_better: bool
) -> str | tuple[str, str]:
    if before is None or after is None:
        return _NOTHING
    step = round(after - before, digits)
    if step == 0:
        return "0"
    better = (step > 0) == more_is_better
    return f"{step:+.{digits}f}".replace("-", "−"), "good" if better else "worse"


def _times(ratio: float | None) -> str:
    return _NOTHING if ratio is None else f"{ratio:.1f}×"


def _divide(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def _missing(where: str, found: Any, fields: Sequence[str]) -> list[str]:
    return [f"{where}.{field} is missing" for field in fields if field not in found]


def plain(value: Any) -> Any:
    """The same data in what strict JSON has: numpy scalars unwrapped, NaN and infinity as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if hasattr(value, "item") and not isinstance(value, str):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
