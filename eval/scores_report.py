# SPDX-License-Identifier: Apache-2.0
"""The report of an evaluation: one dict and finished pictures become JSON, Markdown and one page.

The dict is what `vqjax.pipeline.evaluate` makes. Its fields: `models` ({"source": about and scores,
"against": the same where there is one}), `difference` (of twins, or None), `worst` (pairs, lowest
PSNR first), `missing` and `notes` (sentences), `real_halves` (of small data), `protocol`,
`settings`, `command`, `environment`, `seconds`.
"""

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vqjax.eval import judges
from vqjax.eval.page import PAGE
from vqjax.eval.report import (
    Table,
    data_uri,
    duration,
    html_table,
    markdown_rows,
    number,
    plain,
)

SIDES = ("source", "against")
_LITERATURE = {  # field: (name, digits after the point, factor, field of the spread)
    "fid": ("FID ↓", 2, 1, "fid_se"),
    "sfid": ("sFID ↓", 2, 1, None),
    "is": ("Inception score ↑", 2, 1, "is_sd"),
    "precision": ("Precision, % ↑", 2, 100, "precision_se"),
    "recall": ("Recall, % ↑", 2, 100, "recall_se"),
}
_TWINS = {
    "psnr": ("PSNR, dB ↑", 2),
    "ssim": ("SSIM ↑", 4),
    "lpips": ("LPIPS ↓", 4),
    "latent_mse": ("Latent error, relative ↓", 5),
}


def _of_judge(kind: str, name: str) -> dict[str, tuple[str, int, int, None]]:
    """Rows of a judge's scores, as `_LITERATURE` has them."""
    return {
        "fd": (f"{name} ↓", 3, 1, None),
        "sfd": (f"{name}, spatial ↓", 3, 1, None),
        "is": (f"Inception score of {kind} ↑", 3, 1, None),
        "precision": ("Precision ↑", 3, 1, None),
        "recall": ("Recall ↑", 3, 1, None),
        "accuracy": ("Class accuracy ↑", 3, 1, None),
    }


PICTURES = ("samples-*.png", "worst-*.png")
"""Names of all pictures that `build` can make."""


class Pictures(NamedTuple):
    """PNG bytes for the report.

    Attributes:
      samples: side to a grid of its first pictures.
      worst: one picture per pair of `worst`: full precision left, the other model right.
    """

    samples: Mapping[str, bytes]
    worst: Sequence[bytes]


def build(content: Mapping[str, Any], pictures: Pictures) -> dict[str, bytes]:
    """Writes the files of a report.

    Returns:
      File name to content: "evaluation.json", "evaluation.md", "evaluation.html", and the pictures
      that the Markdown file shows: "samples-<side>.png", "worst-<rank>.png".
    """
    texts = {
        "evaluation.json": json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False)
        + "\n",
        "evaluation.md": _markdown(content, pictures),
        "evaluation.html": _page(content, pictures),
    }
    # Names of files need not be UTF-8.
    files = {name: text.encode(errors="backslashreplace") for name, text in texts.items()}
    files |= {f"samples-{side}.png": png for side, png in pictures.samples.items()}
    return files | {f"worst-{rank:02d}.png": png for rank, png in enumerate(pictures.worst)}


def tables(content: Mapping[str, Any]) -> list[Table]:
    """Every table that has a number: the literature's scores, those of small data, likeness."""
    found = [
        _scores(content, "adm", "Scores of the literature", _LITERATURE),
        *(
            _scores(content, kind, f"Scores of {kind}", _of_judge(kind, judge.name))
            for kind, judge in judges.JUDGES.items()
        ),
    ]
    if content["difference"] is not None:
        found.append(_likeness(content["difference"]))
    return [table for table in found if table.rows]


def _scores(content: Mapping[str, Any], kind: str, heading: str, rows: Mapping) -> Table:
    sides = {
        content["models"][side]["label"]: content["models"][side][kind]
        for side in SIDES
        if content["models"].get(side, {}).get(kind)
    }
    real = content.get("real_halves") if kind in judges.JUDGES else None
    columns = sides | ({"real half against real half": real} if sides and real else {})
    lines = []
    for field, (name, places, factor, spread) in rows.items():
        if any(scores.get(field) is not None for scores in columns.values()):
            cells = (_cell(scores, field, places, factor, spread) for scores in columns.values())
            lines.append([name, *cells])
    if lines:
        lines.insert(0, ["N", *(f"{scores['n']:,}" for scores in columns.values())])
    note = (
        "As guided-diffusion's evaluator defines them. ±: standard error that N samples "
        "leave (FID, precision, recall), standard deviation over splits (inception score)."
        if kind == "adm"
        else "Means over three evaluation networks of the package; they compare with nothing else."
    )
    return Table(heading, note, ["", *columns], lines)


def _cell(scores: Mapping[str, Any], field: str, places: int, factor: int, spread: str | None):
    value, error = scores.get(field), scores.get(spread) if spread else None
    text = number(None if value is None else factor * value, places)
    return text if error is None else f"{text} ± {number(factor * error, places)}"


