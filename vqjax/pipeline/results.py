# SPDX-License-Identifier: Apache-2.0
"""From finished pieces to the report: scores, fidelity, bytes, FLOPs, pictures."""

import math
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.table import Table

from vqjax import progress
from vqjax.config import LatentDiffusionConfig
from vqjax.core import tree
from vqjax.core.flops import Flops, layer_flops, total
from vqjax.core.model import Model
from vqjax.core.scalar import ScalarLayer
from vqjax.core.tensor import VQTensor
from vqjax.eval import fidelity, figures, judges, report
from vqjax.pipeline import environment, layer_figures, timesteps
from vqjax.pipeline.journal import Journal
from vqjax.settings import FLOAT_BITS, QuantizeSettings

if TYPE_CHECKING:
    from vqjax.pipeline.quantize import Job, Layers

MODELS = ("full_precision", "quantized", "scalar_baseline")


class Samples(NamedTuple):
    """Images uint8 [N, H, W, 3] and latents float32 [N, h, w, c] of one model."""

    images: np.ndarray
    latents: np.ndarray


def class_ids(config: LatentDiffusionConfig, count: int) -> np.ndarray:
    """Classes of the report's samples: all classes in turn (of many, `count` spread evenly)."""
    classes = max(config.null_class, 1)
    if classes <= count:
        return np.arange(count) % classes
    return np.linspace(0, classes - 1, count).astype(int)


def write(
    job: "Job",
    journal: Journal,
    done: "Layers",
    held_out: dict[str, layer_figures.LayerErrors],
    model: Model,
    pictures: dict[str, Samples],
) -> None:
    """Computes every figure and writes report.json, report.md, report.html and samples.png."""
    labels = class_ids(job.model.config, job.samples)
    judge = judges.of_model(job.model.config)
    content: dict[str, Any] = {
        "model": {"name": job.model.config.name, "parameters": unet_weights(job)},
        "weights": _weights(job, model),
        "activations": {"bits": job.settings.act_bits},
        "tuning": {"steps": job.tune_steps},
        "layers": [_layer(job, path, done, held_out[path]) for path in job.plan],
        "metrics": {
            name: judge and judge.evaluate_images(pictures[name].images, labels) for name in MODELS
        },
        "fidelity": _fidelity(pictures["full_precision"], pictures["quantized"]),
        "fidelity_scalar_baseline": _fidelity(
            pictures["full_precision"], pictures["scalar_baseline"]
        ),
        "flops": _flops(job),
        "calibration": {"timestep_weights": timesteps.recorded(journal)},
        "seconds": journal.record["seconds"],
        "peak_memory_bytes": journal.peak_memory_bytes,
        "environment": environment.describe() | {"command": journal.record["command"]},
        "folded": {
            "weights": job.folded.weights,
            "share": job.folded.weights / unet_weights(job),
        },
        "warnings": _warnings(job, done.scalar),
    }
    content["failures"] = failures(job.settings, content["fidelity"])
    if judge is not None:
        before = pictures["full_precision"].images
        content["paired"] = {
            name: judge.paired_difference(before, pictures[name].images) for name in MODELS[1:]
        }
        content["real_halves"] = judge.real_halves()
        content["memorization"] = judge.memorization(before)
    figured = _figures(job, content, pictures, labels)
    for name, data in report.build(content, figured).items():
        journal.write(name, data)
    journal.write("samples.png", figured["samples"].light)


def unet_weights(job: "Job") -> int:
    """Parameters of the U-Net, with those that folding removed."""
    flat = tree.flatten(job.model.params)
    kept = sum(leaf.size for path, leaf in flat.items() if path.startswith("unet/"))
    return int(kept) + job.folded.weights


class Stored(NamedTuple):
    """What a model's U-Net takes.

    Attributes:
      bits_per_weight: of quantized weights, codebooks and scales counted.
      nbytes: of the whole U-Net, ranges of activations included.
    """

    bits_per_weight: float
    nbytes: int


