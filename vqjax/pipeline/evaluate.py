# SPDX-License-Identifier: Apache-2.0
"""Scores of many samples against the real digits."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from vqjax import io, progress, sampling, settings
from vqjax.errors import VqjaxError
from vqjax.eval import digits, fidelity
from vqjax.io import native
from vqjax.pipeline import environment

SCORES = ("fd", "sfd", "is", "precision", "recall", "accuracy")


@jax.default_matmul_precision("highest")  # scores must not depend on the device
def run(wanted: settings.EvaluateSettings) -> dict[str, Any]:
    """Samples, scores, prints a table and writes the JSON file; returns its content.

    Raises:
      VqjaxError: if a source is no model of the digits or a setting is unusable.
    """
    if wanted.count < 4 or wanted.batch < 1:
        raise VqjaxError(f"--count {wanted.count} --batch {wanted.batch}: expected 4 and 1 or more")
    sources = [wanted.source] + ([wanted.against] if wanted.against else [])
    labels = np.arange(wanted.count) % 10
    images = [_sample(source, labels, wanted) for source in sources]
    found = {
        "command": settings.command_line("vqjax.evaluate", wanted),
        "settings": dataclasses.asdict(wanted) | {"out": str(wanted.out)},
        "models": {
            source: digits.evaluate_images(pictures, labels)
            | {
                "memorization": digits.memorization(pictures),
                "against_held_out": digits.evaluate_images(pictures, labels, reference="held"),
            }
            for source, pictures in zip(sources, images)
        },
        "real_halves": digits.real_halves(),
        "environment": environment.describe(),
    }
    if wanted.against:
        psnr, identical = fidelity.mean_psnr(fidelity.psnr(images[1], images[0]))
        found["difference"] = digits.paired_difference(images[1], images[0]) | {
            "psnr": psnr,
            "identical": identical,
            "ssim": float(np.mean(fidelity.ssim(images[1], images[0]))),
        }
    native.write_atomically(wanted.out, (json.dumps(found, indent=2) + "\n").encode())
    _show(found)
    return found


def _sample(source: str, labels: np.ndarray, wanted: settings.EvaluateSettings) -> np.ndarray:
    model = io.load_model(source)
    if model.config.name != "digits":
        raise VqjaxError(
            f"{source} is {model.config.name!r}: only models of the embedded digits can be scored, "
            "their evaluation networks are in the package"
        )
    with progress.stage(f"sample {source}", wanted.count) as advance:
        return sampling.generate(
            model,
            labels,
            steps=wanted.steps,
            guidance=model.config.guidance if wanted.guidance is None else wanted.guidance,
            eta=wanted.eta,
            seed=wanted.seed,
            batch_size=min(wanted.batch, wanted.count),
            on_batch=advance,
        )


def _show(found: dict[str, Any]) -> None:
    table = Table(title="Scores, mean over three extractors", title_justify="left")
    columns = {**found["models"], "real halves": found["real_halves"]}
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    table.add_row("N", *(str(scores["n"]) for scores in columns.values()))
    for score in SCORES:
        cells = [f"{scores[score]:.3f}" for scores in columns.values()]
        table.add_row("digit-FD" if score == "fd" else score, *cells)
    held = [f"{scores['against_held_out']['fd']:.3f}" for scores in found["models"].values()]
    table.add_row("digit-FD to the held-out half", *held, "")
    console = Console(highlight=False)
    console.print(table)
    for name, scores in found["models"].items():
        memory = scores["memorization"]
        console.print(
            f"{name}: {memory['closer_to_train']:.1%} of samples lie nearer to a training digit "
            f"than to a held-out one, {memory['copies']:.1%} are copies "
            f"(held-out digits: {memory['held_out']['closer_to_train']:.1%}, "
            f"{memory['held_out']['copies']:.1%})"
        )
    if "difference" in found:
        d = found["difference"]
        console.print(
            f"difference: digit-FD {d['fd_difference']:+.3f} (sd {d['fd_difference_sd']:.3f}), "
            f"PSNR {d['psnr']:.2f} dB, SSIM {d['ssim']:.4f}"
        )
