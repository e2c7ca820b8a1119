# SPDX-License-Identifier: Apache-2.0
"""The numbers of a run, flat, and whether those of two runs agree."""

import contextlib
import hashlib
import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from vqjax.errors import VqjaxError
from vqjax.eval import adm, judge, judges
from vqjax.io import published
from vqjax.pipeline import sources

_TWINS = ("psnr", "ssim", "lpips", "latent_mse")
_CHANGES = ("fd_difference", "fd_difference_sd")


class Tolerance(NamedTuple):
    """How far a number may be from a recorded one: `absolute` + `relative` * |recorded|."""

    absolute: float
    relative: float


_EQUAL = Tolerance(0, 0)

TOLERANCES = {
    "n": Tolerance(0, 0),
    "bits_per_weight": Tolerance(0, 0.005),
    "bits_per_weight_model": Tolerance(0, 0.005),
    "bytes_before": Tolerance(0, 0),
    "bytes_after": Tolerance(0, 0.005),
    "psnr": Tolerance(0.3, 0),
    "ssim": Tolerance(0.01, 0),
    "lpips": Tolerance(0.01, 0),
    "latent_mse": Tolerance(0, 0.1),
    "fid": Tolerance(0.1, 0.02),
    "sfid": Tolerance(0.1, 0.02),
    "is": Tolerance(0, 0.02),
    "precision": Tolerance(0.01, 0),
    "recall": Tolerance(0.01, 0),
    "accuracy": Tolerance(0.01, 0),
    "fd": Tolerance(0.3, 0.1),
    "sfd": Tolerance(0.3, 0.1),
    "fd_difference": Tolerance(0.3, 0.1),
    "fd_difference_sd": Tolerance(0, 1),
}
"""By the last part of a number's name, for another kind of device or other versions: a code that
falls to the other side of a tie changes everything after it a little. Chosen from how far seeds
move the scores of digits at N = 10,000; not measured across devices. An error of a bootstrap is
itself uncertain: another course of tuning has given .061 where .038 was recorded."""


class Agreement(NamedTuple):
    """One number of two runs; `verdict` is "equal", "within tolerance", "outside", "absent"
    from the new run, or "other bits" (of a hash)."""

    name: str
    before: Any
    after: Any
    verdict: str


def of_quantization(folder: pathlib.Path) -> dict[str, Any]:
    """Stored bits and bytes, likeness on the report's images, also of the scalar baseline, and the
    hash of the model.

    Raises:
      VqjaxError: if the folder holds no finished quantization.
    """
    path = folder / "report.json"
    report = _read(path)
    names = ("bits_per_weight", "bits_per_weight_model", "bytes_before", "bytes_after")
    with _whole(path):
        near = report["fidelity"]
        found = {name: report["weights"][name] for name in names}
        found |= {f"report.{name}": near[name] for name in _TWINS if near.get(name) is not None}
        rival = report.get("fidelity_scalar_baseline", {})
        found |= {
            f"report.scalar.{name}": rival[name] for name in _TWINS if rival.get(name) is not None
        }
    found["model_sha256"] = sources.open_source(str(folder)).sha256
    check(found, str(path))
    return found


def of_evaluation(folder: pathlib.Path) -> dict[str, Any]:
    """Scores of the source, those of full precision as "full.*", likeness, what a paired bootstrap
    says of the change of the score, hash of the samples.

    Raises:
      VqjaxError: if the folder holds no finished evaluation.
    """
    path = folder / "evaluation.json"
    content = _read(path)
    with _whole(path):
        found: dict[str, Any] = {"n": content["models"]["source"]["n"]}
        for side, prefix in (("source", ""), ("against", "full.")):
            scores = content["models"].get(side, {})
            kinds = [(kind, judge.SCORES, f"{kind}.") for kind in judges.JUDGES]
            for kind, fields, more in [("adm", adm.SCORES, ""), *kinds]:
                values = {f"{prefix}{more}{f}": scores.get(kind, {}).get(f) for f in fields}
                found |= {name: value for name, value in values.items() if value is not None}
        near = content["difference"] or {}
        compared = (*_TWINS, *_CHANGES)
        found |= {name: near[name] for name in compared if near.get(name) is not None}
    samples = sorted((folder / "samples" / "source").glob("images-*.npy"))
    if samples:
        hashes = "".join(published.sha256_of(path) for path in samples)
        found["samples_sha256"] = hashlib.sha256(hashes.encode()).hexdigest()
    check(found, str(path))
    return found


def check(found: Mapping[str, Any], where: str) -> None:
    """Refuses what cannot be compared.

    Raises:
      VqjaxError: if a hash is no text, or anything else is no finite number.
    """
    for name, value in found.items():
        if name.endswith("_sha256"):
            if not isinstance(value, str):
                raise VqjaxError(f"{where}: {name}: found {value!r}, expected a text")
        elif not isinstance(value, int | float) or not math.isfinite(value):
            raise VqjaxError(f"{where}: {name}: found {value!r}, expected a finite number")


def inputs(
    quantization: Mapping[str, Any] | None, evaluation: Mapping[str, Any] | None
) -> dict[str, str]:
    """SHA-256 of what a run read: "source", "against", "reference" and "inception", where there
    are such.

    Args:
      quantization, evaluation: the run.json of either part; None where the run has no such part.
        An evaluation that follows a quantization samples what the run made: no input.
    """
    found = dict({} if evaluation is None else evaluation.get("sha256", {}))
    if quantization is None:
        return found
    made = {"source": quantization.get("source_sha256"), "against": None}
    return {name: sha256 for name, sha256 in (found | made).items() if sha256 is not None}


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Agreement]:
    """Every recorded number beside the new one. Hashes are equal or say nothing about quality."""
    return [
        Agreement(name, old, after.get(name), _verdict(name, old, after.get(name)))
        for name, old in before.items()
    ]


def _verdict(name: str, before: Any, after: Any) -> str:
    if before == after:
        return "equal"
    if after is None:
        return "absent"
    if name.endswith("_sha256"):
        return "other bits"
    tolerance = TOLERANCES.get(name.rpartition(".")[2], _EQUAL)
    allowed = tolerance.absolute + tolerance.relative * abs(before)
    return "within tolerance" if abs(after - before) <= allowed else "outside"


@contextlib.contextmanager
def _whole(path: pathlib.Path) -> Iterator[None]:
    """Turns what a report of another form raises into one sentence."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise VqjaxError(
            f"{path}: no report of a finished run ({type(error).__name__}: {error}); make it again"
        ) from error


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise VqjaxError(
            f"{path}: no finished run there ({error}); run it to its end first"
        ) from error
