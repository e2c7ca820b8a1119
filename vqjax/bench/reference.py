# SPDX-License-Identifier: Apache-2.0
"""What the PyTorch reference of additive quantization (AQLM) stores, and what it reached."""

import json
import math
import pathlib
from typing import Any

from vqjax.core import grouping
from vqjax.errors import VqjaxError

_OBJECTIVES = {"xtx": "S", "eye": "I"}
_FIELDS = {
    "rel_weight_mse": "rel_weight_mse",
    "rel_act_mse": "rel_act_mse",
    "rel_act_mse_test": "rel_act_mse_test",
    "wall_s": "seconds",
}


def stored_bits(outputs: int, fan_in: int, *, group: int, codebooks: int, code_bits: int) -> float:
    """Bits per weight: codes, float16 codebooks, a float16 scale per row (AQLM, section 3.1)."""
    codes = codebooks * code_bits * grouping.groups_per_row(fan_in, group) / fan_in
    books = codebooks * 2**code_bits * group * 16 / (outputs * fan_in)
    return codes + books + 16 / fan_in


def limit(shape: tuple[int, ...], nominal: int) -> float:
    """Total stored bits of the reference at 2 or 4 nominal bits.

    That is 2 or 4 codebooks of 8 bits for groups of 8, of 9 bits for 3x3 kernels.
    """
    outputs, fan_in = grouping.matrix_shape(shape)
    group = 9 if tuple(shape[:-2]) == (3, 3) else 8
    return stored_bits(outputs, fan_in, group=group, codebooks=nominal, code_bits=group)


def read(folder: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
    """Results of the reference by input file, or nothing where `reference_results.json` is absent.

    Raises:
      VqjaxError: if the file is not what it should be.
    """
    path = folder / "reference_results.json"
    if not path.is_file():
        return {}
    found: dict[str, list[dict[str, Any]]] = {}
    try:
        for name, case in json.loads(path.read_text(encoding="utf-8")).items():
            if not name.startswith("_"):
                found.setdefault(case["input"], []).append(_record(name, case))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise VqjaxError(
            f"{path}: not the results of the reference ({type(error).__name__}: {error}); expected "
            "an object of cases with input, shape, M, nbits, group and errors; correct or remove it"
        ) from None
    return found


def _record(name: str, case: dict[str, Any]) -> dict[str, Any]:
    outputs, fan_in = case["shape"]
    bits = stored_bits(
        outputs, fan_in, group=case["group"], codebooks=case["M"], code_bits=case["nbits"]
    )
    return {
        "case": name,
        "objective": _OBJECTIVES[case["objective"]],
        "nominal_bits": round(case["M"] * case["nbits"] / case["group"], 6),
        "beam": case["beam"],
        "bits_per_weight": bits,
        "spec": {
            "group": case["group"],
            "codebooks": case["M"],
            "entries": 2 ** case["nbits"],
            "codebook_bits": 16,
        },
        **{ours: float(case[theirs]) for theirs, ours in _FIELDS.items()},
    }


def matching(cases: list[dict[str, Any]], objective: str, nominal: int) -> dict[str, Any] | None:
    """The reference's result with one beam for an objective and nominal bits."""
    for case in cases:
        if (case["objective"], case["beam"]) == (objective, 1) and math.isclose(
            case["nominal_bits"], nominal
        ):
            return case
    return None
