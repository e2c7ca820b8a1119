# SPDX-License-Identifier: Apache-2.0
"""An evaluation from its settings to its report: sample or read, look, score. It resumes."""

import dataclasses
import io
import math
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image
from rich.table import Table

from vqjax import progress, settings
from vqjax.config import LatentDiffusionConfig
from vqjax.errors import VqjaxError
from vqjax.eval import adm, judges, scores_report
from vqjax.eval.judge import Judge
from vqjax.io import adm_npz, images, inception, lpips, places, published
from vqjax.io.image_set import ImageSet
from vqjax.io.image_shards import Shards
from vqjax.pipeline import environment, features, sampled, sources, twins
from vqjax.pipeline.journal import Journal, alone, fingerprint
from vqjax.pipeline.processes import Team
from vqjax.pipeline.sources import Source
from vqjax.sampling import png, schedule

SMALL_COUNT = 10_000
_SMALL_BATCH, _LARGE_BATCH = 100, 16
_SHOWN, _COLUMNS = 40, 10  # pictures of each side in the report
_SHOWN_SIDE = 96  # pixels: smaller pictures are shown enlarged


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """Everything that is known before work starts.

    Attributes:
      sources: "source", and "against" where there is one.
      sets: their pictures, read when they are asked for; those of models may not be there yet.
      shards: where the pictures of models are kept.
      protocol: None where nothing is sampled.
      weights, reference, lpips_params: None where the user gave none.
    """

    settings: settings.EvaluateSettings
    sources: dict[str, Source]
    sets: dict[str, ImageSet]
    shards: dict[str, Shards]
    protocol: sampled.Protocol | None
    weights: inception.Weights | None
    reference: ImageSet | None
    reference_sha256: str
    lpips_params: dict[str, jax.Array] | None


class _Beside(NamedTuple):
    """What is looked at beside sources; None where the user gave none."""

    weights: inception.Weights | None
    reference: ImageSet | None
    lpips_params: dict[str, jax.Array] | None


@jax.default_matmul_precision("highest")  # scores must not depend on the device
def run(wanted: settings.EvaluateSettings) -> dict[str, Any]:
    """Samples or reads, scores, prints a table and writes the report; returns its content.

    Everything that a user could have to fix is looked at before work starts, and samples and
    features stay in the folder, so that no mistake costs them.

    Raises:
      VqjaxError: for unusable settings, sources or files.
    """
    job = prepare(wanted)
    with alone(wanted.out):
        return _made(job)


def _made(job: Evaluation) -> dict[str, Any]:
    """The work of `run`."""
    wanted = job.settings
    journal = Journal.open(wanted.out, record_of(job))
    journal.begin()  # until the end, a report that is there may be one of other settings
    for side, shards in job.shards.items():
        source, labels = job.sources[side], job.sets[side].labels
        assert source.model is not None
        assert labels is not None
        assert job.protocol is not None
        with journal.stage(f"sample {side}"):
            sampled.sample(source.model, labels, shards, job.protocol, f"sample {source.where}")
    if wanted.export_npz is not None:
        with journal.stage("export"):
            _export(job.sets["source"], wanted.export_npz, job.shards["source"].shard)
    with journal.stage("score"):
        real = None
        if job.weights is not None and job.reference is not None:
            real = _look(job, job.reference, job.reference_sha256, "reference")
        models = {side: _about(job, side) | _scores(job, side, real) for side in job.sources}
    difference, worst = None, []
    if "against" in job.sets:
        with journal.stage("compare"):
            difference, worst = _compared(job)
    judge = next(iter(_judges(job)), None)
    content = {
        "command": journal.record["command"],
        "settings": journal.record["settings"],
        "protocol": None if job.protocol is None else dataclasses.asdict(job.protocol),
        "models": models,
        "difference": difference,
        "worst": [_about_pair(pair, job.sets["source"].labels) for pair in worst],
        "real_halves": None if judge is None else judge.real_halves(),
        "missing": missing(job),
        "notes": _notes(job, models),
        "seconds": journal.record["seconds"],
        "peak_memory_bytes": journal.peak_memory_bytes,
        "environment": environment.describe(),
    }
    files = scores_report.build(content, _pictures(job, worst))
    for name, data in files.items():
        journal.write(name, data)
    for pattern in scores_report.PICTURES:  # of an evaluation beside another model before this one
        for file in wanted.out.glob(pattern):
            if file.name not in files:
                file.unlink()
    journal.finish()
    _show(content, wanted.out)
    if wanted.export_npz is not None:
        print(f"samples: {wanted.export_npz}")
    return content