def stored(model: Model) -> Stored:
    """What a quantized model's U-Net takes."""
    flat = {p: leaf for p, leaf in tree.flatten(model.params).items() if p.startswith("unet/")}
    packed = [leaf for leaf in flat.values() if isinstance(leaf, VQTensor)]
    nbytes = sum(int(leaf.nbytes) for leaf in flat.values()) + _of_ranges(model)
    return Stored(8 * sum(t.nbytes for t in packed) / sum(t.size for t in packed), nbytes)


def stored_scalar(model: Model, layers: Mapping[str, ScalarLayer]) -> Stored:
    """The same for the scalar baseline, whose kernels are held as the values of their grids."""
    rest = [
        leaf
        for path, leaf in tree.flatten(model.params).items()
        if path.startswith("unet/") and path not in layers
    ]
    bits, weights = _scalar_bits(layers), sum(layer.kernel.size for layer in layers.values())
    nbytes = round(bits * weights / 8) + sum(int(leaf.nbytes) for leaf in rest)
    return Stored(bits, nbytes + _of_ranges(model))


def _scalar_bits(layers: Mapping[str, ScalarLayer]) -> float:
    weights = sum(layer.kernel.size for layer in layers.values())
    return sum(layer.bits_per_weight * layer.kernel.size for layer in layers.values()) / weights


def _of_ranges(model: Model) -> int:
    return int(model.params["activations"].nbytes) if "activations" in model.params else 0


def _weights(job: "Job", model: Model) -> dict[str, Any]:
    found = stored(model)
    return {
        "bits_target": job.bits,
        "bits_per_weight": found.bits_per_weight,
        "bits_per_weight_model": 8 * found.nbytes / unet_weights(job),
        "bytes_before": 4 * unet_weights(job),
        "bytes_after": found.nbytes,
    }


def _layer(
    job: "Job", path: str, done: "Layers", held_out: layer_figures.LayerErrors
) -> dict[str, Any]:
    spec, stats = job.plan[path], done.stats[path]
    search, scalar = done.search[path], done.scalar[path]
    counted = _layer_flops(job, path)
    return {
        "path": path,
        "kind": spec.kind,
        "shape": list(job.shapes[path]),
        "group": spec.group,
        "codebooks": spec.codebooks,
        "entries": spec.entries,
        "bits_per_weight": stats.bits_per_weight,
        "rel_weight_mse": stats.rel_weight_mse,
        "rel_output_mse": stats.rel_output_mse,
        "rel_output_mse_test": held_out.quantized,
        "bound": search.bound,
        "ratio_to_bound": stats.rel_output_mse / search.bound if search.bound else None,
        "codes_entropy": search.codes_entropy,
        "flops_dense": counted.dense,
        "flops_lookup": counted.lookup,
        "flops_ratio": counted.ratio,
        "seconds": search.seconds,
        "scalar_bits_per_weight": scalar.bits_per_weight,
        "scalar_output_mse": scalar.rel_output_mse,
        "scalar_output_mse_test": held_out.scalar,
    }


def _fidelity(full: Samples, other: Samples) -> dict[str, Any]:
    psnr, identical = fidelity.mean_psnr(fidelity.psnr(full.images, other.images))
    return {
        "psnr": psnr,
        "identical": identical,
        "ssim": float(np.mean(fidelity.ssim(full.images, other.images))),
        "latent_mse": fidelity.latent_mse(full.latents, other.latents),
    }


def _layer_flops(job: "Job", path: str) -> Flops:
    """Operations of one layer on one image."""
    return layer_flops(job.shapes[path], job.plan[path], job.sizes[path].positions)


def _flops(job: "Job") -> dict[str, Any]:
    whole = total([_layer_flops(job, path) for path in job.plan])
    return {"dense": whole.dense, "lookup": whole.lookup, "ratio": whole.ratio}