def _likeness(difference: Mapping[str, Any]) -> Table:
    rows = []
    for field, (name, places) in _TWINS.items():
        if difference.get(field) is not None:
            rows.append([name, _cell(difference, field, places, 1, f"{field}_se")])
    if difference.get("fd_difference") is not None:
        change, spread = difference["fd_difference"], difference["fd_difference_sd"]
        name = difference["fd_name"]
        rows.append([f"{name}, change", f"{change:+.3f} ± {number(spread, 3)}"])
    note = (
        f"Each of {difference['n']:,} pictures against its twin, mean and standard error; "
        f"{difference['identical']:,} pairs are identical and not in the mean PSNR. "
        f"SSIM: {difference['ssim_variant']}."
    )
    return Table("Likeness to full precision", note, ["", "mean"], rows)


def _worst(content: Mapping[str, Any]) -> list[str]:
    return [
        f"picture {pair['number']}"
        + ("" if pair["class"] is None else f", class {pair['class']}")
        + f": {number(pair['psnr'], 2)} dB"
        + ("" if pair["ssim"] is None else f", SSIM {number(pair['ssim'], 3)}")
        for pair in content["worst"]
    ]


def _markdown(content: Mapping[str, Any], pictures: Pictures) -> str:
    parts = [f"# Evaluation of {_label(content, 'source')}"]
    for title, lines in _banners(content):
        parts.append("\n".join([f"> **{title}**", *(f"> - {line}" for line in lines)]))
    for table in tables(content):
        parts += [f"## {table.heading}", table.note, markdown_rows(table.columns, table.rows)]
    if content["worst"]:
        parts.append("## Worst pairs")
        parts.append("Full precision left, the other right; lowest PSNR first.")
        for rank, line in enumerate(_worst(content)):
            parts.append(f"![{line}](worst-{rank:02d}.png) {line}")
    for side in pictures.samples:
        name = _label(content, side)
        parts += [f"## Pictures of {name}", f"![{name}](samples-{side}.png)"]
    parts += ["## How it was made", markdown_rows(["", ""], _made(content))]
    return "\n\n".join(parts) + "\n"


def _page(content: Mapping[str, Any], pictures: Pictures) -> str:
    sections = [html_table(table) for table in tables(content)]
    if pictures.worst:
        pairs = "\n".join(
            f'<figure class="card"><img src="{data_uri(png)}" alt="{html.escape(line)}">'
            f"<figcaption>{html.escape(line)}</figcaption></figure>"
            for png, line in zip(pictures.worst, _worst(content))
        )
        sections.append(
            '<section><h2>Worst pairs</h2><p class="note">Full precision left, the other right; '
            f'lowest PSNR first.</p><div class="pairs pixels">{pairs}</div></section>'
        )
    for side, png in pictures.samples.items():
        name = html.escape(_label(content, side))
        sections.append(
            f'<section><h2>Pictures of {name}</h2><figure class="card pixels">'
            f'<img src="{data_uri(png)}" alt="Pictures of {name}"></figure></section>'
        )
    sections.append(
        html_table(Table("How it was made", "", ["", ""], _made(content)), style="facts")
    )
    banners = [
        f'<div class="banner warn" role="note"><strong>{html.escape(title)}</strong><ul>'
        + "".join(f"<li>{html.escape(line)}</li>" for line in lines)
        + "</ul></div>"
        for title, lines in _banners(content)
    ]
    tiles = [
        f'<div class="tile"><span>{html.escape(name)}</span><b>{html.escape(value)}</b></div>'
        for name, value in _tiles(content)
    ]
    title = html.escape(f"Evaluation of {_label(content, 'source')}")
    return PAGE.substitute(
        kind="evaluation",
        title=f"{title} · vqjax",
        heading=title,
        lead=html.escape(_lead(content)),
        banners="\n".join(banners),
        tiles="\n".join(tiles),
        sections="\n".join(sections),
        footer="All numbers of this page, unrounded, are in evaluation.json beside it.",
    )


def _banners(content: Mapping[str, Any]) -> list[tuple[str, Sequence[str]]]:
    found = [("Not computed", content["missing"]), ("Read with care", content["notes"])]
    return [(title, lines) for title, lines in found if lines]


def _lead(content: Mapping[str, Any]) -> str:
    about = content["models"]["source"]
    text = f"{about['n']:,} pictures"
    if content["protocol"] is not None:
        p = content["protocol"]
        text += (
            f", DDIM {p['steps']} steps, guidance {p['guidance']:g}, eta {p['eta']:g}, "
            f"seed {p['seed']}"
        )
    if "against" in content["models"]:
        text += f"; against {_label(content, 'against')}"
    return text + "."


def _tiles(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The first four numbers of the tables, N aside."""
    rows = [row for table in tables(content) for row in table.rows if row[0] != "N"]
    return [(str(row[0]), str(row[1])) for row in rows[:4]]


def _label(content: Mapping[str, Any], side: str) -> str:
    return content["models"][side]["label"]


def _made(content: Mapping[str, Any]) -> list[list[str]]:
    rows = [["Command", content["command"]]]
    for side in SIDES:
        about = content["models"].get(side)
        if about is not None:
            rows.append([f"{side}, SHA-256", about["sha256"]])
    scores = content["models"]["source"].get("adm")
    if scores is not None:
        rows.append(["FID network, SHA-256", scores["inception_sha256"]])
    rows += [[f"Time, {stage}", duration(s)] for stage, s in content["seconds"].items()]
    return rows + [[name, str(value)] for name, value in content["environment"].items()]