def prepare(wanted: settings.EvaluateSettings) -> Evaluation:
    """Opens all files and checks that they belong together.

    Raises:
      VqjaxError: for anything the user has to fix.
    """
    if Team.current().count > 1:
        raise VqjaxError(
            "evaluation runs in one process, on all of its devices; start it once, without "
            "JAX_COORDINATOR_ADDRESS"
        )
    _check_counts(wanted)
    _check_export(wanted)
    beside = _open_beside(wanted)
    texts = {"source": wanted.source} | ({"against": wanted.against} if wanted.against else {})
    opened = {side: sources.open_source(text, wanted.config) for side, text in texts.items()}
    if wanted.export_npz is not None and opened["source"].pictures is not None:
        raise VqjaxError(
            f"--export-npz {wanted.export_npz}: {wanted.source} is pictures already, expected a "
            "model to sample; leave it out"
        )
    _check_twins(opened)
    for source in opened.values():
        if source.judge is not None:
            source.judge.check()
    count, batch = _count(wanted, opened), _batch(wanted, opened)
    sets, shards = {}, {}
    for side, source in opened.items():
        if source.pictures is not None:
            sets[side] = source.pictures
        elif source.model is not None:
            config = source.model.config
            side_length = config.first_stage.resolution
            folder = wanted.out / "samples" / side
            shards[side] = Shards(folder, count, min(batch, count), (side_length, side_length))
            labels = sources.class_ids(config, count, wanted.seed)
            sets[side] = shards[side].image_set(source.where, labels)
    if "against" in sets:
        twins.check(sets["source"], sets["against"], with_lpips=beside.lpips_params is not None)
    if beside.weights is not None:
        for pictures in sets.values():
            adm.check(pictures, beside.reference)
    return Evaluation(
        settings=wanted,
        sources=opened,
        sets=sets,
        shards=shards,
        protocol=_protocol(wanted, opened),
        weights=beside.weights,
        reference=beside.reference,
        reference_sha256=sources.hash_of_pictures(wanted.reference) if wanted.reference else "",
        lpips_params=beside.lpips_params,
    )


def check_ahead(wanted: settings.EvaluateSettings, config: LatentDiffusionConfig | None) -> None:
    """What `prepare` refuses whatever its sources are, for who makes the source first: that may
    take hours. Nothing of what it opens is kept.

    Args:
      config: of the models to be sampled; None where it is not known.

    Raises:
      VqjaxError: for numbers of the protocol, and for files, that are unusable.
    """
    _check_counts(wanted)
    _check_export(wanted)
    _check_protocol(wanted, config)
    _open_beside(wanted)


def default_count(config: LatentDiffusionConfig) -> int:
    """Images per model where nobody says how many."""
    return SMALL_COUNT if judges.of_model(config) else adm.PUBLISHED_COUNT


def record_of(job: Evaluation) -> dict[str, Any]:
    """What a run's record starts with; its fingerprints say which samples belong to it.

    Each side has its own: scores against something else may be asked for, or no longer.
    """
    wanted, here = job.settings, environment.describe()
    hashes = {side: source.sha256 for side, source in job.sources.items()}
    # Other devices and kernels round differently: their samples would not be this run's.
    kind = [here["device"], here["backend"], here["kernels"], environment.versions()]
    sides = {side: fingerprint(hashes[side], _sampled_as(job, side), kind) for side in hashes}
    return {
        "command": settings.command_line("vqjax.evaluate", wanted),
        "settings": settings.plain(wanted),
        "sha256": hashes
        | ({"reference": job.reference_sha256} if job.reference is not None else {})
        | ({"inception": job.weights.sha256} if job.weights is not None else {}),
        "fingerprint": sides.pop("source"),
        "parts": sides,
        "environment": here,
    }


def _sampled_as(job: Evaluation, side: str) -> list[Any] | None:
    """What decides the samples of a side beside its model; None where it is pictures."""
    if side not in job.shards:
        return None
    assert job.protocol is not None
    shards = job.shards[side]
    return [shards.count, shards.shard, dataclasses.asdict(job.protocol)]


def missing(job: Evaluation) -> list[str]:
    """What was not computed, one sentence each: why, and where people get what it needs.

    Nothing is missing for models of small data, whose evaluation networks are in the package.
    """
    if all(source.judge for source in job.sources.values()):
        unused = job.reference is not None and job.weights is None
        return ["FID of the pictures in --reference: it needs --inception"] if unused else []
    found = []
    if job.weights is None:
        found.append(
            "FID, sFID, inception score, precision and recall: give the FID network with "
            f"--inception. {published.INCEPTION.describe()}"
        )
    if job.reference is None:
        found.append(
            "FID, sFID, precision and recall: give real pictures with --reference. Those of "
            f"ImageNet: {published.IMAGENET_REFERENCE.describe()}"
        )
    if "against" not in job.sources:
        found.append("PSNR, SSIM and LPIPS: give the full-precision model with --against")
    elif job.lpips_params is None:
        found.append(
            "LPIPS: give its weights with --lpips. "
            f"{published.VGG16.describe()}. {published.LPIPS.describe()}"
        )
    return found