def _warnings(job: "Job", scalar: dict[str, ScalarLayer]) -> list[str]:
    warnings = []
    bits = _scalar_bits(scalar)
    warnings.append(
        f"The scalar baseline stores {bits:.2f} bits per weight: {job.scalar_bits} bits a code, "
        "and a step and an offset per row."
    )
    if job.tune_steps or job.settings.act_bits < FLOAT_BITS:
        warnings.append(
            "The scalar baseline is as its search left it: not tuned, activations in floating "
            "point. `python -m vqjax.bench ablation` compares it tuned, with 8-bit activations."
        )
    judge = judges.of_model(job.model.config)
    if judge is not None:
        warnings.append(f"{judge.about[0].upper()}{judge.about[1:]}.")
        warnings.append(
            f"Scores on {job.samples} images are rough: {judge.name} falls like 1/N. Compare equal "
            "N."
        )
    return warnings


def failures(wanted: QuantizeSettings, fidelity: Mapping[str, float | None]) -> list[str]:
    """What a run falls short of that it was asked for."""
    least, psnr = wanted.least_psnr, fidelity["psnr"]
    if least is None or psnr is None or psnr >= least:
        return []
    return [f"PSNR {psnr:.2f} dB to full precision, --least-psnr {least:g} asked for more"]


def _figures(job, content, pictures, labels) -> dict[str, figures.Picture]:
    headings = {
        "full_precision": "full precision",
        "quantized": f"vqjax, {content['weights']['bits_per_weight']:.2f} bits",
        "scalar_baseline": f"scalar, {job.scalar_bits}-bit",
    }
    panels = {headings[name]: pictures[name].images for name in MODELS}
    weights = content["weights"]
    return {
        "samples": figures.before_after(panels, labels),
        "sizes": figures.sizes(
            weights["bytes_before"],
            weights["bytes_after"],
            content["layers"],
            weights["bits_target"],
        ),
        "layers": figures.layer_errors(content["layers"]),
    }


def show(content: dict[str, Any], folder: pathlib.Path) -> None:
    """Prints what was gained and lost, and where to look."""
    weights = content["weights"]
    table = Table(title="Gained and lost", title_justify="left")
    for name in ("", "full precision", "quantized", "scalar baseline"):
        table.add_column(name, justify="left" if not name else "right")
    factor = weights["bytes_before"] / weights["bytes_after"]
    table.add_row("U-Net, MB", f"{weights['bytes_before'] / 1e6:.2f}",
                  f"{weights['bytes_after'] / 1e6:.2f} ({factor:.1f}x less)", "")  # fmt: skip
    table.add_row("bits per weight", "32", f"{weights['bits_per_weight']:.3f}", "")
    table.add_row("bits per activation", "32", str(content["activations"]["bits"]), "32")
    first = content["metrics"]["quantized"] or {}
    scores = {"fd": first.get("name"), "accuracy": "class accuracy", "is": "inception score"}
    for key, name in scores.items():
        if content["metrics"]["quantized"] is not None:
            values = [f"{content['metrics'][model][key]:.3f}" for model in MODELS]
            table.add_row(f"{name}, N={content['metrics']['quantized']['n']}", *values)
    for key, name in {"psnr": "PSNR, dB", "ssim": "SSIM"}.items():
        near, rival = content["fidelity"], content["fidelity_scalar_baseline"]
        shown = (report.number(_score(found, key), 3) for found in (near, rival))
        table.add_row(f"{name} to full precision", "", *shown)
    console = progress.console()
    console.print(table)
    console.print(f"report: {folder / 'report.html'}\nmodel:  {folder / 'model'}", soft_wrap=True)


def _score(found: Mapping[str, Any], score: str) -> float | None:
    """A score from report.json, which has null for the infinite PSNR of identical pictures."""
    return math.inf if found[score] is None and found["identical"] else found[score]
