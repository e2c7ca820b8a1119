# SPDX-License-Identifier: Apache-2.0
"""The tables that `bench aq` prints: one for each rule on stored bits."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from vqjax import progress

TITLES = {
    "reference": "Stored bits no higher than the reference's",
    "exact": "Stored bits no higher than 2.00 and 4.00",
}
_COLUMNS = (
    "method",
    "for",
    "bits",
    "weight error",
    "output error",
    "held-out",
    "bound",
    "x bound",
    "x ref.",
    "entropy",
    "s",
    "x faster",
    "code",
)
_NAMES = {"round_to_nearest": "round", "gptq": "GPTQ", "product": "k-means PQ"}
_PIPE_WIDTH = 150  # characters of a line where no terminal tells


def wide_console() -> Console:
    """A console that a table of many columns fits in, also when its output goes to a file."""
    console = progress.console()
    return console if console.is_terminal else progress.console(width=_PIPE_WIDTH)


def percent(share: float | None) -> str:
    """A share for people; a dash where it is not known."""
    return "-" if share is None else f"{100 * share:.0f} %"


def show(records: Sequence[dict[str, Any]]) -> None:
    """Prints the tables, file by file, the least held-out error in bold."""
    console = wide_console()
    for storage, title in TITLES.items():
        table = Table(title=title, title_justify="left")
        for name in _COLUMNS:
            table.add_column(name, justify="left" if name in ("method", "code") else "right")
        for file in dict.fromkeys(record["file"] for record in records):
            chosen = [r for r in records if r["file"] == file and r["storage"] in (None, storage)]
            _add(table, file, chosen)
        console.print(table)
    console.print(
        "for: errors minimized under the given inputs (S) or plainly (I); bits: all stored, per "
        "weight;\nbound: of what was minimized, for Gaussian weights at these bits; x ref.: "
        "held-out error (for I: weight error) over the\nreference's with one beam; entropy: bits "
        "if codes were entropy-coded; s: search time, compilation apart;\nx faster: than the "
        "reference with one beam, which ran on two CPU threads",
        style="dim",
    )


def _add(table: Table, file: str, records: list[dict[str, Any]]) -> None:
    shape = "x".join(map(str, records[0]["shape"]))
    for nominal in sorted({record["nominal_bits"] for record in records}):
        table.add_section()
        table.add_row(f"{file}, {shape}, {nominal} bits", style="bold")
        rows = [record for record in records if record["nominal_bits"] == nominal]
        least = min(record["rel_act_mse_test"] for record in rows)
        for record in rows:
            table.add_row(
                *_cells(record), style="" if record["rel_act_mse_test"] > least else "bold"
            )


def _cells(record: dict[str, Any]) -> list[str]:
    name = str(_NAMES.get(record["method"], record["method"]))
    if record["method"] == "reference":
        name = record["setting"].split()[0] + ", beam " + record["setting"].split()[-1]
    ratio, entropy = record["ratio_to_reference"], record["codes_entropy"]
    return [
        name,
        record["objective"],
        f"{record['bits_per_weight']:.3f}",
        *(f"{record[key]:.5f}" for key in ("rel_weight_mse", "rel_act_mse", "rel_act_mse_test")),
        f"{record['bound']:.5f}",
        f"{record['ratio_to_bound']:.2f}",
        "" if ratio is None else f"{ratio:.2f}",
        "" if entropy is None else f"{entropy:.3f}",
        f"{record['seconds']:.1f}",
        ""
        if record["reference"] is None
        else f"{record['reference']['seconds'] / record['seconds']:.1f}",
        code(record["spec"]),
    ]


def code(spec: dict[str, Any] | None) -> str:
    """A code in short: "4x16 g8 int8" is four codebooks of sixteen int8 entries of eight."""
    if spec is None:
        return ""
    kind = "int8" if spec["codebook_bits"] == 8 else "f16"
    return f"{spec['codebooks']}x{spec['entries']} g{spec['group']} {kind}"