def _check_counts(wanted: settings.EvaluateSettings) -> None:
    for name, least in (("count", 4), ("batch", 1)):
        value = getattr(wanted, name)
        if value is not None and value < least:
            raise VqjaxError(f"--{name} {value}: expected {least} or more")


def _check_export(wanted: settings.EvaluateSettings) -> None:
    path = wanted.export_npz
    if path is None:
        return
    if path.suffix != ".npz":
        raise VqjaxError(f"--export-npz {path}: expected a name that ends in .npz")
    for option in ("against", "reference"):
        given = getattr(wanted, option)
        if given is not None and path.resolve().is_relative_to(pathlib.Path(given).resolve()):
            raise VqjaxError(
                f"--export-npz {path}: would be a part of --{option} {given}; choose another name"
            )
    places.check_file("--export-npz", path, makes_folders=True)


def _export(pictures: ImageSet, path: pathlib.Path, batch: int) -> None:
    """Writes pictures and labels for the ADM evaluator, a batch at a time."""
    batches, labels_N = pictures.batches(batch), pictures.labels
    adm_npz.save_npz(path, batches, count=pictures.count, labels_N=labels_N)


def _open_beside(wanted: settings.EvaluateSettings) -> _Beside:
    weights = None if wanted.inception is None else inception.load(wanted.inception)
    reference = None if wanted.reference is None else images.open_images(wanted.reference)
    if weights is not None and reference is not None:
        adm.check_set(reference)
    return _Beside(weights, reference, None if wanted.lpips is None else lpips.load(*wanted.lpips))


def _check_twins(opened: dict[str, Source]) -> None:
    configs = [source.model.config for source in opened.values() if source.model is not None]
    if len(configs) < 2:
        return
    after, before = configs
    for what, of in (
        ("classes", lambda c: c.n_classes),
        ("latents", lambda c: c.latent_shape),
        ("pixels", lambda c: c.first_stage.resolution),
    ):
        if of(after) != of(before):
            raise VqjaxError(
                f"twins share noise and classes: {opened['source'].where} has {what} "
                f"{of(after)}, {opened['against'].where} {of(before)}; give the model that was "
                f"quantized"
            )


def _count(wanted: settings.EvaluateSettings, opened: dict[str, Source]) -> int:
    """Pictures to sample; as many as are given where one side is pictures."""
    given = [source.pictures.count for source in opened.values() if source.pictures is not None]
    if given and wanted.count is not None and wanted.count != given[0]:
        raise VqjaxError(
            f"--count {wanted.count}: {given[0]} pictures are given and all of them count; leave "
            f"--count out"
        )
    if given:
        return given[0]
    if wanted.count is not None:
        return wanted.count
    model = opened["source"].model
    assert model is not None  # else pictures were given
    return default_count(model.config)


def _batch(wanted: settings.EvaluateSettings, opened: dict[str, Source]) -> int:
    if wanted.batch is not None:
        return wanted.batch
    models = [source.model for source in opened.values() if source.model is not None]
    return _SMALL_BATCH if all(model.config.small for model in models) else _LARGE_BATCH


def _protocol(
    wanted: settings.EvaluateSettings, opened: dict[str, Source]
) -> sampled.Protocol | None:
    models = [source.model for source in opened.values() if source.model is not None]
    if not models:
        return None
    for model in models:  # a schedule that there is not is refused before the folder is claimed
        _check_protocol(wanted, model.config)
    guidance = models[0].config.guidance if wanted.guidance is None else wanted.guidance
    return sampled.Protocol(
        steps=wanted.steps,
        guidance=guidance,
        eta=wanted.eta,
        seed=wanted.seed,
    )


def _check_protocol(
    wanted: settings.EvaluateSettings, config: LatentDiffusionConfig | None
) -> None:
    """Refuses numbers that a model cannot be sampled with; where it is not known, that none can."""
    schedule.check(wanted.steps, wanted.eta, None if config is None else config.timesteps)
    if wanted.guidance is not None and not math.isfinite(wanted.guidance):  # a model's own is
        raise VqjaxError(f"--guidance {wanted.guidance}: expected a finite number")


def _about(job: Evaluation, side: str) -> dict[str, Any]:
    source = job.sources[side]
    return {
        "label": source.where,
        "model": None if source.model is None else source.model.config.name,
        "sha256": source.sha256,
        "n": job.sets[side].count,
        "size": list(job.sets[side].size),
    }


def _scores(job: Evaluation, side: str, real: adm.Seen | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    pictures = job.sets[side]
    judge = job.sources[side].judge
    if judge is not None:
        in_memory, labels = _all(pictures), pictures.labels
        assert labels is not None
        found[judge.kind] = judge.evaluate_images(in_memory, labels) | {
            "memorization": judge.memorization(in_memory),
            "against_held_out": judge.evaluate_images(in_memory, labels, reference="held"),
        }
    if job.weights is not None:
        seen = _look(job, pictures, job.sources[side].sha256, side)
        found["adm"] = adm.scores(pictures, seen, job.weights, job.reference, real)
    return found


def _look(job: Evaluation, pictures: ImageSet, sha256: str, title: str) -> adm.Seen:
    assert job.weights is not None
    # Samples are told by the model they come from: the folder holds those of one protocol only.
    folder = job.settings.out / "features" / f"{sha256[:16]}-{job.weights.sha256[:16]}"
    return features.look(pictures, job.weights, folder, f"features {title}")


def _compared(job: Evaluation) -> tuple[dict[str, Any], list[twins.Pair]]:
    source, against = job.sets["source"], job.sets["against"]
    difference, worst = twins.compare(source, against, job.lpips_params)
    if len(job.shards) == 2:
        latents = job.shards["source"].latents(), job.shards["against"].latents()
        difference["latent_mse"] = twins.latent_mse(*latents)
    judged = _judges(job)
    if len(judged) == 1 and all(s.judge for s in job.sources.values()):
        difference |= judged[0].paired_difference(_all(against), _all(source))
        difference["fd_name"] = judged[0].name
    return difference, worst


def _notes(job: Evaluation, models: dict[str, Any]) -> list[str]:
    notes = [note for scores in models.values() for note in scores.get("adm", {}).get("notes", ())]
    if len(job.sources) > len(job.shards) and "against" in job.sources:
        notes.append(
            "given pictures are compared in their order: that pairs share noise and class is not "
            "checked"
        )
    for judge in _judges(job):
        notes += judge.notes(job.sets["source"].count)
    wanted = job.settings
    given = (wanted.reference, wanted.inception, *(wanted.lpips or ()))
    notes += published.doubts(path for path in given if path is not None)
    return list(dict.fromkeys(notes))


def _judges(job: Evaluation) -> list[Judge]:
    """Of all sources, each once."""
    return list(dict.fromkeys(source.judge for source in job.sources.values() if source.judge))


def _about_pair(pair: twins.Pair, labels_N: np.ndarray | None) -> dict[str, Any]:
    return {
        "number": pair.number,
        "class": None if labels_N is None else int(labels_N[pair.number]),
        "psnr": pair.psnr,
        "ssim": pair.ssim,
    }


def _pictures(job: Evaluation, worst: list[twins.Pair]) -> scores_report.Pictures:
    grids = {
        side: _png(next(pictures.batches(_SHOWN)), _COLUMNS) for side, pictures in job.sets.items()
    }
    pairs = [_png(np.stack([pair.before, pair.after]), 2) for pair in worst]
    return scores_report.Pictures(grids, pairs)


def _png(images_NHWC: np.ndarray, columns: int) -> bytes:
    enlarged = max(1, _SHOWN_SIDE // images_NHWC.shape[1])
    shown = images_NHWC.repeat(enlarged, 1).repeat(enlarged, 2)
    data = io.BytesIO()
    Image.fromarray(png.tile(shown, columns)).save(data, format="PNG", optimize=True)
    return data.getvalue()


def _all(pictures: ImageSet) -> np.ndarray:
    """All pictures at once: they are small where this is asked for."""
    return np.concatenate(list(pictures.batches(1024)))


def _show(content: dict[str, Any], folder: pathlib.Path) -> None:
    console = progress.console()
    for table in scores_report.tables(content):
        shown = Table(title=table.heading, title_justify="left")
        for index, column in enumerate(table.columns):
            shown.add_column(column, justify="right" if index else "left")
        for row in table.rows:
            shown.add_row(*(cell if isinstance(cell, str) else cell[0] for cell in row))
        console.print(shown)
    for about in content["models"].values():
        for kind in about.keys() & judges.JUDGES.keys():
            memory = about[kind]["memorization"]
            console.print(
                f"{about['label']}: {memory['closer_to_train']:.1%} of samples lie nearer to a "
                f"training picture than to a held-out one, {memory['copies']:.1%} are copies "
                f"(held-out {kind}: {memory['held_out']['closer_to_train']:.1%}, "
                f"{memory['held_out']['copies']:.1%})"
            )
    for sentence in content["missing"]:
        console.print(f"not computed: {sentence}", soft_wrap=True)
    for sentence in content["notes"]:
        console.print(f"note: {sentence}", soft_wrap=True)
    console.print(f"report: {folder / 'evaluation.html'}", soft_wrap=True)
